"""Sets of numbers as disjoint ranges: an immutable tuple of (first, stop) pairs in order, which never touch. In
messages they are runs, (first, count).

They are immutable so that a checkpoint can keep one while it goes on being changed. Everything here is linear in the
number of ranges, which the owner bounds.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

Ranges = tuple[tuple[int, int], ...]


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The ranges in order, those that touch made one."""
    found: list[tuple[int, int]] = []
    for first, stop in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((first, stop))
    return tuple(found)


def within(ranges: Ranges, first: int, stop: int) -> list[tuple[int, int]]:
    """What of the ranges lies in first <= number < stop."""
    return [(max(start, first), min(end, stop)) for start, end in ranges if start < stop and end > first]


def runs_of(numbers: Iterable[int], most: int = 0) -> tuple[tuple[int, int], ...]:
    """Rising numbers as runs: (first, count). `most`: there are no more of them than that, for the price of numbers
    between them that are none; the narrowest gaps are closed."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    if most and len(runs) > most:
        gaps = [second[0] - sum(first) for first, second in pairwise(runs)]
        widest = sorted(gaps)[len(runs) - most - 1]  # of those that are closed
        ranges = joined((first, first + count + widest) for first, count in runs)
        return tuple((first, stop - widest - first) for first, stop in ranges)
    return tuple(runs)


def numbers_of(runs: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The numbers of runs."""
    return (number for first, count in runs for number in range(first, first + count))
