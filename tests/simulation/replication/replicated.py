"""What every simulated replicated family has: its nodes, who attaches where, conspiracies, and what must always hold.

Theory. Clients use the family through whichever node says that it owns it, also one that only believes so. What they do
and how answers are judged is the affair of the two worlds: `in_memory` (one volume over a log in memory, fast, for the
rules of replication) and `on_log_disks` (volumes with snapshots and clones, on disks that lose what was not synced). In
the end all replicas must hold the same, in sync.

Rules of this file
- Nobody takes over by itself: somebody attaches somewhere, now and then, more often while nobody owns the family.
- The generation is part of what a client knows: when it has risen, what was acknowledged and not flushed may be gone.
- A disk is lost only while another whole member is up.
"""

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from metadata.registry_calls import Change
from metadata.replica_set import Member, ReplicaSet, ReplicaSets, replica_set_key
from nbdserver.replication.family import ReplicatedFamily
from nbdserver.replication.in_sync_set import is_whole
from nbdserver.replication.owner import Owner
from nbdserver.replication.peer_server import PeerServer
from nbdserver.replication.replica_log import ReplicaLog
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.faults import Mix, draw_mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.registers import ViolationError
from tests.simulation.replication.keeping import KeepingRegistry, KeptSets, make_whole

FAMILY = bytes(range(16))
PORT = 702
SETTLING_S = 60.0
LEFT_OUT = frozenset({"step", "suspend", "lease lost"})
"""Faults that grants do not survive: a clock that leaps or stands still; and one of a registry's that is not used."""
AGAIN = 0.05  # chance in an act that operators try again to make the registry whole

STARTED_OVER = "a replica had to start over, although nothing that was acknowledged is lost"


class FamilyNode:
    """One life of a node: production's `ReplicatedFamily` over some log."""

    def __init__(self, scenario: "FamilyScenario", machine: Machine, seams: Seams, log: ReplicaLog) -> None:
        self.machine = machine
        self.log = log
        self.keeping: KeepingRegistry | None = None
        """Where the registry may be put back."""
        registry: ReplicaSets = seams.registry
        if scenario.cluster.mix["registry put back"]:
            registry = self.keeping = KeepingRegistry(seams, scenario.kept.of(machine))
        self.family = ReplicatedFamily(
            seams.clock, seams.network, registry, log, FAMILY, machine.name, scenario.address_of, scenario.report
        )
        self.server = PeerServer(
            seams.clock, seams.network, f"{machine.host}:{PORT}", lambda family: self.family.accept
        )
        self.open: dict[int, Callable[[], None]] = {}
        """What is asked of it and not answered, by number; called when that will never be known."""
        self._asked = 0

    @property
    def may_answer(self) -> bool:
        """Whether it would answer a client at this moment, if it runs."""
        owner = self.family.owner
        return owner is not None and owner.has_authority

    def is_in_sync(self, value: ReplicaSet) -> bool:
        """Whether its replica is, as it stands, one of those that the registry has in sync."""
        member = value.member(self.machine.name)
        return member is not None and is_whole(member, self.log.incarnations)

    def asked(self, doubt: Callable[[], None]) -> Callable[[], bool]:
        """Something is asked of it; `doubt` if its answer will never be known. Returns what to call with its answer:
        whether anybody waits for that yet."""
        self._asked += 1
        number = self._asked
        self.open[number] = doubt
        return lambda: self.open.pop(number, None) is not None

    def doubt(self) -> None:
        """What it has not answered is in doubt."""
        opened, self.open = self.open, {}
        for doubt in opened.values():
            doubt()

    def close(self) -> None:
        self.server.close()
        self.family.close()


class FamilyScenario(ABC):
    """Who is there, what happens to them, and what is expected."""

    converges_within_s = SETTLING_S

    def __init__(
        self,
        rng: random.Random,
        trouble: float | None = None,
        count: int | None = None,
    ) -> None:
        self.answers: Counter[str] = Counter()
        self.reports: Counter[str] = Counter()
        self.cluster: Cluster
        self.kept = KeptSets()
        self._random = rng
        self._count = rng.choice([1, 2, 3, 3, 3, 3, 4, 5]) if count is None else count
        self._operations = rng.choice([1, 2, 6])
        self._attach = rng.choice([0.0, 0.005, 0.05])  # chance that somebody attaches elsewhere for no reason
        self._place = rng.choice([0.0, 0.0, 0.01, 0.05])  # chance that replicas shall be elsewhere
        self._trouble = rng.choice([0.0, 0.01, 0.05, 0.1]) if trouble is None else trouble  # chance of a conspiracy
        self._generation = 1
        self._is_recovery_due = False  # operators have tried, and not all answered who have to
        self._lives: list[FamilyNode] = []

    # --- the machines ---

    def begin(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.may_lose_disk = self._may_lose_disk
        cluster.recover = self.recover
        names = [f"node-{number}" for number in range(1, self._count + 1)]
        for name in names:
            machine = cluster.add(name)
            machine.ended = partial(self._ended, machine)
        self.begin_family(names)

    def begin_family(self, names: Sequence[str]) -> None:
        """Start the nodes, and say that all are members."""
        for name in names:
            self.cluster.start(name)
        self.write_value(names, [node.log.incarnation for node in self.nodes()])

    def write_value(self, names: Sequence[str], incarnations: Sequence[int]) -> None:
        """Of the family, into the registry."""
        members = tuple(Member(name, incarnation) for name, incarnation in zip(names, incarnations, strict=True))
        value = ReplicaSet(1, names[0], members, tuple(names))
        self.cluster.registry.swap([Change(replica_set_key(FAMILY), None, value.encode())])

    def address_of(self, node: str) -> str:
        """Where its peers reach it."""
        return f"{self.cluster.machines[node].host}:{PORT}"

    def start(self, machine: Machine, seams: Seams) -> FamilyNode:
        """Begin a life of a node."""
        self._bury()
        node = self.make(machine, seams)
        self._lives.append(node)
        return node

    @abstractmethod
    def make(self, machine: Machine, seams: Seams) -> FamilyNode:
        """A node on this machine."""

    def _ended(self, machine: Machine, power: bool) -> None:
        """A machine's process is over."""
        down = [each.life is None for each in self.cluster.machines.values()]
        if sum(down) > 1:
            self.answers["all are down" if all(down) else "two are down"] += 1
        self.lost(machine, power)
        self._bury()

    @abstractmethod
    def lost(self, machine: Machine, power: bool) -> None:
        """A machine's process is over: what its disk loses."""

    def _bury(self) -> None:
        """What processes that are over had not answered is in doubt."""
        for node in list(self._lives):
            if node.machine.node is not node:
                self._lives.remove(node)
                node.doubt()

    def nodes(self) -> list[FamilyNode]:
        """Those that run, paused ones too."""
        return [each.node for each in self.cluster.machines.values() if isinstance(each.node, FamilyNode)]

    @property
    def is_resyncing(self) -> bool:
        """Whether some replica has regions to fetch."""
        return any(node.log.resync_count for node in self.nodes())

    def value(self) -> ReplicaSet:
        """What the registry has; while it has an earlier state, the newest that any node keeps."""
        there = ReplicaSet.decode(self.cluster.registry.get(replica_set_key(FAMILY)).items[0][1])
        return self.kept.newest(there) if self.cluster.needs_recovery else there

    def recover(self) -> None:
        """What operators do when the registry was put back."""
        made = make_whole(self.cluster, FAMILY, self.nodes())
        self.answers["made whole" if made else "not made whole"] += 1
        self._is_recovery_due = not made

    def report(self, kind: str, fields: dict[str, object]) -> None:
        """What a node tells its operator."""
        self.reports[kind] += 1
        self.cluster.tell(f"  {kind} {fields}")

    def _may_lose_disk(self, name: str) -> bool:
        value = self.value()
        others = [node for node in self.nodes() if node.machine.name != name and node.machine.is_running]
        whole = sum(node.is_in_sync(value) for node in others)
        mix = self.cluster.mix
        return whole >= 2 and not (mix["power of all"] or mix["registry put back"] or self._trouble)

    # --- clients ---

    def act(self) -> None:
        self.check()
        if self._is_recovery_due and self._random.random() < AGAIN:
            self.recover()
        running = [node for node in self.nodes() if node.machine.is_running]
        if not running:
            return
        owners = [node for node in running if node.family.owner is not None]
        if self._random.random() < (self._attach if owners else 0.3):
            self.attach_at(self._random.choice(running))
        if self._random.random() < self._trouble:
            self._conspire()
        if owners and self._random.random() < self._place:
            self.place_by(self._random.choice(owners))
        for _ in range(self._random.randint(1, self._operations)):
            if owners:
                self.operate(self._random.choice(owners))

    def attach_at(self, node: FamilyNode) -> None:
        """Somebody wants to use the volume there."""
        self.cluster.tell(f"somebody attaches at {node.machine.name}")

        def taken(reason: str) -> None:
            self.answers["taken over" if not reason else "not taken over"] += 1
            if not reason and self.is_resyncing:
                self.answers["taken over during a resync"] += 1

        node.family.take_over(taken)

    def place_by(self, node: FamilyNode, names: Sequence[str] | None = None) -> None:
        """Replicas shall be on some nodes, this one among them."""
        owner = node.family.owner
        assert owner is not None
        if names is None:
            others = [name for name in self.cluster.machines if name != node.machine.name]
            others = self._random.sample(others, self._random.randint(0, len(others)))
            names = sorted((node.machine.name, *others))
        self.cluster.tell(f"replicas shall be on {names}")

        def placed(reason: str) -> None:
            self.answers["placed" if not reason else "not placed"] += 1

        owner.place(names, placed)

    # --- conspiracies: what chance alone brings together too rarely ---

    def _conspire(self) -> None:
        """One node is cut off from the owner, or dies, in the middle of writes; and somebody attaches there, or at a
        node that dies in its turn."""
        rng, scheduler = self._random, self.cluster.scheduler
        names = list(self.cluster.machines)
        owner = self.value().owner
        resyncing = [node.machine.name for node in self.nodes() if node.log.resync_count]
        victim = rng.choice(resyncing if resyncing and rng.random() < 0.5 else names)
        self.answers["conspiracy"] += 1
        self.cluster.tell(f"a conspiracy against {victim}")
        if rng.random() < 0.6 and victim != owner:
            self._cut_off(victim, [owner] if rng.random() < 0.7 else names, rng.choice([0.3, 1.5, 5.0]) * rng.random())
        dies = rng.random()
        if dies < 0.6:
            self._write_much()
            scheduler.after(0.002 * rng.random(), self._end, victim, dies < 0.3, rng.choice([0.01, 0.3, 2.0]))
        if rng.random() < 0.3:
            self._write_much()
            scheduler.after(0.002 * rng.random(), self._end, owner, rng.random() < 0.5, rng.choice([0.3, 2.0, 5.0]))
        for _ in range(rng.randrange(3)):
            after_s = rng.choice([0.05, 0.5, 1.5]) * rng.random()
            scheduler.after(after_s, self._attach_if_up, victim if rng.random() < 0.7 else rng.choice(names))

    def _cut_off(self, victim: str, others: Sequence[str], duration_s: float) -> None:
        wires = self.cluster.wires
        others = [name for name in others if name != victim]
        paths = wires.paths([victim], others) + wires.paths(others, [victim])
        for path in paths:
            path.block()
            self.cluster.scheduler.after(duration_s, path.unblock)

    def _end(self, name: str, power: bool, away_s: float) -> None:
        machine = self.cluster.machines[name]
        if machine.life is not None:
            machine.end(power)
            self.cluster.scheduler.after(away_s * self._random.random(), self.cluster.start, name)

    def _attach_if_up(self, name: str) -> None:
        node = self.cluster.machines[name].node
        if isinstance(node, FamilyNode) and node.machine.is_running:
            self.attach_at(node)

    def _write_much(self) -> None:
        owners = [node for node in self.nodes() if node.machine.is_running and node.family.owner is not None]
        for _ in range(self._random.choice([1, 3, 10]) if owners else 0):
            self.operate(self._random.choice(owners))

    @abstractmethod
    def operate(self, node: FamilyNode) -> None:
        """A client does something through that node, which says that it is the owner."""

    def knows_generation(self, owner: Owner) -> None:
        """An answer of this owner: a client learns its generation."""
        if owner.value.generation > self._generation:
            self.cluster.tell(f"generation {owner.value.generation}")
            self.answers["generation"] += 1
            self._generation = owner.value.generation
            self.went_back()

    @abstractmethod
    def went_back(self) -> None:
        """What was acknowledged and not flushed may be gone."""

    # --- what is expected ---

    def check(self) -> None:
        self._bury()
        with_authority = [node.machine.name for node in self.nodes() if node.machine.is_running and node.may_answer]
        if len(with_authority) > 1:
            raise ViolationError(f"{with_authority} answer at the same time")
        value = self.value()
        for node in self.nodes():
            if node.is_in_sync(value) and node.log.resync_count:
                raise ViolationError(f"{node.machine.name} is in sync and has regions to fetch")

    def core(self, rng: random.Random) -> set[str]:
        return set(self.cluster.machines)

    def missing(self) -> str:
        if self.cluster.needs_recovery:
            self.recover()
        if self._is_recovery_due:
            return "the registry is not whole"
        self.act_to_heal()
        value = self.value()
        owners = sum(node.may_answer for node in self.nodes())
        if owners != 1:
            return f"{owners} owners"
        if candidates := [node.machine.name for node in self.nodes() if node.family.is_candidate]:
            return f"{candidates} are about to own it"
        if value.leaving and value.leaving != (value.owner,):
            return f"{value.leaving} are still leaving"
        if len(value.in_sync) != len(self.placed()):
            return f"in sync are only {[member.node for member in value.in_sync]} of {value.placement}"
        lasts = {node.log.last for node in self.placed()}
        if len(lasts) > 1:
            return f"the logs end at {lasts}"
        return ""

    def act_to_heal(self) -> None:
        """Somebody wants to use the volume."""
        if not any(node.family.owner is not None for node in self.nodes()) and (placed := self.placed()):
            self.attach_at(self._random.choice(placed))

    def placed(self) -> list[FamilyNode]:
        """Those with a replica that counts."""
        placement = self.value().placement
        return [node for node in self.nodes() if node.machine.name in placement]

    def end(self) -> None:
        """All must hold the same, and what is expected."""
        self._bury()
        nodes = self.placed()
        (owner,) = [node for node in nodes if node.family.owner is not None]
        assert owner.family.owner is not None
        self.knows_generation(owner.family.owner)
        self.compare(owner)
        for node in nodes:
            if node.log.resync_count:
                raise ViolationError(f"{node.machine.name} is in sync and has regions to fetch")

    @abstractmethod
    def compare(self, owner: FamilyNode) -> None:
        """Look at what all replicas hold, first at the owner's."""


def draw_replication_mix(rng: random.Random, left_out: frozenset[str] = LEFT_OUT) -> Mix:
    """What the catalogue has, without what cannot be survived; what happens by the hour happens more often, because
    runs are short."""
    drawn = draw_mix(rng)
    often = rng.choice([1.0, 5.0, 15.0])
    return Mix(
        {
            name: strength * often if strength >= 1.0 else strength
            for name, strength in drawn.strengths.items()
            if name not in left_out
        }
    )
