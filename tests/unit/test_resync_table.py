"""The bitmap of regions that are to be fetched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.resync_table import ResyncTable
from protocol.disk import DamagedValueError, pack_value

RUNS = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 6000)), max_size=4)


class Values(dict[bytes, bytes]):
    """A batch, and what comes of it."""

    def put(self, key: bytes, value: bytes) -> None:
        self[key] = value

    def delete(self, key: bytes) -> None:
        self.pop(key, None)


def members(runs: list[tuple[int, int]]) -> set[int]:
    return {region for first, count in runs for region in range(first, first + count)}


@given(RUNS, RUNS, RUNS)
def test_it_is_a_set_that_outlives_its_process(
    added: list[tuple[int, int]], removed: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    stored = Values()
    table = ResyncTable()
    table.add(added)
    table.put_changes(stored)
    table.remove(removed)
    table.add(more)
    table.put_changes(stored)
    expected = (members(added) - members(removed)) | members(more)
    again = ResyncTable()
    again.load(sorted(stored.items()))
    for each in (table, again):
        assert list(each) == sorted(expected)
        assert len(each) == len(expected)
        assert bool(each) == bool(expected)


def test_a_value_that_is_no_page_is_refused() -> None:
    key = b"B" + bytes(4)
    with pytest.raises(DamagedValueError):
        ResyncTable().load([(key, pack_value(key, b"x"))])
