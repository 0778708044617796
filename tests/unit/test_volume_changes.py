"""Changes of volumes against a data process that fails at the worst moment: what the registry and the disk then say."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from metadata.families import Families
from metadata.registry import Change, ExportSettings, Family, VolumeState
from metadata.registry_table import RegistryTable
from nbdserver.node.data_process import DataProcessError
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError
from nbdserver.node.local_registry import open_registry
from nbdserver.node.volumes import Volumes

SIZE = 1 << 20
MOST_BYTES = 1 << 30
CHANGES = {"format", "open", "clone", "delete", "serve", "withdraw", "rename", "close", "set"}


class Crash(BaseException):
    """The node is gone, data process and all."""


async def admit(what: str, more_bytes: int) -> None:
    if more_bytes > MOST_BYTES:
        raise ConflictError(f"{what} is too much")


@dataclass
class Fuse:
    """Burns when as many effects have been had as `left` says."""

    left: int = 1 << 30

    def burn(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash


@dataclass
class FakeData:
    """Answers the channel's requests and remembers what logs have; those in `failing` fail after they were done."""

    fuse: Fuse = field(default_factory=Fuse)
    failing: set[str] = field(default_factory=set)
    errno: dict[str, int] = field(default_factory=dict)
    clients: int = 0
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, dict[int, int]] = field(default_factory=dict)  # family → volume → its size
    served: dict[int, str] = field(default_factory=dict)  # of the family that was opened last
    calls: list[str] = field(default_factory=list)
    epochs: dict[str, list[int]] = field(default_factory=dict)

    async def call(self, name: str, **arguments: Any) -> Any:
        if name in CHANGES:
            self.fuse.burn()
        self.calls.append(name)
        family, number = arguments.get("family", ""), arguments.get("number", 0)
        answer: Any = self.errno.get(name, 0)
        if name == "format":
            Path(arguments["directory"]).mkdir()
            self.logs[family] = {1: arguments["size_bytes"]}
        elif name == "open":
            self.epochs.setdefault(family, []).append(arguments["epoch"])
            self.served = {}
            sizes_bytes = {str(number): size for number, size in self.logs[family].items()}
            answer = {"generation": 1, "sizes_bytes": sizes_bytes}
        elif name == "serve":
            for volume in arguments["volumes"]:
                assert volume["number"] in self.logs[family]
                self.served[volume["number"]] = volume["name"]
        elif name == "clone" and not answer:
            self.logs[family][number] = SIZE
        elif name == "delete" and not answer:
            assert number not in self.served, "clients can attach to it"
            self.logs[family].pop(number, None)
        elif name == "withdraw":
            answer = self.clients
            if not answer or arguments["force"]:
                del self.served[number]
                answer = 0
        elif name == "rename":
            self.served[number] = arguments["new_name"]
        elif name in ("volumes", "volume", "snapshots", "snapshot"):
            there = next((found for found in self.snapshots if found["name"] == arguments.get("snapshot")), None)
            none = {"families": {}, "last": ""}
            answer = {"volumes": none, "volume": {"disk": {}}, "snapshots": self.snapshots, "snapshot": there}[name]
        if name in self.failing:
            raise DataProcessError(f"{name} failed")
        return answer


@dataclass
class BurningRegistry:
    """A registry whose swaps are effects."""

    registry: RegistryTable
    fuse: Fuse

    def get(self, key: str) -> bytes | None:
        return self.registry.get(key)

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        return self.registry.range(prefix)

    async def compare_and_swap(self, changes: list[Change]) -> bool:
        self.fuse.burn()
        return await self.registry.compare_and_swap(changes)


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

    def names(self) -> dict[int, str]:
        """Of the volumes of the one family, by number; the registry and the log agree on which there are."""
        (family,) = self.families.all()
        assert {volume.number for volume in family.volumes} == set(self.data.logs[family.id])
        assert {volume.state for volume in family.volumes} == {VolumeState.THERE}
        names = {volume.number: volume.name for volume in family.volumes}
        assert self.data.served == names
        assert {key for key, _ in self.registry.range("volume/")} == {f"volume/{name}" for name in names.values()}
        return names

    def start_again(self) -> None:
        """As after kill -9: what is not in the registry or in a log is gone."""
        self.data.fuse.left = 1 << 30
        self.families = Families(BurningRegistry(self.registry, self.data.fuse), "here")
        self.volumes = Volumes(
            self.directory,
            self.families,
            self.data.call,
            self.data.call,
            lambda kind, fields: self.events.append(kind),
            1 << 20,
            admit,
        )
        asyncio.run(self.volumes.remove_scraps())
        asyncio.run(self.volumes.open_all([self.families.all()]))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    directory = DataDirectory(tmp_path / "data")
    directory.open()
    registry = open_registry(directory)
    data = FakeData()
    families, events = Families(BurningRegistry(registry, data.fuse), "here"), list[str]()
    volumes = Volumes(
        directory, families, data.call, data.call, lambda kind, fields: events.append(kind), 1 << 20, admit
    )
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
    asyncio.run(node.volumes.open_all([node.families.all()]))
    (shown,) = asyncio.run(node.volumes.list())
    assert shown["reason"] == ""
    assert node.data.epochs == {node.known()[0]: [1, 2]}


def test_one_volume_that_fails_does_not_keep_the_next_from_opening(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    asyncio.run(node.volumes.create("disk1", SIZE))
    node.data.failing = {"open"}
    asyncio.run(node.volumes.open_all([node.families.all()]))
    assert [shown["state"] for shown in asyncio.run(node.volumes.list())] == ["failed", "failed"]
    assert node.data.calls.count("open") == 4


def test_a_setting_that_the_export_refuses_is_not_registered(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.failing = {"set"}
    refused(DataProcessError, lambda: node.volumes.set("disk0", {"shared": "true"}))
    found = node.families.find("disk0")
    assert found is not None
    assert not found[1].settings.shared


def test_a_limit_is_the_familys_and_changes_with_the_other_settings_or_not_at_all(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    with pytest.raises(WrongInputError, match="less than 16M"):
        asyncio.run(node.volumes.set("disk0", {"shared": "true", "max-data": "1M"}))
    changed = asyncio.run(node.volumes.set("disk0", {"shared": "true", "max-data": "32M"}))
    assert (changed["settings"]["shared"], changed["settings"]["max_data"]) == (True, 32 << 20)
    (family,) = node.families.all()
    assert family.max_data == 32 << 20
    assert Family.decode(family.encode()) == family


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


def test_a_volume_with_snapshots_is_deleted_by_force_only(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.snapshots = [{"name": f"s{number}", "clones": []} for number in range(7)]
    error = refused(ConflictError, lambda: node.volumes.delete("disk0"))
    assert "s0, s1, s2, s3, s4 and 2 more" in error
    assert "--force" in error
    assert "withdraw" not in node.data.calls
    asyncio.run(node.volumes.delete("disk0", force=True))
    assert node.known() == []


def test_a_volume_whose_snapshots_have_clones_is_not_deleted_by_force_either(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.snapshots = [{"name": "s0", "clones": ["c2", "c1"]}, {"name": "s1", "clones": ["c2", "c3"]}]
    for force in (False, True):
        error = refused(ConflictError, lambda force=force: node.volumes.delete("disk0", force))  # type: ignore[misc]
        assert "c1, c2, c3; delete the clones first, or the snapshots" in error
    assert "withdraw" not in node.data.calls


def test_a_size_that_the_registry_did_not_hear_of_is_noted_at_the_next_opening(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.logs[node.known()[0]] = {1: 2 * SIZE}
    asyncio.run(node.volumes.open_all([node.families.all()]))
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
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.snapshots = [{"name": "monday", "layer": 7, "size_bytes": MOST_BYTES * 2}]
    assert (
        refused(ConflictError, lambda: node.volumes.clone("disk0", "monday", "disk1"))
        == "clone disk1 of 2G is too much"
    )
    assert node.names() == {1: "disk0"}


def with_clone(node: Node) -> None:
    """disk0 and disk1, a clone of its snapshot."""
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.snapshots = [{"name": "monday", "layer": 7, "size_bytes": SIZE, "clones": []}]
    asyncio.run(node.volumes.clone("disk0", "monday", "disk1"))
    node.data.snapshots = []
    assert node.names() == {1: "disk0", 2: "disk1"}


def outcomes(node: Node, change: Callable[[], Any]) -> list[dict[int, str]]:
    """What there is after `change` was cut off before its first effect, after it, after the next, ... and finished."""
    found: list[dict[int, str]] = []
    before = {key: dict(log) for key, log in node.data.logs.items()}
    keys = [node.registry.range(prefix) for prefix in ("family/", "volume/")]
    for effects in range(100):
        node.data.logs = {key: dict(log) for key, log in before.items()}
        gone = [(key, now, None) for part in ("family/", "volume/") for key, now in node.registry.range(part)]
        assert asyncio.run(node.registry.compare_and_swap(gone))
        assert asyncio.run(node.registry.compare_and_swap([(key, None, value) for part in keys for key, value in part]))
        node.start_again()
        node.data.fuse.left = effects
        try:
            asyncio.run(change())
        except Crash:
            node.start_again()
            found.append(node.names())
        else:
            found.append(node.names())
            node.start_again()
            assert node.names() == found[-1]
            return found
    raise AssertionError("it never ends")


def steps(found: list[dict[int, str]]) -> list[dict[int, str]]:
    """Each outcome once, in order."""
    return [now for at, now in enumerate(found) if not at or now != found[at - 1]]


def test_a_clone_is_there_or_not_wherever_its_making_is_cut_off(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.snapshots = [{"name": "monday", "layer": 7, "size_bytes": SIZE}]
    found = outcomes(node, lambda: node.volumes.clone("disk0", "monday", "disk1"))
    assert len(found) >= 4
    assert steps(found) == [{1: "disk0"}, {1: "disk0", 2: "disk1"}]


def test_a_deletion_is_done_or_not_wherever_it_is_cut_off(node: Node) -> None:
    with_clone(node)
    found = outcomes(node, lambda: node.volumes.delete("disk1"))
    assert len(found) >= 4
    assert steps(found) == [{1: "disk0", 2: "disk1"}, {1: "disk0"}]


def test_the_first_volume_of_a_family_can_go_before_the_others(node: Node) -> None:
    with_clone(node)
    found = outcomes(node, lambda: node.volumes.delete("disk0"))
    assert steps(found) == [{1: "disk0", 2: "disk1"}, {2: "disk1"}]
    asyncio.run(node.volumes.delete("disk1"))
    assert (node.known(), node.directories(), node.families.scraps()) == ([], [], [])


def test_a_volume_has_one_of_its_names_wherever_a_renaming_is_cut_off(node: Node) -> None:
    with_clone(node)
    found = outcomes(node, lambda: node.volumes.rename("disk1", "build"))
    assert steps(found) == [{1: "disk0", 2: "disk1"}, {1: "disk0", 2: "build"}]


def test_a_clone_that_was_refused_leaves_nothing(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    node.data.snapshots = [{"name": "monday", "layer": 7, "size_bytes": SIZE}]
    node.data.errno = {"clone": 28}
    assert "the disk is full" in refused(ConflictError, lambda: node.volumes.clone("disk0", "monday", "disk1"))
    assert node.names() == {1: "disk0"}
    node.data.errno = {"clone": 31}
    assert "as many snapshots" in refused(ConflictError, lambda: node.volumes.clone("disk0", "monday", "disk1"))
    node.data.errno = {}
    assert "no snapshot 'x'" in refused(NotFoundError, lambda: node.volumes.clone("disk0", "x", "disk1"))
    assert "cannot be a volume's name" in refused(
        WrongInputError, lambda: node.volumes.clone("disk0", "monday", "disk@1")
    )
    assert "disk0 exists already" in refused(ConflictError, lambda: node.volumes.clone("disk0", "monday", "disk0"))


def test_a_clone_may_be_attached_to_by_whom_its_base_allows(node: Node) -> None:
    asyncio.run(node.volumes.create("disk0", SIZE))
    asyncio.run(
        node.volumes.set(
            "disk0", {"allowed-clients": "10.0.0.0/8", "read-only": "yes", "iops": "9", "description": "d"}
        )
    )
    node.data.snapshots = [{"name": "monday", "layer": 7, "size_bytes": SIZE}]
    asyncio.run(node.volumes.clone("disk0", "monday", "disk1"))
    found = node.families.find("disk1")
    assert found is not None
    assert found[1].settings == ExportSettings(allowed_clients=("10.0.0.0/8",), iops=9)


def test_a_deletion_that_the_log_refuses_is_finished_by_the_next_start(node: Node) -> None:
    with_clone(node)
    node.data.errno = {"delete": 5}
    assert "the next start goes on" in refused(NodeError, lambda: node.volumes.delete("disk1"))
    assert [shown["name"] for shown in asyncio.run(node.volumes.list())] == ["disk0"]
    assert "was being deleted" in refused(ConflictError, lambda: node.volumes.create("disk1", SIZE))
    node.start_again()
    assert [shown["name"] for shown in asyncio.run(node.volumes.list())] == ["disk0"]
    assert "volume-not-deleted" in node.events
    node.data.errno = {}
    node.start_again()
    assert node.names() == {1: "disk0"}


def test_a_volume_that_its_family_lost_is_said_to_have_failed_and_can_be_deleted(node: Node) -> None:
    with_clone(node)
    del node.data.logs[node.known()[0]][2]
    node.start_again()
    first, second = asyncio.run(node.volumes.list())
    assert (first["reason"], second["state"]) == ("", "failed")
    assert "does not have it" in second["reason"]
    assert node.data.served == {1: "disk0"}
    refused(ConflictError, lambda: node.volumes.ask("snapshots", "disk1"))
    asyncio.run(node.volumes.delete("disk1"))
    assert node.names() == {1: "disk0"}


def test_a_volume_without_a_name_is_told_and_never_deleted(node: Node) -> None:
    with_clone(node)
    node.data.logs[node.known()[0]][9] = SIZE
    node.start_again()
    assert "volume-without-name" in node.events
    assert node.data.logs[node.known()[0]] == {1: SIZE, 2: SIZE, 9: SIZE}


def test_volumes_of_a_family_that_does_not_open_can_be_deleted_one_by_one(node: Node) -> None:
    with_clone(node)
    node.data.failing = {"open"}
    node.start_again()
    assert [shown["state"] for shown in asyncio.run(node.volumes.list())] == ["failed", "failed"]
    asyncio.run(node.volumes.delete("disk0"))
    assert [shown["name"] for shown in asyncio.run(node.volumes.list())] == ["disk1"]
    asyncio.run(node.volumes.delete("disk1"))
    assert (node.known(), node.directories()) == ([], [])


def test_a_deletion_in_a_family_that_did_not_open_is_done_when_it_does(node: Node) -> None:
    with_clone(node)
    node.data.failing = {"open"}
    node.start_again()
    asyncio.run(node.volumes.delete("disk0"))
    node.data.failing = set()
    node.start_again()
    assert node.names() == {2: "disk1"}
