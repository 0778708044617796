"""Numbers as runs."""

from metadata.ranges import numbers_of, runs_of


def test_neighbouring_numbers_are_one_run() -> None:
    assert runs_of([]) == ()
    runs = runs_of([1, 2, 3, 7, 9, 10])
    assert runs == ((1, 3), (7, 1), (9, 2))
    assert list(numbers_of(runs)) == [1, 2, 3, 7, 9, 10]
