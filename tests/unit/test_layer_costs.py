"""What changes of the tree of layers cost: counted by work, not by the clock, at several sizes of a volume and numbers
of snapshots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.unit.families import BLOCK_BYTES, SETTINGS, SimulatedFamily
from tests.unit.test_layers import change, put, settled, snapshot

WORK = (
    "log_records",
    "log_bytes_appended",
    "map_page_loads",
    "map_pages_derived",
    "map_values_written",
    "logical_map_updates",
    "middle_map_updates",
)


@dataclass(frozen=True)
class Case:
    """A volume: how large, with how many written blocks, under how many snapshots."""

    size_bytes: int
    blocks: int
    snapshots: int


CASES = (Case(1 << 30, 1, 0), Case(1 << 30, 3000, 0), Case(16 << 40, 3000, 0), Case(1 << 30, 300, 200))


class Measured:
    """A family of a case, and what is done to it."""

    def __init__(self, case: Case) -> None:
        self.family = SimulatedFamily(size_bytes=case.size_bytes, segment_bytes=1 << 20, settings=SETTINGS)
        put(self.family, 1, 0, 1, case.blocks)
        self.base = snapshot(self.family, "base")
        put(self.family, 1, 0, 10_000)
        for number in range(case.snapshots):
            snapshot(self.family, f"{number}")
            put(self.family, 1, number, 20_000 + number)
        assert change(self.family, "clone", self.base, 2) == 0
        self.family.checkpoint()
        self.ranges_read = 0
        real = self.family.store.range_later

        def counted(ranges: Sequence[tuple[bytes, bytes]], done: Callable[..., None], limit: int = 0) -> None:
            self.ranges_read += len(ranges)
            real(ranges, done, limit)

        self.family.store.range_later = counted

    def cost(self, do: Callable[[], Any]) -> dict[str, int]:
        before = self._work()
        do()
        return {name: value - before[name] for name, value in self._work().items()}

    def _work(self) -> dict[str, int]:
        counters = self.family.disk.counters()
        return {name: counters[name] for name in WORK} | {"ranges_read": self.ranges_read}


def changes_of(measured: Measured) -> dict[str, tuple[str, tuple[Any, ...]]]:
    size_bytes = measured.family.disk.head(1).size_bytes
    return {
        "snapshot": ("snapshot", (1, "another", 0)),
        "clone": ("clone", (measured.base, 3)),
        "rollback": ("rollback", (1, measured.base)),
        "grow": ("resize", (1, size_bytes * 2)),
        "shrink": ("resize", (1, size_bytes // 2)),
        "delete a snapshot": ("delete_snapshot", (measured.base,)),
        "delete a volume": ("delete_volume", (2,)),
    }


@pytest.mark.parametrize(
    "name", ["snapshot", "clone", "rollback", "grow", "shrink", "delete a snapshot", "delete a volume"]
)
def test_a_change_is_a_record_or_two_at_any_size_and_number_of_snapshots(name: str) -> None:
    costs = []
    for case in CASES:
        measured = Measured(case)
        operation, arguments = changes_of(measured)[name]
        costs.append(measured.cost(lambda: change(measured.family, operation, *arguments)))  # noqa: B023
    assert costs == [costs[0]] * len(CASES)
    assert costs[0]["log_records"] == (2 if name == "shrink" else 1)
    assert costs[0]["log_bytes_appended"] < 1000
    assert costs[0]["map_page_loads"] == costs[0]["map_pages_derived"] == 0
    assert costs[0]["ranges_read"] <= 1  # with which the background begins to work in what was cut off
    assert costs[0]["map_values_written"] < 20  # the checkpoint with which the background begins


def test_what_a_deletion_gives_back_costs_what_the_layer_holds_whatever_there_is_besides() -> None:
    """The work in the background, until all is settled."""
    costs = []
    for case in CASES[1:]:
        measured = Measured(case)
        family = measured.family
        last = snapshot(family, "last")
        family.checkpoint()
        for page in range(20):
            put(family, 1, 10_000 + page * 256, 30_000 + page, 3)
        layer = snapshot(family, "short")
        put(family, 1, 10_000, 40_000, 2)
        family.checkpoint()
        live = family.disk.maps.live_blocks
        costs.append(measured.cost(lambda: (change(family, "delete_snapshot", layer), family.run(200.0))))  # noqa: B023
        assert not family.disk.maps.tree.removable
        assert live - family.disk.maps.live_blocks == 2
        assert last in family.disk.maps.tree.layers
    assert costs == [costs[0]] * len(costs)
    assert costs[0]["ranges_read"] <= 2 + 20
    assert costs[0]["map_values_written"] < 100


def test_a_deleted_volume_gives_all_back_that_only_it_showed() -> None:
    measured = Measured(CASES[1])
    family = measured.family
    live = family.disk.maps.live_blocks
    put(family, 2, 100, 50_000, 700)
    assert change(family, "resize", 2, 64 << 30) == 0
    put(family, 2, (64 << 30) // BLOCK_BYTES - 1, 60_000)
    assert family.disk.maps.live_blocks == live + 701
    assert change(family, "delete_volume", 2) == 0
    settled(family)
    assert family.disk.maps.live_blocks == live
