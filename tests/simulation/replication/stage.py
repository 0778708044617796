"""A stage for plays: a replicated volume without faults of chance, and a script that makes exactly one thing happen.

Chance finds what nobody thought of; what a rule is there for is sometimes too rare for it. A play leads there in a few
steps. The judge is the same as in every run: the registers, and the comparison of all replicas in the end.
"""

import random
from collections.abc import Callable

from nbdserver.replication.owner import Owner
from tests.simulation.cluster.cluster import Cluster, converge
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.registry_twin import Backup
from tests.simulation.registers import ViolationError
from tests.simulation.replication.in_memory import BLOCKS, ReplicaNode, ReplicatedScenario
from tests.simulation.replication.memory_log import REGION_BLOCKS, MemoryDisk

CHECK_S = 0.001


class Stage:
    """The nodes `1` to `count`, the first of which owns the volume."""

    def __init__(self, count: int = 3, slow: tuple[int, ...] = (), keeps: bool = False) -> None:
        """`keeps`: nodes keep what they know of the registry, which is put back."""
        self.scenario = ReplicatedScenario(random.Random("stage"), trouble=0.0, count=count)
        self.cluster = Cluster(7, Mix({"registry put back": 1.0} if keeps else {}), self.scenario.start)
        self.scenario.slow = {f"node-{number}" for number in slow}
        self.scenario.begin(self.cluster)
        self.attach(1)
        self.until(lambda: self.in_sync() == set(range(1, count + 1)))

    # --- who is there ---

    def node(self, number: int) -> ReplicaNode:
        node = self.cluster.machines[f"node-{number}"].node
        assert isinstance(node, ReplicaNode)
        return node

    def owner(self, number: int) -> Owner:
        owner = self.node(number).family.owner
        assert owner is not None
        return owner

    def in_sync(self) -> set[int]:
        return {int(member.node.removeprefix("node-")) for member in self.scenario.value().in_sync}

    # --- time ---

    def run(self, duration_s: float) -> None:
        """Let time go by, and look often."""
        until_s = self.cluster.now_s + duration_s
        while self.cluster.now_s < until_s:
            self.cluster.run(CHECK_S)
            self.scenario.check()

    def until(self, holds: Callable[[], bool], limit_s: float = 10.0) -> None:
        """Run to the very event after which it holds."""
        if not self.cluster.run_until(holds, limit_s):
            raise ViolationError(f"{limit_s:g} s went by without what should happen")

    # --- what happens ---

    def attach(self, number: int) -> None:
        """Somebody attaches there until that node answers."""
        for _ in range(10):
            self.scenario.attach_at(self.node(number))
            if self.cluster.run_until(lambda: self.node(number).may_answer, 3.0):
                return
        raise ViolationError(f"node-{number} does not become the owner")

    def write(self, number: int, lba: int, count: int = 1) -> None:
        """Through that node; it is not waited for."""
        self.scenario.write(self.node(number), self.owner(number), lba, count, discards=False)

    def write_everywhere(self, number: int) -> None:
        """A block in every region, and wait until that is acknowledged."""
        for lba in range(0, BLOCKS, REGION_BLOCKS):
            self.write(number, lba)
        self.until(lambda: not self.node(number).open)

    def place(self, number: int, *numbers: int) -> None:
        """Its owner is told where replicas shall be."""
        self.scenario.place_by(self.node(number), [f"node-{each}" for each in numbers])

    def read(self, number: int, lba: int) -> None:
        self.scenario.read(self.node(number), self.owner(number), lba, 1)

    def block(self, sources: tuple[int, ...], targets: tuple[int, ...]) -> Callable[[], None]:
        """What one half sends does not reach the other; returns what mends it."""
        return self.cluster.wires.block([f"node-{each}" for each in sources], [f"node-{each}" for each in targets])

    def isolate(self, number: int) -> Callable[[], None]:
        """A node hears nobody, nor does anybody hear it, the registry neither."""
        return self.cluster.isolate(f"node-{number}")

    def kill(self, number: int, power: bool = False) -> None:
        self.cluster.machines[f"node-{number}"].end(power)

    def start(self, number: int) -> None:
        self.cluster.start(f"node-{number}")

    def kill_all(self, power: bool = False) -> None:
        for machine in self.cluster.machines.values():
            machine.end(power)

    def start_all(self) -> None:
        for name in self.cluster.machines:
            self.cluster.start(name)

    def copy_disk(self, number: int) -> MemoryDisk:
        """Of a node that is stopped."""
        return self.scenario.disk_of(self.cluster.machines[f"node-{number}"]).copied()

    def put_disk_back(self, number: int, disk: MemoryDisk) -> None:
        """As it was when it was copied; the node is stopped."""
        self.scenario.put_disk_back(f"node-{number}", disk)

    def put_registry_back(self, backup: Backup) -> None:
        """To a state that it had; it is of no use until it is recovered."""
        self.cluster.needs_recovery = True
        self.cluster.registry.put_back(backup)

    def recover(self) -> bool:
        """Make the registry whole, if those that run are enough for that."""
        self.scenario.recover()
        return not self.cluster.needs_recovery

    def forget_log(self, number: int) -> None:
        """A checkpoint: the log does not go back any more."""
        self.run(2.0)  # everybody knows what is committed, and has synced
        for _ in range(30):
            self.node(number).log.checkpoint()

    def end(self) -> None:
        """All that run must come to be in sync and hold the same."""
        converge(self.cluster, self.scenario)
        self.scenario.end()
