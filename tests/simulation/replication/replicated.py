"""The world `replication`: one replicated volume, on every node production's `ReplicatedFamily` over a log in memory.

Theory. Clients write, discard, read and flush through whichever node says that it owns the volume, also one that only
believes so. A register a block (tests/simulation/registers.py) says what each answer may be: an operation was answered,
or is in doubt because its node died or was deposed. In the end all replicas must hold the same, in sync.

Rules of this file
- Nobody takes over by itself: somebody attaches somewhere, now and then, more often while nobody owns the volume.
- The generation is part of what a client knows: when it has risen, what was acknowledged and not flushed may be gone.
- A disk is lost only while another whole member is up.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from metadata.registry_calls import Change
from metadata.replica_set import Member, ReplicaSet, replica_set_key
from nbdserver.replication.family import ReplicatedFamily
from nbdserver.replication.owner import Owner, is_whole
from nbdserver.replication.peer_server import PeerServer
from tests.simulation.cluster.cluster import Cluster, ClusterRun
from tests.simulation.cluster.faults import Mix, draw_mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.registers import Changes, Registers, ViolationError, pattern
from tests.simulation.replication.memory_log import BLOCK_BYTES, MemoryDisk, MemoryLog

FAMILY = bytes(range(16))
PORT = 702
BLOCKS = 24
SETTLING_S = 60.0
LEFT_OUT = frozenset({"step", "suspend", "lease lost", "disk error", "crash in a call"})
"""Faults that grants do not survive (a clock that leaps or stands still), and those of disks that are not used here."""


class ReplicaNode:
    """One life of a node."""

    def __init__(self, scenario: "ReplicatedScenario", machine: Machine, seams: Seams) -> None:
        self.machine = machine
        slow = 1.0 if machine.name in scenario.slow else machine.mix.slow
        self.log = MemoryLog(scenario.disk_of(machine), seams.clock, seams.random, slow)
        self.log.at_once = scenario.at_once
        self.family = ReplicatedFamily(
            seams.clock,
            seams.network,
            seams.registry,
            self.log,
            FAMILY,
            machine.name,
            scenario.address_of,
            scenario.report,
        )
        self.server = PeerServer(
            seams.clock, seams.network, f"{machine.host}:{PORT}", lambda family: self.family.accept
        )
        self.open: dict[int, Changes] = {}  # writes that are not answered, by their labels

    @property
    def may_answer(self) -> bool:
        """Whether it would answer a client at this moment, if it runs."""
        owner = self.family.owner
        return owner is not None and owner.has_authority

    def close(self) -> None:
        self.server.close()
        self.family.close()


class ReplicatedScenario:
    """Who is there, what clients do, and what is expected."""

    converges_within_s = SETTLING_S

    def __init__(
        self,
        rng: random.Random,
        trouble: float | None = None,
        count: int | None = None,
    ) -> None:
        self.registers = Registers()
        self.answers: Counter[str] = Counter()
        self.reports: Counter[str] = Counter()
        self.cluster: Cluster
        self._random = rng
        self.slow: set[str] = set()  # nodes with slow disks, beside those that the faults make slow
        self._count = rng.choice([1, 2, 3, 3, 3, 3, 4, 5]) if count is None else count
        self._operations = rng.choice([1, 2, 6])
        self._attach = rng.choice([0.0, 0.005, 0.05])  # chance that somebody attaches elsewhere for no reason
        self._place = rng.choice([0.0, 0.0, 0.01, 0.05])  # chance that replicas shall be elsewhere
        self._trouble = rng.choice([0.0, 0.01, 0.05, 0.1]) if trouble is None else trouble  # chance of a conspiracy
        self.at_once = (
            rng.choice([0.0, 0.5]) if trouble is None else 0.0
        )  # how often a replica appends where it receives
        self._disks: dict[str, MemoryDisk] = {}
        self._drives: dict[str, object] = {}
        self._label = 0
        self._generation = 1
        self._lives: list[ReplicaNode] = []

    # --- the machines ---

    def begin(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.may_lose_disk = self._may_lose_disk
        names = [f"node-{number}" for number in range(1, self._count + 1)]
        for name in names:
            machine = cluster.add(name)
            machine.ended = partial(self._ended, machine)
        members = []
        for name in names:
            disk = self.disk_of(cluster.machines[name])
            members.append(Member(name, disk.incarnation + 1))
        value = ReplicaSet(1, names[0], tuple(members), tuple(names))
        cluster.registry.swap([Change(replica_set_key(FAMILY), None, value.encode())])
        for name in names:
            cluster.start(name)

    def disk_of(self, machine: Machine) -> MemoryDisk:
        """Its disk; an empty one if the drive is a new one, which counts its lives from somewhere else."""
        if self._drives.get(machine.name) is not machine.drive:
            self._drives[machine.name] = machine.drive
            self._disks[machine.name] = MemoryDisk(machine.random)
        return self._disks[machine.name]

    def address_of(self, node: str) -> str:
        """Where its peers reach it."""
        return f"{self.cluster.machines[node].host}:{PORT}"

    def start(self, machine: Machine, seams: Seams) -> ReplicaNode:
        """Begin a life of a node."""
        self._bury()
        node = ReplicaNode(self, machine, seams)
        self._lives.append(node)
        return node

    def _ended(self, machine: Machine, power: bool) -> None:
        """A machine's process is over."""
        if machine.name in self._disks:
            self._disks[machine.name].crash(machine.random, power)
        self._bury()

    def _bury(self) -> None:
        """What processes that are over had not answered is in doubt."""
        for node in list(self._lives):
            if node.machine.node is not node:
                self._lives.remove(node)
                for changes in node.open.values():
                    self.registers.doubt(changes)
                node.open.clear()

    def nodes(self) -> list[ReplicaNode]:
        """Those that run, paused ones too."""
        return [each.node for each in self.cluster.machines.values() if isinstance(each.node, ReplicaNode)]

    def value(self) -> ReplicaSet:
        """What the registry has."""
        return ReplicaSet.decode(self.cluster.registry.get(replica_set_key(FAMILY)).items[0][1])

    def report(self, kind: str, fields: dict[str, object]) -> None:
        """What a node tells its operator."""
        self.reports[kind] += 1
        self.cluster.tell(f"  {kind} {fields}")

    def _may_lose_disk(self, name: str) -> bool:
        value = self.value()
        others = [node for node in self.nodes() if node.machine.name != name and node.machine.is_running]
        whole = [
            node
            for node in others
            if (member := value.member(node.machine.name)) is not None
            and is_whole(member, node.log.incarnation, node.log.intact_since)
        ]
        return len(whole) >= 2 and self.cluster.mix["power of all"] == 0 and not self._trouble

    # --- clients ---

    def act(self) -> None:
        self.check()
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
                self._operate(self._random.choice(owners))

    def attach_at(self, node: ReplicaNode) -> None:
        """Somebody wants to use the volume there."""
        self.cluster.tell(f"somebody attaches at {node.machine.name}")

        def taken(reason: str) -> None:
            self.answers["taken over" if not reason else "not taken over"] += 1

        node.family.take_over(taken)

    def place_by(self, node: ReplicaNode, names: Sequence[str] | None = None) -> None:
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
        if isinstance(node, ReplicaNode) and node.machine.is_running:
            self.attach_at(node)

    def _write_much(self) -> None:
        owners = [node for node in self.nodes() if node.machine.is_running and node.family.owner is not None]
        for _ in range(self._random.choice([1, 3, 10]) if owners else 0):
            self._operate(self._random.choice(owners))

    def _operate(self, node: ReplicaNode) -> None:
        owner = node.family.owner
        if owner is None:
            return
        count = self._random.choice([1, 1, 2, 6])
        lba = self._random.randrange(BLOCKS - count + 1)
        kind = self._random.random()
        if kind < 0.45:
            self.read(node, owner, lba, count)
        elif kind < 0.9:
            self.write(node, owner, lba, count, discards=kind > 0.82)
        else:
            self.flush(owner)

    def _knows_generation(self, owner: Owner) -> None:
        """An answer of this owner: a client learns its generation."""
        if owner.value.generation > self._generation:
            self.cluster.tell(f"generation {owner.value.generation}")
            self.answers["generation"] += 1
            self._generation = owner.value.generation
            for register in self.registers.blocks.values():
                register.settle(register.after_power_loss(), self.registers.tick())

    def write(self, node: ReplicaNode, owner: Owner, lba: int, count: int, discards: bool) -> None:
        """Through that node, if it has room."""
        if self.registers.is_busy(lba * BLOCK_BYTES, count * BLOCK_BYTES):
            return
        self._knows_generation(owner)
        if owner.room_bytes() < 1 << 20:
            self.answers["no room"] += 1
            return
        self._label += 1
        length = count * BLOCK_BYTES
        data = bytes(length) if discards else pattern(self._label, lba * BLOCK_BYTES, length)
        changes = self.registers.ask(f"write {self._label}", lba * BLOCK_BYTES, data, length)
        number = self._label
        node.open[number] = changes
        pieces: Sequence[bytes | None] = [data[at : at + BLOCK_BYTES] for at in range(0, length, BLOCK_BYTES)]
        modification = node.log.order(lba, [None] * count if discards else pieces)
        self.registers.order(changes)
        self.cluster.tell(f"{node.machine.name} orders {modification.position} at {lba}+{count}{' discard' * discards}")

        def done(errno: int) -> None:
            if number not in node.open:
                return
            del node.open[number]
            self.answers["write unknown" if errno else "write"] += 1
            if errno:
                self.registers.doubt(changes)
            else:
                self.cluster.tell(f"{node.machine.name} acknowledges {modification.position}")
                self.registers.answer(changes)

        owner.when_committed(modification.txid, done)

    def read(self, node: ReplicaNode, owner: Owner, lba: int, count: int) -> None:
        """Through that node, at once or when it is allowed to answer."""
        self._knows_generation(owner)
        offset = lba * BLOCK_BYTES
        begun = self.registers.begin_read(offset, count * BLOCK_BYTES)
        data = b"".join(node.log.image.read(block) for block in range(lba, lba + count))
        newest = owner.unacknowledged(lba, count)
        if not newest and owner.has_authority:
            self.registers.end_read(begun, offset, data)
            self.registers.read(offset, data)
            self.registers.shown(offset, data)
            self.answers["read at once"] += 1
            return
        asked = self.registers.tick()

        def done(errno: int) -> None:
            self.answers["read unknown" if errno else "read later"] += 1
            self.cluster.tell(f"{node.machine.name} answers a read of {lba}+{count} at {asked}: {errno}")
            self.registers.end_read(begun, offset, None if errno else data)
            if not errno:
                self.registers.shown(offset, data)

        owner.when_committed(newest, done)

    def flush(self, owner: Owner) -> None:
        """Through that owner."""
        self._knows_generation(owner)
        asked = self.registers.tick()

        def done(errno: int) -> None:
            self.answers["flush unknown" if errno else "flush"] += 1
            if not errno:
                self.registers.flushed(asked)

        owner.flush(done)

    # --- what is expected ---

    def check(self) -> None:
        self._bury()
        with_authority = [node.machine.name for node in self.nodes() if node.machine.is_running and node.may_answer]
        if len(with_authority) > 1:
            raise ViolationError(f"{with_authority} answer at the same time")
        value = self.value()
        for node in self.nodes():
            member, log = value.member(node.machine.name), node.log
            if member is not None and is_whole(member, log.incarnation, log.intact_since) and log.resync_count:
                raise ViolationError(f"{node.machine.name} is in sync and has regions to fetch")

    def core(self, rng: random.Random) -> set[str]:
        return set(self.cluster.machines)

    def missing(self) -> str:
        self.act_to_heal()
        value = self.value()
        owners = sum(node.may_answer for node in self.nodes())
        if owners != 1:
            return f"{owners} owners"
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
        if not any(node.family.owner is not None for node in self.nodes()):
            self.attach_at(self._random.choice(self.placed()))

    def placed(self) -> list[ReplicaNode]:
        """Those with a replica that counts."""
        placement = self.value().placement
        return [node for node in self.nodes() if node.machine.name in placement]

    def end(self) -> None:
        self._bury()
        nodes = self.placed()
        (owner,) = [node.family.owner for node in nodes if node.family.owner is not None]
        self._knows_generation(owner)
        first = nodes[0]
        for lba in range(BLOCKS):
            contents = {node.machine.name: node.log.image.read(lba) for node in nodes}
            if len(set(contents.values())) > 1:
                shown = {name: content[:16].hex() for name, content in contents.items()}
                raise ViolationError(f"block {lba} is not the same on all replicas: {shown}")
            self.registers.read(lba * BLOCK_BYTES, contents[first.machine.name])
        for node in nodes:
            if node.log.resync_count:
                raise ViolationError(f"{node.machine.name} is in sync and has regions to fetch")


def draw_replication_mix(rng: random.Random) -> Mix:
    """What the catalogue has, without what cannot be survived; what happens by the hour happens more often, because
    runs are short."""
    drawn = draw_mix(rng)
    often = rng.choice([1.0, 5.0, 15.0])
    return Mix(
        {
            name: strength * often if strength >= 1.0 else strength
            for name, strength in drawn.strengths.items()
            if name not in LEFT_OUT
        }
    )


def replication_run(
    seed: int,
    mix: Mix | None = None,
    trouble: float | None = None,
    story: Callable[[str], None] | None = None,
) -> tuple[ReplicatedScenario, ClusterRun]:
    """A run of one seed; `go` is still to be called."""
    rng = random.Random(f"{seed} replication")
    drawn = draw_replication_mix(rng) if mix is None else mix
    scenario = ReplicatedScenario(rng, trouble)
    cluster = Cluster(seed, drawn, scenario.start, story)
    return scenario, ClusterRun(cluster, scenario, safety_s=rng.choice([20.0, 60.0]), act_s=rng.choice([0.1, 0.2, 0.5]))
