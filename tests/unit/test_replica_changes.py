"""Where replicas are put, and what is left when that fails."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metadata.registry import Family, Volume
from metadata.replica_set import Member, ReplicaSet
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError
from nbdserver.node.replica_changes import ReplicaChanges
from tests.unit.test_replicas import DB, ID, Node, run

MIB = 1 << 20


def row(name: str, **more: Any) -> dict[str, Any]:
    """A node as the cluster describes it."""
    return {
        "name": name,
        "state": "up",
        "draining": False,
        "across_wan": False,
        "data_addresses": ["192.0.2.1:7"],
        "fault_domain": name,
        "fill_percent": 10.0,
        "promisable_bytes": None,
        "size_bytes": 100 * MIB,
        "used_bytes": 10 * MIB,
    } | more


class Rig:
    """Node n2 of a cluster, which is drawn by `rows`."""

    is_active = True

    def __init__(self, node: Node) -> None:
        self.node = node
        self.rows = [row(name) for name in ("n1", "n2", "n3", "n4")]
        self.silent = {"n9": 0.0}
        self.moved: list[str] = []
        self.placed: list[Sequence[str]] = []
        volumes: Any = SimpleNamespace(
            lock=asyncio.Lock(),
            segment_bytes=1 << 26,
            admit_new=self._admit_new,
            show=self._show,
            call=self._call,
        )
        owning: Any = SimpleNamespace(move=self._move)
        cluster: Any = self
        self.changes = ReplicaChanges(
            node.families, node.replicas, owning, volumes, lambda: cluster, lambda kind, fields: None, 60.0
        )

    def describe(self) -> dict[str, Any]:
        return {"nodes": self.rows}

    def silent_s(self, name: str) -> float:
        return self.silent.get(name, 0.0)

    async def _admit_new(self, name: str, size_bytes: int) -> None:
        pass

    async def _show(self, name: str) -> dict[str, Any]:
        return {"name": name}

    async def _move(self, family: Any, node: str) -> None:
        self.moved.append(node)

    async def _call(self, name: str, **arguments: Any) -> None:
        assert name == "place"
        self.placed.append(arguments["placement"])
        value = self.node.families.replica_set(ID)
        assert value is not None
        self.node.shared.values[f"replicas/{ID}"] = value.placed(arguments["placement"]).encode()

    def owns_db(self, *nodes: str) -> None:
        """n2 owns db, which is on these nodes, all in sync."""
        node = self.node
        members = tuple(Member(each, 1) for each in nodes)
        node.shared.values[f"family/{ID}"] = DB.encode()
        node.shared.values["volume/db"] = f"{ID}/1".encode()
        node.shared.values[f"replicas/{ID}"] = ReplicaSet(1, "n2", members, nodes).encode()
        run(lambda: node.families.keep_replica(DB), node.replicas.reconcile, lambda: node.replicas.own(ID))

    def steps(self) -> None:
        """What one look at all families does."""

        async def look() -> None:
            watching = asyncio.create_task(self.changes.watch())
            self.changes.stir()
            await asyncio.sleep(0.02)
            watching.cancel()

        asyncio.run(look())


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    node = Node(tmp_path / "data")
    yield Rig(node)
    node.registry.close()
    node.directory.release()


@pytest.mark.parametrize(
    ("replicas", "on", "error", "message"),
    [
        (0, [], WrongInputError, "replicas: 0 is not 1 to 5"),
        (6, [], WrongInputError, "replicas: 6 is not 1 to 5"),
        (5, [], ConflictError, "need as many nodes, and there are 4"),
        (2, ["n7"], NotFoundError, "there is no node 'n7'; there are: n1, n2, n3, n4"),
        (2, ["n1", "n1"], WrongInputError, "name each once"),
        (1, ["n1", "n3"], WrongInputError, "--on names 2 nodes for 1 replicas"),
        (2, ["full"], ConflictError, "full gets no new replica: it is 97 % full"),
        (2, ["far"], ConflictError, "is across a WAN"),
        (2, ["gone"], ConflictError, "is silent"),
        (2, ["leaves"], ConflictError, "is being drained"),
        (2, ["old"], ConflictError, "has not said where its data processes are"),
    ],
)
def test_nodes_that_cannot_be_meant_are_refused(
    rig: Rig, replicas: int, on: list[str], error: type[NodeError], message: str
) -> None:
    special = {
        "full": {"fill_percent": 97.0},
        "far": {"across_wan": True},
        "gone": {"state": "silent"},
        "leaves": {"draining": True},
        "old": {"data_addresses": []},
    }
    rig.rows += [row(name, **special[name]) for name in on if name in special]
    with pytest.raises(error, match=message):
        rig.changes.choose(replicas, on, 1 << 30)


def test_the_node_that_is_asked_comes_first_where_it_is_as_good(rig: Rig) -> None:
    assert rig.changes.choose(3, [], 1 << 30) == ("n2", "n1", "n3")
    assert rig.changes.choose(2, ["n4", "n3"], 1 << 30) == ("n4", "n3")


def test_a_volume_is_made_known_to_all_with_its_first_replica(rig: Rig) -> None:
    asyncio.run(rig.changes.create("db", MIB, ("n2", "n1"), wait_s=0.0))
    (family,) = rig.node.families.of_cluster()
    value = rig.node.families.replica_set(family.id)
    assert value is not None
    assert (value.owner, value.placement, family.replicas) == ("n2", ("n2", "n1"), 2)
    assert rig.node.calls == ["format", "follow", "own", "serve"]
    assert (rig.node.families.has_replica(family.id), rig.node.replicas.owns(family.id)) == (True, True)


@pytest.mark.parametrize("failing", ["format", "follow", "name"])
def test_a_volume_that_cannot_be_made_leaves_nothing(rig: Rig, failing: str) -> None:
    rig.node.failing = {failing}
    if failing == "name":
        rig.node.shared.values["volume/db"] = b"another/1"
    before = dict(rig.node.shared.values)
    with pytest.raises(NodeError):
        asyncio.run(rig.changes.create("db", MIB, ("n2", "n1"), wait_s=0.0))
    assert (rig.node.directories(), rig.node.shared.values) == ([], before)
    assert (rig.node.families.replica_scraps(), rig.node.families.here()) == ([], [])


def test_a_family_of_too_many_volumes_cannot_become_the_clusters_and_is_not_touched(rig: Rig) -> None:
    volumes = tuple(Volume(number, f"clone{number}", MIB) for number in range(1, 64))
    with pytest.raises(ConflictError, match="clone1 and what was cloned from it are 63 volumes, of which at most 62"):
        asyncio.run(rig.changes.share(Family(ID, 1 << 26, "", volumes), 2))
    assert rig.node.calls == []


Draw = Callable[[Rig], None]


def drained(name: str) -> Draw:
    def draw(rig: Rig) -> None:
        rig.rows = [each | {"draining": each["name"] == name} for each in rig.rows]

    return draw


def silent(name: str, silent_s: float) -> Draw:
    def draw(rig: Rig) -> None:
        rig.rows = [each | ({"state": "silent"} if each["name"] == name else {}) for each in rig.rows]
        rig.silent = {name: silent_s}

    return draw


def removed(name: str) -> Draw:
    def draw(rig: Rig) -> None:
        rig.rows = [each for each in rig.rows if each["name"] != name]

    return draw


@pytest.mark.parametrize(
    ("draw", "placed", "moved"),
    [
        (lambda rig: None, [], []),
        (drained("n1"), [["n2", "n3"]], []),
        (drained("n2"), [], ["n1"]),
        (silent("n1", 59.0), [], []),
        (silent("n1", 61.0), [["n2", "n3"]], []),
        (removed("n1"), [["n2", "n3"]], []),
    ],
)
def test_the_owner_makes_the_next_step(rig: Rig, draw: Draw, placed: list[list[str]], moved: list[str]) -> None:
    rig.owns_db("n2", "n1")
    draw(rig)
    rig.steps()
    assert (rig.placed, rig.moved) == (placed, moved)


def test_who_does_not_own_a_family_leaves_it_alone_and_what_is_in_the_way_is_known(rig: Rig) -> None:
    rig.owns_db("n2", "n1")
    rig.rows = [row("n1", draining=True), row("n2")]
    rig.steps()
    assert rig.placed == []
    assert rig.changes.problems == {ID: "there are 1 nodes too few for 2 replicas"}
    rig.node.replicas.heard("owner-deposed", {"family": ID, "epoch": 1, "reason": "x"})
    rig.steps()
    assert rig.changes.problems == {}


def test_a_replica_moves_to_where_it_is_said_and_what_cannot_be_is_refused(rig: Rig) -> None:
    rig.owns_db("n2", "n1")
    for source, target, message in [
        ("n3", "", "db has no replica on 'n3'; it is on n2, n1"),
        ("n1", "n2", "has a replica on n2 already"),
        ("n1", "n7", "there is no node 'n7'"),
    ]:
        with pytest.raises(WrongInputError, match=message):
            asyncio.run(rig.changes.move("db", source, target))
    asyncio.run(rig.changes.move("db", "n1", "n4"))
    assert rig.placed == [["n2", "n1", "n4"]]
    assert [family.leave for family in rig.node.families.of_cluster()] == [("n1",)]
    rig.steps()
    assert rig.placed[1:] == [["n2", "n4"]]
    assert [family.leave for family in rig.node.families.of_cluster()] == [("n1",)], "it is there until n4 is in sync"
    rig.owns_db("n2", "n4")
    value = rig.node.families.of_cluster()[0]
    asyncio.run(rig.node.families.change(value, leave=("n1",)))
    rig.steps()
    assert [family.leave for family in rig.node.families.of_cluster()] == [()]
