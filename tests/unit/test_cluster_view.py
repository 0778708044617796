"""The cluster for people: rows of nodes, and what is wrong with what to do about it."""

import json
from dataclasses import replace

import pytest

from metadata.directory.registry_keys import Member
from metadata.registry_calls import Health
from nbdserver.node import cluster_view
from nbdserver.node.cluster_view import GRACE_S, Picture, nodes
from nbdserver.node.findings import NOW, SOON, Finding
from protocol.directory import NodeKind


def member(node: int, name: str) -> Member:
    return Member(node, NodeKind.FIRST, name, f"10.0.0.{node}:10810", f"10.0.0.{node}:10810")


def load(percent: float) -> bytes:
    return json.dumps({"volumes": 3, "requests_per_s": 12.5, "fill_percent": percent}).encode()


def cluster_findings(picture: Picture) -> list[Finding]:
    return cluster_view.cluster_findings(picture, nodes(picture))


WELL = Picture(
    cluster="prod",
    me="n1",
    members=(member(2, "n2"), member(1, "n1"), member(3, "n3")),
    own_id=1,
    master="n2",
    epoch=4,
    voters=frozenset({"n1", "n2", "n3"}),
    directory={
        "node/n1": b'{"site": "main", "version": "1.0"}',
        "node/n3": b'{"site": "attic", "fault_domain": "shelf", "version": "1.0", "colour": "of a later version"}',
        "load/n3": load(40.0),
        "drain/n3": b"{}",
    },
)


def test_a_row_has_what_its_node_says_of_itself_and_null_where_it_says_nothing() -> None:
    n1, n2, n3 = nodes(WELL)
    assert [row["name"] for row in (n1, n2, n3)] == ["n1", "n2", "n3"]
    assert (n2["is_master"], n1["is_master"], n1["is_voter"]) == (True, False, True)
    assert (n3["site"], n3["fault_domain"], n3["volumes"], n3["requests_per_s"]) == ("attic", "shelf", 3, 12.5)
    assert (n3["draining"], n1["draining"]) == (True, False)
    assert (n1["volumes"], n1["fill_percent"], n2["site"]) == (None, None, "")


@pytest.mark.parametrize("said", [b"\xff", b"no json", b"[1]", b'{"volumes": "many", "fill_percent": true}'])
def test_what_a_node_says_wrongly_disturbs_nothing(said: bytes) -> None:
    rows = nodes(replace(WELL, directory={"load/n1": said, "node/n1": said}))
    assert rows[0]["volumes"] is None
    assert rows[0]["fill_percent"] is None


def test_nothing_is_wrong_when_all_is_well() -> None:
    assert cluster_findings(WELL) == []


LONG_S = GRACE_S + 1
TWIN = (*WELL.members, member(9, "n1"))

WRONG = [
    (replace(WELL, failure="its store is full"), NOW, "takes no part in the cluster any more: its store is full"),
    (replace(WELL, is_active=False, in_this_state_s=LONG_S), NOW, "has heard no master for 11 s"),
    (replace(WELL, members=TWIN, is_active=False), NOW, "another node calls itself n1, at 10.0.0.9:10810"),
    (
        replace(WELL, registry=Health(False, 0.0, "e1:2379", "refused", 0), registry_state_s=9.0),
        NOW,
        "registry (etcd, e1:2379) has not answered for 9 s: refused",
    ),
    (replace(WELL, registry_error="it has lost its content"), NOW, "no master can be elected: it has lost its content"),
    (
        replace(
            WELL,
            silent_s={"n3": 20.0},
            directory={"volumes/n3": b'{"volumes": {"b": {}, "a": 1, "c": {"replicas": 3}}}'},
        ),
        NOW,
        "node n3 has been silent for 20 s, with what it alone has: a, b",
    ),
    (replace(WELL, silent_s={"n3": 20.0}), NOW, "node n3 has been silent for 20 s"),
    (replace(WELL, silent_s={"n3": 20.0}), NOW, "1 of 3 voters are silent: when one more goes there is no master"),
    (replace(WELL, voters=frozenset({"n1", "n2"})), SOON, "there are two voters"),
    (replace(WELL, directory={"load/n3": load(91.0)}), SOON, "node n3 is 91 % full"),
    (replace(WELL, directory={"load/n3": load(96.0)}), NOW, "node n3 is 96 % full"),
    (
        replace(WELL, directory={"node/n1": b'{"version": "1"}', "node/n2": b'{"version": "2"}'}),
        SOON,
        "the nodes run different versions: 1, 2",
    ),
    (replace(WELL, keys=2), SOON, "two cluster keys are valid"),
    (replace(WELL, certificate_problem="it expires; make another"), SOON, "it expires"),
    (
        replace(WELL, refused=(("10.0.0.8", "another key"), ("10.0.0.8", "another key"), ("10.0.0.9", "another key"))),
        SOON,
        "refused what 10.0.0.8, 10.0.0.9 sent: another key",
    ),
]


@pytest.mark.parametrize(("picture", "urgency", "sentence"), WRONG, ids=[sentence for _, _, sentence in WRONG])
def test_what_is_wrong_is_told_with_what_to_do(picture: Picture, urgency: str, sentence: str) -> None:
    found = [finding for finding in cluster_findings(picture) if finding.sentence.startswith(sentence)] or [
        finding for finding in cluster_findings(picture) if sentence in finding.sentence
    ]
    assert [finding.urgency for finding in found] == [urgency]
    assert all(finding.remedy for finding in cluster_findings(picture))


def test_a_start_and_a_change_of_master_are_given_time_before_anything_is_said() -> None:
    picture = replace(WELL, is_active=False, master="", in_this_state_s=GRACE_S - 1)
    assert cluster_findings(replace(picture, registry=Health(False, 0.0, "e1:2379", "", 0), registry_state_s=1.0)) == []
