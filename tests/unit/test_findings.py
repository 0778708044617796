"""What is wrong and what to do: a table of statuses, and what is said of each."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nbdserver.node.errors import listed
from nbdserver.node.findings import MOST, NOTE, NOW, SOON, TOLD_FOR, Finding, findings, in_order, need_attention

TIME = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)

WELL: dict[str, Any] = {
    "data": "/srv/nbd",
    "workers": [{"worker": 0, "pid": 42, "silent_s": 0.0, "volumes": []}],
    "warnings": [],
    "fills": [],
    "volumes": [],
    "scrubs": [],
    "handover": None,
}


def worker(number: int, **more: Any) -> dict[str, Any]:
    return {"worker": number, "pid": 42, "silent_s": 0.0, "volumes": ["a", "b"]} | more


def volume(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "state": "serving", "reason": "", "disk": {"damaged": []}} | more


def full(name: str, why: str) -> dict[str, Any]:
    return volume(name, state="full", disk={"full": why})


def damaged(name: str, *blocks: tuple[str, str, int]) -> dict[str, Any]:
    found = [{"volume": owner, "export": export, "lba": lba} for owner, export, lba in blocks]
    return volume(name, disk={"damaged": found})


def fill(subject: str, percent: float, alarm: int) -> dict[str, Any]:
    return {"subject": subject, "used_bytes": 9 << 30, "size_bytes": 10 << 30, "percent": percent, "alarm": alarm}


def event(kind: str, ago: timedelta = timedelta(minutes=10), **fields: Any) -> dict[str, Any]:
    return {"sequence": 1, "time": (TIME - ago).isoformat(), "kind": kind, **fields}


CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"workers": [worker(0, pid=None)]}, NOW, "data process is being started again", "wait"),
    (
        {"workers": [worker(0, silent_s=12.4)]},
        NOW,
        "data process has not answered for 12 s: clients wait",
        "kill -9 42",
    ),
    ({"workers": [worker(0), worker(1, pid=None)]}, NOW, "data process 1 is being started again: 2 volumes", "wait"),
    ({"workers": [worker(0, silent_s=3.1), worker(1)]}, NOW, "data process 0 has not answered for 3 s", "kill -9 42"),
    ({"warnings": ["x.pem has expired; make a new one"]}, NOW, "x.pem has expired", "make a new one"),
    ({"warnings": ["something"]}, NOW, "something", ""),
    ({"fills": [fill("file system", 80.1, 80)]}, SOON, "file system is 80.1 % full: 9.0 GiB of 10.0 GiB", "/srv/nbd"),
    ({"fills": [fill("max_data", 96.0, 95)]}, NOW, "max_data is 96.0 % full", "raise it and reload"),
    ({"fills": [fill("volume web", 91.0, 90)]}, NOW, "volume web is 91.0 % full", "volume set web max-data=SIZE"),
    ({"volumes": [volume("a", state="failed", reason="EIO")]}, NOW, "a is not served: EIO", "nbdserver check"),
    ({"volumes": [full("a", "disk")]}, NOW, "a is full: writes get ENOSPC (the file system", "grow the file system"),
    ({"volumes": [full("a", "max-data")]}, NOW, "a is full: writes get ENOSPC (its data", "max-data=SIZE"),
    ({"volumes": [full("a", "node-max-data")]}, NOW, "a is full: writes get ENOSPC (all volumes", "reload"),
    ({"volumes": [damaged("a", ("a", "a@old", 7))]}, NOW, "a is damaged: 1 block in a@old cannot be read", "backup"),
    (
        {"scrubs": [{"volume": "a", "state": "failed", "reason": "EIO"}]},
        SOON,
        "scrub of a failed: EIO",
        "scrub start a",
    ),
    ({"handover": {"failure": "no room"}}, SOON, "upgrade failed: no room", "nbdserver upgrade-in-place"),
]


@pytest.mark.parametrize(("change", "urgency", "sentence", "remedy"), CASES, ids=[case[2] for case in CASES])
def test_what_is_wrong_is_said_with_what_to_do(
    change: dict[str, Any], urgency: str, sentence: str, remedy: str
) -> None:
    (found,) = findings(WELL | change, [], TIME)
    assert found.urgency == urgency
    assert found.sentence.startswith(sentence)
    assert remedy in found.remedy
    assert need_attention([found])


def test_of_a_node_that_is_well_nothing_is_said() -> None:
    well = {
        "volumes": [volume("a"), volume("b", state="starting")],
        "fills": [fill("file system", 79.9, 0)],
        "scrubs": [{"volume": "a", "state": "running", "reason": ""}],
        "handover": {"failure": ""},
    }
    events = [event("volume-created", volume="a"), event("data-process-ended", TOLD_FOR, exit_code=-9)]
    assert findings(WELL | well, events, TIME) == []


def test_what_is_wrong_with_the_cluster_is_told_in_its_place() -> None:
    of_cluster = [Finding(NOW, "node3", "is silent", "look at it"), Finding(SOON, "", "there are two voters", "")]
    change = {"workers": [worker(0, pid=None)], "handover": {"failure": "no room"}}
    found = findings(WELL | change, [], TIME, of_cluster)
    assert [one.subject for one in found] == ["data process", "node3", "", "upgrade"]


def test_what_is_over_is_told_for_a_day_and_needs_nobody() -> None:
    events = [
        event("data-process-ended", timedelta(hours=3), exit_code=1),
        event("data-process-ended", timedelta(minutes=30), exit_code=-9),
        event("generation-raised", timedelta(hours=2), volume="b"),
        event("generation-raised", timedelta(hours=2), volume="a"),
    ]
    ended, raised = findings(WELL, events, TIME)
    assert ended.sentence == "data process ended unexpectedly 2 times in 24 h, last at 02:30 UTC, with -9"
    assert raised.sentence.startswith("a, b may lack writes that were not flushed")
    assert not need_attention([ended, raised])
    assert findings(WELL, events, TIME + TOLD_FOR) == []


def test_what_many_volumes_have_in_common_is_said_once() -> None:
    names = [f"v{number:03}" for number in range(300)]
    volumes = [full(name, "disk") for name in names] + [volume("x", state="failed", reason="EIO")]
    assert [found.subject for found in findings(WELL | {"volumes": volumes}, [], TIME)] == [listed(names), "x"]


def test_a_damaged_block_that_a_family_shares_counts_once() -> None:
    blocks = (("a", "a", 7), ("b", "b", 7), ("b", "b@s", 9))
    family = [damaged("a", *blocks), damaged("b", *blocks)]
    (found,) = findings(WELL | {"volumes": family}, [], TIME)
    assert found.sentence == "a, b are damaged: 3 blocks in a, b, b@s cannot be read, clients get EIO"


def test_a_thousand_different_problems_are_counted() -> None:
    volumes = [volume(f"v{number}", state="failed", reason=f"reason {number}") for number in range(1000)]
    found = findings(WELL | {"volumes": volumes}, [], TIME)
    assert len(found) == MOST + 1
    assert found[-1].problem == f"and {1000 - MOST} more like these"


def test_the_most_urgent_comes_first() -> None:
    given = ((NOTE, "c"), (NOW, "a"), (SOON, "b"), (NOW, "d"))
    unordered = [Finding(urgency, "", problem, "") for urgency, problem in given]
    assert [found.problem for found in in_order(unordered)] == ["a", "d", "b", "c"]
