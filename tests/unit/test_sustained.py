"""The theory that sustained writes are compared with."""

import pytest

from tests.benchmark.sustained import steps, theoretical_amplification


@pytest.mark.parametrize(("live_share", "amplification"), [(0.5, 1.26), (0.8, 2.69), (0.9, 5.18)])
def test_amplification_grows_with_the_live_share(live_share: float, amplification: float) -> None:
    assert theoretical_amplification(live_share) == pytest.approx(amplification, abs=0.01)


def test_a_second_in_which_nothing_was_written_is_left_out() -> None:
    samples = [
        {"at_s": 1.0, "written": 0.0, "appended": 0.0},
        {"at_s": 2.0, "written": 40960.0, "appended": 81920.0},
        {"at_s": 3.0, "written": 40960.0, "appended": 90000.0},
        {"at_s": 5.0, "written": 81920.0, "appended": 130960.0},
    ]
    assert [(step["writes_per_s"], step["amplification"]) for step in steps(samples)] == [(10.0, 2.0), (5.0, 1.0)]
