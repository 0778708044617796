"""A holder stops believing in its lease before the registry ends it, however late anything is."""

import random
from collections.abc import Callable

import pytest

from metadata.kept_lease import DRIFT, KeptLease
from tests.simulation.world import SimulatedClock, World

TTL_S = 10.0


class SlowRegistry:
    """Counts a lease from when a renewal arrived; requests and answers take their time or are lost."""

    def __init__(self, clock: SimulatedClock, rng: random.Random, trouble: float, rate: float) -> None:
        self._clock = clock
        self._rng = rng
        self._trouble = trouble
        self._rate = rate
        """How many of the registry's seconds go by in one of the holder's."""
        self.ends_s = clock.now() + TTL_S / rate
        self.renewals = 0

    def renew(self, done: Callable[[float | None], None]) -> None:
        self.renewals += 1
        is_lost, is_unheard = (self._rng.random() < self._trouble / 2 for _ in range(2))
        there_s, back_s = (self._rng.expovariate(1 / (self._trouble * 4 + 0.01)) for _ in range(2))

        def arrive() -> None:
            has_ended = self._clock.now() >= self.ends_s
            if not has_ended:
                self.ends_s = self._clock.now() + TTL_S / self._rate
            answer = None if is_unheard else 0.0 if has_ended else TTL_S
            self._clock.call_later(back_s, lambda: done(answer))

        if is_lost:
            self._clock.call_later(3.0, lambda: done(None))
        else:
            self._clock.call_later(there_s, arrive)


@pytest.mark.parametrize("seed", range(200))
def test_no_holder_believes_in_a_lease_that_has_ended(seed: int) -> None:
    rng = random.Random(seed)
    world = World(seed)
    clock = SimulatedClock(world)
    sent_s = clock.now()
    world.now_s += rng.expovariate(1)
    registry = SlowRegistry(clock, rng, rng.choice([0, 0.1, 0.5, 0.9]), rate=1 + rng.uniform(-1, 1) * DRIFT * 0.99)
    world.now_s += rng.expovariate(1)
    ends: list[bool] = []
    lease = KeptLease(clock, 1, TTL_S, sent_s, registry.renew, ends.append)
    for _ in range(100):
        clock.run(rng.expovariate(1))
        if rng.random() < 0.05:
            world.now_s += rng.uniform(0, TTL_S * 1.5)
        now_s = clock.now()
        if now_s < lease.valid_until_s:
            assert now_s < registry.ends_s
            assert not ends
    clock.run(3 * TTL_S)
    assert ends in ([], [True])
    assert (lease.valid_until_s > clock.now()) == (not ends)


def test_a_lease_in_good_health_is_renewed_thrice_in_its_time() -> None:
    clock = SimulatedClock(World(0))
    registry = SlowRegistry(clock, random.Random(0), 0, 1)
    granted_s = clock.now()
    lease = KeptLease(clock, 1, TTL_S, granted_s, registry.renew, _never)
    assert lease.valid_until_s == pytest.approx(granted_s + TTL_S * 0.99), "less what this clock may be slow"
    clock.run(TTL_S * 10)
    assert 29 <= registry.renewals <= 31
    lease.release()
    lease.release()
    assert lease.valid_until_s == 0


def test_an_unanswered_renewal_is_sent_again_sooner() -> None:
    clock = SimulatedClock(World(0))
    sent_s: list[float] = []
    ends: list[bool] = []

    def unanswered(done: Callable[[float | None], None]) -> None:
        sent_s.append(clock.now())
        clock.call_soon(lambda: done(None))

    granted_s = clock.now()
    KeptLease(clock, 1, TTL_S, granted_s, unanswered, ends.append)
    clock.run(TTL_S * 2)
    assert ends == [True]
    assert len(sent_s) >= 8
    assert sent_s[-1] < granted_s + TTL_S


def test_what_the_registry_has_dropped_is_lost_at_once() -> None:
    clock = SimulatedClock(World(0))
    ends: list[bool] = []
    lease = KeptLease(clock, 1, TTL_S, clock.now(), lambda done: clock.call_soon(lambda: done(0.0)), ends.append)
    clock.run(TTL_S * 0.4)
    assert (ends, lease.valid_until_s) == ([True], 0)


@pytest.mark.parametrize("end", [KeptLease.release, KeptLease.drop])
def test_what_was_given_up_is_not_renewed_nor_lost(end: Callable[[KeptLease], None]) -> None:
    clock = SimulatedClock(World(0))
    registry = SlowRegistry(clock, random.Random(0), 0, 1)
    ends: list[bool] = []
    lease = KeptLease(clock, 1, TTL_S, clock.now(), registry.renew, ends.append)
    clock.run(TTL_S / 3 + 0.001)
    end(lease)
    renewals = registry.renewals
    clock.run(TTL_S * 2)
    assert ends == ([False] if end is KeptLease.release else [])
    assert registry.renewals == renewals


def _never(was_lost: bool) -> None:
    raise AssertionError(was_lost)
