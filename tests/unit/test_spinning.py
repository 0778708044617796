"""When the network spins: only while it pays, and not where another process needs the processor."""

import pytest

from nbdserver.host.spinning import CREDIT_LIMIT, INTERRUPTED_S, REST_S, SPIN_S, Spinning
from nbdserver.node.data import Place

SOON_S = SPIN_S / 3
LATE_S = SPIN_S * 1.5


class Day:
    """A network's life: `sleep` and `spin` until data arrives `after_s` the last batch."""

    def __init__(self) -> None:
        self.spinning = Spinning()
        self.now_s = 1000.0
        self.spinning.batch_ended(self.now_s)

    def arrive(self, after_s: float) -> None:
        """As the network does it: spin if that is wanted, sleep if it was in vain."""
        if self.spinning.wanted:
            found = after_s < SPIN_S
            self.spinning.spun(self.now_s + min(after_s, SPIN_S), found)
            if found:
                self.batch(after_s)
                return
        self.spinning.woken(self.now_s + after_s)
        self.batch(after_s)

    def batch(self, after_s: float) -> None:
        self.now_s += after_s + 10e-6
        self.spinning.batch_ended(self.now_s)


def test_it_sleeps_until_arrivals_come_soon_and_spins_while_they_do() -> None:
    day = Day()
    assert not day.spinning.wanted
    for _ in range(100):
        day.arrive(SOON_S)
        assert day.spinning.wanted


def test_arrivals_that_come_late_are_slept_for_after_few_spins() -> None:
    day = Day()
    for _ in range(100):
        day.arrive(SOON_S)
    spins = 0
    for _ in range(100):
        spins += day.spinning.wanted
        day.arrive(LATE_S)
    assert spins <= CREDIT_LIMIT
    assert not day.spinning.wanted


def test_an_interrupted_spin_means_that_the_processor_is_needed_elsewhere() -> None:
    day = Day()
    for _ in range(100):
        day.arrive(SOON_S)
    day.spinning.spun(day.now_s + 2 * INTERRUPTED_S, True)
    day.batch(2 * INTERRUPTED_S)
    for _ in range(100):
        day.arrive(SOON_S)
        assert not day.spinning.wanted
    day.arrive(REST_S)
    day.arrive(SOON_S)
    assert day.spinning.wanted


def test_what_came_while_the_loop_was_held_came_soon() -> None:
    """A sync on the loop: the request that came meanwhile is no reason to sleep before the next one."""
    spinning = Spinning()
    now_s = 1000.0
    for _ in range(100):
        spinning.batch_ended(now_s)
        spinning.woken(now_s + LATE_S, held_until_s=now_s + LATE_S - SOON_S)
        assert spinning.wanted
        now_s += 2 * LATE_S
    for _ in range(CREDIT_LIMIT):
        spinning.batch_ended(now_s)
        spinning.woken(now_s + LATE_S, held_until_s=now_s - LATE_S)
        now_s += 2 * LATE_S
    assert not spinning.wanted


def test_a_network_without_credit_never_spins() -> None:
    spinning = Spinning(0)
    for number in range(100):
        spinning.batch_ended(1000.0 + number * SOON_S)
        spinning.woken(1000.0 + (number + 0.5) * SOON_S)
        assert not spinning.wanted


@pytest.mark.parametrize(
    ("workers", "cores", "may_spin"), [(1, 1, True), (1, 2, True), (2, 2, False), (2, 4, True), (4, 4, False)]
)
def test_workers_spin_only_if_a_core_is_left_for_those_who_are_waited_for(
    workers: int, cores: int, may_spin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(cores)))
    assert Place(0, workers, 0, ()).may_spin is may_spin
