"""How full a node is and how much it may promise, over a data process and a file system that say what they are told."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metadata.registry import Family, Volume
from nbdserver.node.capacity import Capacity
from nbdserver.node.config import NodeSettings
from nbdserver.node.data_process import DataProcessError
from nbdserver.node.errors import ConflictError

GIB = 1 << 30


class NodeOnPaper:
    """What a Capacity looks at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = NodeSettings()
        self.sizes: list[int] = []
        self.size_bytes, self.free_bytes = 100 * GIB, 100 * GIB
        self.room: dict[str, dict[str, int]] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.is_running = True
        monkeypatch.setattr(os, "statvfs", self._statvfs)
        self.capacity = Capacity(
            Path("/"), lambda: self.settings, self._families, self._call, lambda *event: self.events.append(event)
        )

    def change(self, **settings: Any) -> None:
        self.settings = self.settings.model_copy(update=settings)

    def look(self) -> list[str]:
        self.events.clear()
        asyncio.run(self.capacity.look())
        return [f"{kind} {fields['subject']} {fields['threshold_percent']}" for kind, fields in self.events]

    def _statvfs(self, _: Path) -> Any:
        blocks, free = self.size_bytes // 4096, self.free_bytes // 4096
        return SimpleNamespace(f_blocks=blocks, f_bfree=free, f_bavail=free, f_frsize=4096)

    def _families(self) -> list[Family]:
        return [Family(f"{size:032x}", 1 << 26, "here", (Volume(1, f"disk{size}", size),)) for size in self.sizes]

    async def _call(self, name: str) -> Any:
        assert name == "room"
        if not self.is_running:
            raise DataProcessError("gone")
        return self.room


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> NodeOnPaper:
    return NodeOnPaper(monkeypatch)


def room(allocated_bytes: int, filled_bytes: int) -> dict[str, int]:
    return {"allocated_bytes": allocated_bytes, "filled_bytes": filled_bytes}


def test_the_file_system_is_told_once_when_it_fills_and_once_when_it_empties(node: NodeOnPaper) -> None:
    assert node.look() == []
    node.free_bytes = 9 * GIB
    assert node.look() == ["fill-alarm file system 80", "fill-alarm file system 90"]
    assert node.look() == []
    node.is_running = False  # the file system is looked at all the same
    node.free_bytes = 50 * GIB
    assert node.look() == ["fill-alarm-over file system 90", "fill-alarm-over file system 80"]


def test_of_a_limit_counts_what_cannot_be_cleaned_away(node: NodeOnPaper) -> None:
    node.change(max_data=10 * GIB)
    node.room = {"a": room(5 * GIB, 4 * GIB), "b": room(5 * GIB, 3 * GIB)}
    assert node.look() == []
    node.room["b"] = room(5 * GIB, 5 * GIB)
    assert node.look() == ["fill-alarm max_data 80", "fill-alarm max_data 90"]
    assert [(fill["subject"], fill["percent"], fill["alarm"]) for fill in node.capacity.fills()] == [
        ("file system", 0.0, 0),
        ("max_data", 90.0, 90),
    ]
    node.change(max_data=0)
    node.look()
    assert [fill["subject"] for fill in node.capacity.fills()] == ["file system"]


@pytest.mark.parametrize(
    ("overcommit", "max_data", "allocated", "free", "sizes", "more", "is_refused"),
    [
        (0, 0, 0, 100, [1000], 1000, False),  # thin without limit
        (2, 0, 0, 100, [150], 50, False),
        (2, 0, 0, 100, [150], 51, True),
        (2, 0, 30, 70, [150], 50, False),  # what our files take is room too
        (2, 0, 0, 70, [140], 1, True),  # what others take is not
        (2, 40, 0, 100, [60], 20, False),
        (2, 40, 0, 100, [60], 21, True),
        (1, 0, 0, 100, [500], 0, False),  # what is there stays, and may get smaller
        (1, 0, 0, 100, [500], -1, False),
    ],
)
def test_what_may_be_promised(
    node: NodeOnPaper,
    overcommit: float,
    max_data: int,
    allocated: int,
    free: int,
    sizes: list[int],
    more: int,
    is_refused: bool,
) -> None:
    node.change(overcommit=float(overcommit), max_data=max_data * GIB)
    node.free_bytes = free * GIB
    node.room = {"a": room(allocated * GIB, 0)}
    node.sizes = [size * GIB for size in sizes]
    if not is_refused:
        asyncio.run(node.capacity.admit("volume x", more * GIB))
        return
    with pytest.raises(
        ConflictError, match=r"^volume x would make .* of volumes on .* of room, and overcommit: "
    ) as caught:
        asyncio.run(node.capacity.admit("volume x", more * GIB))
    assert "\n" not in str(caught.value)


def test_metrics_and_status_agree(node: NodeOnPaper) -> None:
    node.change(max_data=10 * GIB, overcommit=3.0)
    node.room = {"a": room(9 * GIB, 8 * GIB)}
    node.sizes = [20 * GIB]
    node.free_bytes = 4 * GIB
    node.look()
    gauges, described = node.capacity.gauges(), node.capacity.describe()
    for name in ("allocated_bytes", "max_data_bytes", "room_bytes", "provisioned_bytes", "overcommit"):
        assert gauges[name] == described[name]
    assert gauges["filesystem_alarm_percent"] == 95
    assert gauges["max_data_alarm_percent"] == 80
    assert (described["room_bytes"], described["provisioned_bytes"]) == (10 * GIB, 20 * GIB)
