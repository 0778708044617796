"""The two maps in step: which pages are asked for, and how a discarded range reaches pages that are not in memory."""

from array import array

import pytest

from metadata.layers import Row
from metadata.logical_map import LAYER_SHIFT
from metadata.pages import PAGE_BLOCKS
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.maps import Maps
from protocol.disk import HEAD, SNAPSHOT
from tests.simulation.faults import FaultMix
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import SimulatedClock, World
from tests.unit.families import SimulatedFamily, block

TIB = 1 << 40
PAGES = 1 << 32  # the first volume's first page
BLOCKS = 1 << 40  # its first block
SETTINGS = DiskSettings(cache_bytes=0, checkpoint_bytes=1 << 30, checkpoint_interval_s=3600.0)


@pytest.fixture
def family() -> SimulatedFamily:
    family = SimulatedFamily(size_bytes=4 * TIB, settings=SETTINGS)
    family.put(0, 1, 3 * PAGE_BLOCKS)
    family.checkpoint()
    family.close()
    family.open()
    return family


def load_all(maps: Maps, family: SimulatedFamily, lba: int, count: int) -> None:
    while need := maps.needed(lba, count):
        family.wait(lambda done, need=need: maps.load(need, lambda: done(0)))  # type: ignore[misc]


def test_what_is_needed_is_the_logical_page_first_then_the_middle_pages(family: SimulatedFamily) -> None:
    maps = family.disk.maps
    need = maps.needed(BLOCKS + 0, PAGE_BLOCKS)
    assert need == [(maps.logical, PAGES + 0)]
    family.wait(lambda done: maps.load(need, lambda: done(0)))
    assert {page_map for page_map, _ in maps.needed(BLOCKS + 0, PAGE_BLOCKS)} == {maps.middle}
    load_all(maps, family, BLOCKS, PAGE_BLOCKS)
    assert maps.needed(BLOCKS + 0, PAGE_BLOCKS) == []
    assert maps.needed(BLOCKS + PAGE_BLOCKS - 1, 2) == [(maps.logical, PAGES + 1)]


def test_two_who_need_a_page_read_it_once(family: SimulatedFamily) -> None:
    maps = family.disk.maps
    loads = maps.logical.loads
    done: list[int] = []
    for name in range(5):
        maps.load([(maps.logical, PAGES + 0)], lambda name=name: done.append(name))  # type: ignore[misc]
    family.run(1.0)
    assert done == [0, 1, 2, 3, 4]
    assert maps.logical.loads == loads + 1


def test_a_hole_over_pages_in_memory_takes_them_from_the_hot_path_at_once(family: SimulatedFamily) -> None:
    maps = family.disk.maps
    load_all(maps, family, BLOCKS, 2 * PAGE_BLOCKS)
    maps.add_hole(BLOCKS + 0, 1 << 20)
    assert maps.page(PAGES + 0) is None
    assert maps.page(PAGES + 1) is None
    assert set(maps.stale) == {PAGES, PAGES + 1}
    load_all(maps, family, BLOCKS, 2 * PAGE_BLOCKS)
    page = maps.page(PAGES + 0)
    assert page is not None
    assert not any(page)
    assert maps.live_blocks == PAGE_BLOCKS
    assert not maps.stale


def test_a_hole_over_pages_that_are_loaded_later_is_applied_to_them(family: SimulatedFamily) -> None:
    maps = family.disk.maps
    maps.add_hole(BLOCKS + 10, (1 << 20) - 10)
    load_all(maps, family, BLOCKS, 3 * PAGE_BLOCKS)
    first = maps.page(PAGES + 0)
    assert first is not None
    assert all(first[:10])
    assert not any(first[10:])
    assert maps.live_blocks == 10


def test_a_hole_is_applied_to_a_page_once_however_often_it_comes_and_goes(family: SimulatedFamily) -> None:
    """The page's stamp in LevelDB says that the hole was applied: what was written since stays."""
    maps = family.disk.maps
    family.disk.background.stop()
    maps.add_hole(BLOCKS + 0, 1 << 20)
    assert family.write(5 * 4096, block(99)) == 0
    family.checkpoint()
    for number in range(10_000, 10_500):  # beyond the hole
        maps.logical.install(PAGES + number, [])  # push page 0 out
    assert maps.page(PAGES + 0) is None
    assert maps.holes
    assert family.number_at(5) == 99
    assert family.number_at(6) == 0


def test_holes_that_overlap_are_applied_in_their_order(family: SimulatedFamily) -> None:
    maps = family.disk.maps
    family.disk.background.stop()
    maps.add_hole(BLOCKS + 0, 1 << 20)
    family.put(3, 50)
    maps.add_hole(BLOCKS + 2, 1 << 20)
    family.put(4, 60)
    assert [family.number_at(lba) for lba in range(6)] == [0, 0, 0, 0, 60, 0]


def test_new_mbas_begin_a_page_of_their_own_in_each_epoch(family: SimulatedFamily) -> None:
    maps = family.disk.maps
    assert maps.next_mba == family.epoch << 40
    family.put(1 << 20, 1, 300)
    page = maps.page(PAGES + ((1 << 20) >> 8))
    assert page is not None
    assert page == array("Q", range(family.epoch << 40, (family.epoch << 40) + 256))


def test_a_page_that_is_set_aside_when_a_checkpoint_writes_it_is_noted_as_stored() -> None:
    world = World(1)
    store = SimulatedStore(SimulatedTable(world), SimulatedClock(world), FaultMix(), lambda: False)
    maps = Maps(store, 1 << 20, lambda reason: None)
    maps.tree.apply(Row(1, 0, 0, 1 << 30, 1, SNAPSHOT, 0, "base"))
    maps.tree.apply(Row(2, 1, 1, 1 << 30, 1, HEAD))
    maps.tree.layers[2].stored = set()
    number = 2 << LAYER_SHIFT | 5
    page = maps.logical.create(number)
    maps.logical.first_change(number).append(7)
    page[7] = 9
    maps.logical.freeze()
    batch = store.batch()
    list(maps.logical.encode(batch, {2: 4}, {}, {number: 0}))
    assert maps.tree.layers[2].stored == {5}, "otherwise nobody looks for it once it is evicted"
