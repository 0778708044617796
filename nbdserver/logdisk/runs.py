"""Runs in arrays: comparisons in C that keep the maps from being walked block by block.

Theory. An array of unsigned numbers, read as one long integer, is `first * ones + steps` if its values rise by a step:
`ones` has a 1 where each value begins, `steps` what each is more than the first. So a run is told, or made, by a
multiplication and an addition instead of a Python number for each value. Nothing is carried from one value into the
next as long as the last one fits.
"""

from __future__ import annotations

from array import array
from functools import cache

from metadata.pages import PAGE_BLOCKS


@cache  # a few steps, and counts up to those of a page
def _ones_and_steps(value_bits: int, step: int, count: int) -> tuple[int, int]:
    ones = sum(1 << value_bits * index for index in range(count))
    return ones, sum(index * step << value_bits * index for index in range(count))


def rising(typecode: str, first: int, step: int, count: int) -> array[int]:
    """At most a page of values that rise by `step`; OverflowError if the last one does not fit."""
    made = array(typecode)
    ones, steps = _ones_and_steps(made.itemsize * 8, step, count)
    made.frombytes((first * ones + steps).to_bytes(made.itemsize * count, "little"))
    return made


def run_length(values: array[int], at: int, step: int) -> int:
    """How many values from `at` on rise by `step` each."""
    total = len(values)
    first = values[at]
    count = total - at
    if 1 < count <= PAGE_BLOCKS and values[-1] == first + (count - 1) * step and values[at + 1] == first + step:
        # Usually the whole rest is one run.
        ones, steps = _ones_and_steps(values.itemsize * 8, step, count)
        if int.from_bytes(values[at:] if at else values, "little") == first * ones + steps:
            return count
    expected = first
    for index in range(at, total):
        if values[index] != expected:
            return index - at
        expected += step
    return count


def same_length(values: array[int], at: int) -> int:
    """How many values from `at` on are equal."""
    first = values[at]
    if not at and values.count(first) == len(values):
        return len(values)
    stop = at + 1
    while stop < len(values) and values[stop] == first:
        stop += 1
    return stop - at
