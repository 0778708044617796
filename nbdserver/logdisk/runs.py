"""Runs in arrays: the comparisons in C that keep the maps from being walked block by block."""

from __future__ import annotations

from array import array


def run_length(values: array[int], at: int, step: int) -> int:
    """How many values from `at` on rise by `step` each."""
    total = len(values)
    first = values[at]
    count = total - at
    if count > 1 and values[total - 1] == first + (count - 1) * step and values[at + 1] == first + step:
        # Usually the whole rest is one run: one comparison in C.
        if not at and values == array(values.typecode, range(first, first + count * step, step)):
            return count
        if at and values[at:] == array(values.typecode, range(first, first + count * step, step)):
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
