"""The segment usage table: what a checkpoint writes is the table at the freeze, and comes back."""

import pytest

from metadata.segment_table import FrozenRows, SegmentTable
from protocol.invariant import InvariantError
from tests.simulation.simulated_store import SimulatedBatch, SimulatedTable
from tests.simulation.world import World


def encoded(table: SegmentTable, frozen: FrozenRows, store: SimulatedTable) -> None:
    batch = SimulatedBatch()
    for _ in table.encode(batch, frozen):
        pass
    store.apply(batch.changes)


def loaded(store: SimulatedTable) -> SegmentTable:
    table = SegmentTable()
    table.load(iter(store.items(*table.key_range())))
    return table


@pytest.fixture
def store() -> SimulatedTable:
    return SimulatedTable(World(1))


def test_rows_come_back(store: SimulatedTable) -> None:
    table = SegmentTable()
    for segment in (1, 3):
        table.begin(segment, segment + 10, bytes([segment]) * 8)
        table.appended(segment, 5000 + segment, 7, 70 + segment)
        table.live[segment] = 4
    encoded(table, table.freeze(3, 13, 73), store)
    again = loaded(store)
    assert again.in_use == {1, 3}
    assert again.row(1) == table.row(1)
    assert again.row(3) == table.row(3)


def test_what_happens_after_the_freeze_is_not_in_the_checkpoint(store: SimulatedTable) -> None:
    table = SegmentTable()
    table.begin(3, 1, b"a" * 8)
    table.appended(3, 5000, 1, 1)
    table.live[3] = 4
    frozen = table.freeze(3, 1, 1)
    at_the_freeze = table.row(3)
    table.appended(3, 9000, 2, 2)
    table.live[3] = 9
    table.begin(2, 2, b"b" * 8)
    table.live[2] = 1
    encoded(table, frozen, store)
    again = loaded(store)
    assert again.in_use == {3}
    assert again.row(3) == at_the_freeze
    assert frozen.dead == []
    encoded(table, table.freeze(2, 2, 2), store)
    assert loaded(store).row(3) == table.row(3)
    assert loaded(store).in_use == {2, 3}


def test_a_segment_without_live_blocks_is_named_dead_and_its_row_deleted(store: SimulatedTable) -> None:
    table = SegmentTable()
    for segment in (1, 2):
        table.begin(segment, segment, bytes(8))
        table.appended(segment, 5000, segment, segment)
    table.live[1] = 3
    encoded(table, table.freeze(2, 2, 2), store)
    table.live[1] = 0
    frozen = table.freeze(2, 2, 2)
    encoded(table, frozen, store)
    assert frozen.dead == [1]
    assert loaded(store).in_use == {2}
    table.free(1)
    assert table.in_use == {2}


def test_a_segment_that_holds_a_newer_record_is_not_dead(store: SimulatedTable) -> None:
    table = SegmentTable()
    for segment in (1, 2):
        table.begin(segment, segment, bytes(8))
        table.appended(segment, 5000, segment, segment)
    frozen = table.freeze(2, 2, 2)
    table.appended(1, 6000, 3, 3)
    encoded(table, frozen, store)
    assert frozen.dead == []


def test_the_open_segment_is_never_dead(store: SimulatedTable) -> None:
    table = SegmentTable()
    table.begin(1, 1, bytes(8))
    frozen = table.freeze(1, 1, 0)
    encoded(table, frozen, store)
    assert frozen.dead == []


def test_only_a_free_segment_begins_and_only_an_empty_one_is_freed() -> None:
    table = SegmentTable()
    table.begin(1, 1, bytes(8))
    with pytest.raises(InvariantError):
        table.begin(1, 2, bytes(8))
    table.live[1] = 1
    with pytest.raises(InvariantError):
        table.free(1)


def test_unchanged_rows_are_not_written_again(store: SimulatedTable) -> None:
    table = SegmentTable()
    for segment in range(1, 600):
        table.begin(segment, segment, bytes(8))
        table.live[segment] = 1
    encoded(table, table.freeze(599, 599, 0), store)
    table.live[7] += 1
    batch = SimulatedBatch()
    steps = list(table.encode(batch, table.freeze(599, 599, 0)))
    assert [key[-2:] for key, _ in batch.changes] == [b"\0\x07"]
    assert len(steps) > 2  # in slices
