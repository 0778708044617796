"""Which scrub is next and what is known of each: decided from times that are told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.scrub_plan import DONE, FAILED, NEVER, RUNNING, STOPPED, WAITING, ScrubPlan, ScrubState, due

DAY = 86400.0
MONTH = 30 * DAY


@pytest.mark.parametrize(
    ("state", "since_s", "interval_s", "now_s", "expected"),
    [
        (NEVER, 0.0, MONTH, 10 * DAY, False),
        (NEVER, 0.0, MONTH, MONTH, True),
        (NEVER, 0.0, 0.0, 1000 * DAY, False),
        (DONE, 10 * DAY, MONTH, 39 * DAY, False),
        (DONE, 10 * DAY, MONTH, 40 * DAY, True),
        (STOPPED, 10 * DAY, MONTH, 39 * DAY, False),
        (FAILED, 10 * DAY, MONTH, 40 * DAY, True),
        (DONE, 10 * DAY, MONTH, 9 * DAY, True),  # the clock was set back
        (WAITING, 0.0, MONTH, 1000 * DAY, False),
        (RUNNING, 0.0, MONTH, 1000 * DAY, False),
    ],
)
def test_when_the_next_one_is_due(state: str, since_s: float, interval_s: float, now_s: float, expected: bool) -> None:
    assert due(ScrubState(state=state, since_s=since_s), interval_s, now_s) is expected


def test_a_new_family_is_scrubbed_after_the_interval_and_a_gone_one_is_forgotten() -> None:
    plan = ScrubPlan()
    plan.know(["a", "b"], 0.0)
    plan.know(["b", "c"], 10 * DAY)
    assert plan.schedule(MONTH, MONTH) == ["b"]
    assert plan.schedule(MONTH, MONTH) == []
    assert plan.schedule(MONTH, 40 * DAY) == ["c"]
    assert plan.active() == ["b", "c"]
    assert plan.state("a") == ScrubState()


def test_who_waits_longest_is_next_and_who_runs_comes_first() -> None:
    plan = ScrubPlan()
    plan.know("abc", 0.0)
    for family in "cab":
        plan.change(family, plan.state(family).waiting())
    assert plan.next() == "c"
    plan.change("b", plan.state("b").running(5.0))
    assert plan.next() == "b"
    plan.change("b", plan.state("b").ended(DONE, 9.0))
    assert plan.next() == "c"
    plan.change("a", plan.state("a").waiting())  # asked for again: it keeps its place
    assert plan.active() == ["c", "a"]


def test_only_a_whole_scrub_counts_as_completed() -> None:
    state = ScrubState(since_s=1.0).waiting().running(2.0).ended(DONE, 3.0)
    assert (state.completed_s, state.since_s) == (3.0, 3.0)
    state = state.waiting().running(4.0).ended(STOPPED, 5.0)
    assert (state.completed_s, state.since_s) == (3.0, 5.0)
    assert state.waiting().running(6.0).ended(FAILED, 7.0, "it broke").reason == "it broke"


STATES = st.builds(
    ScrubState,
    state=st.sampled_from([NEVER, WAITING, RUNNING, DONE]),
    reason=st.text(max_size=5),
    sequence=st.integers(0, 1 << 60),
    since_s=st.floats(0, 1e12),
    done_bytes=st.integers(0, 1 << 60),
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), STATES, max_size=5))
def test_what_is_written_is_read_again(states: dict[str, ScrubState]) -> None:
    plan = ScrubPlan()
    for family, state in states.items():
        plan.change(family, state)
    again = ScrubPlan(plan.encode())
    assert again.encode() == plan.encode()
    assert {family: again.state(family) for family in states} == states
    assert again.active() == plan.active()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version": 2, "families": {}}', '{"version": 1}', '{"version": 1, "families": {"a": 5}}',
     '{"version": 1, "families": {"a": {"state": 5}}}', '{"version": 1, "families": {"a": {"new": ""}}}'],
)  # fmt: skip
def test_a_file_that_cannot_be_understood_is_nothing(text: str) -> None:
    assert ScrubPlan(text).active() == []
    assert ScrubPlan(text).encode() == ScrubPlan().encode()
