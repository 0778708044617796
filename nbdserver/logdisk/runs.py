"""Runs in arrays of addresses: how much of them one call can do."""

from __future__ import annotations

from array import array


def run_length(values: array[int], at: int, step: int) -> int:
    """How many values from `at` on rise by `step` each."""
    expected = values[at]
    for index in range(at, len(values)):
        if values[index] != expected:
            return index - at
        expected += step
    return len(values) - at


def same_length(values: array[int], at: int) -> int:
    """How many values from `at` on are equal."""
    first = values[at]
    if not at and values.count(first) == len(values):
        return len(values)
    stop = at + 1
    while stop < len(values) and values[stop] == first:
        stop += 1
    return stop - at
