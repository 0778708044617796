"""A stage for plays on log disks: three nodes, the first of which owns the family, without faults of chance.

The nodes are those of the world `replicas`; what happens is told by the script.
"""

import random
from collections.abc import Callable

from nbdserver.block import IN_FLIGHT, Operation
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.replication.device import ReplicatedDevice
from nbdserver.replication.owner import Owner
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.faults import Mix
from tests.simulation.registers import BLOCK_BYTES, pattern
from tests.simulation.replication.on_log_disks import REGION_BLOCKS, Bend, LogNode, LogScenario

VOLUME = 1


class _Scenario(LogScenario):
    """Remembers what nodes tell."""

    def __init__(self) -> None:
        super().__init__(random.Random("stage"), Bend(trouble=0.0), count=3)
        self.settings = DiskSettings(cache_bytes=1 << 20)
        self.told: list[tuple[str, dict[str, object]]] = []

    def report(self, kind: str, fields: dict[str, object]) -> None:
        super().report(kind, fields)
        self.told.append((kind, fields))


class LogStage:
    """See above."""

    def __init__(self, seed: int = 11) -> None:
        self.scenario = _Scenario()
        self.cluster = Cluster(seed, Mix(), self.scenario.start)
        self.expected: dict[int, bytes] = {}
        self.random = random.Random(5)
        self._label = 0
        self.scenario.begin(self.cluster)
        self.attach(1)

    @property
    def reports(self) -> list[tuple[str, dict[str, object]]]:
        """What nodes have told."""
        return self.scenario.told

    def node(self, number: int) -> LogNode:
        node = self.cluster.machines[f"node-{number}"].node
        assert isinstance(node, LogNode)
        return node

    def owner(self, number: int) -> Owner:
        owner = self.node(number).family.owner
        assert owner is not None
        return owner

    def device(self, number: int) -> ReplicatedDevice:
        """The volume, through its owner there."""
        return self.node(number).head(VOLUME, self.owner(number))

    def content(self, number: int, lba: int) -> bytes:
        """What a node's own log shows."""
        return self.scenario.shown(self.node(number), VOLUME, "", lba)

    def until(self, holds: Callable[[], bool], limit_s: float = 10.0) -> None:
        assert self.cluster.run_until(holds, limit_s), f"not within {limit_s} s; {self.scenario.told[-5:]}"

    def attach(self, number: int) -> None:
        for _ in range(5):
            self.node(number).family.take_over(lambda reason: None)
            if self.cluster.run_until(lambda: self.answers(number), 3.0):
                return
        raise AssertionError(f"node-{number} does not become the owner; {self.scenario.told[-5:]}")

    def answers(self, number: int) -> bool:
        return self.node(number).may_answer

    def write(self, number: int, lba: int, count: int = 1) -> list[int]:
        """The errno once it is acknowledged."""
        self._label += 1
        data = pattern(self._label, lba * BLOCK_BYTES, count * BLOCK_BYTES)
        device = self.device(number)
        told: list[int] = []
        if device.write(lba * BLOCK_BYTES, memoryview(data)):
            assert device.commit() == IN_FLIGHT
            device.acknowledged(told.append)
        else:
            device.later(Operation.WRITE, lba * BLOCK_BYTES, len(data), data, lambda errno, result: told.append(errno))
        for index in range(count):
            self.expected[lba + index] = data[index * BLOCK_BYTES :][:BLOCK_BYTES]
        return told

    def write_through(self, number: int, lba: int, count: int = 1) -> None:
        """Wait until it is acknowledged."""
        told = self.write(number, lba, count)
        self.until(lambda: told == [0])

    def flush(self, number: int) -> None:
        told: list[int] = []
        self.device(number).flush(told.append)
        self.until(lambda: told == [0])

    def any_block(self, count: int) -> int:
        """One of the first `count` of some region."""
        return self.random.randrange(4) * REGION_BLOCKS + self.random.randrange(count)

    def write_some(self, number: int, count: int = 20) -> None:
        for _ in range(count):
            self.write_through(number, self.any_block(60), self.random.choice([1, 1, 4]))

    def all_in_sync(self) -> bool:
        return not self.scenario.missing()

    def end(self) -> None:
        """All are in sync and hold what was acknowledged."""
        self.until(self.all_in_sync, 30.0)
        for number in (1, 2, 3):
            wrong = [lba for lba, data in self.expected.items() if self.content(number, lba) != data]
            assert not wrong, f"node-{number} has other contents at {wrong}"
