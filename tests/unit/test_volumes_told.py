"""What nodes tell each other of their volumes: bounded, read leniently, and not believed of who is silent."""

import json
from typing import Any

import pytest

from nbdserver.node.volumes_told import (
    BUSIEST,
    MOST_ELSEWHERE,
    NOT_TOLD,
    TOLD_BYTES,
    Elsewhere,
    busiest,
    told,
    volumes_of,
)


def own(name: str, **more: Any) -> dict[str, Any]:
    """A row of the node itself."""
    load = {"clients": 0, "requests_per_s": 0.0, "read_bytes_per_s": 0, "write_bytes_per_s": 0, "latency_us": 0}
    return {**NOT_TOLD, **load, "name": name, "node": "n1", "state": "serving", "size_bytes": 1 << 30, **more}


def node(name: str, state: str = "up") -> dict[str, Any]:
    return {"name": name, "state": state}


def shown(directory: dict[str, bytes], *nodes: dict[str, Any]) -> list[dict[str, Any]]:
    return Elsewhere().rows(nodes or [node("n1"), node("n2")], "n2", lambda key: directory.get(key, b""))


def test_what_a_node_has_is_shown_on_another_one_with_the_load_of_the_busiest() -> None:
    rows = [
        own("idle", description="for later", snapshots=3),
        own("busy", clients=2, requests_per_s=80.25, write_bytes_per_s=4096),
    ]
    directory = {"volumes/n1": told(rows), "load/n1": json.dumps({"busiest": busiest(rows)}).encode()}
    idle, busy = shown(directory)
    assert (idle["name"], idle["node"], idle["description"], idle["state"]) == ("idle", "n1", "for later", "serving")
    assert (idle["requests_per_s"], idle["clients"], idle["size_bytes"]) == (None, None, 1 << 30)
    assert (idle["snapshots"], busy["snapshots"]) == (3, 0)
    assert (busy["requests_per_s"], busy["bytes_per_s"], busy["clients"]) == (80.2, 4096, 2)
    assert set(idle) == set(busy) == {*NOT_TOLD, "key", "name", "node"}


def test_nobody_knows_what_the_volumes_of_a_silent_node_do() -> None:
    rows = [own("disk", clients=2, requests_per_s=5.0)]
    directory = {"volumes/n1": told(rows), "load/n1": json.dumps({"busiest": busiest(rows)}).encode()}
    (row,) = shown(directory, node("n1", "silent"))
    assert (row["state"], row["reason"], row["clients"]) == ("unknown", "n1 is silent", None)


def test_what_has_replicas_is_listed_by_every_node_itself_when_its_owner_is_silent() -> None:
    directory = {"volumes/n1": told([own("everywhere", replicas=3, in_sync=2), own("there")])}
    assert [(row["name"], row["replicas"], row["in_sync"]) for row in shown(directory)] == [
        ("everywhere", 3, 2),
        ("there", 0, 0),
    ]
    assert [row["name"] for row in shown(directory, node("n1", "silent"))] == ["there"]


def test_a_node_s_own_volumes_are_not_shown_twice() -> None:
    assert shown({"volumes/n2": told([own("mine")])}) == []


@pytest.mark.parametrize(
    "said",
    [
        b"\xff",
        b"[1]",
        b'{"volumes": [1], "total": "many"}',
        b'{"volumes": {"v": 1}, "total": true}',
        b'{"volumes": {"v": {"size_bytes": "large", "state": null, "colour": "of a later version"}}}',
    ],
)
def test_what_a_node_says_wrongly_disturbs_nothing(said: bytes) -> None:
    for row in shown({"volumes/n1": said, "load/n1": said}):
        assert {**row, "key": "", "name": "", "node": ""} == {**NOT_TOLD, "key": "", "name": "", "node": ""}


@pytest.mark.parametrize("load", [{"clients": 1}, 5, {"clients": float("nan")}, None])
def test_a_load_that_is_none_is_not_known(load: object) -> None:
    (row,) = shown({"volumes/n1": told([own("v")]), "load/n1": json.dumps({"busiest": {"v": load}}).encode()})
    assert row["clients"] is None


def test_what_is_told_is_bounded_and_what_is_left_out_is_counted() -> None:
    rows = [own(f"v{number}", description="x" * 200) for number in range(2000)]
    value = told(rows)
    assert TOLD_BYTES - 1000 < len(value) < TOLD_BYTES + 100
    assert list(volumes_of(value))[:2] == ["v0", "v1"]
    assert len(busiest([own(f"v{number}", clients=1) for number in range(20)])) == BUSIEST
    elsewhere = Elsewhere()
    assert len(elsewhere.rows([node("n1")], "n2", lambda key: value)) < 2000 == elsewhere.total
    many = [node(f"n{number}") for number in range(100)]
    assert len(elsewhere.rows(many, "n2", lambda key: value)) == MOST_ELSEWHERE
    assert elsewhere.total == 99 * 2000


def test_what_has_not_changed_is_not_read_again() -> None:
    elsewhere, value = Elsewhere(), told([own("v")])
    (first,) = elsewhere.rows([node("n1")], "n2", lambda key: value)
    (again,) = elsewhere.rows([node("n1")], "n2", lambda key: value)
    (silent,) = elsewhere.rows([node("n1", "silent")], "n2", lambda key: value)
    assert again is first
    assert silent is not first
    assert elsewhere.rows([], "n2", lambda key: value) == []
