"""Which data process has which family.

Theory: a family lives whole in one process, so what can be balanced is how families are spread. What a family will have
to do is not known when it is placed; the number of its volumes is the best guess, their sizes decide between equals.
At a start the largest come first, each to the process that has least; a new family goes there too. Nothing is written
down: all families are opened at a start anyhow, and what a process has in memory does not outlive it.
A replica of a family of the cluster is where its id says: the other nodes have to find it, and no table tells them.

Rules: a family stays where it is as long as the node runs, whichever processes die meanwhile. What is placed where is a
function of the families that there are: the same ones are spread in the same way at every start.
"""

from collections.abc import Sequence

from metadata.registry import Family

Load = tuple[int, int]
"""Volumes, and their bytes."""


class Placement:
    """Families on `workers` processes."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._worker: dict[str, int] = {}

    def place_all(self, families: Sequence[Family]) -> None:
        """Spread them anew: nothing is open."""
        self._worker.clear()
        loads = self._loads(())
        for family in families:
            if family.replicas:
                worker = self.place_replica(family.id)
                loads[worker] = _sum(loads[worker], _load(family))
        own = [family for family in families if not family.replicas]
        for family in sorted(own, key=lambda family: (_load(family), family.id), reverse=True):
            self._worker[family.id] = worker = loads.index(min(loads))
            loads[worker] = _sum(loads[worker], _load(family))

    def place(self, family_id: str, families: Sequence[Family]) -> int:
        """Give a family a process, the one with least of those that there are."""
        loads = self._loads(families)
        self._worker[family_id] = worker = loads.index(min(loads))
        return worker

    def place_replica(self, family_id: str) -> int:
        """Give a replica of a family of the cluster the process in which every node has it."""
        self._worker[family_id] = worker = worker_of(family_id, self._workers)
        return worker

    def worker(self, family_id: str) -> int | None:
        """Where a family is; None if it has not been placed."""
        return self._worker.get(family_id)

    def families(self, worker: int, families: Sequence[Family]) -> list[Family]:
        """Those of one process."""
        return [family for family in families if self._worker.get(family.id) == worker]

    def _loads(self, families: Sequence[Family]) -> list[Load]:
        loads: list[Load] = [(0, 0)] * self._workers
        there = {family.id: _load(family) for family in families}
        self._worker = {family_id: worker for family_id, worker in self._worker.items() if family_id in there}
        for family_id, worker in self._worker.items():
            loads[worker] = _sum(loads[worker], there[family_id])
        return loads


def worker_of(family_id: str, workers: int) -> int:
    """In which of a node's data processes a replica is, so that the others know where to find it."""
    return int(family_id, 16) % workers


def _load(family: Family) -> Load:
    return len(family.volumes), family.size_bytes


def _sum(one: Load, other: Load) -> Load:
    return one[0] + other[0], one[1] + other[1]
