"""Segments are made ahead of need in a thread: the loop waits for none, what waits for one is woken, and a file that
could not be made or was not used harms nobody."""

from dataclasses import replace
from errno import ENOSPC

import pytest

from nbdserver.block import Operation
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.making import BALLAST_BYTES, Making
from nbdserver.logdisk.segments import _FREE_FLOOR_BYTES, CLEANER_KEEPS, CLIENTS_KEEP, MADE_AHEAD, segment_path
from tests.unit.families import BLOCK_BYTES, CALM, SimulatedFamily, block

SEGMENT_BYTES = 64 << 10
BLOCKS_A_SEGMENT = 15
SETTINGS = DiskSettings(cache_bytes=64 << 20, checkpoint_bytes=512 << 10, checkpoint_interval_s=1.0)


def small(latency_s: float = 0.0001) -> SimulatedFamily:
    mix = replace(CALM, latency_s=latency_s)
    return SimulatedFamily(segment_bytes=SEGMENT_BYTES, settings=SETTINGS, mix=mix)


def segment_files(family: SimulatedFamily) -> int:
    return sum(path.endswith(".seg") for path in family.drive.files)


@pytest.fixture
def none_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def now(_: Making, path: str) -> int:
        raise AssertionError(f"{path} is made on the loop")

    monkeypatch.setattr(Making, "now", now)


@pytest.mark.usefixtures("none_on_the_loop")
@pytest.mark.parametrize("latency_s", [0.00001, 0.5])
def test_new_data_is_written_and_discarded_without_a_segment_made_on_the_loop(latency_s: float) -> None:
    family = small(latency_s)
    assert family.discard(5 * BLOCK_BYTES, 9 * BLOCK_BYTES) == 0
    for lba in range(0, 40 * BLOCKS_A_SEGMENT, 5):
        family.put(lba, lba + 1, 5)
    assert family.disk.pool.created >= 40
    assert all(family.number_at(lba) == lba + 1 for lba in range(0, 40 * BLOCKS_A_SEGMENT, 5))


def test_at_rest_a_written_volume_has_its_reserve_and_two_more() -> None:
    family = small()
    family.put(0, 1)
    family.run(60.0)
    assert segment_files(family) == 1 + CLIENTS_KEEP + MADE_AHEAD


def test_one_write_of_a_new_volume_makes_one_segment() -> None:
    family = small()
    family.put(0, 1)
    assert segment_files(family) == 1


def test_while_there_is_room_half_of_the_reserve_is_lent_to_clients() -> None:
    family = small()
    family.put(0, 1)
    family.run(60.0)
    pool = family.disk.pool
    taken = 0
    while pool.is_at_hand():
        assert pool.take(CLIENTS_KEEP)
        taken += 1
    assert taken == MADE_AHEAD + CLIENTS_KEEP // 2
    assert pool.is_at_hand(CLEANER_KEEPS)
    family.drive.capacity_bytes = family.drive.used_bytes() + _FREE_FLOOR_BYTES
    assert not pool.is_at_hand(CLEANER_KEEPS), "what is lent could not be made anew"


def test_the_room_that_is_told_is_without_that_of_a_ballast_that_is_still_to_be_made() -> None:
    family = small()
    family.put(0, 1)
    pool = family.disk.pool
    room_bytes = BALLAST_BYTES + (CLIENTS_KEEP + 3) * pool.segment_bytes
    family.drive.capacity_bytes = family.drive.used_bytes() + _FREE_FLOOR_BYTES + room_bytes
    told = pool.segments_to_be_had(CLIENTS_KEEP)
    assert (told, pool.ballast.missing_bytes) == (3, BALLAST_BYTES)
    family.run(60.0)
    assert (pool.segments_to_be_had(CLIENTS_KEEP), pool.ballast.missing_bytes) == (told, 0)


def test_the_last_file_that_there_is_room_for_is_not_missed_while_it_is_being_made() -> None:
    family = small()
    family.put(0, 1)
    family.run(60.0)
    pool = family.disk.pool
    for _ in range(MADE_AHEAD):
        assert pool.take(CLIENTS_KEEP)
    family.drive.capacity_bytes = family.drive.used_bytes() + _FREE_FLOOR_BYTES + SEGMENT_BYTES
    files = segment_files(family)
    assert pool.make_ahead()
    assert pool.is_at_hand()
    assert family.clock.run_until(lambda: segment_files(family) > files)
    assert pool.is_making
    assert pool.is_at_hand(), "it is as good as there"
    assert family.clock.run_until(lambda: not pool.is_making)
    assert pool.take(CLIENTS_KEEP)
    assert not pool.can_take()
    assert "disk-full" not in family.kinds()


def waiting_write(family: SimulatedFamily) -> list[int]:
    """Of a write that finds no segment; gets its errno."""
    errnos: list[int] = []
    family.device.later(Operation.WRITE, 0, BLOCK_BYTES, block(7), lambda errno, _: errnos.append(errno))
    family.run(0.0)
    assert family.disk.pool.is_making
    assert errnos == []
    return errnos


def test_a_snapshot_of_a_volume_whose_first_segment_is_being_made_is_made_after_it_and_shows_no_later_write() -> None:
    family = small(0.1)
    errnos = waiting_write(family)
    snapshots: list[int] = []
    family.disk.snapshot(1, "first", 0, snapshots.append)
    assert family.clock.run_until(lambda: bool(snapshots and errnos))
    assert (snapshots, errnos) == ([0], [0])
    row = family.disk.snapshot_row(1, "first")
    assert row is not None
    view = family.disk.view(row.layer)
    errno, data = family.wait(lambda done: view.later(Operation.READ, 0, BLOCK_BYTES, None, done))
    assert (errno, b"".join(data)) == (0, bytes(BLOCK_BYTES))
    assert family.number_at(0) == 7


def test_a_family_that_fails_meanwhile_answers_who_waits() -> None:
    family = small(0.1)
    errnos = waiting_write(family)
    snapshots: list[int] = []
    family.disk.snapshot(1, "first", 0, snapshots.append)
    family.disk.fail("a test")
    family.run(0.0)
    assert errnos[0] > 0
    assert snapshots[0] > 0
    family.close()
    assert not family.disk.pool.is_busy


def test_closing_waits_for_the_file_that_is_being_made_and_the_next_opening_has_it() -> None:
    family = small(0.1)
    family.put(0, 1)
    pool = family.disk.pool
    assert pool.make_ahead()
    files = family.files
    family.wait(family.disk.close)
    assert not pool.is_busy
    assert files._handles == {}
    family.open()
    assert family.disk.pool.spare == [2]
    assert family.number_at(0) == 1


def test_closing_waits_for_the_file_that_is_being_unlinked() -> None:
    family = small(0.1)
    family.put(0, 1)
    family.run(60.0)
    pool = family.disk.pool
    gone = pool.spare[0]
    pool._drop(pool.spare.pop(0))
    family.wait(family.disk.close)
    assert segment_path(gone) not in family.drive.files


def test_a_file_that_cannot_be_made_is_told_once_and_a_write_that_waits_for_it_gets_enospc() -> None:
    family = small()
    family.put(0, 1)
    family.files.mix = replace(CALM, create_error=1.0)
    errnos = [family.write(lba * BLOCK_BYTES, block(lba + 1)) for lba in range(1, 40)]
    assert set(errnos) == {0, ENOSPC}
    family.run(20.0)
    assert family.kinds().count("segment-not-made") == 1
    family.files.mix = CALM
    family.run(2.0)
    assert family.write(0, block(3)) == 0
    assert family.number_at(0) == 3
    assert family.disk.pool.handles.count(-2) == 0
    assert family.disk.pool.budget.used_bytes == segment_files(family) * SEGMENT_BYTES


def test_a_file_whose_name_cannot_be_made_durable_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    family = small()
    family.put(0, 1)
    monkeypatch.setattr(family.files, "sync_directory_later", lambda _, done: family.clock.call_soon(lambda: done(5)))
    assert family.disk.pool.make_ahead()
    family.run(0.1)
    assert family.disk.pool.spare == []
    assert segment_files(family) == 1
    assert [fields["errno"] for kind, fields in family.events if kind == "segment-not-made"] == [5]
    monkeypatch.undo()
    family.run(60.0)
    assert len(family.disk.pool.spare) == CLIENTS_KEEP + MADE_AHEAD
