"""Numbers as runs."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from metadata.ranges import numbers_of, runs_of


def test_neighbouring_numbers_are_one_run() -> None:
    assert runs_of([]) == ()
    runs = runs_of([1, 2, 3, 7, 9, 10])
    assert runs == ((1, 3), (7, 1), (9, 2))
    assert list(numbers_of(runs)) == [1, 2, 3, 7, 9, 10]


@given(st.sets(st.integers(0, 200)), st.integers(1, 20))
def test_runs_that_are_too_many_are_joined_over_the_narrowest_gaps(numbers: set[int], most: int) -> None:
    exact, bounded = runs_of(sorted(numbers)), runs_of(sorted(numbers), most)
    assert len(bounded) <= most
    assert numbers <= set(numbers_of(bounded))
    assert bounded == runs_of(numbers_of(bounded))
    if len(exact) <= most:
        assert bounded == exact
    elif len(bounded) > 1:
        gaps = [second[0] - sum(first) for first, second in pairwise(bounded)]
        closed = [second[0] - sum(first) for first, second in pairwise(exact)]
        assert sorted(closed)[-len(gaps) :] == sorted(gaps)
