"""Fill alarms: each crossing told once, up and down, and nothing on the edge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.alarms import FILE_SYSTEM, HYSTERESIS, THRESHOLDS, Alarms, Crossing, Fill, cross

UP, DOWN = True, False


@pytest.mark.parametrize(
    ("level", "used", "size", "expected", "crossed"),
    [
        (0, 0, 1000, 0, []),
        (0, 799, 1000, 0, []),
        (0, 800, 1000, 80, [(80, UP)]),
        (80, 800, 1000, 80, []),
        (80, 799, 1000, 80, []),  # on the edge
        (80, 780, 1000, 80, []),
        (80, 779, 1000, 0, [(80, DOWN)]),
        (0, 899, 1000, 80, [(80, UP)]),
        (0, 950, 1000, 95, [(80, UP), (90, UP), (95, UP)]),
        (80, 1000, 1000, 95, [(90, UP), (95, UP)]),
        (95, 930, 1000, 95, []),
        (95, 929, 1000, 90, [(95, DOWN)]),
        (95, 879, 1000, 80, [(95, DOWN), (90, DOWN)]),
        (95, 0, 1000, 0, [(95, DOWN), (90, DOWN), (80, DOWN)]),
        (90, 2000, 1000, 95, [(95, UP)]),  # a limit was lowered below what there is
        (95, 950, 2000, 0, [(95, DOWN), (90, DOWN), (80, DOWN)]),  # or raised
        (90, 950, 0, 0, [(90, DOWN), (80, DOWN)]),  # or taken away
        (0, 950, 0, 0, []),
    ],
)
def test_the_table_of_crossings(
    level: int, used: int, size: int, expected: int, crossed: list[tuple[int, bool]]
) -> None:
    assert cross(level, used, size) == (expected, [Crossing(*each) for each in crossed])


@given(st.sampled_from((0, *THRESHOLDS)), st.integers(0, 1 << 50), st.integers(0, 1 << 50))
def test_looking_again_at_the_same_crosses_nothing(level: int, used: int, size: int) -> None:
    after, crossings = cross(level, used, size)
    assert cross(after, used, size) == (after, [])
    assert {crossing.is_rising for crossing in crossings} <= {after > level}
    assert len(crossings) == abs((0, *THRESHOLDS).index(after) - (0, *THRESHOLDS).index(level))


@given(st.integers(1 << 12, 1 << 40), st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_level_that_swings_by_less_than_the_hysteresis_is_told_once(size: int, swings: list[float]) -> None:
    level = 0
    told: list[Crossing] = []
    for swing in swings:
        level, crossings = cross(level, int(size * (0.80 + (swing - 0.5) * HYSTERESIS / 100)), size)
        told += crossings
    assert told in ([], [Crossing(80, UP)])


def test_alarms_keep_a_level_for_each_subject_and_forget_what_is_gone() -> None:
    alarms = Alarms()
    crossed = alarms.look([Fill(FILE_SYSTEM, 50, 100), Fill("volume disk0", 91, 100)])
    assert [(fill.subject, crossing.percent, crossing.is_rising) for fill, crossing in crossed] == [
        ("volume disk0", 80, UP),
        ("volume disk0", 90, UP),
    ]
    assert (alarms.level(FILE_SYSTEM), alarms.level("volume disk0"), alarms.level("nobody")) == (0, 90, 0)
    assert alarms.look([Fill(FILE_SYSTEM, 50, 100)]) == []
    assert alarms.level("volume disk0") == 0
    assert list(alarms.fills) == [FILE_SYSTEM]


@pytest.mark.parametrize(
    ("used", "size", "percent"), [(0, 0, 0.0), (9499, 10000, 94.9), (95, 100, 95.0), (3, 2, 150.0)]
)
def test_a_fill_is_shown_in_tenths_of_a_percent(used: int, size: int, percent: float) -> None:
    assert Fill("x", used, size).percent == percent
