"""Changes of volumes against a data process that fails at the worst moment: what the registry and the disk then say."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from metadata.registry import Families
from metadata.registry_table import RegistryTable
from nbdserver.node.control import open_registry
from nbdserver.node.data_process import DataProcessError
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import ConflictError
from nbdserver.node.volumes import Volumes

SIZE = 1 << 20
MOST_BYTES = 1 << 30


@dataclass
class FakeData:
    """Answers the channel's requests; those in `failing` fail after they were done."""

    failing: set[str] = field(default_factory=set)
    clients: int = 0
    size_bytes: int = SIZE
    snapshots: list[dict[str, str]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    epochs: dict[str, list[int]] = field(default_factory=dict)

    async def call(self, name: str, **arguments: Any) -> Any:
        self.calls.append(name)
        if name == "format":
            Path(arguments["directory"]).mkdir()
        if name == "open":
            self.epochs.setdefault(arguments["family"], []).append(arguments["epoch"])
        if name in self.failing:
            raise DataProcessError(f"{name} failed")
        opened = {"generation": 1, "size_bytes": self.size_bytes}
        return {"open": opened, "close": self.clients, "volumes": {}, "snapshots": self.snapshots}.get(name)


@dataclass
class Node:
    directory: DataDirectory
    registry: RegistryTable
    families: Families
    data: FakeData
    volumes: Volumes
    events: list[str]

    def directories(self) -> list[str]:
        return sorted(path.name for path in self.directory.families.iterdir())

    def known(self) -> list[str]:
        return sorted(family.id for family in self.families.all())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    directory = DataDirectory(tmp_path / "data")
    directory.open()
    registry = open_registry(directory)
    families, data, events = Families(registry, "here"), FakeData(), list[str]()

    async def admit(what: str, more_bytes: int) -> None:
        if more_bytes > MOST_BYTES:
            raise ConflictError(f"{what} is too much")

    volumes = Volumes(directory, families, data.call, lambda kind, fields: events.append(kind), 1 << 20, admit)
    yield Node(directory, registry, families, data, volumes, events)
    registry.close()
    directory.release()


def refused(error: type[Exception], change: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        asyncio.run(change())
    return str(caught.value)


def test_a_volume_that_cannot_be_formatted_leaves_nothing(node: Node) -> None:
    node.data.failing = {"format"}
    refused(DataProcessError, lambda: node.volumes.create("disk0", SIZE))
    assert (node.directories(), node.known(), node.families.scraps()) == ([], [], [])
    node.data.failing = set()
    asyncio.run(node.volumes.create("disk0", SIZE))
    assert node.directories() == node.known()


def test_a_volume_that_cannot_be_opened_is_kept_and_said_to_have_failed(node: Node) -> None:
    node.data.failing = {"open"}
    refused(DataProcessError, lambda: node.volumes.create("disk0", SIZE))
    (shown,) = asyncio.run(node.volumes.list())
    assert (shown["state"], shown["reason"]) == ("failed", "open failed")
    assert "volume-not-opened" in node.events
    node.data.failing = set()
    asyncio.run(node.volumes.open_all())
    (shown,) = asyncio.run(node.volumes.list())
    assert shown["reason"] == ""
    assert node.data.epochs == {node.known()[0]: [1, 2]}


def test_one_volume_that_fails_does_not_keep_the_next_from_opening(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    asyncio.run(node.volumes.create("disk1", SIZE))
    node.data.failing = {"open"}
    asyncio.run(node.volumes.open_all())
    assert [shown["state"] for shown in asyncio.run(node.volumes.list())] == ["failed", "failed"]
    assert node.data.calls.count("open") == 4


def test_a_setting_that_the_export_refuses_is_not_registered(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.failing = {"set"}
    refused(DataProcessError, lambda: node.volumes.set("disk0", {"shared": "true"}))
    family = node.families.find("disk0")
    assert family is not None
    assert not family.settings.shared


def test_a_deletion_that_clients_prevent_changes_nothing(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.clients = 2
    message = refused(ConflictError, lambda: node.volumes.delete("disk0"))
    assert message.startswith("volume disk0 has 2 client connections; ")
    assert node.directories() == node.known() != []


def test_a_deletion_cut_off_after_it_was_registered_is_finished_by_the_next_start(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))

    def cut_off(family_id: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(node.directory, "remove_family", cut_off)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(node.volumes.delete("disk0"))
    assert (node.known(), len(node.directories())) == ([], 1)
    asyncio.run(node.volumes.remove_scraps())
    assert (node.directories(), node.families.scraps()) == ([], [])


def test_a_volume_with_snapshots_is_not_deleted(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.snapshots = [{"name": f"s{number}"} for number in range(7)]
    error = refused(ConflictError, lambda: node.volumes.delete("disk0", force=True))
    assert "s0, s1, s2, s3, s4 and 2 more" in error
    assert "close" not in node.data.calls


def test_a_size_that_the_registry_did_not_hear_of_is_noted_at_the_next_opening(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.size_bytes = 2 * SIZE
    asyncio.run(node.volumes.open_all())
    assert asyncio.run(node.volumes.show("disk0"))["size_bytes"] == 2 * SIZE


def test_a_volume_that_is_wanted_and_there_keeps_its_size(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    asyncio.run(node.volumes.create("disk0", SIZE, exist_ok=True))
    assert node.data.calls.count("format") == 1
    assert asyncio.run(node.volumes.create("disk0", 2 * SIZE, exist_ok=True))["size_bytes"] == SIZE
    refused(ConflictError, lambda: node.volumes.create("disk0", SIZE))


def test_a_volume_that_promises_too_much_is_refused_before_anything_is_made(node: Node) -> None:
    assert (
        refused(ConflictError, lambda: node.volumes.create("disk0", MOST_BYTES * 2)) == "volume disk0 of 2G is too much"
    )
    assert (node.data.calls, node.directories(), node.families.scraps()) == ([], [], [])
