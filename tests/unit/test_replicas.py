"""The replicas of one node, made what the shared registry says, whatever was broken off before."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadata.families import OF_REPLICA, Families
from metadata.registry import Family, Volume
from metadata.replica_set import Member, ReplicaSet
from nbdserver.node import replicas
from nbdserver.node.data_process import DataProcessError
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError
from nbdserver.node.local_registry import open_registry
from nbdserver.node.opening import Opening
from nbdserver.node.replicas import Replicas
from tests.unit.test_families import Held

ID = "ab" * 16
DB = Family(ID, 1 << 26, "", (Volume(1, "db", 1 << 20),), replicas=2)


class Node:
    """Node n2, with a data process that does what it is asked."""

    def __init__(self, path: Path) -> None:
        self.directory = DataDirectory(path)
        self.directory.open()
        self.registry = open_registry(self.directory)
        self.shared = Held()
        self.calls: list[str] = []
        self.events: list[str] = []
        self.failing: set[str] = set()
        self.owner_by_now = ""
        self.epoch = 1
        self.start()

    def start(self) -> None:
        """As a program that was started."""
        self.families = Families(self.registry, "local")
        self.families.shared = self.shared
        event = self._event
        opening = Opening(self.directory, self.families, self.call, event)
        self.replicas = Replicas(
            "n2", self.directory, self.families, opening, asyncio.Lock(), self.call, lambda family: None, event
        )

    def _event(self, kind: str, fields: dict[str, Any]) -> None:
        self.events.append(kind)

    async def call(self, name: str, **arguments: Any) -> Any:
        self.calls.append(name)
        if name in self.failing:
            raise DataProcessError(f"{name} failed")
        if name == "format":
            Path(arguments["directory"]).mkdir()
        if name == "own":
            if self.owner_by_now and arguments["only_again"]:
                raise DataProcessError(f"{self.owner_by_now} owns it by now")
            self.replicas.heard("owner", {"family": arguments["family"], "epoch": self.epoch})
            return {"epoch": self.epoch, "generation": 1, "sizes_bytes": {"1": 1 << 20}}
        return {"incarnation": 1, "generation": 1, "sizes_bytes": {"1": 1 << 20}}

    def named(self, *nodes: str, in_sync: tuple[str, ...] = ("n1",), owner: str = "n1") -> None:
        """The shared registry has the family, on these nodes."""
        value = ReplicaSet(self.epoch, owner, tuple(Member(node, 1) for node in in_sync), nodes)
        self.shared.values[f"family/{ID}"] = DB.encode()
        self.shared.values["volume/db"] = f"{ID}/1".encode()
        self.shared.values[f"replicas/{ID}"] = value.encode()

    def directories(self) -> list[str]:
        return [path.name for path in self.directory.families.iterdir()]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "data")
    yield node
    node.registry.close()
    node.directory.release()


def run(*work: Callable[[], Awaitable[Any]]) -> None:
    async def one_after_the_other() -> None:
        for each in work:
            await each()
            await asyncio.sleep(0)

    asyncio.run(one_after_the_other())


def test_a_replica_is_made_where_it_is_named_and_deleted_where_it_is_not_any_more(node: Node) -> None:
    node.named("n1", "n2")
    run(node.replicas.reconcile, node.replicas.reconcile)
    assert node.calls == ["format", "follow"]
    assert (node.directories(), node.families.has_replica(ID)) == ([ID], True)
    node.named("n1", in_sync=("n1", "n2"))
    run(node.replicas.reconcile)
    assert node.directories() == [ID], "a member stays until the set is without it"
    node.named("n1")
    run(node.replicas.reconcile)
    assert node.calls[2:] == ["close"]
    assert (node.directories(), node.families.has_replica(ID), node.families.scraps()) == ([], False, [])


def test_a_replica_whose_disk_has_failed_is_opened_anew_after_a_while(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.named("n1", "n2")
    run(node.replicas.reconcile)
    node.replicas.heard("family-failed", {"family": ID, "reason": "the disk is broken"})
    run(node.replicas.reconcile)
    assert node.calls == ["format", "follow"]
    monkeypatch.setattr(replicas, "REOPEN_S", 0.0)
    node.replicas.heard("family-failed", {"family": ID, "reason": "the disk is broken"})
    run(node.replicas.reconcile, node.replicas.reconcile)
    assert node.calls[2:] == ["close", "follow"]
    assert node.events[-1] == "replica-opened-anew"


def test_a_replica_that_could_not_be_opened_is_tried_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "REOPEN_S", 0.0)
    node.named("n1", "n2")
    node.failing = {"follow"}
    run(node.replicas.reconcile, node.replicas.reconcile, node.replicas.reconcile)
    assert (node.calls, node.events.count("replica-not-opened")) == (["format", *["follow"] * 3], 1)
    node.failing = set()
    run(node.replicas.reconcile, node.replicas.reconcile)
    assert node.calls[4:] == ["follow"]
    assert (node.replicas.is_followed(ID), node.replicas.problems) == (True, {})


def test_nothing_is_deleted_because_the_registry_does_not_have_it(node: Node) -> None:
    node.named("n1", "n2")
    run(node.replicas.reconcile)
    node.shared.values.clear()
    run(node.replicas.reconcile)
    assert (node.directories(), "close" in node.calls) == ([ID], False)


def test_a_deleted_family_goes_and_says_so_also_after_an_absence(node: Node) -> None:
    node.named("n1", "n2")
    run(node.replicas.reconcile)
    node.start()
    node.shared.values = {f"removed/{ID}": b'["n1","n2"]'}
    run(node.replicas.reconcile)
    assert (node.directories(), node.shared.values) == ([], {f"removed/{ID}": b'["n1"]'})


def test_an_empty_replica_does_not_take_the_place_of_one_that_was_in_sync(node: Node) -> None:
    node.named("n1", "n2", in_sync=("n1", "n2"))
    run(node.replicas.reconcile)
    assert (node.calls, node.directories(), node.events) == ([], [], ["replica-not-opened"])
    node.named("n1", "n2")
    run(node.replicas.reconcile)
    assert node.calls == ["format", "follow"]


@pytest.mark.parametrize(("in_sync", "stays"), [(("n2",), True), (("n1",), False)])
def test_what_was_being_made_counts_if_the_shared_registry_says_so(
    node: Node, in_sync: tuple[str, ...], stays: bool
) -> None:
    run(lambda: node.replicas.format(DB))
    (node.directory.family(ID) / "mark").touch()
    assert node.families.replica_scraps() == [ID]
    node.start()
    node.named("n1", "n2", in_sync=in_sync)
    run(node.replicas.reconcile)
    assert (node.directory.family(ID) / "mark").exists() is stays
    assert (node.families.has_replica(ID), node.families.replica_scraps()) == (True, [])


def test_a_replica_that_cannot_be_opened_is_told_once_and_tried_at_the_next_start_at_the_latest(node: Node) -> None:
    node.named("n1", "n2")
    node.failing = {"follow"}
    run(node.replicas.reconcile, node.replicas.reconcile)
    assert (node.calls, node.events.count("replica-not-opened")) == (["format", "follow"], 1)
    assert node.replicas.problems == {ID: "follow failed"}
    node.failing = set()
    run(lambda: node.replicas.follow_all(node.families.replicas()))
    assert (node.replicas.is_followed(ID), node.replicas.problems) == (True, {})


def test_an_owner_serves_until_another_one_is_that(node: Node) -> None:
    node.named("n1", "n2", in_sync=("n1", "n2"))
    run(lambda: node.families.begin(ID, OF_REPLICA), lambda: node.families.keep_replica(DB))
    run(node.replicas.reconcile, lambda: node.replicas.own(ID), lambda: node.replicas.own(ID))
    assert node.calls == ["follow", "own", "serve"]
    assert node.replicas.owns(ID)
    node.replicas.heard("owner-deposed", {"family": ID, "epoch": 1, "reason": "epoch 2 was opened here"})
    assert not node.replicas.owns(ID)


def test_who_is_named_as_the_owner_goes_on_after_a_start_and_nobody_else_begins(node: Node) -> None:
    run(lambda: node.families.begin(ID, OF_REPLICA), lambda: node.families.keep_replica(DB))
    node.named("n1", "n2", in_sync=("n1", "n2"))
    run(node.replicas.reconcile)
    assert node.calls == ["follow"]
    node.start()
    node.named("n1", "n2", in_sync=("n1", "n2"), owner="n2")

    async def settle() -> None:
        await asyncio.sleep(0.01)

    run(node.replicas.reconcile, settle)
    assert node.calls == ["follow", "follow", "own", "serve"]


def test_who_was_cut_off_while_another_became_the_owner_takes_nothing_back(node: Node) -> None:
    """It still holds an old value of the registry."""
    run(lambda: node.families.begin(ID, OF_REPLICA), lambda: node.families.keep_replica(DB))
    node.named("n1", "n2", in_sync=("n1", "n2"), owner="n2")
    node.owner_by_now = "n1"
    run(node.replicas.reconcile, lambda: asyncio.sleep(0.01))
    assert node.calls == ["follow", "own"]
    assert not node.replicas.owns(ID)
    run(lambda: node.replicas.own(ID))  # a client wants it here
    assert node.replicas.owns(ID)


def test_what_is_not_open_here_cannot_be_owned_here(node: Node) -> None:
    with pytest.raises(NodeError, match="n2 has no open replica"):
        run(lambda: node.replicas.own(ID))


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_family_that_was_on_its_way_to_the_shared_registry_is_there_or_this_nodes_own_again(
    node: Node, is_shared: bool
) -> None:
    own = Family(ID, 1 << 26, "", DB.volumes)
    run(lambda: node.families.begin(ID), lambda: node.families.add(own))
    node.directory.family(ID).mkdir()
    run(lambda: node.families.begin_sharing(own, 2))
    node.start()
    assert (node.families.own(), [family.id for family in node.families.being_shared()]) == ([], [ID])
    if is_shared:
        node.named("n2", in_sync=("n2",), owner="n2")
    run(node.replicas.reconcile)
    assert node.families.being_shared() == []
    assert node.families.has_replica(ID) is is_shared
    assert [family.id for family in node.families.own()] == ([] if is_shared else [ID])
    assert node.calls[0] == ("follow" if is_shared else "open")
    found = node.families.find("db")
    assert found is not None
    assert found[0].replicas == (2 if is_shared else 0)
