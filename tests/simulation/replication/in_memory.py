"""The world `replication`: one replicated volume, on every node production's `ReplicatedFamily` over a log in memory.

Theory. What is proved here are the rules of replication, by many fast runs. Clients write, discard, read and flush; a
register a block (tests/simulation/registers.py) says what each answer may be: an operation was answered, or is in doubt
because its node died or was deposed.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial

from nbdserver.replication.owner import Owner
from protocol.disk import BLOCK_BYTES
from tests.simulation.cluster.cluster import Cluster, ClusterRun
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.registers import Registers, ViolationError, pattern
from tests.simulation.replication.memory_log import MemoryDisk, MemoryLog
from tests.simulation.replication.replicated import (
    LEFT_OUT,
    STARTED_OVER,
    FamilyNode,
    FamilyScenario,
    draw_replication_mix,
)

BLOCKS = 24
OF_DISKS = frozenset({"disk error", "crash in a call"})
"""Faults of disks that are not used here."""


class ReplicaNode(FamilyNode):
    """One life of a node."""

    log: MemoryLog

    def __init__(self, scenario: "ReplicatedScenario", machine: Machine, seams: Seams) -> None:
        slow = 1.0 if machine.name in scenario.slow else machine.mix.slow
        log = MemoryLog(scenario.disk_of(machine), seams.clock, seams.random, slow)
        log.at_once = scenario.at_once
        super().__init__(scenario, machine, seams, log)


class ReplicatedScenario(FamilyScenario):
    """What clients do, and what they may see."""

    def __init__(self, rng: random.Random, trouble: float | None = None, count: int | None = None) -> None:
        super().__init__(rng, trouble, count)
        self.at_once = rng.choice([0.0, 0.5]) if trouble is None else 0.0
        """How often a replica appends where it receives."""
        self.registers = Registers()
        self.slow: set[str] = set()  # nodes with slow disks, beside those that the faults make slow
        self._disks: dict[str, MemoryDisk] = {}
        self._drives: dict[str, object] = {}
        self._label = 0

    def make(self, machine: Machine, seams: Seams) -> ReplicaNode:
        return ReplicaNode(self, machine, seams)

    def lost(self, machine: Machine, power: bool) -> None:
        if machine.name in self._disks:
            self._disks[machine.name].crash(machine.random, power)

    def disk_of(self, machine: Machine) -> MemoryDisk:
        """Its disk; an empty one if the drive is a new one, which counts its lives from somewhere else."""
        if self._drives.get(machine.name) is not machine.drive:
            self._drives[machine.name] = machine.drive
            self._disks[machine.name] = MemoryDisk(machine.random)
        return self._disks[machine.name]

    def put_disk_back(self, name: str, disk: MemoryDisk) -> None:
        """As it was, from a copy; no process is running."""
        self._disks[name] = disk

    def check(self) -> None:
        super().check()
        if self.value().generation == 1 and any(disk.has_started_over for disk in self._disks.values()):
            raise ViolationError(STARTED_OVER)

    # --- clients ---

    def operate(self, node: FamilyNode) -> None:
        owner = node.family.owner
        if owner is None:
            return
        assert isinstance(node, ReplicaNode)
        count = self._random.choice([1, 1, 2, 6])
        lba = self._random.randrange(BLOCKS - count + 1)
        kind = self._random.random()
        if kind < 0.45:
            self.read(node, owner, lba, count)
        elif kind < 0.9:
            self.write(node, owner, lba, count, discards=kind > 0.82)
        else:
            self.flush(owner)

    def went_back(self) -> None:
        self.registers.went_back()

    def write(self, node: ReplicaNode, owner: Owner, lba: int, count: int, discards: bool) -> None:
        """Through that node, if it has room."""
        if self.registers.is_busy(lba * BLOCK_BYTES, count * BLOCK_BYTES):
            return
        self.knows_generation(owner)
        if owner.room_bytes() < 1 << 20:
            self.answers["no room"] += 1
            return
        self._label += 1
        length = count * BLOCK_BYTES
        data = bytes(length) if discards else pattern(self._label, lba * BLOCK_BYTES, length)
        changes = self.registers.ask(f"write {self._label}", lba * BLOCK_BYTES, data, length)
        waits = node.asked(partial(self.registers.doubt, changes))
        pieces: Sequence[bytes | None] = [data[at : at + BLOCK_BYTES] for at in range(0, length, BLOCK_BYTES)]
        modification = node.log.order(lba, [None] * count if discards else pieces)
        self.registers.order(changes)
        self.cluster.tell(f"{node.machine.name} orders {modification.position} at {lba}+{count}{' discard' * discards}")

        def done(errno: int) -> None:
            if not waits():
                return
            self.answers["write unknown" if errno else "write"] += 1
            if errno:
                self.registers.doubt(changes)
            else:
                self.cluster.tell(f"{node.machine.name} acknowledges {modification.position}")
                self.registers.answer(changes)

        owner.when_committed(modification.txid, done)

    def read(self, node: ReplicaNode, owner: Owner, lba: int, count: int) -> None:
        """Through that node, at once or when it is allowed to answer."""
        self.knows_generation(owner)
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
        self.knows_generation(owner)
        asked = self.registers.tick()

        def done(errno: int) -> None:
            self.answers["flush unknown" if errno else "flush"] += 1
            if not errno:
                self.registers.flushed(asked)

        owner.flush(done)

    def compare(self, owner: FamilyNode) -> None:
        nodes = [node for node in self.placed() if isinstance(node, ReplicaNode)]
        for lba in range(BLOCKS):
            contents = {node.machine.name: node.log.image.read(lba) for node in nodes}
            if len(set(contents.values())) > 1:
                shown = {name: content[:16].hex() for name, content in contents.items()}
                raise ViolationError(f"block {lba} is not the same on all replicas: {shown}")
            self.registers.read(lba * BLOCK_BYTES, contents[owner.machine.name])


def replication_run(
    seed: int,
    mix: Mix | None = None,
    trouble: float | None = None,
    story: Callable[[str], None] | None = None,
) -> tuple[ReplicatedScenario, ClusterRun]:
    """A run of one seed; `go` is still to be called."""
    rng = random.Random(f"{seed} replication")
    drawn = draw_replication_mix(rng, LEFT_OUT | OF_DISKS) if mix is None else mix
    scenario = ReplicatedScenario(rng, trouble)
    cluster = Cluster(seed, drawn, scenario.start, story)
    return scenario, ClusterRun(cluster, scenario, safety_s=rng.choice([20.0, 60.0]), act_s=rng.choice([0.1, 0.2, 0.5]))
