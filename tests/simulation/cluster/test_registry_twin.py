"""The registry twin keeps every promise of the seam, whatever lies between it and its clients."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from metadata.registry_calls import Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.seams import Lease
from tests.registry_conformance import SHORT_TTL_S, Holder, RegistryConformance, swap
from tests.simulation.cluster.cluster import Cluster, ClusterRun
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.registers import ViolationError

KEY = "chain"
LOCK = "lock"
REGISTRY_FAULTS = {
    "registry outage": 360.0,
    "registry delay": 0.3,
    "registry unknown": 0.15,
    "registry compaction": 600.0,
    "watch break": 600.0,
    "kill": 120.0,
    "pause": 240.0,
    "split": 120.0,
    "drift": 0.004,
}


class Client:
    """Appends its name to one value, follows it by a watch, and wants to hold a lock."""

    def __init__(self, machine: Machine, seams: Seams, notes: "Notes") -> None:
        self.seams = seams
        self.notes = notes
        self.seen: bytes | None = None
        self.lease: Lease | None = None
        self.holds_lock = False
        self._name = machine.name
        self._revision = 0
        seams.registry.watch(KEY, self._changed)
        self._append()
        self._take_lease()

    def close(self) -> None:
        self.seams.registry.close()

    # One value that everyone appends to.

    def _append(self) -> None:
        self.seams.registry.get_later(KEY, self._read)

    def _read(self, answer: Reading | Unavailable) -> None:
        if isinstance(answer, Unavailable):
            self.seams.clock.call_later(0.1, self._append)
            return
        old = answer.items[0][1] if answer.items else None
        self.notes.number += 1
        word = b"%s:%d" % (self._name.encode(), self.notes.number)
        self._swap(Change(KEY, old, (old or b"") + word + b" "), word, was_unknown=False)

    def _swap(self, change: Change, word: bytes, was_unknown: bool) -> None:
        def done(answer: Swap) -> None:
            self.notes.outcomes[answer.outcome] += 1
            if answer.outcome is Outcome.UNKNOWN or (was_unknown and answer.outcome is Outcome.NOT_DONE):
                self._swap(change, word, was_unknown=True)
                return
            if answer.outcome is Outcome.SWAPPED:
                self.notes.made.add(word)
            elif not was_unknown:
                self.notes.never.add(word)
            self.seams.clock.call_later(1.0 + self.seams.random.random(), self._append)

        self.seams.registry.swap_later([change], done)

    def _changed(self, event: Event) -> None:
        if event.revision < self._revision or (event.revision == self._revision and not event.is_reset):
            raise ViolationError(f"a watch went back from revision {self._revision} to {event.revision}")
        self.notes.events[event.is_reset] += 1
        self._revision = event.revision
        found = dict(event.changes).get(KEY)
        if event.is_reset:
            self.seen = found
            return
        if found is None or not found.startswith(self.seen or b"") or found[len(self.seen or b"") :].count(b" ") != 1:
            raise ViolationError(f"a watch has a gap between {self.seen!r} and {found!r}")
        self.seen = found

    # One lock that everyone wants.

    def _take_lease(self) -> None:
        self.seams.registry.grant_later(3.0, self._lost, self._granted)

    def _granted(self, answer: Lease | Unavailable) -> None:
        if isinstance(answer, Unavailable):
            self.seams.clock.call_later(0.5, self._take_lease)
            return
        self.lease = answer
        self._take_lock()

    def _take_lock(self) -> None:
        lease = self.lease
        if lease is None:
            return

        def done(answer: Swap) -> None:
            if self.lease is not lease:
                return
            if answer.outcome is Outcome.SWAPPED:
                self.holds_lock = True
                self.seams.clock.call_later(10.0 * self.seams.random.random(), lambda: self._give_back(lease))
            else:
                self.seams.clock.call_later(1.0, self._take_lock)

        self.seams.registry.swap_later([Change(LOCK, None, self._name.encode(), lease.id)], done)

    def _give_back(self, lease: Lease) -> None:
        if self.lease is lease:
            self.lease, self.holds_lock = None, False
            lease.release()
            self._take_lease()

    def _lost(self) -> None:
        self.notes.lost += 1
        self.lease, self.holds_lock = None, False
        self._take_lease()

    @property
    def believes(self) -> bool:
        return self.holds_lock and self.lease is not None and self.lease.valid_until_s > self.seams.clock.now()


class Notes:
    """What all clients of a run have been told."""

    def __init__(self) -> None:
        self.number = 0
        self.made: set[bytes] = set()
        self.never: set[bytes] = set()
        self.outcomes: Counter[Outcome] = Counter()
        self.events: Counter[bool] = Counter()
        self.holders: Counter[str] = Counter()
        self.lost = 0


class Clients:
    """The scenario."""

    converges_within_s = 60.0

    def __init__(self, notes: Notes) -> None:
        self.cluster: Cluster
        self.notes = notes

    def begin(self, cluster: Cluster) -> None:
        self.cluster = cluster
        for number in range(4):
            cluster.add(f"node-{number + 1}")
            cluster.start(f"node-{number + 1}")

    def act(self) -> None:
        holders = [client for client in self._clients() if client.believes]
        if len(holders) > 1:
            raise ViolationError("two clients believe that they hold the lock")
        self.notes.holders.update(client._name for client in holders)

    def check(self) -> None:
        words = self._words()
        if len(words) != len(set(words)):
            raise ViolationError("a swap was made twice")
        if not self.notes.made <= set(words):
            raise ViolationError("a swap that was made is gone")
        if self.notes.never & set(words):
            raise ViolationError("a swap that was not made is there")

    def core(self, rng: random.Random) -> set[str]:
        return set(self.cluster.machines)

    def missing(self) -> str:
        now = self.cluster.registry.get(KEY).items
        behind = [client._name for client in self._clients() if now and client.seen != now[0][1]]
        return f"{behind} do not know what the registry has" if behind else ""

    def end(self) -> None:
        self.check()

    def _clients(self) -> list[Client]:
        nodes = [machine.node for machine in self.cluster.machines.values()]
        return [node for node in nodes if isinstance(node, Client)]

    def _words(self) -> list[bytes]:
        items = self.cluster.registry.get(KEY).items
        return items[0][1].split() if items else []


class _Idle:
    """A process that only has seams."""

    def __init__(self, machine: Machine, seams: Seams) -> None:
        self.seams = seams

    def close(self) -> None:
        self.seams.registry.close()


class TwinRig:
    """Two machines and the registry, on a good day."""

    def __init__(self) -> None:
        self.cluster = Cluster(0, Mix(), _Idle)
        seams = []
        for name in ("node-1", "node-2"):
            machine = self.cluster.add(name)
            self.cluster.start(name)
            assert isinstance(machine.node, _Idle)
            seams.append(machine.node.seams)
        self.registry, self.other = (each.registry for each in seams)
        self.clock = seams[0].clock

    def run_until(self, holds: Callable[[], bool]) -> None:
        assert self.cluster.run_until(holds, limit_s=600.0)

    def run_for(self, duration_s: float) -> None:
        self.cluster.run(duration_s)

    def stand_still(self, duration_s: float) -> None:
        machine = self.cluster.machines["node-1"]
        machine.pause()
        self.cluster.run(duration_s)
        machine.resume()


class TestRegistryTwin(RegistryConformance):
    """The sentences of tests/registry_conformance.py."""

    @pytest.fixture
    def rig(self) -> TwinRig:
        return TwinRig()


def test_a_backup_that_was_put_back_is_refused_also_by_who_has_seen_nothing_and_its_leases_end() -> None:
    """As a real one (tests/interop/test_etcd_faults.py)."""
    rig = TwinRig()
    holder = Holder(rig)
    assert swap(rig, Change("l/a", None, b"1", holder.lease.id)).outcome is Outcome.SWAPPED
    twin = rig.cluster.registry
    backup = twin.back_up()
    twin.put_back(backup)
    assert twin.get("l/a").items
    rig.cluster.add("new")
    rig.cluster.start("new")
    new = rig.cluster.machines["new"].node
    assert isinstance(new, _Idle)
    for registry in (rig.registry, rig.other, new.seams.registry):
        answer = swap(rig, Change("b", None, b"2"), registry=registry)
        assert answer.outcome is Outcome.NOT_DONE
        assert "restored from a backup" in answer.reason
    rig.run_for(SHORT_TTL_S + 1.0)
    assert not twin.get("l/a").items
    twin.home = twin.cluster_id
    assert swap(rig, Change("b", None, b"2"), registry=new.seams.registry).outcome is Outcome.SWAPPED


def run(seed: int, mix: Mix) -> tuple[Notes, ClusterRun]:
    notes = Notes()
    cluster = Cluster(seed, mix, lambda machine, seams: Client(machine, seams, notes))
    return notes, ClusterRun(cluster, Clients(notes), safety_s=120.0, act_s=0.1).go()


def test_on_a_good_day_every_call_is_answered_with_what_is_so() -> None:
    notes, _ = run(1, Mix())
    assert notes.outcomes[Outcome.UNKNOWN] == notes.outcomes[Outcome.NOT_DONE] == notes.lost == 0
    assert notes.outcomes[Outcome.SWAPPED] > 100
    assert notes.events[True] == 4  # each watch begins with a reset, and needs no other
    assert len(notes.holders) > 1


@pytest.mark.parametrize("first", range(0, 24, 8))
def test_whatever_lies_between_no_swap_is_doubled_lost_or_undone_and_a_lock_has_one_holder(first: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + 8):
        notes, cluster_run = run(seed, Mix(REGISTRY_FAULTS))
        seen.update(cluster_run.cluster.hits)
        for outcome, count in notes.outcomes.items():
            seen[outcome.name] += count
        seen["resets"] += notes.events[True]
        seen["events"] += notes.events[False]
        seen["lost"] += notes.lost
        seen["holders"] += len(notes.holders)
    for name in (*REGISTRY_FAULTS, *Outcome.__members__, "resets", "events", "lost", "holders"):
        assert seen[name] > 3, f"{name}: {seen[name]}"
