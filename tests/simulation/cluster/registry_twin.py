"""The one registry of a simulated cluster: what etcd holds, and its faults.

Theory: etcd itself is taken to be right (it is the system that others prove): one copy of the truth, each change at one
moment, revisions that rise. What can lie between it and a client is in `simulated_registry`.

Rules of this file
- It outlives every process.
- While nobody can reach it, its leases do not run out, and afterwards each has its whole time again, as with a new
  leader of etcd. So it is with leases that come back with a backup: their keys go when nobody has renewed them.
- What was sent to it before it was put back reaches it no more: it is another etcd cluster.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from metadata.registry_calls import LIFE_KEY, NO_LEASE, Change, Outcome, Reading, Swap
from metadata.registry_guard import RegistryPast
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.scheduler import Scheduler

Changes = tuple[tuple[str, bytes | None], ...]


class TwinWatch(Protocol):
    """A client's watch, as the registry sees it."""

    def wake(self) -> None:
        """There may be something to tell."""

    def broken(self) -> None:
        """It has to be resumed."""


@dataclass
class _GrantedLease:
    """A lease as the registry knows it."""

    ttl_s: float
    ends_s: float
    keys: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True)
class Backup:
    """What `etcdctl snapshot save` writes: the values, and the leases with their keys."""

    life: int
    revision: int
    values: dict[str, bytes]
    leases: dict[int, tuple[float, tuple[str, ...]]]
    """For how long each was given, and the keys bound to it."""


class RegistryTwin:
    """What etcd holds, and its faults."""

    def __init__(self, scheduler: Scheduler, mix: Mix, hits: Counter[str]) -> None:
        self.scheduler = scheduler
        self.hits = hits
        self.cluster_id = self.home = 1
        self.revision = 1
        self.forgotten = 1  # changes up to this revision are not known any more
        self.history: list[tuple[int, Changes]] = []
        self.is_down = False
        self.cuts: Counter[str] = Counter()  # reasons why a machine cannot reach it
        self.watches: dict[TwinWatch, None] = {}
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
        self._begin_lease(self._last_lease_id, ttl_s)
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

    def back_up(self) -> Backup:
        """What there is."""
        leases = {lease_id: (lease.ttl_s, tuple(lease.keys)) for lease_id, lease in self._leases.items()}
        return Backup(self.past.life, self.revision, dict(self._values), leases)

    def put_back(self, backup: Backup) -> set[str]:
        """Hold what was there then, as another etcd cluster under the same addresses; the keys that it changes."""
        now, then = self._values, backup.values
        changed = {key for key in now.keys() | then.keys() if now.get(key) != then.get(key)}
        self.cluster_id += 1
        self.revision = self.forgotten = backup.revision
        self.history = []
        self._values = dict(backup.values)
        self._leases, self._lease_of = {}, {}
        for lease_id, (ttl_s, keys) in backup.leases.items():
            self._begin_lease(lease_id, ttl_s).keys.update(dict.fromkeys(keys))
            self._lease_of.update(dict.fromkeys(keys, lease_id))
        self.break_watches()
        return changed

    @property
    def past(self) -> RegistryPast:
        """How far it is."""
        return RegistryPast(int(self._values.get(LIFE_KEY, b"0")), self.cluster_id, self.revision)

    def reaches(self, machine: str) -> bool:
        return not self.is_down and not self.cuts[machine]

    # --- inside ---

    def _begin_lease(self, lease_id: int, ttl_s: float) -> _GrantedLease:
        lease = self._leases[lease_id] = _GrantedLease(ttl_s, self.scheduler.now_s + ttl_s)
        self.scheduler.at(lease.ends_s, None, self._run_out, lease_id)
        return lease

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
