"""Whoever waits is answered when the family fails, whatever keeps a page of the maps from being made."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from metadata.logical_map import LAYER_SHIFT
from metadata.pages import PAGE_BLOCKS
from nbdserver.block import Operation
from nbdserver.logdisk.maps import SMALL_HOLE_BLOCKS
from tests.unit.families import BLOCK_BYTES, CALM, SimulatedFamily
from tests.unit.test_layers import SMALL_CACHE, change, snapshot

PAGES = 20
PAGE_BYTES = PAGE_BLOCKS * BLOCK_BYTES

Answered = Callable[..., None]


@pytest.fixture
def family() -> SimulatedFamily:
    return SimulatedFamily(size_bytes=PAGES * PAGE_BYTES, settings=SMALL_CACHE)


def write_every_page(family: SimulatedFamily) -> None:
    for page in range(PAGES):
        family.put(page * PAGE_BLOCKS, page + 1)


def forget_pages(family: SimulatedFamily) -> None:
    """Nothing of the maps is in memory any more."""
    family.close()
    family.open()


def ask_everything(family: SimulatedFamily, since: int = 0) -> list[list[int]]:
    """Start every operation that waits for pages, each for one that is not in memory; returns where their answers will
    be."""
    disk, device = family.disk, family.device
    layer = device.layer << LAYER_SHIFT
    asked: list[Callable[[Answered], None]] = [
        lambda done: device.later(Operation.READ, PAGE_BYTES, 100, None, done),
        lambda done: device.later(Operation.WRITE, 2 * PAGE_BYTES + 10, 5, b"12345", done),
        lambda done: device.later(Operation.DISCARD, 3 * PAGE_BYTES + 10, 5, None, done),
        lambda done: device.later(Operation.EXTENTS, 4 * PAGE_BYTES, PAGE_BYTES, None, done),
        lambda done: device.later(Operation.CACHE, 5 * PAGE_BYTES, PAGE_BYTES, None, done),
        lambda done: disk.resize(1, 6 * PAGE_BYTES + 10, done),
    ]
    if since:
        asked.append(lambda done: device.changed(since, 7 * PAGE_BYTES, PAGE_BYTES, 1, done))
    assert all(disk.maps.logical.get(layer | page) is None for page in range(1, len(asked) + 1))
    answers: list[list[int]] = [[] for _ in asked]
    for ask, place in zip(asked, answers, strict=True):
        ask(lambda error, *_, place=place: place.append(error))
    return answers


def damage_middle_map(family: SimulatedFamily) -> None:
    for key, value in family.table.values.items():
        if key.startswith(b"M"):
            family.table.values[key] = value[:-1] + bytes((value[-1] ^ 1,))


def keep_middle_map_from_being_read(family: SimulatedFamily) -> None:
    read = family.store.range_later

    def range_later(ranges: Sequence[tuple[bytes, bytes]], done: Callable[..., None], limit: int = 0) -> None:
        if any(start.startswith(b"M") for start, _ in ranges):
            family.clock.call_later(0.01, lambda: done(errno.EIO, []))
        else:
            read(ranges, done, limit)

    family.store.range_later = range_later  # type: ignore[method-assign]


def test_every_operation_ends_when_the_checkpoint_that_moves_entries_is_refused(family: SimulatedFamily) -> None:
    write_every_page(family)
    base = snapshot(family, "base")
    write_every_page(family)
    snapshot(family, "one")
    family.put(0, 99)
    gone = snapshot(family, "two")
    forget_pages(family)
    disk = family.disk
    assert change(family, "delete_snapshot", gone) == 0
    while not disk.maps.moved_keys:
        disk.background.check()
        family.run(0.01)
    family.store.mix = replace(CALM, store_write_error=1.0, latency_s=0.01)
    disk.checkpointer.start()
    assert family.clock.run_until(lambda: disk.maps.tree.moving), "the batch that moves entries is on its way"
    answers = ask_everything(family, base)
    family.run(5.0)
    assert disk.failure.startswith("LevelDB refused a checkpoint")
    assert answers == [[errno.EIO]] * len(answers)
    assert disk.slow_path.under_way == 0


@pytest.mark.parametrize("fault", [damage_middle_map, keep_middle_map_from_being_read])
def test_every_operation_ends_when_what_a_long_discard_frees_cannot_be_looked_up(
    family: SimulatedFamily, fault: Callable[[SimulatedFamily], None]
) -> None:
    write_every_page(family)
    forget_pages(family)
    assert family.device.discard(0, (SMALL_HOLE_BLOCKS + 1) * BLOCK_BYTES)
    assert family.device.commit() == 0
    assert family.disk.maps.holes
    answers = ask_everything(family)
    fault(family)
    family.run(5.0)
    assert family.disk.failure
    assert answers == [[errno.EIO]] * len(answers)
    assert family.disk.slow_path.under_way == 0


def test_changes_of_the_tree_and_flushes_end_whether_the_family_fails_before_or_after_them(
    family: SimulatedFamily,
) -> None:
    layer = snapshot(family, "base")
    disk = family.disk
    assert change(family, "clone", layer, 2) == 0
    assert change(family, "clone", layer, 3) == 0

    def ask(name: str) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in range(5)]
        disk.snapshot(1, name, 0, answers[0].append)
        disk.clone(layer, ord(name), answers[1].append)
        disk.rollback(1, layer, answers[2].append)
        disk.resize(1, 2 * family.size_bytes, answers[3].append)
        disk.flush(answers[4].append)
        return answers

    before = ask("b")
    deleted: list[list[int]] = [[], []]
    disk.delete_volume(2, deleted[0].append)
    disk.delete_snapshot(disk.maps.tree.names[1]["b"], deleted[1].append)
    disk.fail("a test says so")
    after = [*ask("a"), [], []]
    disk.delete_volume(3, after[5].append)
    disk.delete_snapshot(layer, after[6].append)
    family.run(5.0)
    assert before + deleted == after == [[errno.EIO]] * 7
