"""Cleaning, freeing and recycling: space comes back, live blocks survive, and a freed segment waits for its readers."""

import random
from array import array
from errno import ENOSPC

import pytest

from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.ordering import Rule, disabled
from nbdserver.logdisk.segments import _FREE_FLOOR_BYTES, DELETIONS_KEEP, DISCARDS_KEEP
from tests.simulation.faults import FaultMix
from tests.unit.families import BLOCK_BYTES, CALM, SimulatedFamily, block

SETTINGS = DiskSettings(cache_bytes=64 << 20, checkpoint_bytes=512 << 10, checkpoint_interval_s=1.0)
SEGMENT_BYTES = 64 << 10


def aged(seed: int = 1, settings: DiskSettings = SETTINGS) -> tuple[SimulatedFamily, dict[int, int]]:
    """A family whose segments are half dead, and what its blocks hold."""
    family = SimulatedFamily(segment_bytes=SEGMENT_BYTES, settings=settings, seed=seed)
    rng = random.Random(seed)
    expected = {}
    for lba in range(600):
        family.put(lba, lba + 1)
        expected[lba] = lba + 1
    for number in range(1000, 1400):
        lba = rng.randrange(600)
        family.put(lba, number)
        expected[lba] = number
    return family, expected


def test_at_rest_garbage_is_cleaned_up_and_every_block_survives() -> None:
    family, expected = aged()
    before = family.disk.cleaner.garbage_bytes
    family.run(120.0)
    counters = family.disk.counters()
    assert counters["cleaner_blocks_moved"] > 50
    assert family.disk.cleaner.garbage_bytes < before / 2
    assert {lba: family.number_at(lba) for lba in expected} == expected
    family.crash()
    family.open()
    assert {lba: family.number_at(lba) for lba in expected} == expected


def test_spare_segments_are_unlinked_to_the_limit_when_data_is_gone() -> None:
    family, _ = aged()
    assert family.discard(0, 600 * BLOCK_BYTES) == 0
    family.run(90.0)
    assert family.disk.maps.live_blocks == 0
    segments = [path for path in family.drive.files if path.endswith(".seg")]
    assert len(segments) <= 8 + 2  # the spare ones, the open one, one that was just sealed
    assert len(family.disk.pool.spare) <= 8
    family.put(0, 7)
    assert family.number_at(0) == 7


def test_the_most_recently_freed_segment_is_used_first() -> None:
    family = SimulatedFamily(segment_bytes=SEGMENT_BYTES)
    pool = family.disk.pool
    pool.spare = [5, 9, 7]
    assert pool.take(0) == 7


def place_of(family: SimulatedFamily, lba: int) -> tuple[int, int, int, int]:
    """(MBA, segment, offset, checksum) of a mapped block."""
    logical = family.disk.maps.page(1 << 32 | lba >> 8)
    assert logical is not None
    mba = logical[lba & 255]
    middle = family.disk.maps.middle.get(mba >> 8)
    assert middle is not None
    segment, offset, checksum = middle[mba & 255 :: 256]
    return mba, segment, offset, checksum


def clean_while_a_client_overwrites() -> SimulatedFamily:
    """The victim has been asked for; the client overwrites a block of it before its moves are made."""
    family, expected = aged(settings=DiskSettings(64 << 20, 1 << 30, 3600.0))
    family.disk.background.stop()
    cleaner = family.disk.cleaner
    family.clock.run_until(lambda: not cleaner.running)
    assert cleaner.start()
    lba = next(lba for lba in expected if place_of(family, lba)[1] == cleaner._victim)
    family.put(lba, 7777)
    family.clock.run_until(lambda: not cleaner.running)
    assert family.number_at(lba) == 7777
    return family


def test_a_move_does_not_undo_what_a_client_wrote_meanwhile() -> None:
    assert "checksum-error" not in clean_while_a_client_overwrites().kinds()
    with disabled(Rule.MOVE_ONLY_IF_UNCHANGED):
        # Then only the checksum is in the way, which takes the client's block for a damaged one.
        assert "checksum-error" in clean_while_a_client_overwrites().kinds()


def replayed_after_a_stale_move() -> int:
    family = SimulatedFamily()
    family.put(0, 1)
    mba, segment, offset, checksum = place_of(family, 0)
    family.put(0, 2)
    moved = array("Q", [mba]), array("I", [segment, offset]), array("I", [checksum])
    family.disk.log.append_move(*moved, [block(1)])
    family.crash()
    family.open()
    return family.number_at(0)


def test_at_replay_a_move_counts_only_if_the_block_is_still_where_it_was() -> None:
    assert replayed_after_a_stale_move() == 2
    with disabled(Rule.MOVE_ONLY_IF_UNCHANGED):
        assert replayed_after_a_stale_move() == 1


def test_a_segment_with_a_damaged_block_is_kept_and_reported_once() -> None:
    family, expected = aged()
    lba = next(lba for lba in expected if expected[lba] == lba + 1)
    family.rot(expected[lba])
    family.run(120.0)
    reports = [fields for kind, fields in family.events if kind == "checksum-error"]
    assert len(reports) == 1
    assert reports[0]["by"] == "cleaner"
    with pytest.raises(OSError):
        family.number_at(lba)
    del expected[lba]
    assert {lba: family.number_at(lba) for lba in expected} == expected


def reused_under_a_reader() -> list[bool]:
    family = SimulatedFamily(segment_bytes=SEGMENT_BYTES, mix=FaultMix(cold_read=0.0, latency_s=0.0001))
    pool = family.disk.pool
    family.put(0, 1)
    pool.begin_read(1)
    for number in range(100):
        family.put(0, number)
        if number % 10 == 0:
            family.checkpoint()
    held = 1 in family.disk.maps.segments.in_use or 1 in pool.spare
    pool.end_read(1)
    for number in range(60):
        family.put(0, number)
        family.checkpoint()
    return [held, 1 in family.disk.maps.segments.in_use or 1 in pool.spare]


def test_a_freed_segment_waits_for_the_read_that_looked_up_an_address_in_it() -> None:
    assert reused_under_a_reader() == [False, True]
    with disabled(Rule.REUSE_AFTER_READERS_LEFT):
        assert reused_under_a_reader()[0]


def test_a_segment_is_free_only_after_a_checkpoint() -> None:
    family = SimulatedFamily(segment_bytes=SEGMENT_BYTES, settings=DiskSettings(64 << 20, 1 << 30, 3600.0))
    family.disk.background.stop()
    for number in range(60):
        family.put(0, number)
    segments = set(family.disk.maps.segments.in_use)
    assert sum(1 for segment in segments if not family.disk.maps.segments.live[segment]) >= 3
    assert family.disk.pool.recycled == 0
    family.checkpoint()
    assert len(family.disk.maps.segments.in_use) == 1
    assert family.disk.pool.spare


def full_family(segments: int) -> tuple[SimulatedFamily, int]:
    """A family that a client has filled, on a disk with room for so many more segments; and how many blocks it took."""
    family = SimulatedFamily(segment_bytes=SEGMENT_BYTES, settings=SETTINGS, mix=CALM)
    family.drive.capacity_bytes = family.drive.used_bytes() + _FREE_FLOOR_BYTES + segments * SEGMENT_BYTES
    for lba in range(segments * 20):
        errno = family.write(lba * BLOCK_BYTES, block(lba + 1))
        if errno:
            assert errno == ENOSPC
            return family, lba
    raise AssertionError("the disk never became full")


def test_a_full_disk_refuses_writes_and_reads_and_flushes_go_on() -> None:
    family, written = full_family(12)
    assert written > 60
    assert family.disk.status()["state"] == "full"
    assert "disk-full" in family.kinds()
    assert [family.number_at(lba) for lba in range(written)] == list(range(1, written + 1))
    assert family.number_at(written) == 0
    assert family.flush() == 0


def test_after_a_trim_a_full_disk_takes_writes_again() -> None:
    family, written = full_family(24)
    assert family.discard(0, written // 2 * BLOCK_BYTES) == 0
    assert family.number_at(0) == 0
    family.run(5.0)
    assert family.disk.status()["state"] == "open"
    assert "disk-has-room" in family.kinds()
    for lba in range(written // 4):
        family.put(lba, 5000 + lba)
    family.crash()
    family.open()
    assert family.number_at(3) == 5003
    assert family.number_at(written // 2 - 1) == 0
    assert family.number_at(written - 1) == written


def test_the_last_segment_is_for_deletions() -> None:
    family, _ = full_family(24)
    disk = family.disk
    while disk.pool.can_take(DISCARDS_KEEP):
        assert disk.appending.next_segment(DISCARDS_KEEP)
    assert not disk.appending.make_room_for_bytes(SEGMENT_BYTES, DISCARDS_KEEP)
    assert disk.appending.make_room_for_bytes(SEGMENT_BYTES // 2, DELETIONS_KEEP)
    assert family.wait(lambda done: disk.delete_volume(1, done)) == (0,)


def test_a_full_disk_is_trimmed_block_by_block_without_running_out() -> None:
    """Small discards append too; the reserve has to carry them until they have emptied a segment."""
    family, written = full_family(24)
    for lba in sorted(range(written), key=lambda lba: lba % 15):
        assert family.discard(lba * BLOCK_BYTES, BLOCK_BYTES) == 0
    family.run(5.0)
    family.put(0, 1)
    assert family.disk.maps.live_blocks == 1
