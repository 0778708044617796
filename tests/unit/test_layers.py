"""Snapshots, clones, rollback and resizing: what each volume and snapshot shows, at once and after each kind of end."""

import errno
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from metadata.layers import Row
from metadata.logical_map import LBA_OF_ADDRESS, PAGE_OF_LAYER
from nbdserver.block import Operation
from nbdserver.logdisk.check import check_family
from nbdserver.logdisk.devices import Device
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.segments import SegmentPool
from protocol.disk import PENDING_HOLE, pack_value, unpack_value
from tests.simulation.faults import FaultMix
from tests.unit.families import BLOCK_BYTES, SimulatedFamily, block

MIB = 1 << 20
SMALL_CACHE = DiskSettings(cache_bytes=0, checkpoint_bytes=1 << 30, checkpoint_interval_s=3600.0)


@pytest.fixture
def family() -> SimulatedFamily:
    return SimulatedFamily(size_bytes=1 << 30, segment_bytes=256 << 10)


def change(family: SimulatedFamily, operation: str, *arguments: Any) -> int:
    """One change of the tree; returns its errno."""
    return int(family.wait(lambda done: getattr(family.disk, operation)(*arguments, done))[0])


def snapshot(family: SimulatedFamily, name: str, volume: int = 1) -> int:
    """Make a snapshot and return its layer."""
    assert change(family, "snapshot", volume, name, 1_700_000_000) == 0
    return family.disk.maps.tree.names[volume][name]


def put(family: SimulatedFamily, volume: int, lba: int, number: int, count: int = 1) -> None:
    device = family.disk.head(volume)
    data = b"".join(block(number + index) for index in range(count))
    if device.write(lba * BLOCK_BYTES, memoryview(data)):
        assert device.commit() == 0
    else:
        answer = family.wait(lambda done: device.later(Operation.WRITE, lba * BLOCK_BYTES, len(data), data, done))
        assert answer[0] == 0


def discard(family: SimulatedFamily, volume: int, lba: int, count: int) -> None:
    device = family.disk.head(volume)
    offset, length = lba * BLOCK_BYTES, count * BLOCK_BYTES
    if device.discard(offset, length):
        assert device.commit() == 0
    else:
        assert family.wait(lambda done: device.later(Operation.DISCARD, offset, length, None, done))[0] == 0


def numbers(family: SimulatedFamily, device: Device, first: int, count: int) -> list[int]:
    """The number of each block."""
    found = device.read(first * BLOCK_BYTES, count * BLOCK_BYTES)
    if found is None:
        errno, found = family.wait(
            lambda done: device.later(Operation.READ, first * BLOCK_BYTES, count * BLOCK_BYTES, None, done)
        )
        assert errno == 0
    data = b"".join(found)
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), BLOCK_BYTES)]


def seen(family: SimulatedFamily, layer: int, first: int, count: int) -> list[int]:
    """The same of a snapshot."""
    view = family.disk.view(layer)
    found = numbers(family, view, first, count)
    view.close()
    return found


def check(family: SimulatedFamily) -> None:
    """What a kill -9 of now leaves is whole."""
    result = check_family(family.files, family.store, quick=False)
    assert [finding.sentence for finding in result.findings] == []


def changes(
    family: SimulatedFamily, device: Device, since: int, first: int, count: int, limit: int = 1000
) -> list[bool]:
    """Whether each block changed."""
    found: list[bool] = []
    while len(found) < count:
        offset, length = (first + len(found)) * BLOCK_BYTES, (count - len(found)) * BLOCK_BYTES
        errno, extents = family.wait(
            lambda done, o=offset, n=length: family.disk.changed(device, since, o, n, limit, done)  # type: ignore[misc]
        )
        assert errno == 0
        assert 0 < len(extents) <= limit
        assert all(one[1] != other[1] for one, other in pairwise(extents))
        for size, is_dirty in extents:
            assert size % BLOCK_BYTES == 0
            found += [bool(is_dirty)] * (size // BLOCK_BYTES)
    assert len(found) == count
    return found


def visible_blocks(family: SimulatedFamily) -> int:
    """How many blocks all layers show, each counted once."""
    maps = family.disk.maps
    seen: set[int] = set()
    for row in [layer.row for layer in maps.tree.layers.values()]:
        for page in range(-(-row.size_bytes // BLOCK_BYTES // 256)):
            number = row.layer << 32 | page
            while maps.page(number) is None:
                family.wait(lambda done, number=number: maps.load([(maps.logical, number)], lambda: done(0)))  # type: ignore[misc]
            found = maps.page(number)
            assert found is not None
            seen |= set(found)
    return len(seen - {0})


def settled(family: SimulatedFamily) -> None:
    """Wait until nothing is left to take apart, and see that nothing takes room that nobody sees."""
    family.run(200.0)
    tree = family.disk.maps.tree
    assert not tree.removable
    for layer in tree.layers.values():
        assert layer.row.kind or len(layer.children) > 1
    assert family.disk.maps.live_blocks == visible_blocks(family)


def ends(family: SimulatedFamily, end: str) -> None:
    """The present life ends, and another one begins."""
    if end == "nothing":
        return
    if end == "clean":
        family.close()
    elif end == "kill":
        family.crash()
    elif end == "checkpoint and kill":
        family.checkpoint()
        family.crash()
    else:
        assert family.flush() == 0
        family.crash(power=True)
    family._begin()
    check(family)
    family.open()


ENDS = ("nothing", "clean", "kill", "checkpoint and kill", "power")


@pytest.mark.parametrize("end", ENDS)
def test_a_snapshot_shows_what_was_there_when_it_was_made(family: SimulatedFamily, end: str) -> None:
    put(family, 1, 0, 1, 300)
    layer = snapshot(family, "monday")
    put(family, 1, 10, 1000, 20)
    put(family, 1, 500, 2000)
    discard(family, 1, 100, 5)
    ends(family, end)
    assert seen(family, layer, 0, 300) == list(range(1, 301))
    assert seen(family, layer, 500, 1) == [0]
    head = family.disk.head(1)
    assert numbers(family, head, 0, 32) == [*range(1, 11), *range(1000, 1020), 31, 32]
    assert numbers(family, head, 98, 9) == [99, 100, 0, 0, 0, 0, 0, 106, 107]
    assert numbers(family, head, 500, 1) == [2000]
    assert [(row.volume, row.name, row.created_s) for row in family.disk.snapshots()] == [(1, "monday", 1_700_000_000)]


@pytest.mark.parametrize("end", ENDS)
def test_a_clone_is_written_beside_its_snapshot(family: SimulatedFamily, end: str) -> None:
    put(family, 1, 0, 1, 50)
    layer = snapshot(family, "base")
    put(family, 1, 0, 101, 10)
    assert change(family, "clone", layer, 2) == 0
    put(family, 2, 5, 201, 10)
    ends(family, end)
    put(family, 1, 49, 999)
    assert numbers(family, family.disk.head(1), 0, 20) == [*range(101, 111), *range(11, 21)]
    assert numbers(family, family.disk.head(2), 0, 20) == [*range(1, 6), *range(201, 211), *range(16, 21)]
    assert seen(family, layer, 0, 50) == list(range(1, 51))
    assert numbers(family, family.disk.head(2), 49, 1) == [50]
    assert [row.volume for row in family.disk.volumes()] == [1, 2]
    assert family.disk.clones(layer) == {2}


@pytest.mark.parametrize("end", ENDS)
def test_a_rollback_brings_back_what_the_snapshot_shows_and_keeps_later_ones(family: SimulatedFamily, end: str) -> None:
    put(family, 1, 0, 1, 20)
    first = snapshot(family, "first")
    put(family, 1, 0, 101, 20)
    second = snapshot(family, "second")
    put(family, 1, 0, 201, 20)
    put(family, 1, 400, 7)
    assert change(family, "rollback", 1, first) == 0
    ends(family, end)
    assert numbers(family, family.disk.head(1), 0, 20) == list(range(1, 21))
    assert numbers(family, family.disk.head(1), 400, 1) == [0]
    put(family, 1, 3, 301)
    assert numbers(family, family.disk.head(1), 2, 3) == [3, 301, 5]
    assert seen(family, second, 0, 20) == list(range(101, 121))
    assert seen(family, first, 0, 20) == list(range(1, 21))


@pytest.mark.parametrize("end", ENDS)
def test_what_shrinking_cuts_off_is_zeros_when_the_volume_grows_again(family: SimulatedFamily, end: str) -> None:
    put(family, 1, 0, 1, 3000)
    layer = snapshot(family, "whole")
    put(family, 1, 2000, 5000, 10)
    size = 100 * BLOCK_BYTES + 1000
    assert change(family, "resize", 1, size) == 0
    assert family.disk.head(1).size_bytes == size
    ends(family, end)
    assert family.disk.head(1).size_bytes == size
    assert change(family, "resize", 1, 2 << 30) == 0
    ends(family, end)
    head = family.disk.head(1)
    assert head.size_bytes == 2 << 30
    assert numbers(family, head, 0, 100) == list(range(1, 101))
    data = b"".join(family.wait(lambda done: head.later(Operation.READ, size - 1000, 4096, None, done))[1])
    assert data == block(101)[:1000] + bytes(3096)
    assert numbers(family, head, 101, 200) == [0] * 200
    assert numbers(family, head, 1990, 100) == [0] * 100
    assert numbers(family, head, 2990, 20) == [0] * 20
    assert seen(family, layer, 0, 3000) == list(range(1, 3001))
    put(family, 1, (2 << 30) // BLOCK_BYTES - 1, 77)
    assert numbers(family, head, (2 << 30) // BLOCK_BYTES - 1, 1) == [77]


@pytest.mark.parametrize("end", ENDS)
def test_a_long_discard_over_a_parent_hides_it(end: str) -> None:
    family = SimulatedFamily(size_bytes=1 << 40, segment_bytes=256 << 10, settings=SMALL_CACHE)
    far = 200_000_000
    put(family, 1, 0, 1, 300)
    put(family, 1, far, 500, 5)
    layer = snapshot(family, "before")
    put(family, 1, 40, 900)
    discard(family, 1, 20, far + 1 - 20)
    put(family, 1, 30, 901)
    put(family, 1, far - 1, 902)
    for _ in range(2):
        ends(family, end)
        head = family.disk.head(1)
        assert numbers(family, head, 0, 50) == [*range(1, 21), *[0] * 10, 901, *[0] * 19]
        assert numbers(family, head, far - 2, 8) == [0, 902, 0, 501, 502, 503, 504, 0]
        assert numbers(family, head, 250, 60) == [0] * 60
        family.run(30.0)
    assert not family.disk.maps.holes
    assert seen(family, layer, 0, 300) == list(range(1, 301))
    assert seen(family, layer, far, 5) == [500, 501, 502, 503, 504]
    second = snapshot(family, "after")
    put(family, 1, 100, 1000)
    ends(family, end)
    assert numbers(family, family.disk.head(1), 99, 3) == [0, 1000, 0]
    assert seen(family, second, 0, 50) == [*range(1, 21), *[0] * 10, 901, *[0] * 19]


def test_a_refusal_says_why_and_changes_nothing(family: SimulatedFamily) -> None:
    put(family, 1, 0, 1)
    layer = snapshot(family, "one")
    rows = (family.disk.volumes(), family.disk.snapshots())
    lsn = family.disk.log.lsn
    for operation, arguments, expected in (
        ("snapshot", (1, "one", 0), errno.EEXIST),
        ("snapshot", (2, "one", 0), errno.ENOENT),
        ("snapshot", (1, "", 0), errno.EINVAL),
        ("snapshot", (1, "ä" * 65, 0), errno.EINVAL),
        ("clone", (layer + 1, 2), errno.ENOENT),
        ("clone", (layer, 1), errno.EEXIST),
        ("clone", (layer, 0), errno.EINVAL),
        ("rollback", (1, 99), errno.ENOENT),
        ("rollback", (2, layer), errno.ENOENT),
        ("resize", (1, 0), errno.EINVAL),
        ("resize", (3, 1 << 20), errno.ENOENT),
        ("delete_snapshot", (layer + 1,), errno.ENOENT),
        ("delete_volume", (1,), errno.EBUSY),
        ("delete_volume", (2,), errno.ENOENT),
    ):
        assert change(family, operation, *arguments) == expected, (operation, arguments)
    assert (family.disk.volumes(), family.disk.snapshots()) == rows
    assert family.disk.log.lsn == lsn


def test_a_clone_is_rolled_back_to_its_own_snapshots_only(family: SimulatedFamily) -> None:
    layer = snapshot(family, "base")
    assert change(family, "clone", layer, 2) == 0
    assert change(family, "rollback", 2, layer) == errno.EINVAL


def test_what_is_bound_to_a_head_stays_right_through_snapshots_and_rollbacks(family: SimulatedFamily) -> None:
    put(family, 1, 0, 1)
    head = family.disk.head(1)
    read, write, commit = head.read, head.write, head.commit
    for life in range(5):
        assert write(0, memoryview(block(10 + life)))
        assert commit() == 0
        snapshot(family, f"{life}")
        assert b"".join(read(0, BLOCK_BYTES) or ()) == block(10 + life)
    assert change(family, "rollback", 1, family.disk.maps.tree.names[1]["2"]) == 0
    assert family.disk.head(1) is head
    assert b"".join(read(0, BLOCK_BYTES) or ()) == block(12)
    assert [seen(family, row.layer, 0, 1) for row in family.disk.snapshots()] == [[10], [11], [12], [13], [14]]


def test_a_snapshot_takes_no_write(family: SimulatedFamily) -> None:
    layer = snapshot(family, "one")
    view = family.disk.view(layer)
    assert not view.write(0, memoryview(block(1)))
    assert not view.discard(0, 1 << 30)
    for operation, data in ((Operation.WRITE, block(1)), (Operation.DISCARD, None)):
        assert family.wait(lambda done, o=operation, d=data: view.later(o, 0, 4096, d, done))[0] == errno.EPERM  # type: ignore[misc]
    assert family.wait(view.flush) == (0,)
    view.close()
    view.close()
    assert family.wait(lambda done: view.later(Operation.READ, 0, 4096, None, done))[0] == errno.EIO


def test_a_snapshot_is_one_record_however_much_there_is(family: SimulatedFamily) -> None:
    """Constant time, counted by work: pages loaded and made, values written, bytes of log."""
    costs = []
    for blocks in (1, 2000):
        put(family, 1, 1000, 1, blocks)
        family.checkpoint()
        before = family.disk.counters()
        snapshot(family, f"{blocks}")
        after = family.disk.counters()
        costs.append({name: after[name] - before[name] for name in after if "sync" not in name})
    assert costs[0] == costs[1]
    assert costs[0]["log_bytes_appended"] == 56 + 2 * 168
    assert costs[0]["map_page_loads"] == costs[0]["map_pages_derived"] == costs[0]["map_values_written"] == 0


def test_a_moved_block_is_one_change_of_the_middle_map_however_many_snapshots(family: SimulatedFamily) -> None:
    put(family, 1, 0, 1, 64)
    layers = [snapshot(family, f"{number}") for number in range(10)]
    page = family.disk.maps.page(1 << 32)
    assert page is not None
    before = family.disk.counters()
    moved = family.disk.maps
    segment = moved.middle.pages[page[0] >> 8][page[0] & 255]
    family.disk.cleaner.urgent = True
    table = moved.segments
    family.disk.appending.next_segment(0)
    family.disk.cleaner.choose = lambda: segment if table.live[segment] else 0  # type: ignore[method-assign]
    family.disk.cleaner._is_over = lambda: not table.live[segment]  # type: ignore[method-assign]
    assert family.disk.cleaner.start()
    family.run(5.0)
    after = family.disk.counters()
    blocks = after["cleaner_blocks_moved"] - before["cleaner_blocks_moved"]
    assert blocks >= 1
    assert after["middle_map_updates"] - before["middle_map_updates"] == blocks
    assert after["logical_map_updates"] == before["logical_map_updates"]
    for layer in layers:
        assert seen(family, layer, 0, 64) == list(range(1, 65))


def test_the_cost_of_a_snapshot_to_what_is_written_on_is_one_copy_a_page(family: SimulatedFamily) -> None:
    put(family, 1, 0, 1, 1024)
    snapshot(family, "one")
    before = family.disk.counters()
    for _ in range(3):
        for lba in range(0, 1024, 64):
            put(family, 1, lba, lba + 1)
    after = family.disk.counters()
    assert after["map_pages_derived"] - before["map_pages_derived"] == 4
    assert after["map_page_loads"] == before["map_page_loads"]
    assert after["logical_map_updates"] - before["logical_map_updates"] == 16  # a new MBA once, then in place


def test_rows_are_what_they_say() -> None:
    row = Row(7, 3, 1 << 41, 1 << 40, 2, 2, 1_700_000_000, "täglich")
    assert Row.unpack(row.pack()) == row


@pytest.mark.parametrize("end", ENDS)
def test_what_changed_since_a_snapshot_is_known_also_after_a_rollback(family: SimulatedFamily, end: str) -> None:
    put(family, 1, 0, 1, 1000)
    first = snapshot(family, "first")
    put(family, 1, 10, 2000, 5)
    discard(family, 1, 100, 3)
    second = snapshot(family, "second")
    put(family, 1, 500, 3000, 2)
    put(family, 1, 200_000, 1)
    ends(family, end)
    head = family.disk.head(1)

    def changed(since: int, limit: int = 1000) -> set[int]:
        return {lba for lba, is_dirty in enumerate(changes(family, head, since, 0, 262_144, limit)) if is_dirty}

    in_second, in_head = {*range(10, 15), *range(100, 103)}, {500, 501, 200_000}
    assert changed(second) == in_head
    assert changed(first) == changed(first, limit=1) == in_head | in_second
    assert change(family, "rollback", 1, first) == 0
    put(family, 1, 11, 5)
    ends(family, end)
    head = family.disk.head(1)
    assert changed(first) == {11}
    assert changed(second) == in_second
    view = family.disk.view(second)
    assert {lba for lba, dirty in enumerate(changes(family, view, first, 0, 262_144)) if dirty} == in_second
    assert changes(family, view, second, 5, 10) == [False] * 10
    view.close()
    discard(family, 1, 0, 262_144)
    assert changed(first) == set(range(1000))
    assert changed(second) == set(range(1000)) - {100, 101, 102}


def test_bitmaps_are_the_older_snapshots_of_the_same_volume(family: SimulatedFamily) -> None:
    head = family.disk.head(1)
    assert head.bitmaps() == {}
    first, second, third = (snapshot(family, name) for name in ("first", "second", "third"))
    assert change(family, "clone", second, 2) == 0
    snapshot(family, "of the clone", 2)
    assert list(head.bitmaps().items()) == [("first", first), ("second", second), ("third", third)]
    view = family.disk.view(second)
    assert view.bitmaps() == {"first": first}
    view.close()
    assert list(family.disk.head(2).bitmaps()) == ["of the clone"]
    assert change(family, "rollback", 1, first) == 0
    assert list(head.bitmaps()) == ["first", "second", "third"], (
        "what was made later is older than the head all the same"
    )
    assert change(family, "delete_snapshot", second) == 0
    ends(family, "kill")
    assert family.disk.head(1).bitmaps() == {"first": first, "third": third}


def test_a_snapshot_that_is_deleted_is_never_compared_with(family: SimulatedFamily) -> None:
    """A merge gives its MBAs to the head, which overwrites them in place: they would look as if nothing had changed."""
    put(family, 1, 0, 1, 600)
    layer = snapshot(family, "first")
    put(family, 1, 300, 5000)
    view = family.disk.view(layer)
    assert change(family, "delete_snapshot", layer) == 0

    def compare(done: Callable[..., None]) -> None:
        family.disk.changed(family.disk.head(1), layer, 0, 600 * BLOCK_BYTES, 100, done)

    assert family.wait(compare) == (errno.ESTALE, None), "it is there still, because it is looked at"
    view.close()
    family.run(0.01)
    put(family, 1, 0, 9000, 600)
    assert family.wait(compare) == (errno.ESTALE, None)
    settled(family)
    assert layer not in family.disk.maps.tree.layers
    assert family.wait(compare) == (errno.ESTALE, None)


def test_a_snapshot_that_is_deleted_during_a_comparison_ends_it(family: SimulatedFamily) -> None:
    put(family, 1, 0, 1, 2000)
    layer = snapshot(family, "first")
    answers: list[tuple[int, object]] = []
    family.disk.changed(family.disk.head(1), layer, 0, 2000 * BLOCK_BYTES, 9, lambda *answer: answers.append(answer))
    assert change(family, "delete_snapshot", layer) == 0
    family.run(1.0)
    assert answers in ([(errno.ESTALE, None)], [(0, [(2000 * BLOCK_BYTES, 0)])])


def test_the_changes_of_a_terabyte_of_which_little_changed_are_found_at_once() -> None:
    family = SimulatedFamily(size_bytes=4 << 40, segment_bytes=256 << 10, settings=SMALL_CACHE)
    put(family, 1, 0, 1, 2000)
    first = snapshot(family, "first")
    discard(family, 1, 100_000, 900_000_000)
    put(family, 1, 1 << 29, 5)
    family.run(30.0)
    before = family.disk.counters()["map_page_loads"]
    errno, extents = family.wait(lambda done: family.disk.changed(family.disk.head(1), first, 0, 4 << 40, 100, done))
    assert (errno, extents) == (0, [((1 << 29) << 12, 0), (4096, 1), ((4 << 40) - ((1 << 29) + 1 << 12), 0)])
    assert family.disk.counters()["map_page_loads"] - before < 30


def test_a_family_from_before_layers_opens_as_one_volume() -> None:
    family = SimulatedFamily(size_bytes=1 << 30, segment_bytes=256 << 10)
    put(family, 1, 0, 1, 300)
    family.disk.background.stop()
    discard(family, 1, 10, 100_000)
    family.checkpoint()
    family.crash()
    batch = family.store.batch()
    for key in [key for key in family.table.keys if key[:1] in b"TYG"]:
        batch.delete(key)
    (key,) = [key for key in family.table.keys if key[:1] == b"H"]
    hole, address, count, cursor = PENDING_HOLE.unpack(unpack_value(key, family.table.values[key]))
    batch.put(key, pack_value(key, PENDING_HOLE.pack(hole, address & LBA_OF_ADDRESS, count, cursor & PAGE_OF_LAYER)))
    family.table.apply(batch.changes)  # type: ignore[attr-defined]
    family._begin()
    check(family)
    family.open()
    assert [(row.volume, row.layer, row.size_bytes) for row in family.disk.volumes()] == [(1, 1, 1 << 30)]
    assert numbers(family, family.disk.head(1), 0, 300) == [*range(1, 11), *[0] * 290]
    layer = snapshot(family, "first")
    put(family, 1, 0, 77)
    ends(family, "kill")
    assert seen(family, layer, 0, 12) == [*range(1, 11), 0, 0]
    settled(family)


def test_a_full_disk_refuses_a_snapshot_and_lets_one_be_deleted() -> None:
    mix = FaultMix(cold_read=0.0, latency_s=0.0001, tear=0.0, room_segments=12)
    family = SimulatedFamily(size_bytes=1 << 30, segment_bytes=64 << 10, mix=mix)
    put(family, 1, 0, 1)
    layer = snapshot(family, "early")
    lba = 1
    while family.write(lba * BLOCK_BYTES, block(lba)) == 0:
        lba += 1
    answers = [change(family, "snapshot", 1, f"late {number}", 0) for number in range(600)]
    assert answers[-1] == errno.ENOSPC
    assert set(answers) <= {0, errno.ENOSPC}
    assert len(family.disk.snapshots()) == 1 + answers.count(0)
    assert change(family, "delete_snapshot", layer) == 0
    assert change(family, "resize", 1, 1 << 20) == 0
    assert numbers(family, family.disk.head(1), 0, 3) == [1, 1, 2]
    ends(family, "kill")
    assert numbers(family, family.disk.head(1), 0, 3) == [1, 1, 2]


def test_the_last_segment_keeps_room_for_deletions_from_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimulatedFamily(size_bytes=1 << 30, segment_bytes=64 << 10)
    put(family, 1, 0, 1)
    layer = snapshot(family, "early")
    monkeypatch.setattr(SegmentPool, "take", lambda pool, keep: 0)
    monkeypatch.setattr(SegmentPool, "can_take", lambda pool, keep=0: False)
    family.disk.pool.spare.clear()
    lba = 1
    while family.write(lba * BLOCK_BYTES, block(lba)) == 0:
        lba += 1
    assert lba > 8
    while family.discard(0, BLOCK_BYTES) == 0:
        pass
    assert change(family, "resize", 1, 2 << 30) == errno.ENOSPC
    assert change(family, "snapshot", 1, "late", 0) == errno.ENOSPC
    assert change(family, "delete_snapshot", layer) == 0
    assert change(family, "resize", 1, 1 << 29) == 0
    assert family.discard(0, 1 << 29) == 0


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_are_remembered(seed: int) -> None:
    """Volumes, snapshots, clones, rollbacks and ends of all kinds against a dictionary."""
    rng = random.Random(seed)
    family = SimulatedFamily(size_bytes=64 * MIB, segment_bytes=256 << 10, settings=SMALL_CACHE, seed=seed)
    heads: dict[int, dict[int, int]] = {1: {}}
    named: dict[int, tuple[int, dict[int, int]]] = {}  # layer → (volume, content)
    for label in range(1, 251):
        volume = rng.choice(sorted(heads))
        kind = rng.choices(range(8), (20, 6, 3, 2, 1, 1, 2, 1))[0]
        if kind == 0:
            lba, count = rng.randrange(2000), rng.choice([1, 1, 4, 300])
            put(family, volume, lba, label * 1000, count)
            heads[volume].update({lba + index: label * 1000 + index for index in range(count)})
        elif kind == 1:
            lba, count = rng.randrange(2000), rng.choice([1, 10, 300, 8000])
            discard(family, volume, lba, count)
            heads[volume] = {at: now for at, now in heads[volume].items() if not lba <= at < lba + count}
        elif kind == 2:
            layer = snapshot(family, f"{label}", volume)
            named[layer] = (volume, dict(heads[volume]))
        elif kind == 3 and named and len(heads) < 5:
            layer = rng.choice(sorted(named))
            new = max(heads) + 1
            assert change(family, "clone", layer, new) == 0
            heads[new] = dict(named[layer][1])
        elif kind == 4 and named:
            layer = rng.choice(sorted(named))
            if named[layer][0] in heads:
                assert change(family, "rollback", named[layer][0], layer) == 0
                heads[named[layer][0]] = dict(named[layer][1])
        elif kind == 5:
            ends(family, rng.choice(ENDS))
        elif kind == 6 and len(heads) > 1 and rng.random() < 0.2:
            gone = rng.choice(sorted(heads))
            if gone != 1 and not any(owner == gone for owner, _ in named.values()):
                assert change(family, "delete_volume", gone) == 0
                del heads[gone]
                volume = 1
        elif kind == 6 and named and rng.random() < 0.7:
            layer = rng.choice(sorted(named))
            del named[layer]
            assert change(family, "delete_snapshot", layer) == 0
        elif kind == 7:
            family.run(rng.choice([0.01, 1.0, 20.0]))
        look = rng.randrange(2300)
        assert numbers(family, family.disk.head(volume), look, 20) == [
            heads[volume].get(look + index, 0) for index in range(20)
        ]
    for end in ENDS:
        ends(family, end)
        for volume, content in heads.items():
            assert numbers(family, family.disk.head(volume), 0, 2560) == [content.get(lba, 0) for lba in range(2560)]
        for layer, (_, content) in named.items():
            assert seen(family, layer, 0, 2560) == [content.get(lba, 0) for lba in range(2560)]
        for layer in rng.sample(sorted(named), min(2, len(named))):
            volume = rng.choice(sorted(heads))
            found = changes(family, family.disk.head(volume), layer, 0, 2560, rng.choice([1, 7, 1000]))
            for lba, is_dirty in enumerate(found):
                assert is_dirty or heads[volume].get(lba, 0) == named[layer][1].get(lba, 0)
            # Contents are told by their numbers, which no two writes share.
            same = [lba for lba in range(2560) if heads[volume].get(lba, 0) == named[layer][1].get(lba, 0)]
            assert not [lba for lba in same if found[lba]]
        if rng.random() < 0.5:
            settled(family)
    settled(family)


def test_a_snapshot_that_someone_looks_at_stays_until_the_view_is_closed(family: SimulatedFamily) -> None:
    put(family, 1, 0, 1, 100)
    layer = snapshot(family, "one")
    put(family, 1, 0, 201, 100)
    view = family.disk.view(layer)
    assert change(family, "delete_snapshot", layer) == 0
    family.run(200.0)
    assert numbers(family, view, 0, 100) == list(range(1, 101))
    assert family.disk.maps.live_blocks == 200
    with pytest.raises(LookupError):
        family.disk.view(layer)
    view.close()
    settled(family)
    assert family.disk.maps.live_blocks == 100


def test_what_a_deleted_snapshot_held_comes_back_to_the_file_system() -> None:
    family = SimulatedFamily(size_bytes=1 << 30, segment_bytes=256 << 10)
    put(family, 1, 0, 1, 4000)
    layer = snapshot(family, "one")
    put(family, 1, 0, 10_001, 4000)
    family.run(60.0)
    before = family.files.free_bytes()
    assert change(family, "delete_snapshot", layer) == 0
    family.run(90.0)
    assert family.files.free_bytes() - before > 0.8 * 4000 * BLOCK_BYTES
    assert numbers(family, family.disk.head(1), 0, 4000) == list(range(10_001, 14_001))


def test_a_deletion_goes_on_after_a_crash_in_the_middle_of_it() -> None:
    family = SimulatedFamily(size_bytes=4 << 30, segment_bytes=1 << 20, settings=SMALL_CACHE)
    for page in range(300):
        put(family, 1, page * 256, page * 10, 3)
    layer = snapshot(family, "one")
    for page in range(300):
        put(family, 1, page * 256 + 1, 50_000 + page)
    assert change(family, "delete_snapshot", layer) == 0
    work = family.disk.tree_work
    moments = 0
    while family.disk.maps.tree.layers.get(layer):
        family.run(0.01)
        if work.layer and family.disk.maps.moved_keys and moments < 4:
            moments += 1
            put(family, 1, 256 * moments, 90_000 + moments)
            ends(family, "checkpoint and kill" if moments % 2 else "kill")
            work = family.disk.tree_work
    assert moments >= 2
    settled(family)
    assert family.disk.maps.live_blocks == 900
    assert numbers(family, family.disk.head(1), 256 * 299, 3) == [2990, 50_299, 2992]
