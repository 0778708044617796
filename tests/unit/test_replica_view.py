"""What people are told of volumes on several nodes."""

from typing import Any

import pytest

from metadata.registry import Family, Volume
from metadata.replica_set import Member, ReplicaSet
from nbdserver.node.findings import NOTE, NOW, SOON
from nbdserver.node.replica_view import NO_REPLICAS, disk_findings, peers_finding, replica_findings, replicas
from nbdserver.node.resync_view import row
from nbdserver.replication.slow_disks import SLOW

VALUE = ReplicaSet(3, "n1", (Member("n1", 1), Member("n2", 4)), ("n1", "n2", "n3"))
MIB = 1 << 20


def volume(name: str, up: str, state: str = "serving", value: ReplicaSet | None = VALUE) -> dict[str, Any]:
    return {"name": name, "state": state, "replicas": replicas(3, value, lambda node: node in up.split())}


def test_each_replica_has_a_state() -> None:
    shown = replicas(3, VALUE, lambda node: node != "n2")
    assert (shown["wanted"], shown["owner"], shown["in_sync"]) == (3, "n1", 2)
    assert [each["state"] for each in shown["nodes"]] == ["in sync", "silent", "returning"]
    assert replicas(3, None, lambda node: True)["nodes"] == []


@pytest.mark.parametrize(
    ("shown", "urgency", "problem"),
    [
        (volume("db", "n1 n2 n3"), SOON, "2 of 3 in sync, n3 being made complete"),
        (volume("db", "n1 n2"), SOON, "2 of 3 in sync, silent: n3"),
        (volume("db", "n1"), NOW, "1 of 3 in sync, silent: n2, n3"),
        (volume("db", "n3"), NOW, "served by no node"),
        (volume("db", "n1 n2 n3", value=None), NOW, "cannot be told where it is"),
        (volume("db", "n2 n3", "idle", VALUE.with_member(Member("n3", 1))), NOTE, "its owner n1 is gone"),
    ],
)
def test_what_is_wrong_with_a_volume_is_said(shown: dict[str, Any], urgency: str, problem: str) -> None:
    found = [finding for finding in replica_findings([shown], {}) if finding.urgency == urgency]
    assert [finding.subject for finding in found] == ["db"]
    assert problem in found[0].problem
    assert found[0].remedy


def test_nothing_is_said_of_what_is_as_it_shall_be_and_the_same_of_many_once() -> None:
    whole = volume("db", "n1 n2 n3", value=VALUE.with_member(Member("n3", 1)))
    own = {"name": "disk0", "state": "serving", "replicas": NO_REPLICAS}
    assert replica_findings([whole, own], {}) == []
    many = replica_findings([volume("a", "n1 n2"), volume("b", "n1 n2")], {"a": "too few", "b": "too few"})
    assert [finding.subject for finding in many] == ["a, b", "a, b"]
    assert "data_address" in peers_finding("port 7 is taken").remedy


LINK = {"state": "copying", "regions_left": 3, "regions_total": 10, "bytes_per_s": 4.0 * MIB, "reason": ""}
FAMILY = Family("ab" * 16, 1 << 26, "", (Volume(1, "db", 1 << 30),), replicas=3)


def test_a_disk_that_is_not_what_it_was_is_told_once_a_node() -> None:
    rows = [row(FAMILY, VALUE, "n3", True, LINK | {"disk": why}) for why in ("", "it was put back", "it was put back")]
    (finding,) = disk_findings(rows)
    assert (finding.subject, finding.problem) == ("n3: db, db", "it was put back")
    (slow,) = disk_findings([row(FAMILY, VALUE, "n3", True, LINK | {"disk": SLOW})])
    assert "kept up with the others'" in slow.remedy


@pytest.mark.parametrize(
    ("is_up", "link", "state", "left_s"),
    [
        (True, LINK, "copying", 3),
        (True, LINK | {"bytes_per_s": 0.0}, "copying", None),
        (True, LINK | {"bytes_per_s": 0.0, "reason": "clients come first"}, "waiting", None),
        (True, LINK | {"regions_left": 0}, "waiting", None),
        (True, LINK | {"state": "connecting", "reason": "refused"}, "connecting", 3),
        (True, None, "unknown", None),
        (False, LINK, "silent", 3),
    ],
)
def test_what_a_replica_lacks_is_told_by_the_owners_word(
    is_up: bool, link: dict[str, Any] | None, state: str, left_s: int | None
) -> None:
    told = row(FAMILY, VALUE, "n3", is_up, link)
    assert (told["volume"], told["node"], told["owner"], told["state"], told["left_s"]) == (
        *("db", "n3", "n1", state),
        left_s,
    )
    assert told["reason"] == (link["reason"] if link and state in ("waiting", "connecting") else "")
    if link is not None and link["regions_left"]:
        assert (told["left_bytes"], told["total_bytes"]) == (12 * MIB, 40 * MIB)
        assert row(FAMILY, VALUE, "n3", is_up, link | {"region_bytes": 1 * MIB})["left_bytes"] == 3 * MIB


def test_what_a_replica_gets_from_the_log_is_told_too() -> None:
    link = LINK | {"regions_left": 0, "regions_total": 0, "bytes_per_s": 0, "reason": ""}
    told = row(
        FAMILY,
        VALUE,
        "n3",
        True,
        link | {"log_left_bytes": 6 * MIB, "log_total_bytes": 9 * MIB, "log_bytes_per_s": MIB},
    )
    assert (told["state"], told["left_bytes"], told["total_bytes"], told["left_s"]) == ("copying", 6 * MIB, 9 * MIB, 6)
