"""The twin of EtcdRegistry: one registry for a whole cluster, and what can lie between it and its clients.

Theory: etcd itself is taken to be right (it is the system that others prove): one copy of the truth, each change at one
moment, revisions that rise. What is simulated is everything a client can notice of it: answers that are late or never
come, changes that are made after the client gave them up, silence for all or for one machine, history that is
forgotten, watches that break, leases that run out in virtual time, or too early.

Rules of this file
- `RegistryTwin` outlives every process; a `SimulatedRegistry` is one life's client of it.
- A call is done by the twin at one moment between asking and answering, or (a change whose answer is lost) later.
- While nobody can reach it, its leases do not run out, and afterwards each has its whole time again, as with a new
  leader of etcd.
- A client keeps its leases with production's own `KeptLease`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from metadata.kept_lease import KeptLease
from metadata.registry_calls import (
    MAX_LEASES,
    MAX_PENDING_CALLS,
    MAX_WATCHES,
    NO_LEASE,
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
from metadata.seams import Clock, Lease
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.scheduler import Life, Scheduler

ANSWER_S = 0.002  # mean, of a call there and back
CALL_LIMIT_S = 3.0  # after which a client gives up
LATE_S = 20.0  # at most, after which a change that was given up is made yet
RECONNECT_S = 2.0  # at most, of a watch that broke

Answer = TypeVar("Answer")
Changes = tuple[tuple[str, bytes | None], ...]


@dataclass
class _GrantedLease:
    """A lease as the registry knows it."""

    ttl_s: float
    ends_s: float
    keys: dict[str, None] = field(default_factory=dict)


class RegistryTwin:
    """What etcd holds, and its faults."""

    def __init__(self, scheduler: Scheduler, mix: Mix, hits: Counter[str]) -> None:
        self.scheduler = scheduler
        self.hits = hits
        self.revision = 1
        self.forgotten = 1  # changes up to this revision are not known any more
        self.history: list[tuple[int, Changes]] = []
        self.is_down = False
        self.cuts: Counter[str] = Counter()  # reasons why a machine cannot reach it
        self.watches: dict[_Watch, None] = {}
        self._values: dict[str, bytes] = {}
        self._leases: dict[int, _GrantedLease] = {}
        self._lease_of: dict[str, int] = {}
        self._last_lease_id = 1000
        self.set_mix(mix)

    def set_mix(self, mix: Mix) -> None:
        """From now on it has these faults."""
        self.delay = mix["registry delay"]
        self.unknown = mix["registry unknown"]

    # --- what a call does, at its moment ---

    def get(self, key: str) -> Reading:
        value = self._values.get(key)
        return Reading(self.revision, () if value is None else ((key, value),))

    def range(self, prefix: str) -> Reading:
        found = sorted((key for key in self._values if key.startswith(prefix)), key=str.encode)
        return Reading(self.revision, tuple((key, self._values[key]) for key in found))

    def swap(self, changes: Sequence[Change]) -> Swap:
        for change in changes:
            if change.lease_id != NO_LEASE and change.lease_id not in self._leases:
                return Swap(Outcome.NOT_DONE, reason=f"the lease for {change.key} has ended")
        if any(self._values.get(change.key) != change.expected for change in changes):
            return Swap(Outcome.LOST)
        written = [change for change in changes if not change.is_check]
        if written:
            self._write(written)
        return Swap(Outcome.SWAPPED, self.revision)

    def grant(self, ttl_s: float) -> int:
        self._last_lease_id += 1
        lease = self._leases[self._last_lease_id] = _GrantedLease(ttl_s, self.scheduler.now_s + ttl_s)
        self.scheduler.at(lease.ends_s, None, self._run_out, self._last_lease_id)
        return self._last_lease_id

    def renew(self, lease_id: int) -> float:
        """The seconds it is good for from now; 0 if it is gone."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0.0
        lease.ends_s = self.scheduler.now_s + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: int) -> None:
        """End a lease and remove its keys, as one change."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None and lease.keys:
            self._write([Change(key, self._values[key], None) for key in lease.keys])

    # --- faults ---

    def compact(self) -> None:
        """Forget history, though not always all of it."""
        self.forgotten = max(self.forgotten, self.revision - self.scheduler.random.choice([0, 1, 10]))
        self.history = [entry for entry in self.history if entry[0] > self.forgotten]

    def break_watches(self) -> None:
        """Every watch has to be resumed, each after its own time."""
        for watch in list(self.watches):
            watch.broken()

    def end_a_lease(self) -> bool:
        """Drop some lease that has not run out."""
        if self._leases:
            self.revoke(self.scheduler.random.choice(list(self._leases)))
            return True
        return False

    def go_down(self) -> None:
        """Answer nobody."""
        self.is_down = True

    def come_back(self) -> None:
        """Answer again."""
        if not self.is_down:
            return
        self.is_down = False
        for lease_id, lease in self._leases.items():
            lease.ends_s = self.scheduler.now_s + lease.ttl_s
            self.scheduler.at(lease.ends_s, None, self._run_out, lease_id)
        self.break_watches()

    def reaches(self, machine: str) -> bool:
        return not self.is_down and not self.cuts[machine]

    # --- inside ---

    def _write(self, changes: Sequence[Change]) -> None:
        self.revision += 1
        for change in changes:
            old = self._leases.get(self._lease_of.pop(change.key, NO_LEASE))
            if old is not None:
                old.keys.pop(change.key, None)
            if change.new is None:
                self._values.pop(change.key, None)
                continue
            self._values[change.key] = change.new
            if change.lease_id != NO_LEASE:
                self._lease_of[change.key] = change.lease_id
                self._leases[change.lease_id].keys[change.key] = None
        self.history.append((self.revision, tuple((change.key, change.new) for change in changes)))
        self.scheduler.note("registry", self.revision, *(change.key for change in changes))
        for watch in list(self.watches):
            watch.wake()

    def _run_out(self, lease_id: int) -> None:
        lease = self._leases.get(lease_id)
        if lease is None or self.is_down:
            return
        if self.scheduler.now_s < lease.ends_s:
            self.scheduler.at(lease.ends_s, None, self._run_out, lease_id)
            return
        self.revoke(lease_id)


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

    def __init__(self, twin: RegistryTwin, clock: Clock, life: Life) -> None:
        self.twin = twin
        self.life = life
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
        """Whether the registry answers this machine now."""
        return self.twin.reaches(self.life.machine_name)

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
        number = self._last_call
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
            if not self.is_reachable:
                self._is_lost(act)
                return
            result = act()
            if self.twin.unknown and self._random.random() < self.twin.unknown:
                self.twin.hits["registry unknown"] += 1
                return  # the answer does not come back
            scheduler.at(scheduler.now_s + self.half_way_s(), self.life, answer, result)

        if not self.is_reachable and self._random.random() < 0.5:
            # There is no connection, and this is noticed before anything was sent.
            at_s = scheduler.now_s + CALL_LIMIT_S * self._random.random()
            reason = "no connection to any endpoint"
            scheduler.at(at_s, self.life, answer, not_done(reason), reason)
        elif self.twin.unknown and self._random.random() < self.twin.unknown:
            self.twin.hits["registry unknown"] += 1
            self._is_lost(act)
        else:
            scheduler.after(self.half_way_s(), arrive)

    def _is_lost(self, act: Callable[[], Any]) -> None:
        """The request lies somewhere: it is dropped, or arrives when its sender does not wait any more."""
        if self._random.random() < 0.5:
            self._scheduler.after(LATE_S * self._random.random(), self._arrives_late, act)

    def _arrives_late(self, act: Callable[[], Any]) -> None:
        if self.is_reachable:
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
