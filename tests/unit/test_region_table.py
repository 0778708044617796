"""The region table against a dictionary, through checkpoints."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.region_table import REGION_SHIFT, RegionTable
from protocol.disk import pack_value
from tests.simulation.simulated_store import SimulatedBatch, SimulatedTable
from tests.simulation.world import World

REGIONS = 3000
MARK = st.tuples(st.integers(0, REGIONS * 1024 - 1), st.integers(1, 1500 * 1024))


def encoded(table: RegionTable, store: SimulatedTable) -> None:
    batch = SimulatedBatch()
    for _ in table.encode(batch):
        pass
    store.apply(batch.changes)


@given(st.lists(st.one_of(MARK, st.sampled_from(["freeze", "encode", "reload"])), max_size=25))
def test_a_region_has_the_txid_of_its_last_modification(steps: list[tuple[int, int] | str]) -> None:
    table, store = RegionTable(), SimulatedTable(World(1))
    model: dict[int, int] = {}
    is_frozen = False
    for txid, step in enumerate(steps, 1):
        if isinstance(step, tuple):
            lba, count = step
            table.mark(lba, count, txid)
            model.update(dict.fromkeys(range(lba >> REGION_SHIFT, (lba + count - 1 >> REGION_SHIFT) + 1), txid))
        elif step == "freeze" and not is_frozen:
            table.freeze()
            is_frozen = True
        elif step == "encode" and is_frozen:
            encoded(table, store)
            is_frozen = False
        elif step == "reload" and not is_frozen:
            table.freeze()
            encoded(table, store)
            table = RegionTable()
            table.load(iter(store.items(*table.key_range())))
        for region in (0, 1, 500, 511, 512, 2999):
            assert table.txid_of(region) == model.get(region, 0)
    middle = len(steps) // 2
    assert list(table.later_than(middle)) == sorted(region for region, txid in model.items() if txid > middle)


def test_a_terabyte_is_one_entry_in_memory() -> None:
    table = RegionTable()
    table.mark(0, 1 << 28, 5)
    assert not table.recent
    assert table.txid_of(200_000) == 5


@pytest.mark.parametrize("first_txid", [1, 1 << 40])
@pytest.mark.parametrize("apart", [1, (1 << 32) - 2, (1 << 32) - 1, 1 << 32])
def test_txids_however_far_apart_come_back_as_they_were(first_txid: int, apart: int) -> None:
    table, store = RegionTable(), SimulatedTable(World(1))
    table.mark(0, 1, first_txid)
    table.mark(1 << REGION_SHIFT, 1, first_txid + apart)
    table.freeze()
    encoded(table, store)
    again = RegionTable()
    again.load(iter(store.items(*table.key_range())))
    assert [again.txid_of(region) for region in (0, 1, 2)] == [first_txid, first_txid + apart, 0]


def test_pages_of_plain_txids_are_read() -> None:
    table = RegionTable()
    key = b"R" + bytes(4)
    table.load(iter([(key, pack_value(key, array("Q", range(512)).tobytes()))]))
    assert [table.txid_of(region) for region in (0, 1, 511)] == [0, 1, 511]


def test_a_page_is_stored_in_half_the_bytes_of_its_txids() -> None:
    table, store = RegionTable(), SimulatedTable(World(1))
    for region in range(512):
        table.mark(region << REGION_SHIFT, 1, region + 1)
    table.freeze()
    encoded(table, store)
    ((_, value),) = store.items(*table.key_range())
    assert len(value) < 512 * 8 / 1.9
