"""A registry that is put back to an earlier state: what nodes keep of replicated families, and who makes it whole.

Theory. Production's control process stands between a family and the registry, and keeps what the family acts on
(nbdserver/node/channel_registry.py). Here `KeepingRegistry` does, by the same rules: what was swapped or read is on the
machine's disk before the family hears of it, what is only heard of soon after, and what is older than that is not
passed on; what adds a member is there before it is asked for. `make_whole` is what an operator has one node do with
`cluster recover`: production's `verdict` decides.

Rules of this file
- What a machine keeps is on its drive: another drive keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from metadata.registry import Family, Volume
from metadata.registry_calls import Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.replica_set import ReplicaSet, replica_set_key
from metadata.seams import Watch
from nbdserver.node.recovered import Word, verdict
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.machine import Machine, Seams

if TYPE_CHECKING:
    from tests.simulation.replication.replicated import FamilyNode

KEEP_S = 0.01  # at most, until something is on the machine's disk


class Kept:
    """What a machine keeps of one replica set."""

    def __init__(self) -> None:
        self.value: ReplicaSet | None = None
        self.asked: ReplicaSet | None = None
        """The last one with a new member that was asked for."""

    def keep(self, value: bytes) -> bool:
        """False if a newer one is kept."""
        told = ReplicaSet.decode(value)
        if self.value is None or told.number > self.value.number:
            self.value = told
        return told.number >= self.value.number


class KeptSets:
    """What all machines keep."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Kept]] = {}

    def of(self, machine: Machine) -> Kept:
        """On the drive that it has now."""
        drive, kept = self._kept.get(machine.name, (None, Kept()))
        if drive is not machine.drive:
            self._kept[machine.name] = machine.drive, (kept := Kept())
        return kept

    def newest(self, there: ReplicaSet) -> ReplicaSet:
        """That any machine keeps, or the one that is there."""
        return max([there, *(kept.value for _, kept in self._kept.values() if kept.value)], key=lambda set: set.number)


class KeepingRegistry:
    """`ReplicaSets`, in one life of a machine."""

    def __init__(self, seams: Seams, kept: Kept) -> None:
        self._registry = seams.registry
        self._clock = seams.clock
        self._random = seams.random
        self._kept = kept
        self._times_told = 0

    def tell(self) -> Kept:
        """What is kept, for who makes the registry whole: what was asked of the one before is not acted on any more."""
        self._times_told += 1
        return self._kept

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        times_told = self._times_told

        def got(answer: Reading | Unavailable) -> None:
            if times_told != self._times_told:
                answer = Unavailable("the registry was made whole meanwhile")
            elif isinstance(answer, Reading) and not all(self._kept.keep(value) for _, value in answer.items):
                answer = Unavailable("the registry shows an earlier state than this node has seen")
            done(answer)

        self._registry.get_later(key, lambda answer: self._soon(lambda: got(answer)))

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        times_told = self._times_told

        def swapped(answer: Swap) -> None:
            if times_told != self._times_told:
                answer = Swap(Outcome.UNKNOWN, reason="the registry was made whole meanwhile")
            elif answer.outcome is Outcome.SWAPPED:
                self._keep([change.new for change in changes if change.new is not None])
            done(answer)

        for change in changes:
            self.note(change)
        self._registry.swap_later(changes, lambda answer: self._soon(lambda: swapped(answer)))

    def watch(self, prefix: str, changed: Callable[[Event], None]) -> Watch:
        def heard(event: Event) -> None:
            values = [value for _, value in event.changes if value is not None]
            self._soon(lambda: self._keep(values))
            changed(event)

        return self._registry.watch(prefix, heard)

    def note(self, change: Change) -> None:
        """On the machine's disk, if it adds a member."""
        if change.expected is not None and change.new is not None:
            new = ReplicaSet.decode(change.new)
            if new.adds_to(ReplicaSet.decode(change.expected)):
                self._kept.asked = new

    def _keep(self, values: Sequence[bytes]) -> None:
        for value in values:
            self._kept.keep(value)

    def _soon(self, callback: Callable[[], None]) -> None:
        self._clock.call_later(KEEP_S * self._random.random(), callback)


def make_whole(cluster: Cluster, family: bytes, nodes: Sequence[FamilyNode]) -> bool:
    """Have one node make the registry whole from what all know that answer it; whether these are enough."""
    running = [node for node in nodes if node.machine.is_running]
    asked = [node.machine for node in running if cluster.registry.reaches(node.machine.name)]
    told = [node for node in running if asked and cluster.hear_each_other(asked[0], node.machine)]
    if not told:
        return False
    key, described = replica_set_key(family), _described(family)
    words = {node.machine.name: _word(described, node) for node in told}
    (there,) = (value for _, value in cluster.registry.get(key).items)
    found = verdict(described, words, ReplicaSet.decode(there), ())
    if found.value is None:
        cluster.tell(f"{asked[0].name} cannot make the registry whole: {found.problem}")
        return False
    cluster.tell(f"{asked[0].name} makes the registry whole, with {found.value}")
    cluster.make_registry_whole([Change(key, there, found.value.encode())], [node.machine for node in told])
    return True


def _word(described: Family, node: FamilyNode) -> Word:
    assert node.keeping is not None
    kept, log = node.keeping.tell(), node.log
    return Word(described, kept.value, log.incarnation, log.last, log.promised_epoch, log.resync_count, kept.asked)


def _described(family: bytes) -> Family:
    return Family(family.hex(), 1 << 20, "", (Volume(1, "disk0", 1 << 20),), replicas=3)
