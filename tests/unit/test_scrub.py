"""Scrubbing: rot in live blocks is found, wherever it lies and whoever shows it, and nothing else is called rot."""

import random
from collections.abc import Callable

import pytest

from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.pacing import BUSY_SHARE, Pace
from nbdserver.logdisk.scrub import PIECE_BYTES, Progress
from protocol.disk import BLOCK_BYTES
from tests.simulation.faults import FaultMix
from tests.unit.families import CALM, SETTINGS, SimulatedFamily

SEGMENT_BYTES = 256 << 10
FAST = 1 << 40
MIB = 1 << 20


def numbered(count: int = 300, mix: FaultMix = CALM, settings: DiskSettings = SETTINGS) -> SimulatedFamily:
    family = SimulatedFamily(segment_bytes=SEGMENT_BYTES, settings=settings, mix=mix)
    for lba in range(count):
        family.put(lba, lba + 1)
    return family


def segment_of(family: SimulatedFamily, lba: int) -> int:
    maps = family.disk.maps
    logical = maps.page(1 << 32 | lba >> 8)
    assert logical is not None
    mba = logical[lba & 255]
    middle = maps.middle.get(mba >> 8)
    assert middle is not None
    return middle[mba & 255]


def scrub(
    family: SimulatedFamily,
    begin: Progress | None = None,
    bytes_per_s: int = FAST,
    moved_bytes: Callable[[], int] = lambda: 0,
) -> Progress:
    """Run one to its end."""
    ends: list[str] = []
    family.disk.start_scrub(begin or Progress(), bytes_per_s, moved_bytes, ends.append)
    assert family.clock.run_until(lambda: bool(ends), 3600.0), "the scrub never ended"
    assert ends == [""]
    assert family.disk.scrub is not None
    assert not family.disk.scrub.busy
    return family.disk.scrub.progress


def damage(family: SimulatedFamily) -> list[tuple[int, str, int]]:
    return sorted((found["number"], found["snapshot"], found["lba"]) for found in family.disk.damage.listed())  # type: ignore[type-var]


def snapshot(family: SimulatedFamily, name: str) -> int:
    assert family.wait(lambda done: family.disk.snapshot(1, name, 0, done))[0] == 0
    return next(row.layer for row in family.disk.snapshots() if row.name == name)


def test_all_is_well_and_everything_was_read() -> None:
    family = numbered()
    progress = scrub(family)
    assert progress.done_bytes == progress.total_bytes > 300 * BLOCK_BYTES
    assert progress.sequence == progress.stop == family.disk.log.sequence
    assert (progress.damaged_blocks, damage(family)) == (0, [])
    assert "checksum-error" not in family.kinds()


def test_rot_in_a_live_block_is_found_and_named() -> None:
    family = numbered()
    family.rot(31)
    family.rot(200)
    assert scrub(family).damaged_blocks == 2
    assert damage(family) == [(1, "", 30), (1, "", 199)]
    assert [fields["lba"] for kind, fields in family.events if kind == "checksum-error" and "lba" in fields] == [
        30,
        199,
    ]
    assert family.disk.status()["state"] == "open"
    assert family.number_at(29) == 30


def test_rot_in_a_dead_block_is_no_damage() -> None:
    family = numbered()
    family.put(30, 5000)
    family.discard(40 * BLOCK_BYTES, 10 * BLOCK_BYTES)
    for number in (31, 41, 50):
        family.rot(number)
    assert scrub(family).damaged_blocks == 0
    assert damage(family) == []


def test_rot_that_was_overwritten_is_forgotten_by_the_next_scrub() -> None:
    family = numbered()
    family.rot(31)
    scrub(family)
    family.put(30, 5000)
    assert damage(family) == [(1, "", 30)]
    assert scrub(family).damaged_blocks == 0
    assert damage(family) == []


def test_a_block_that_snapshots_share_is_named_for_each_that_shows_it() -> None:
    family = numbered()
    snapshot(family, "monday")
    family.put(30, 5000)
    snapshot(family, "tuesday")
    for lba in range(100):
        family.put(lba + 400, lba + 6000)
    family.rot(31)  # monday alone
    family.rot(5000)  # tuesday and the head
    family.rot(60)  # all three
    assert scrub(family).damaged_blocks == 3
    assert damage(family) == [
        (1, "", 30), (1, "", 59), (1, "monday", 30), (1, "monday", 59), (1, "tuesday", 30), (1, "tuesday", 59),
    ]  # fmt: skip


def test_a_block_that_the_cleaner_moved_is_named_too() -> None:
    family = numbered(settings=DiskSettings(64 << 20, 512 << 10, 1.0))
    kept = range(0, 300, 5)
    before = {lba: segment_of(family, lba) for lba in kept}
    for lba in range(300):
        if lba not in kept:
            family.put(lba, 10_000 + lba)
    family.run(120.0)
    moved = [lba for lba in kept if segment_of(family, lba) != before[lba]]
    assert len(moved) > 2
    for lba in moved[:2]:
        family.rot(lba + 1)
    assert scrub(family).damaged_blocks == 2
    assert damage(family) == [(1, "", moved[0]), (1, "", moved[1])]


@pytest.mark.parametrize("what", ["header", "unreadable"])
def test_a_segment_that_cannot_be_read_in_order_is_read_block_by_block(what: str) -> None:
    family = numbered()
    family.rot(31)
    content, at = family.places(20)[0]
    if what == "header":
        content[at - 20] ^= 1  # in the header of its record
    else:
        real = family.files.read_device_later
        refused = {family.disk.pool.handles[1]}

        def read_device_later(handle: int, length: int, offset: int, done: Callable[[int, bytes], None]) -> None:
            if handle in refused:
                family.clock.call_soon(lambda: done(5, b""))
            else:
                real(handle, length, offset, done)

        family.files.read_device_later = read_device_later  # type: ignore[method-assign]
    assert scrub(family).damaged_blocks == 1
    assert damage(family) == [(1, "", 30)]
    assert "segment-not-scrubbed" in family.kinds()


def test_a_record_larger_than_a_piece_is_read_whole() -> None:
    family = SimulatedFamily(segment_bytes=8 << 20)
    family.put(0, 1, count=1000)
    family.rot(900)
    assert PIECE_BYTES < 1000 * BLOCK_BYTES
    assert scrub(family).damaged_blocks == 1
    assert damage(family) == [(1, "", 899)]


@pytest.mark.parametrize("seed", range(3))
def test_under_overwrites_cleaning_and_recycling_no_false_damage_and_no_segment_is_kept(seed: int) -> None:
    family = SimulatedFamily(
        segment_bytes=SEGMENT_BYTES,
        settings=DiskSettings(64 << 20, 512 << 10, 1.0),
        mix=FaultMix(latency_s=0.002),
        seed=seed,
    )
    rng = random.Random(seed)
    expected = {}
    ends: list[str] = []
    scrubs = 0
    for number in range(1, 2500):
        lba = rng.randrange(300)
        family.put(lba, number)
        expected[lba] = number
        family.run(0.002)
        if ends or number == 1:
            ends.clear()
            scrubs += 1
            family.disk.start_scrub(Progress(), 40 * MIB, lambda: 0, ends.append)
    assert scrubs > 2
    assert family.disk.pool.recycled > 5
    assert damage(family) == []
    assert "checksum-error" not in family.kinds()
    assert family.clock.run_until(lambda: bool(ends))
    assert not family.disk.pool._readers
    assert not family.disk.pool._awaiting_readers
    assert {lba: family.number_at(lba) for lba in expected} == expected


def test_a_scrub_goes_on_after_a_restart_where_it_was() -> None:
    family = numbered(900)
    family.rot(5)
    family.rot(800)
    ends: list[str] = []
    family.disk.start_scrub(Progress(), MIB, lambda: 0, ends.append)
    family.run(1.5)
    assert family.disk.scrub is not None
    half = family.disk.scrub.progress
    assert 0 < half.done_bytes < half.total_bytes
    assert half.damaged_blocks == 1
    family.close()
    assert ends == []
    family.open()
    whole = scrub(family, half)
    assert whole.damaged_blocks == 2
    assert damage(family) == [(1, "", 799)]  # the first one was reported before
    assert whole.done_bytes == whole.total_bytes
    assert abs(whole.total_bytes - half.total_bytes) < SEGMENT_BYTES


def test_closing_waits_for_the_read_in_flight_and_calls_nothing_more() -> None:
    family = numbered(mix=FaultMix(cold_read=0.0, latency_s=0.05))
    ends: list[str] = []
    family.disk.start_scrub(Progress(), FAST, lambda: 0, ends.append)
    assert family.disk.scrub is not None
    assert family.clock.run_until(lambda: family.disk.scrub.busy)
    family.close()
    assert not family.disk.scrub.busy
    assert ends == []


def test_a_volume_that_fails_ends_its_scrub() -> None:
    family = numbered()
    ends: list[str] = []
    family.disk.start_scrub(Progress(), MIB, lambda: 0, ends.append)
    family.run(0.1)
    family.disk.fail("a test")
    family.run(5.0)
    assert ends == ["the volume has failed"]
    family.close()


# --- pacing


def took_s(family: SimulatedFamily, bytes_per_s: int, moved_bytes: Callable[[], int] = lambda: 0) -> float:
    before_s = family.world.now_s
    scrub(family, bytes_per_s=bytes_per_s, moved_bytes=moved_bytes)
    return family.world.now_s - before_s


def test_the_rate_is_kept_and_clients_that_move_more_get_their_way() -> None:
    family = numbered(2000)
    size_bytes = sum(family.disk.maps.segments.end)
    assert took_s(family, 4 * MIB) == pytest.approx(size_bytes / (4 * MIB), rel=0.2)
    moved = 0

    def busy() -> int:
        nonlocal moved
        moved += 2 * PIECE_BYTES
        return moved

    assert took_s(family, 4 * MIB, busy) == pytest.approx(size_bytes / (4 * MIB) / BUSY_SHARE, rel=0.2)


def test_the_pace_by_a_clock_that_is_told() -> None:
    pace = Pace(MIB, 0.0)
    assert pace.wait_s(MIB, 0, 0.0) == pytest.approx(1.0)
    assert pace.wait_s(MIB, 0, 1.0) == pytest.approx(1.0)
    assert pace.wait_s(MIB, 0, 2.5) == pytest.approx(0.5)  # it was late by half a second
    assert pace.wait_s(MIB, 0, 60.0) <= 1.0  # a long pause is not made up for
    assert pace.wait_s(MIB, 10 * MIB, 61.0) == pytest.approx(1 / BUSY_SHARE, abs=1.0)
    pace.bytes_per_s = 2 * MIB
    assert pace.wait_s(MIB, 10 * MIB, 100.0) <= 0.5
