"""Which data process has which family.

Theory: a family lives whole in one process, so what can be balanced is how families are spread. What a family will have
to do is not known when it is placed; the number of its volumes is the best guess, their sizes decide between equals.
At a start the largest come first, each to the process that has least; a new family goes there too. Nothing is written
down: all families are opened at a start anyhow, and what a process has in memory does not outlive it.

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
        for family in sorted(families, key=lambda family: (_load(family), family.id), reverse=True):
            self._worker[family.id] = worker = loads.index(min(loads))
            loads[worker] = _sum(loads[worker], _load(family))

    def place(self, family_id: str, families: Sequence[Family]) -> int:
        """Give a family a process, the one with least of those that there are."""
        loads = self._loads(families)
        self._worker[family_id] = worker = loads.index(min(loads))
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


def _load(family: Family) -> Load:
    return len(family.volumes), sum(volume.size_bytes for volume in family.volumes)


def _sum(one: Load, other: Load) -> Load:
    return one[0] + other[0], one[1] + other[1]
