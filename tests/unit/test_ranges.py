"""Numbers as runs."""

from metadata.ranges import runs_of


def test_neighbouring_numbers_are_one_run() -> None:
    assert runs_of([]) == ()
    assert runs_of([1, 2, 3, 7, 9, 10]) == ((1, 3), (7, 1), (9, 2))
