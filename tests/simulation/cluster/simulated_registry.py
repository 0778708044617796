"""The twin of EtcdRegistry: one registry for a whole cluster, and what can lie between it and its clients.

Theory: the truth is in one `RegistryTwin`; a `SimulatedRegistry` is one life's client of it. What is simulated is
everything that a client can notice: answers that are late or never come, changes that are made after the client gave
them up, silence for all or for one machine, history that is forgotten, watches that break, leases that run out in
virtual time, or too early.

Rules of this file
- A call is done by the twin at one moment between asking and answering, or (a change whose answer is lost) later.
- A client keeps its leases with production's own `KeptLease`, and takes no registry that production's `RegistryGuard`
  refuses. How far the registry is, the machine remembers as seldom as a node does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from metadata.kept_lease import KeptLease
from metadata.registry_calls import (
    MAX_LEASES,
    MAX_PENDING_CALLS,
    MAX_WATCHES,
    Change,
    Event,
    Health,
    Outcome,
    Reading,
    Swap,
    Unavailable,
    check_changes,
    check_key,
    check_prefix,
    check_ttl,
)
from metadata.registry_guard import RegistryGuard, RegistryPast
from metadata.seams import Clock, Lease
from tests.simulation.cluster.registry_twin import RegistryTwin
from tests.simulation.cluster.scheduler import Life

ANSWER_S = 0.002  # mean, of a call there and back
CALL_LIMIT_S = 3.0  # after which a client gives up
LATE_S = 20.0  # at most, after which a change that was given up is made yet
RECONNECT_S = 2.0  # at most, of a watch that broke
REMEMBER_S = 5.0  # as nbdserver/node/shared_registry.py

Answer = TypeVar("Answer")
Changes = tuple[tuple[str, bytes | None], ...]


class _Watch:
    """One life's view of a range: at most one event is on its way."""

    def __init__(
        self, registry: "SimulatedRegistry", prefix: str, changed: Callable[[Event], None], after: int | None
    ) -> None:
        self._registry = registry
        self._twin = registry.twin
        self._prefix = prefix
        self._changed: Callable[[Event], None] | None = changed
        self._told = after  # everything up to that revision
        self._life = registry.twin.past.life  # of the registry that this is a revision of
        self._is_busy = False
        self._times_broken = 0
        self._twin.watches[self] = None
        self.wake()

    def cancel(self) -> None:
        self._changed = None
        self._twin.watches.pop(self, None)
        self._registry.watch_ended(self)

    def wake(self) -> None:
        """There may be something to tell."""
        if not self._is_busy:
            self._is_busy = True
            self._twin.scheduler.after(self._registry.half_way_s(), self._look, self._times_broken)

    def broken(self) -> None:
        """What is on its way does not arrive; it goes on after a while."""
        self._times_broken += 1
        self._is_busy = True
        wait_s = RECONNECT_S * self._twin.scheduler.random.random()
        self._twin.scheduler.after(wait_s, self._look, self._times_broken)

    def _look(self, times_broken: int) -> None:
        """The registry's moment: see what there is to tell."""
        twin, registry = self._twin, self._registry
        if self._changed is None or times_broken != self._times_broken:
            return
        if not registry.life.alive:
            twin.watches.pop(self, None)
            return
        if not registry.is_reachable:
            self.broken()
            return
        event = self._next()
        if event is None:
            self._told = twin.revision
            self._is_busy = False
            return
        at_s = twin.scheduler.now_s + registry.half_way_s()
        twin.scheduler.at(at_s, registry.life, self._arrive, event, times_broken)

    def _next(self) -> Event | None:
        twin = self._twin
        if self._life != twin.past.life:
            self._life, self._told = twin.past.life, None
        if self._told is None or self._told < twin.forgotten or self._told > twin.revision:
            return Event(twin.revision, True, twin.range(self._prefix).items)
        for revision, changes in twin.history:
            if revision > self._told:
                seen = tuple(change for change in changes if change[0].startswith(self._prefix))
                if seen:
                    return Event(revision, False, seen)
        return None

    def _arrive(self, event: Event, times_broken: int) -> None:
        if self._changed is None or times_broken != self._times_broken:
            return
        self._told = event.revision
        self._is_busy = False
        self.wake()
        self._changed(event)


class SimulatedRegistry:
    """The Registry seam of one life."""

    def __init__(
        self,
        twin: RegistryTwin,
        clock: Clock,
        life: Life,
        past: RegistryPast | None = None,
        remember: Callable[[RegistryPast], None] = lambda past: None,
    ) -> None:
        """`past` is what the machine remembers of the registry, `remember` has it remember more."""
        self.twin = twin
        self.life = life
        self.guard = RegistryGuard(past)
        self._remember = remember
        self._remembered = past
        self._remembered_s = clock.now()
        self._clock = clock
        self._scheduler = twin.scheduler
        self._random = twin.scheduler.random
        self._closed = False
        self._leases: dict[int, KeptLease] = {}
        self._watches: dict[_Watch, None] = {}
        self._pending: dict[int, Callable[[str], None]] = {}  # how each unanswered call is given up
        self._last_call = 0
        self._connected = True
        self._since_s = clock.now()
        self._last_error = ""

    # --- the seam ---

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        check_key(key)
        self._ask(partial(self.twin.get, key), done, Unavailable)

    def range_later(self, prefix: str, done: Callable[[Reading | Unavailable], None]) -> None:
        check_prefix(prefix)
        self._ask(partial(self.twin.range, prefix), done, Unavailable)

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        check_changes(changes)
        asked = tuple(changes)
        self._ask(
            partial(self.twin.swap, asked),
            done,
            lambda reason: Swap(Outcome.UNKNOWN, reason=reason),
            lambda reason: Swap(Outcome.NOT_DONE, reason=reason),
        )

    def grant_later(self, ttl_s: float, lost: Callable[[], None], done: Callable[[Lease | Unavailable], None]) -> None:
        check_ttl(ttl_s)
        sent_s = self._clock.now()

        def granted(answer: int | Unavailable) -> None:
            if isinstance(answer, Unavailable):
                done(answer)
            else:
                done(self._keep(answer, ttl_s, sent_s, lost))

        if len(self._leases) >= MAX_LEASES:
            self._clock.call_soon(lambda: done(Unavailable(f"there are {MAX_LEASES} leases already")))
            return
        self._ask(partial(self.twin.grant, ttl_s), granted, Unavailable)

    def watch(self, prefix: str, changed: Callable[[Event], None], after: int | None = None) -> _Watch:
        check_prefix(prefix)
        if len(self._watches) >= MAX_WATCHES:
            raise ValueError(f"there are {MAX_WATCHES} watches already")
        watch = _Watch(self, prefix, changed, after)
        self._watches[watch] = None
        if self._closed:
            watch.cancel()
        return watch

    def health(self) -> Health:
        return Health(
            self._connected and not self._closed, self._since_s, "simulated:1", self._last_error, len(self._pending)
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for give_up in list(self._pending.values()):
            give_up("the registry is closed")
        for lease in self._leases.values():
            lease.drop()
        for watch in list(self._watches):
            watch.cancel()

    # --- for watches ---

    @property
    def is_reachable(self) -> bool:
        """Whether the registry answers this machine now, and is the one that it has seen."""
        if not self.twin.reaches(self.life.machine_name) or self.guard.admit(self.twin.past, self.twin.home):
            return False
        past, now_s = self.guard.past, self._scheduler.now_s
        if past is not None and (now_s - self._remembered_s > REMEMBER_S or past.is_another_than(self._remembered)):
            self._remembered, self._remembered_s = past, now_s
            self._remember(past)
        return True

    def half_way_s(self) -> float:
        """From here to the registry, or back."""
        delay_s = self._random.expovariate(2.0 / ANSWER_S)
        if self.twin.delay and self._random.random() < self.twin.delay:
            self.twin.hits["registry delay"] += 1
            delay_s += self._random.choice([0.05, 0.5, 0.5, 2.0]) * self._random.random()
        return delay_s

    def watch_ended(self, watch: _Watch) -> None:
        """It was cancelled."""
        self._watches.pop(watch, None)

    # --- calls ---

    def _ask(
        self,
        act: Callable[[], Any],
        done: Callable[[Any], None],
        unknown: Callable[[str], Any],
        not_done: Callable[[str], Any] | None = None,
    ) -> None:
        """Have the twin `act`, and answer once: what it says, or `unknown`, or `not_done` if it was not sent."""
        not_done = not_done or unknown
        if self._closed or len(self._pending) >= MAX_PENDING_CALLS:
            refusal = not_done("the registry is closed" if self._closed else f"{MAX_PENDING_CALLS} calls wait already")
            self._clock.call_soon(lambda: done(refusal))
            return
        self._last_call += 1
        number, cluster_id = self._last_call, self.twin.cluster_id
        scheduler = self._scheduler
        timer = scheduler.at(
            scheduler.now_s + CALL_LIMIT_S, self.life, self._give_up, number, f"no answer in {CALL_LIMIT_S:g} s"
        )

        def answer(result: Any, error: str = "") -> None:
            if self._pending.pop(number, None) is not None:
                timer.cancel()
                self._heard(error)
                done(result)

        def give_up(reason: str) -> None:
            if self._pending.pop(number, None) is not None:
                timer.cancel()
                self._clock.call_soon(lambda: done(unknown(reason)))

        self._pending[number] = give_up

        def arrive() -> None:
            if not self.is_reachable or self.twin.cluster_id != cluster_id:
                self._is_lost(act, cluster_id)
                return
            result = act()
            if self.twin.unknown and self._random.random() < self.twin.unknown:
                self.twin.hits["registry unknown"] += 1
                return  # the answer does not come back
            scheduler.at(scheduler.now_s + self.half_way_s(), self.life, answer, result)

        is_reachable = self.is_reachable
        if not is_reachable and (self.guard.refused or self._random.random() < 0.5):
            # There is no connection, and this is noticed before anything was sent.
            at_s = scheduler.now_s + CALL_LIMIT_S * self._random.random()
            reason = self.guard.refused or "no connection to any endpoint"
            scheduler.at(at_s, self.life, answer, not_done(reason), reason)
        elif self.twin.unknown and self._random.random() < self.twin.unknown:
            self.twin.hits["registry unknown"] += 1
            self._is_lost(act, cluster_id)
        else:
            scheduler.after(self.half_way_s(), arrive)

    def _is_lost(self, act: Callable[[], Any], cluster_id: int) -> None:
        """The request lies somewhere: it is dropped, or arrives when its sender does not wait any more."""
        if self._random.random() < 0.5:
            late_s = LATE_S * self._random.random()
            self._scheduler.after(late_s, self._arrives_late, act, cluster_id)

    def _arrives_late(self, act: Callable[[], Any], cluster_id: int) -> None:
        if self.is_reachable and self.twin.cluster_id == cluster_id:
            act()

    def _give_up(self, number: int, reason: str) -> None:
        give_up = self._pending.get(number)
        if give_up is not None:
            self._heard(reason)
            give_up(reason)

    def _heard(self, error: str) -> None:
        """Note how the connection fares."""
        if error:
            self._last_error = error
        if self._connected == bool(error):
            self._connected = not error
            self._since_s = self._clock.now()

    # --- leases ---

    def _keep(self, lease_id: int, ttl_s: float, sent_s: float, lost: Callable[[], None]) -> KeptLease:
        def renew(answered: Callable[[float | None], None]) -> None:
            self._ask(partial(self.twin.renew, lease_id), answered, lambda reason: None)

        def ended(was_lost: bool) -> None:
            self._leases.pop(lease_id, None)
            if was_lost:
                lost()
            else:
                self._ask(partial(self.twin.revoke, lease_id), lambda answer: None, Unavailable)

        lease = KeptLease(self._clock, lease_id, ttl_s, sent_s, renew, ended)
        self._leases[lease_id] = lease
        return lease
