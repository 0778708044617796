"""The world `replicas`: whole replicated families, production's replicas on simulated disks of several nodes.

Theory. What clients see of a family is the same as on one node: volumes, snapshots, clones. They write, discard, read
and flush through production's `ReplicatedDevice`, and change the tree of layers, while nodes die, lose their power, are
cut off, lose disks, and while regions are copied. Each disk loses any part of what was not synced; in some runs a disk
*rots*: blocks at rest change and appends land elsewhere, and what is read must be right all the same.

Rules of this file
- A disk rots only where everybody stays in the set, and its owner: whose copy is the only one left may not lose it.
- A process whose disk has failed ends, as one that exits.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from errno import ENOSPC
from functools import partial
from typing import Any

from metadata.logical_map import ADDRESS_SHIFT
from metadata.pages import PAGE_MASK, PAGE_SHIFT
from nbdserver.block import IN_FLIGHT, Operation
from nbdserver.logdisk.disk import DiskError, DiskSettings, LogDisk
from nbdserver.logdisk.maps import OFFSET
from nbdserver.logdisk.opening import Replicated
from nbdserver.logdisk.replica import Replica
from nbdserver.logdisk.segments import segment_path
from nbdserver.replication.device import ReplicatedDevice
from nbdserver.replication.owner import Owner
from tests.simulation.cluster.cluster import Cluster, ClusterRun
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.registers import BLOCK_BYTES, ViolationError, pattern, right_length
from tests.simulation.replication.replicated import (
    FAMILY,
    STARTED_OVER,
    FamilyNode,
    FamilyScenario,
    draw_replication_mix,
)
from tests.simulation.replication.small_disks import SmallDisks, drawn_room_segments
from tests.simulation.replication.tree_steps import TreeSteps
from tests.simulation.replication.volumes import Volume, Volumes, judge_snapshot, lbas_of

REGIONS = 4
REGION_BLOCKS = 1024
SIZE_BYTES = REGIONS * REGION_BLOCKS * BLOCK_BYTES
SEGMENT_BYTES = 1 << 20  # smaller ones have no room beside what a device keeps free
HARMLESS = frozenset({"drift", "registry delay", "registry unknown", "registry compaction", "watch break"})
"""Faults that make nobody leave the set."""
READ_LIMIT_S = 30.0
OPENING_S = 0.5  # how long a log that was cut may take to be open again
OPERATIONS = 800  # at most, a run
FLOOD, FLOOD_AN_ACT, FLOOD_BLOCKS = 60, 6, 44


@dataclass(frozen=True)
class Bend:
    """What a test wants of a run that is otherwise drawn: it makes a rare thing frequent. None: as drawn."""

    faults: Mapping[str, float] | None = None
    trouble: float | None = None  # chance of a conspiracy, an act
    of_the_tree: float | None = None  # chance of a change of the tree, instead of an operation
    rots: float | None = None  # chance that something on a disk changes, an act
    room_segments: int | None = None  # of some nodes' disks; 0: all have plenty


class LogNode(FamilyNode):
    """One life of a node."""

    log: Replica

    def __init__(self, scenario: "LogScenario", machine: Machine, seams: Seams) -> None:
        self.seams = seams
        self._scenario = scenario
        self._boot_id = f"{scenario.boots.setdefault(machine.name, 1):036d}"
        self.machine = machine
        self._may_fail = bool(machine.mix.store_write_error)
        if not seams.files.list("."):
            LogDisk.format(seams.files, seams.store, FAMILY, SIZE_BYTES, SEGMENT_BYTES, seams.random)
        try:
            log = Replica(self._open(Replicated()), self._open_again, seams.files)
        except DiskError as error:
            if self._may_fail:
                raise OSError(str(error)) from error
            raise
        super().__init__(scenario, machine, seams, log)
        self.family.gave_up = lambda reason: self.doubt()

    def _open(self, replicated: Replicated) -> LogDisk:
        seams = self.seams
        return LogDisk.open(
            seams.files, seams.store, seams.clock, seams.random, self._scenario.settings, None, self._boot_id,
            self._disk_report, replicated=replicated,
        )  # fmt: skip

    def _open_again(self, replicated: Replicated, done: Callable[[LogDisk | DiskError], None]) -> None:
        """It takes a while, in which the node goes on."""

        def open_it() -> None:
            try:
                opened: LogDisk | DiskError = self._open(replicated)
            except DiskError as error:
                opened = error
            self.seams.clock.call_later(self.seams.random.random() * OPENING_S, lambda: done(opened))

        self.seams.clock.call_soon(open_it)

    def _disk_report(self, kind: str, fields: dict[str, object]) -> None:
        if self.machine.has_crashed:
            return
        self._scenario.report(kind, fields)
        if kind == "started-over" and self._scenario.value().generation == 1:
            raise ViolationError(STARTED_OVER)
        if kind == "family-failed":
            if not self._may_fail:
                raise ViolationError(f"the disk of {self.machine.name} has failed: {fields}")
            self._scenario.cluster.failed(self.machine, str(fields["reason"]))

    @property
    def disk(self) -> LogDisk:
        return self.log.disk

    def place_of(self, volume: int, lba: int) -> tuple[int, int] | None:
        """(segment, offset in it) of a block, as the maps in memory say; None if they know of none."""
        maps = self.disk.maps
        address = (maps.tree.heads.get(volume, 0) << ADDRESS_SHIFT) + lba
        page = maps.page(address >> PAGE_SHIFT)
        mba = page[address & PAGE_MASK] if page is not None else 0
        middle = maps.middle.get(mba >> PAGE_SHIFT) if mba else None
        if middle is None or not middle[mba & PAGE_MASK]:
            return None
        return middle[mba & PAGE_MASK], middle[OFFSET + (mba & PAGE_MASK)]

    def head(self, volume: int, owner: Owner) -> ReplicatedDevice:
        """A volume, for who may see what this owner may tell."""
        return ReplicatedDevice(self.disk.head(volume), owner)


class LogScenario(FamilyScenario):
    """What clients do, and what they may see."""

    def __init__(self, rng: random.Random, bend: Bend | None = None, count: int | None = None) -> None:
        bend = bend or Bend()
        super().__init__(rng, bend.trouble, count)
        self.volumes = Volumes(SIZE_BYTES)
        self.boots: dict[str, int] = {}
        self.settings = DiskSettings(
            cache_bytes=rng.choice([0, 4 << 20]),
            checkpoint_bytes=rng.choice([512, 4096]) << 10,
            checkpoint_interval_s=rng.choice([0.3, 1.0, 30.0]),
        )
        self.rots = 0.0  # chance that something on the bad disk changes, an act
        self.tree = TreeSteps(self, rng)
        self.small = SmallDisks(self, rng, bend.room_segments or 0)
        self._operations = rng.choice([2, 6, 20])
        self._home = rng.choice([0, -1])  # where everybody attaches while a disk rots: not there, or there
        self._near = rng.choice([8, 44])  # blocks at the beginning of each region that are used
        self._most_blocks = rng.choice([4, 16, 40])
        drawn = rng.choice([0.0, 0.02, 0.1])
        self._of_the_tree = drawn if bend.of_the_tree is None else bend.of_the_tree
        self._left = OPERATIONS
        self._flood = self.small.flood  # large writes that are still to come
        self._label = 0

    def _conspire(self) -> None:
        """Or a replica is away while so much is written that the logs do not go back to it."""
        victim = self._random.choice(list(self.cluster.machines))
        if self._random.random() > 0.3 or victim == self.value().owner:
            super()._conspire()
            return
        self.cluster.tell(f"{victim} is left behind")
        self.answers["left behind"] += 1
        self._end(victim, self._random.random() < 0.5, 4.0)
        self._flood = FLOOD

    def _flood_at(self, node: FamilyNode) -> None:
        owner = node.family.owner
        assert isinstance(node, LogNode)
        if owner is None or owner.is_deposed or node.disk.failure or 1 not in node.disk.maps.tree.heads:
            return
        self.knows_generation(owner)
        lba = self._random.randrange(REGIONS) * REGION_BLOCKS
        if self.small.flooded_blocks > 1:
            lba += self._random.randrange(self.small.flooded_blocks)
        offset = lba * BLOCK_BYTES
        length = min(FLOOD_BLOCKS * BLOCK_BYTES, node.disk.head(1).size_bytes - offset)
        if length > 0 and not self.tree.holds(node):
            self.change(node, owner, 1, self.volumes.sure[1], offset, length, discards=False)

    def begin_family(self, names: Sequence[str]) -> None:
        self.small.begin(names, SEGMENT_BYTES)
        if self.rots:  # some appends land elsewhere too
            bad = self.cluster.machines[names[-1]]
            bad.mix = replace(bad.mix, misdirected_write=0.01)
        mixes = {name: self.cluster.machines[name].mix for name in names}
        for name, mix in mixes.items():  # the first time all start
            self.cluster.machines[name].mix = replace(mix, store_write_error=0.0)
        super().begin_family(names)
        for name, mix in mixes.items():
            self.cluster.machines[name].mix = mix

    def make(self, machine: Machine, seams: Seams) -> LogNode:
        return LogNode(self, machine, seams)

    def lost(self, machine: Machine, power: bool) -> None:
        self.boots[machine.name] = self.boots.get(machine.name, 1) + power

    def went_back(self) -> None:
        self.volumes.went_back()

    def report(self, kind: str, fields: dict[str, object]) -> None:
        super().report(kind, fields)
        self.small.judge(kind, fields)

    # --- clients ---

    def act(self) -> None:
        super().act()
        owners = [node for node in self.nodes() if node.machine.is_running and node.family.owner is not None]
        for _ in range(min(self._flood, FLOOD_AN_ACT) if owners else 0):
            self._flood -= 1
            self._flood_at(self._random.choice(owners))
        if self._random.random() < self.rots:
            self._rot()

    def place_by(self, node: FamilyNode, names: Sequence[str] | None = None) -> None:
        if not self.rots:
            super().place_by(node, names)

    def attach_at(self, node: FamilyNode) -> None:
        super().attach_at(self.nodes()[self._home] if self.rots else node)

    def operate(self, node: FamilyNode) -> None:
        owner = node.family.owner
        assert isinstance(node, LogNode)
        if owner is None or owner.is_deposed or node.disk.failure or self.tree.holds(node) or not self._left:
            return
        self._left -= 1
        self.knows_generation(owner)
        if owner.has_authority and not self.tree.is_under_way:
            self.volumes.look(node.disk)
        rng = self._random
        if self.tree.is_wanted or rng.random() < self._of_the_tree:
            self.tree.step(node, owner)
            return
        number = rng.choice([volume for volume in self.volumes.sure if volume in node.disk.maps.tree.heads] or [0])
        if not number:
            return
        volume = self.volumes.sure[number]
        kind = rng.random()
        offset, length = self.place(node.disk.head(number).size_bytes)
        if kind < 0.1 or not length:
            self.flush(node, owner)
        elif kind < 0.5:
            self.read(node, owner, number, volume, offset, length)
        else:
            self.change(node, owner, number, volume, offset, length, discards=kind > 0.9)

    def place(self, size_bytes: int) -> tuple[int, int]:
        """(offset, length) of some blocks or parts of them, inside; length 0 if there is no such place."""
        rng = self._random
        lba = rng.randrange(REGIONS) * REGION_BLOCKS + rng.randrange(self._near)
        offset, length = lba * BLOCK_BYTES, rng.randint(1, self._most_blocks) * BLOCK_BYTES
        if rng.random() < 0.15:
            cut = rng.randrange(BLOCK_BYTES)
            offset, length = offset + cut, max(1, length - cut - rng.randrange(BLOCK_BYTES))
        return offset, max(0, min(length, size_bytes - offset))

    def change(
        self, node: LogNode, owner: Owner, number: int, volume: Volume, offset: int, length: int, discards: bool
    ) -> None:
        """Write or discard."""
        registers = volume.registers
        if registers.is_busy(offset, length):
            return
        self._label += 1
        data = None if discards else pattern(self._label, offset, length)
        what = f"{'discard' if discards else 'write'} {self._label}"
        changes = registers.ask(what, offset, data, length)
        waits = node.asked(partial(registers.doubt, changes))
        device = node.head(number, owner)
        self.cluster.tell(f"{node.machine.name}: {what} of volume {number}, {offset / BLOCK_BYTES:.3f}+{length}")

        def told(errno: int, result: object = None) -> None:
            if not waits():
                return
            self.answers["no room" if errno else "discard" if discards else "write"] += 1
            if errno:
                if not self.small.may_refuse(errno):
                    self._must_be_broken(node, errno, what)
                registers.doubt(changes)
            else:
                registers.answer(changes)

        if device.discard(offset, length) if data is None else device.write(offset, memoryview(data)):
            registers.order(changes)
            errno = device.commit()
            if errno == IN_FLIGHT:
                device.acknowledged(told)
            elif errno == ENOSPC:
                told(errno)
            return
        self.answers["later"] += 1
        operation = Operation.DISCARD if data is None else Operation.WRITE
        device.later(operation, offset, length, data, told)

    def read(self, node: LogNode, owner: Owner, number: int, volume: Volume, offset: int, length: int) -> None:
        """At once or when it is allowed to answer."""
        registers = volume.registers
        begun = registers.begin_read(offset, length)
        device = node.head(number, owner)
        found = device.read(offset, length)
        if found is not None:
            data = b"".join(found)
            right_length(data, length)
            registers.end_read(begun, offset, data)
            registers.read(offset, data)
            registers.shown(offset, data)
            self.answers["read at once"] += 1
            return
        waits = node.asked(partial(registers.end_read, begun, offset, None))

        def told(errno: int, result: Any) -> None:
            if not waits():
                return
            if errno:
                self._must_be_broken(node, errno, "a read")
                registers.end_read(begun, offset, None)
                return
            data = b"".join(result)
            right_length(data, length)
            self.answers["read later"] += 1
            registers.end_read(begun, offset, data)
            registers.shown(offset, data)

        device.later(Operation.READ, offset, length, None, told)

    def flush(self, node: LogNode, owner: Owner) -> None:
        """Of all volumes: they share a log."""
        flushed = self.volumes.ask_flush()
        waits = node.asked(lambda: None)

        def told(errno: int) -> None:
            if waits():
                self.answers["flush"] += 1
                if errno:
                    self._must_be_broken(node, errno, "a flush")
                else:
                    flushed()

        node.head(1, owner).flush(told)

    def _must_be_broken(self, node: LogNode, errno: int, what: str) -> None:
        if not node.disk.failure and not node.machine.has_crashed:
            raise ViolationError(f"{what} at {node.machine.name} failed with errno {errno} without a cause")

    # --- a disk that rots ---

    def _rot(self) -> None:
        """Something at rest changes on the last node's disk: a block of a volume, or anything."""
        node = self.nodes()[-1]
        assert isinstance(node, LogNode)
        drive, rng = node.machine.drive, self._random
        self.answers["rot"] += 1
        for _ in range(20):
            volume = rng.choice(sorted(self.volumes.sure))
            lba = rng.choice(sorted(self.volumes.sure[volume].registers.blocks) or [0])
            if place := node.place_of(volume, lba):
                segment, offset = place
                at = offset + rng.randrange(BLOCK_BYTES)
                drive.files[segment_path(segment)].content[at] ^= 1 << rng.randrange(8)
                return
        drive.rot()

    # --- in the end ---

    def core(self, rng: random.Random) -> set[str]:
        self.small.heal()
        return super().core(rng)

    def missing(self) -> str:
        waiting = [node.machine.name for node in self.nodes() if node.open]
        return super().missing() or (f"{waiting} have not answered what they were asked" if waiting else "")

    def compare(self, owner: FamilyNode) -> None:
        assert isinstance(owner, LogNode)
        self.volumes.look(owner.disk)
        others = [node for node in self.placed() if isinstance(node, LogNode) and node is not owner]
        for number, volume in sorted(self.volumes.sure.items()):
            (size_bytes,) = volume.sizes_bytes
            for lba in lbas_of(volume, size_bytes):
                data = self._same(f"block {lba} of volume {number}", [owner, *others], number, "", lba)
                volume.registers.read(lba * BLOCK_BYTES, data)
            for name, snapshot in sorted(volume.snapshots.items()):
                for lba in lbas_of(volume, snapshot.size_bytes):
                    what = f"snapshot {name} of volume {number}"
                    data = self._same(f"block {lba} of {what}", [owner, *others], number, name, lba)
                    judge_snapshot(what, snapshot.content, lba, data)
        ends: list[str] = []
        owner.family.compare(1 << 40, ends.append)  # production's own comparison finds the same
        self.cluster.run_until(lambda: bool(ends), READ_LIMIT_S)
        if not ends or owner.family.differences:
            raise ViolationError(f"the comparison ends with {ends} and {owner.family.differences}")

    def _same(self, what: str, nodes: Sequence[LogNode], volume: int, snapshot: str, lba: int) -> bytes:
        found = {node.machine.name: self.shown(node, volume, snapshot, lba) for node in nodes}
        if len(set(found.values())) > 1:
            shown = {name: data[:16].hex() for name, data in found.items()}
            raise ViolationError(f"{what} is not the same on all replicas: {shown}")
        return found[nodes[0].machine.name]

    def shown(self, node: LogNode, volume: int, snapshot: str, lba: int) -> bytes:
        """What a replica's own log shows in one block."""
        disk = node.disk
        row = disk.snapshot_row(volume, snapshot) if snapshot else None
        if (snapshot and row is None) or volume not in disk.maps.tree.heads:
            raise ViolationError(f"{node.machine.name} has no snapshot {snapshot!r} of volume {volume}")
        device = disk.head(volume) if row is None else disk.view(row.layer)
        data = device.read(lba * BLOCK_BYTES, BLOCK_BYTES)
        if data is None:
            answers: list[tuple[int, Any]] = []
            device.later(Operation.READ, lba * BLOCK_BYTES, BLOCK_BYTES, None, lambda *answer: answers.append(answer))
            self.cluster.run_until(lambda: bool(answers), READ_LIMIT_S)
            if not answers or answers[0][0]:
                raise ViolationError(f"block {lba} cannot be read at {node.machine.name}: {answers}")
            data = answers[0][1]
        if row is not None:
            device.close()  # type: ignore[union-attr]
        return b"".join(data)


def replicas_run(
    seed: int, bend: Bend | None = None, story: Callable[[str], None] | None = None
) -> tuple[LogScenario, ClusterRun]:
    """A run of one seed; `go` is still to be called."""
    rng = random.Random(f"{seed} replicas")
    bend = bend or Bend()
    drawn = draw_replication_mix(rng) if bend.faults is None else Mix(bend.faults)
    rots = rng.choice([0.1, 0.5]) if rng.random() < 0.15 and bend.faults is None else 0.0
    rots = rots if bend.rots is None else bend.rots
    if rots:
        drawn = Mix({name: strength for name, strength in drawn.strengths.items() if name in HARMLESS})
        bend = replace(bend, trouble=0.0)
    if bend.room_segments is None and bend.faults is None and not rots:
        bend = replace(bend, room_segments=drawn_room_segments(seed))
    scenario = LogScenario(rng, bend, rng.choice([2, 3]) if rots else None)
    scenario.rots = rots
    cluster = Cluster(seed, drawn, scenario.start, story)
    return scenario, ClusterRun(
        cluster, scenario, safety_s=rng.choice([10.0, 30.0]), act_s=rng.choice([0.03, 0.1, 0.3])
    )
