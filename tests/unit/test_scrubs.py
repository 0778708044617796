"""Scrubs from the control process, over a data process that says what it is told and a clock that goes on demand."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from metadata.registry import Family, Volume
from nbdserver.logdisk.scrub import Progress
from nbdserver.node.config import ScrubSettings
from nbdserver.node.data_process import DataProcessError
from nbdserver.node.errors import ConflictError, NotFoundError
from nbdserver.node.scrubs import NOTE_S, Scrubs

MONTH = 30 * 86400.0
MIB = 1 << 20


class DataOnPaper:
    """The data process's side: one scrub at a time."""

    def __init__(self) -> None:
        self.family = ""
        self.progress = Progress()
        self.is_over = False
        self.failure = ""
        self.refusing: dict[str, str] = {}  # family → why
        self.is_running = True
        self.begun: list[tuple[str, int]] = []  # (family, sequence)
        self.rates: list[int] = []

    def forget(self) -> None:
        """It was started again."""
        self.family = ""

    async def call(self, name: str, **arguments: Any) -> Any:
        if not self.is_running:
            raise DataProcessError("gone")
        if name == "scrub_start":
            if reason := self.refusing.get(arguments["family"]):
                raise DataProcessError(reason, "FamilyError")
            self.family, self.progress = arguments["family"], Progress(**arguments["begin"])
            self.is_over, self.failure = False, ""
            self.begun.append((self.family, self.progress.sequence))
            return None
        if name == "scrub_progress":
            self.rates.append(arguments["bytes_per_s"])
        found = {
            "family": self.family,
            "progress": asdict(self.progress),
            "is_over": self.is_over,
            "failure": self.failure,
        }
        if not self.family or arguments["family"] != self.family:
            return None
        if name == "scrub_stop":
            self.family = ""
        return found

    def read(self, sequence: int, done_bytes: int, total_bytes: int = 100 * MIB, damaged_blocks: int = 0) -> None:
        self.progress = Progress(sequence, 99, done_bytes, total_bytes, damaged_blocks)


class NodeOnPaper:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = DataOnPaper()
        self.now_s = 1e9
        self.settings = ScrubSettings()
        self.names = ["disk0", "disk1"]
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.start()

    def start(self) -> None:
        """The control process is started (again)."""
        self.scrubs = Scrubs(
            self.path, lambda: self.settings, self._families, self.data.call, lambda *event: self.events.append(event),
            lambda: self.now_s,
        )  # fmt: skip

    def _families(self) -> list[Family]:
        return [
            Family(name, MIB, "here", (Volume(1, name, MIB), Volume(2, f"{name}-clone", MIB))) for name in self.names
        ]

    def step(self, seconds: float = 1.0) -> None:
        self.now_s += seconds
        asyncio.run(self.scrubs.step())

    def shown(self, volume: str = "disk0") -> dict[str, Any]:
        return next(found for found in self.scrubs.status() if found["volume"] == volume)

    def kinds(self) -> list[str]:
        return [f"{kind} {fields['volume']}" for kind, fields in self.events]


@pytest.fixture
def node(tmp_path: Path) -> NodeOnPaper:
    node = NodeOnPaper(tmp_path / "scrub.json")
    node.step()
    return node


def test_families_are_read_one_after_the_other(node: NodeOnPaper) -> None:
    assert [found["volume"] for found in node.scrubs.start()] == ["disk0", "disk1"]
    node.step()
    assert (node.shown()["state"], node.shown("disk1")["state"]) == ("running", "waiting")
    node.data.read(50, 50 * MIB)
    node.step()
    node.data.read(60, 60 * MIB)
    node.step(2.0)
    assert node.shown()["rate_bytes_per_s"] == 5 * MIB
    assert node.shown()["left_s"] == 8
    node.data.read(99, 100 * MIB, damaged_blocks=2)
    node.data.is_over = True
    node.step()
    assert (node.shown()["state"], node.shown()["damaged_blocks"]) == ("done", 2)
    node.step()
    assert node.data.begun == [("disk0", 0), ("disk1", 0)]
    assert node.kinds() == ["scrub-started disk0", "scrub-done disk0", "scrub-started disk1"]
    assert node.events[1][1]["damaged_blocks"] == 2


def test_a_volume_is_scrubbed_again_from_the_beginning(node: NodeOnPaper) -> None:
    for _ in range(2):
        node.scrubs.start("disk0")
        node.step()
        node.data.read(99, 100 * MIB)
        node.data.is_over = True
        node.step()
        assert node.shown()["state"] == "done"
    assert node.data.begun == [("disk0", 0), ("disk0", 0)]


def test_a_volume_is_scrubbed_with_its_clones_and_by_their_names(node: NodeOnPaper) -> None:
    assert [found["volume"] for found in node.scrubs.start("disk1-clone")] == ["disk1"]
    with pytest.raises(ConflictError, match="disk1 is being scrubbed already"):
        node.scrubs.start("disk1")
    with pytest.raises(NotFoundError, match="there is no volume 'disk9'"):
        node.scrubs.start("disk9")


def test_after_a_restart_of_the_data_process_it_goes_on_where_it_was(node: NodeOnPaper) -> None:
    node.scrubs.start("disk0")
    node.step()
    node.data.read(50, 50 * MIB)
    node.step()
    node.data.is_running = False
    node.step()
    assert node.shown()["state"] == "running"
    node.data.is_running = True
    node.data.forget()
    node.step()
    assert node.data.begun == [("disk0", 0), ("disk0", 50)]
    assert node.kinds() == ["scrub-started disk0"]


@pytest.mark.parametrize("is_clean", [True, False])
def test_after_a_restart_of_the_node_it_goes_on_from_what_was_noted(node: NodeOnPaper, is_clean: bool) -> None:
    node.scrubs.start()
    node.step()
    node.data.read(30, 30 * MIB)
    node.step(NOTE_S)  # noted
    node.data.read(50, 50 * MIB)
    node.step()
    if is_clean:
        node.data.read(55, 55 * MIB)
        asyncio.run(node.scrubs.note())
    node.data.forget()
    node.start()
    node.step()
    assert node.data.begun[-1] == ("disk0", 55 if is_clean else 30)
    assert node.shown("disk1")["state"] == "waiting"


def test_one_that_completed_is_known_after_a_restart_and_the_next_is_due_by_it(node: NodeOnPaper) -> None:
    node.scrubs.start("disk0")
    node.step()
    node.data.is_over = True
    node.step()
    completed = node.shown()["completed"]
    node.start()
    node.step()
    assert (node.shown()["completed"], node.shown("disk1")["completed"]) == (completed, "")
    node.step(MONTH - 10)
    assert node.shown()["state"] == "done"
    node.step(20)
    assert "scrub-due disk0" in node.kinds()
    node.settings = ScrubSettings(interval="none")
    assert node.shown("disk1")["next"] == ""


def test_the_rate_changes_while_one_runs(node: NodeOnPaper) -> None:
    node.scrubs.start("disk0")
    node.step()
    node.settings = ScrubSettings(rate="7M")
    node.step()
    assert node.data.rates[-1] == 7 * MIB


def test_stopping_forgets_what_waits(node: NodeOnPaper) -> None:
    node.scrubs.start()
    node.step()
    node.data.read(50, 50 * MIB, damaged_blocks=1)
    assert asyncio.run(node.scrubs.stop()) == ["disk0", "disk1"]
    assert (node.shown()["state"], node.shown("disk1")["state"]) == ("stopped", "stopped")
    assert node.shown()["damaged_blocks"] == 1
    node.step()
    assert node.data.begun == [("disk0", 0)]
    assert asyncio.run(node.scrubs.stop()) == []
    assert node.kinds() == ["scrub-started disk0", "scrub-stopped disk0"]


def test_a_volume_that_cannot_be_read_is_said_and_the_next_one_is_read(node: NodeOnPaper) -> None:
    node.data.refusing = {"disk0": "its log is damaged"}
    node.scrubs.start()
    node.step()
    node.step()
    assert (node.shown()["state"], node.shown()["reason"]) == ("failed", "its log is damaged")
    assert node.shown("disk1")["state"] == "running"
    node.data.is_over, node.data.failure = True, "the volume has failed"
    node.step()
    assert node.shown("disk1")["reason"] == "the volume has failed"
    assert node.kinds()[-1] == "scrub-failed disk1"


def test_a_volume_that_is_deleted_meanwhile_is_forgotten(node: NodeOnPaper) -> None:
    node.scrubs.start()
    node.step()
    node.names = ["disk1"]
    node.data.forget()
    node.step()
    assert node.data.begun[-1] == ("disk1", 0)
    assert [found["volume"] for found in node.scrubs.status()] == ["disk1"]
