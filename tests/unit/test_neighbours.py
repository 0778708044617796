"""Blocks that lie side by side have MBAs side by side, in whatever order they were written after a snapshot."""

import random

from nbdserver.logdisk import neighbours
from nbdserver.logdisk.neighbours import GROUP_BLOCKS
from tests.unit.families import SimulatedFamily
from tests.unit.test_layers import check, settled, snapshot

BLOCKS = 1000


def mbas(family: SimulatedFamily, first: int, count: int) -> list[int]:
    """Of blocks of the first volume's head."""
    maps = family.disk.maps
    address = family.device.layer * (1 << 40) + first
    found = []
    for each in range(address, address + count):
        page = maps.page(each >> 8)
        assert page is not None
        found.append(page[each & 255])
    return found


def written_then_snapshot() -> SimulatedFamily:
    family = SimulatedFamily(size_bytes=64 << 20)
    family.put(0, 1, count=BLOCKS)
    snapshot(family, "before")
    return family


def write_in_random_order(family: SimulatedFamily, lbas: list[int], seed: int) -> None:
    random.Random(seed).shuffle(lbas)
    for lba in lbas:
        family.put(lba, 10_000 + lba)


def test_groups_written_at_random_after_a_snapshot_have_rising_mbas() -> None:
    family = written_then_snapshot()
    write_in_random_order(family, list(range(BLOCKS)), seed=1)
    for first in range(0, BLOCKS - GROUP_BLOCKS, GROUP_BLOCKS):
        found = mbas(family, first, GROUP_BLOCKS)
        assert found == list(range(found[0], found[0] + GROUP_BLOCKS))
    assert [family.number_at(lba) for lba in range(BLOCKS)] == [10_000 + lba for lba in range(BLOCKS)]


def test_a_long_write_over_a_group_that_was_begun_goes_on_with_its_mbas() -> None:
    family = written_then_snapshot()
    family.put(7, 7)
    family.put(100, 7)
    family.put(0, 20_000, count=256)
    assert mbas(family, 0, 32) == list(range(mbas(family, 0, 1)[0], mbas(family, 0, 1)[0] + 32))
    assert [family.number_at(lba) for lba in range(256)] == [20_000 + lba for lba in range(256)]
    settled(family)


def test_a_long_write_over_untouched_blocks_is_one_run_of_mbas() -> None:
    family = written_then_snapshot()
    family.put(5, 20_000, count=200)
    found = mbas(family, 5, 200)
    assert found == list(range(found[0], found[0] + 200))


def test_an_mba_kept_before_a_checkpoint_and_used_after_it_survives_a_crash() -> None:
    family = written_then_snapshot()
    family.put(40, 1)  # takes a group
    family.checkpoint()
    family.put(41, 2)  # with an MBA that is lower than the checkpoint's next one
    family.put(41, 3)
    assert mbas(family, 41, 1)[0] < family.disk.maps.next_mba
    family.crash()
    family.open()
    assert [family.number_at(lba) for lba in (39, 40, 41, 42)] == [40, 1, 3, 43]
    family.close()
    family._begin()
    check(family)


def test_a_block_that_was_discarded_gets_another_mba_when_it_is_written_again() -> None:
    family = written_then_snapshot()
    family.put(40, 1)
    family.put(41, 2)
    (before,) = mbas(family, 41, 1)
    assert family.discard(41 * 4096, 4096) == 0
    family.put(41, 3)
    assert mbas(family, 41, 1)[0] > before
    assert mbas(family, 40, 1)[0] < before


def test_what_is_kept_is_bounded_and_forgotten_without_harm() -> None:
    family = written_then_snapshot()
    most, neighbours.MOST_GROUPS = neighbours.MOST_GROUPS, 2
    try:
        write_in_random_order(family, list(range(0, BLOCKS, 3)), seed=2)
        assert len(family.disk.maps.neighbours._groups) == 2
        write_in_random_order(family, list(range(BLOCKS)), seed=3)
    finally:
        neighbours.MOST_GROUPS = most
    found = mbas(family, 0, BLOCKS)
    assert len(set(found)) == BLOCKS
    assert [family.number_at(lba) for lba in range(BLOCKS)] == [10_000 + lba for lba in range(BLOCKS)]


def test_a_kept_mba_whose_page_is_out_of_memory_is_let_go() -> None:
    family = written_then_snapshot()
    family.put(40, 1)
    family.checkpoint()
    middle = family.disk.maps.middle
    (mba,) = mbas(family, 40, 1)
    middle.pages.pop(mba >> 8)
    family.disk.maps.begin_epoch(family.epoch + 1)
    family.put(41, 2)
    assert mbas(family, 41, 1)[0] >= (family.epoch + 1) << 40
    assert [family.number_at(lba) for lba in (40, 41)] == [1, 2]


def test_a_failed_batch_gives_its_mbas_to_nobody() -> None:
    family = SimulatedFamily(size_bytes=64 << 20)
    family.put(0, 1, count=BLOCKS)
    snapshot(family, "before")
    taken = family.disk.maps.neighbours
    first, after = taken.take(family.device.layer << 40, family.disk.maps.next_mba)
    taken.forget()
    assert taken.take(family.device.layer << 40, family.disk.maps.next_mba) == (first, after)
    taken.forget()
    assert not taken.has_any(family.device.layer << 40, 256)
