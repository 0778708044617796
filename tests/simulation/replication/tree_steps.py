"""Changes of the tree of layers in the world `replicas`: snapshots, rollbacks, clones, sizes, and what goes again.

Theory. A change is answered as production answers it (nbdserver/node/ownership.py): when all members have it, durably.
One is under way at a time; if its node dies or is deposed it is in doubt, and the next owner's tree tells.

Rules of this file
- A change is asked for when nothing else is under way at its node; a rollback or another size lets nothing else begin.
"""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metadata.seams import Done
from nbdserver.block import Operation
from nbdserver.replication.owner import Owner
from tests.simulation.registers import BLOCK_BYTES, ViolationError
from tests.simulation.replication.volumes import Snapshot, Volume, judge_snapshot, lbas_of

if TYPE_CHECKING:
    from tests.simulation.replication.on_log_disks import LogNode, LogScenario

MOST_SNAPSHOTS = 5
MOST_CLONES = 3
LOOKED_AT = 8  # blocks of a snapshot


class TreeSteps:
    """All changes of one run."""

    def __init__(self, scenario: "LogScenario", rng: random.Random) -> None:
        self._scenario = scenario
        self._random = rng
        self._node: LogNode | None = None  # at which one is under way
        self._is_exclusive = False
        self.is_wanted = False
        """Whether the next step is one of these."""
        self._next_name = 0
        self._next_volume = 2

    @property
    def is_under_way(self) -> bool:
        return self._node is not None

    def holds(self, node: "LogNode") -> bool:
        """Whether nothing may begin there."""
        return self._node is node and self._is_exclusive

    def step(self, node: "LogNode", owner: Owner) -> None:
        """Ask for one, or look at a snapshot."""
        self.is_wanted = False
        if self._node is not None:
            return
        if node.open:
            self.is_wanted = True  # as soon as nothing is
            return
        volumes = self._scenario.volumes.sure
        heads = node.disk.maps.tree.heads
        here = [number for number in sorted(volumes) if number in heads and len(volumes[number].sizes_bytes) == 1]
        if not here:
            return
        number = self._random.choice(here)
        of_snapshots = (self._snapshot, self._look, self._roll_back, self._delete)
        of_volumes = (self._clone, self._resize, self._delete_clone)
        step = self._random.choices(of_snapshots + of_volumes, (4, 4, 1, 2, 2, 1, 1))[0]
        step(node, owner, number, volumes[number])

    def _change(
        self,
        node: "LogNode",
        owner: Owner,
        what: str,
        ask: Callable[[Done], None],
        happened: Callable[[], None],
        in_doubt: Callable[[], None],
        is_exclusive: bool = False,
    ) -> None:
        """Ask for a change, and tell `happened` when all members have it."""
        scenario = self._scenario
        scenario.cluster.tell(f"{node.machine.name}: {what}")
        self._node, self._is_exclusive = node, is_exclusive
        flushed = scenario.volumes.ask_flush()

        def doubt() -> None:
            self._node = None
            scenario.answers[f"{what.split()[0]} in doubt"] += 1
            in_doubt()

        waits = node.asked(doubt)

        def changed(errno: int) -> None:
            if not errno:
                owner.when_committed(owner.ordered_txid, committed)
            elif node.disk.failure or owner.is_deposed:
                pass  # its node ends, and it is in doubt
            elif scenario.small.may_refuse(errno):
                if waits():
                    doubt()
            else:
                raise ViolationError(f"{what} was refused at {node.machine.name}: errno {errno}")

        def committed(errno: int) -> None:
            if not errno:
                owner.flush(durable)

        def durable(errno: int) -> None:
            if not errno and waits():
                self._node = None
                scenario.answers[what.split()[0]] += 1
                if scenario.is_resyncing:
                    scenario.answers["change during a resync"] += 1
                flushed()
                happened()

        ask(changed)

    # --- snapshots ---

    def _snapshot(self, node: "LogNode", owner: Owner, number: int, volume: Volume) -> None:
        if len(volume.snapshots) >= MOST_SNAPSHOTS:
            return
        self._next_name += 1
        name = f"s{self._next_name}"
        (size_bytes,) = volume.sizes_bytes
        snapshot = volume.snapshots[name] = Snapshot(volume.content(), size_bytes, is_sure=False)

        def happened() -> None:
            snapshot.is_sure = True

        self._change(
            node, owner, f"snapshot {name} of volume {number}",
            lambda done: node.disk.snapshot(number, name, 0, done), happened, lambda: None,
        )  # fmt: skip

    def _layer(self, node: "LogNode", number: int, volume: Volume) -> tuple[str, int]:
        """A snapshot that is there, and its layer; ("", 0) if there is none."""
        names = volume.sure()
        if not names:
            return "", 0
        name = self._random.choice(names)
        row = node.disk.snapshot_row(number, name)
        return (name, row.layer) if row is not None else ("", 0)

    def _roll_back(self, node: "LogNode", owner: Owner, number: int, volume: Volume) -> None:
        name, layer = self._layer(node, number, volume)
        if not name:
            return
        snapshot = volume.snapshots[name]
        (before_bytes,) = volume.sizes_bytes
        volume.sizes_bytes = {before_bytes, snapshot.size_bytes}
        volume.registers.replaced(snapshot.content, certain=False)

        def happened() -> None:
            volume.sizes_bytes = {snapshot.size_bytes}
            volume.registers.replaced(snapshot.content, certain=True)

        self._change(
            node, owner, f"rollback of volume {number} to {name}",
            lambda done: node.disk.rollback(number, layer, done), happened, lambda: None, is_exclusive=True,
        )  # fmt: skip

    def _delete(self, node: "LogNode", owner: Owner, number: int, volume: Volume) -> None:
        name, layer = self._layer(node, number, volume)
        if not name:
            return
        volume.snapshots[name].is_sure = False

        def happened() -> None:
            del volume.snapshots[name]

        self._change(
            node, owner, f"deletion of snapshot {name} of volume {number}",
            lambda done: node.disk.delete_snapshot(layer, done), happened, lambda: None,
        )  # fmt: skip

    def _look(self, node: "LogNode", owner: Owner, number: int, volume: Volume) -> None:
        """Read some blocks of a snapshot."""
        name, layer = self._layer(node, number, volume)
        if not name or not owner.has_authority:
            return
        scenario, snapshot = self._scenario, volume.snapshots[name]
        view = node.disk.view(layer)
        lbas = lbas_of(volume, snapshot.size_bytes)
        left = self._random.sample(lbas, min(LOOKED_AT, len(lbas)))
        waits = node.asked(view.close)

        def look() -> None:
            if not left:
                if waits():
                    scenario.answers["look"] += 1
                    view.close()
                return
            lba = left.pop()
            view.later(Operation.READ, lba * BLOCK_BYTES, BLOCK_BYTES, None, lambda *answer: seen(lba, *answer))

        def seen(lba: int, errno: int, data: Any) -> None:
            if errno and not node.disk.failure and not view.gone:
                raise ViolationError(f"snapshot {name} cannot be read at {node.machine.name}: errno {errno}")
            if errno:
                if waits():
                    view.close()
                return
            judge_snapshot(f"snapshot {name} of volume {number}", snapshot.content, lba, b"".join(data))
            look()

        look()

    # --- volumes ---

    def _clone(self, node: "LogNode", owner: Owner, number: int, volume: Volume) -> None:
        volumes = self._scenario.volumes
        name, layer = self._layer(node, number, volume)
        if not name or len(volumes.sure) > MOST_CLONES:
            return
        snapshot = volume.snapshots[name]
        new, self._next_volume = self._next_volume, self._next_volume + 1
        volumes.doubtful[new] = Volume(snapshot.content, snapshot.size_bytes)

        def happened() -> None:
            volumes.sure[new] = volumes.doubtful.pop(new)

        self._change(
            node, owner, f"clone {new} of {name} of volume {number}",
            lambda done: node.disk.clone(layer, new, done), happened, lambda: None,
        )  # fmt: skip

    def _resize(self, node: "LogNode", owner: Owner, number: int, volume: Volume) -> None:
        """To any size; what is cut off reads as zeros when it is there again."""
        (old_bytes,) = volume.sizes_bytes
        size_bytes = self._random.choice([2, 3, 4, 4, 5]) * 1000 * BLOCK_BYTES + self._random.choice([0, 2048])
        changes = []
        if size_bytes < old_bytes:
            end = -(-old_bytes // BLOCK_BYTES) * BLOCK_BYTES
            if volume.registers.is_busy(size_bytes, end - size_bytes):
                return
            changes = volume.registers.ask("shrinking", size_bytes, None, end - size_bytes)
        volume.sizes_bytes = {old_bytes, size_bytes}

        def happened() -> None:
            volume.sizes_bytes = {size_bytes}
            volume.registers.answer(changes)

        self._change(
            node, owner, f"resize of volume {number} from {old_bytes} to {size_bytes}",
            lambda done: node.disk.resize(number, size_bytes, done), happened,
            lambda: volume.registers.doubt(changes), is_exclusive=True,
        )  # fmt: skip

    def _delete_clone(self, node: "LogNode", owner: Owner, number: int, volume: Volume) -> None:
        volumes = self._scenario.volumes
        if number == 1 or volume.snapshots:
            return
        volumes.doubtful[number] = volumes.sure.pop(number)

        def happened() -> None:
            del volumes.doubtful[number]

        self._change(
            node, owner, f"deletion of volume {number}",
            lambda done: node.disk.delete_volume(number, done), happened, lambda: None, is_exclusive=True,
        )  # fmt: skip
