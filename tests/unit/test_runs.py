"""Runs in arrays, against counting one by one."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from nbdserver.logdisk.runs import run_length, same_length

STEPPED = st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 30)), min_size=1, max_size=6)


def slow_run(values: array[int], at: int, step: int) -> int:
    count = 1
    while at + count < len(values) and values[at + count] == values[at] + count * step:
        count += 1
    return count


def slow_same(values: array[int], at: int) -> int:
    count = 1
    while at + count < len(values) and values[at + count] == values[at]:
        count += 1
    return count


@given(STEPPED, st.sampled_from([1, 4096]), st.data())
def test_a_run_is_as_long_as_counting_says(pieces: list[tuple[int, int]], step: int, data: st.DataObject) -> None:
    values = array("Q")
    for first, count in pieces:
        values.extend(range(first, first + count * step, step))
    at = data.draw(st.integers(0, len(values) - 1))
    assert run_length(values, at, step) == slow_run(values, at, step)


@given(STEPPED, st.data())
def test_equal_values_are_as_many_as_counting_says(pieces: list[tuple[int, int]], data: st.DataObject) -> None:
    values = array("Q")
    for value, count in pieces:
        values.extend([value % 3] * count)
    at = data.draw(st.integers(0, len(values) - 1))
    assert same_length(values, at) == slow_same(values, at)


def test_a_run_that_only_looks_whole_from_its_ends_is_not_whole() -> None:
    values = array("Q", [0, 1, 5, 3, 4])
    assert run_length(values, 0, 1) == 2
    assert run_length(values, 3, 1) == 2
