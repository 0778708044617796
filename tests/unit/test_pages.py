"""PageMap against a dictionary: residence, changes, checkpoints that are the state at one instant, eviction, reload."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from metadata.pages import MIN_PAGES, PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, PageMap
from protocol.disk import DamagedValueError, unpack_value
from protocol.invariant import InvariantError
from tests.simulation.simulated_store import SimulatedBatch, SimulatedTable
from tests.simulation.world import World

PAGES = 100
NUMBERS = st.integers(0, PAGES * PAGE_BLOCKS - 1)


def new_map(typecode: str = "Q", fields: int = 1) -> PageMap:
    return PageMap(b"P", typecode, fields, 0)


def stored(table: SimulatedTable) -> dict[int, tuple[int, ...]]:
    """What a fresh map reads back from the table: number → entry."""
    found: dict[int, tuple[int, ...]] = {}
    fresh = new_map("I", 3)
    for number in range(PAGES):
        page = fresh.install(number, table.items(*fresh.key_range(number)))
        for index in range(PAGE_BLOCKS):
            entry = tuple(page[index::PAGE_BLOCKS])
            if any(entry):
                found[number << PAGE_SHIFT | index] = entry
    return found


class PageMapMachine(RuleBasedStateMachine):
    """Entries of three items, as in the middle map; a dictionary is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.map = new_map("I", 3)
        self.table = SimulatedTable(World(1))
        self.model: dict[int, tuple[int, ...]] = {}
        self.frozen: dict[int, tuple[int, ...]] = {}
        self.steps: Any = None
        self.batch = SimulatedBatch()
        self.count = 0

    def page(self, number: int) -> Any:
        page = self.map.get(number)
        if page is None:
            page = self.map.install(number, self.table.items(*self.map.key_range(number)))
        return page

    @rule(first=NUMBERS, count=st.sampled_from([1, 1, 1, 2, 70, 256]), clear=st.booleans())
    def change(self, first: int, count: int, clear: bool) -> None:
        self.count += 1
        for number in range(first, min(first + count, (first | PAGE_MASK) + 1)):
            page = self.page(number >> PAGE_SHIFT)
            index = number & PAGE_MASK
            changed = self.map.changed.get(number >> PAGE_SHIFT) or self.map.first_change(number >> PAGE_SHIFT)
            changed.append(index)
            entry = (0, 0, 0) if clear else (self.count, number, 7)
            page[index], page[256 + index], page[512 + index] = entry
            self.model.pop(number, None)
            if not clear:
                self.model[number] = entry

    @rule(pages=st.lists(st.integers(0, PAGES - 1), max_size=90))
    def look(self, pages: list[int]) -> None:
        """Loading many pages pushes others out."""
        for number in pages:
            page = self.page(number)
            for index in (0, 17, 255):
                assert tuple(page[index::PAGE_BLOCKS]) == self.model.get(number << PAGE_SHIFT | index, (0, 0, 0))

    @rule()
    def freeze(self) -> None:
        if self.steps is None:
            self.map.freeze()
            self.frozen = dict(self.model)
            self.batch = SimulatedBatch()
            self.steps = self.map.encode(self.batch, {}, {}, {})

    @rule(most=st.integers(1, 50))
    def encode(self, most: int) -> None:
        if self.steps is None:
            return
        for _ in range(most):
            if next(self.steps, None) is None:
                break
        else:
            return
        # All encoded. It is synced some time later; changes may come in between.
        self.table.apply(self.batch.changes)
        assert stored(self.table) == self.frozen
        self.map.thaw()
        self.steps = None

    @rule()
    def crash(self) -> None:
        """What was not encoded is gone; the last checkpoint is there."""
        last = stored(self.table)
        self.map = new_map("I", 3)
        self.model = last
        self.steps = None

    @invariant()
    def the_cache_is_bounded(self) -> None:
        assert self.map.resident_pages <= MIN_PAGES + self.map.pinned_pages + 2


PageMapMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
test_a_page_map_is_a_dictionary_with_checkpoints = PageMapMachine.TestCase


def set_entry(pages: PageMap, number: int, value: int) -> None:
    page = pages.get(number >> PAGE_SHIFT)
    assert page is not None
    (pages.changed.get(number >> PAGE_SHIFT) or pages.first_change(number >> PAGE_SHIFT)).append(number & PAGE_MASK)
    page[number & PAGE_MASK] = value


def checkpoint(pages: PageMap, stamp: int = 0) -> list[tuple[bytes, bytes | None]]:
    pages.freeze()
    batch = SimulatedBatch()
    for _ in pages.encode(batch, {0: stamp} if stamp else {}, {}, {}):
        pass
    pages.thaw()
    return batch.changes


def test_few_changes_are_single_entries_and_many_are_one_base() -> None:
    pages = new_map()
    pages.create(3)
    for number in range(3 * 256, 3 * 256 + 5):
        set_entry(pages, number, 9)
    assert [len(key) for key, _ in checkpoint(pages)] == [10] * 5
    for number in range(3 * 256, 3 * 256 + 64):
        set_entry(pages, number, 10)
    changes = checkpoint(pages)
    assert [key for key, value in changes if value is not None] == [b"P" + (3).to_bytes(7, "big") + b"\0"]
    assert len([key for key, value in changes if value is None]) == 5  # the entries that the base replaces


def test_a_page_without_entries_leaves_no_keys() -> None:
    pages, table = new_map(), SimulatedTable(World(1))
    pages.create(1)
    for value in (5, 0):
        for number in range(256, 300):
            set_entry(pages, number, value)
        table.apply(checkpoint(pages, stamp=4 if value else 0))
        assert bool(table.keys) == bool(value)


def test_a_changed_page_is_not_evicted_before_its_checkpoint_is_synced() -> None:
    pages = new_map()
    pages.create(0)
    set_entry(pages, 5, 77)
    for number in range(1, 4 * MIN_PAGES):
        pages.install(number, [])
    assert pages.get(0) is not None
    pages.freeze()
    for number in range(4 * MIN_PAGES, 8 * MIN_PAGES):
        pages.install(number, [])
    assert pages.get(0) is not None
    for _ in pages.encode(SimulatedBatch(), {}, {}, {}):
        pass
    pages.thaw()
    for number in range(8 * MIN_PAGES, 12 * MIN_PAGES):
        pages.install(number, [])
    assert pages.get(0) is None


def test_a_page_that_is_asked_for_outlives_those_that_are_not() -> None:
    pages = new_map()
    for number in range(20 * MIN_PAGES):
        pages.install(number, [])
        assert pages.get(0) is not None
    assert pages.evictions > 10 * MIN_PAGES


def test_stamps_come_back() -> None:
    pages, table = new_map(), SimulatedTable(World(1))
    pages.create(1)
    set_entry(pages, 256, 1)
    table.apply(checkpoint(pages, stamp=12))
    fresh = new_map()
    fresh.install(1, table.items(*fresh.key_range(1)))
    assert fresh.stamp(1) == 12
    assert fresh.stamp(2) == 0


def test_a_damaged_value_is_told() -> None:
    pages, table = new_map(), SimulatedTable(World(1))
    pages.create(1)
    set_entry(pages, 256, 1)
    table.apply(checkpoint(pages))
    key = table.keys[0]
    assert unpack_value(key, table.values[key])
    table.values[key] = table.values[key][:-1] + b"\xff"
    with pytest.raises(DamagedValueError):
        new_map().install(1, table.items(*pages.key_range(1)))


def test_there_is_one_checkpoint_at_a_time() -> None:
    pages = new_map()
    pages.create(0)
    set_entry(pages, 1, 1)
    pages.freeze()
    with pytest.raises(InvariantError):
        pages.freeze()


def test_pages_that_are_taken_out_are_written_from_where_they_are() -> None:
    pages, table = new_map(), SimulatedTable(World(1))
    pages.create(0)
    set_entry(pages, 1, 42)
    pages.freeze()
    taken = dict(pages.take_out(0, 1))
    assert pages.get(0) is None
    batch = SimulatedBatch()
    for _ in pages.encode(batch, {}, taken, {}):
        pass
    pages.thaw()
    table.apply(batch.changes)
    assert new_map().install(0, table.items(*pages.key_range(0)))[1] == 42
