"""Who serves a client: decided from what this node knows and what the owner says of itself."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from metadata.families import Families
from metadata.registry import Family, Volume
from metadata.replica_set import Member, ReplicaSet
from nbdserver.node.errors import ConflictError, NodeError
from nbdserver.node.owning import Owning
from nbdserver.node.placement import worker_of
from nbdserver.node.replicas import Replicas
from nbdserver.volume.wanted import Wanted

FAMILY_ID = "0123456789abcdef" * 2
FAMILY = Family(FAMILY_ID, 1 << 22, "", (Volume(1, "disk", 1 << 20),), replicas=3)
WORKERS = 2


class Known:
    """What the registries say: one family, of which node-1 is the owner."""

    def __init__(self, in_sync: Sequence[str]) -> None:
        self.value = ReplicaSet(3, "node-1", tuple(Member(name, 1) for name in in_sync), ("node-1", "node-2", "node-3"))

    def find(self, name: str) -> tuple[Family, Volume] | None:
        return (FAMILY, FAMILY.volumes[0]) if name == "disk" else None

    def replica_set(self, _family_id: str) -> ReplicaSet | None:
        return self.value


class Here:
    """This node's replicas."""

    def __init__(self, me: str, can: bool, owns: bool) -> None:
        self.me = me
        self._can = can
        self._owns = owns
        self.taken = 0
        self.takes = False

    def is_taking(self, _family_id: str) -> bool:
        return self.takes

    def owns(self, _family_id: str) -> bool:
        return self._owns

    def may_own(self, value: ReplicaSet, _family_id: str) -> bool:
        return value.member(self.me) is not None

    async def own(self, _family_id: str) -> None:
        self.taken += 1
        if not self._can:
            raise ConflictError(f"{self.me} has regions to fetch")


class There:
    """The others: who is up, what the owner says, who takes over when it is asked to."""

    def __init__(self, up: str, told: dict[str, Any] | None, takes: str) -> None:
        self._up = up
        self._told = told
        self._takes = takes
        self.asked: list[tuple[str, str]] = []

    def is_up(self, node: str) -> bool:
        return node[-1] in self._up

    def data_addresses_of(self, node: str) -> list[str]:
        return [f"192.0.2.{node[-1]}:{port}" for port in range(WORKERS)]

    async def ask(self, node: str, question: dict[str, Any], _timeout_s: float) -> dict[str, Any]:
        self.asked.append((str(question["do"]), node))
        if question["do"] == "owns":
            if self._told is None:
                raise NodeError(f"{node} has not answered in 3 s")
            return self._told
        if node[-1] not in self._takes:
            raise NodeError(f"{node} refuses: its disk has failed")
        return {}


BUSY = {"owns": True, "clients": 2}
IDLE = {"owns": True, "clients": 0}
NOT = {"owns": False, "clients": 0}


async def no_call(name: str, **arguments: Any) -> Any:
    raise AssertionError(f"{name} is asked of the data processes")


def names(numbers: str) -> list[str]:
    return [f"node-{number}" for number in numbers]


def owning_at(here: Here, in_sync: str, there: There | None) -> Owning:
    known = Known(names(in_sync))
    return Owning(cast(Families, known), cast(Replicas, here), lambda: there, no_call)


@pytest.mark.parametrize(
    ("asked_at", "in_sync", "up", "told", "can", "takes", "failed", "expected"),
    [
        # The owner is reached.
        ("2", "123", "123", BUSY, True, "", "", "1"),
        ("2", "123", "123", IDLE, True, "", "", "2"),  # nobody uses it: it comes to where it is used
        ("2", "123", "123", IDLE, False, "", "", "1"),  # which cannot have it
        ("2", "13", "123", IDLE, True, "", "", "1"),  # or is not in sync
        ("4", "123", "123", IDLE, True, "", "", "1"),  # or has no replica
        # It is named, and owns nothing: its process was started again.
        ("2", "123", "123", NOT, True, "", "", "2"),
        ("2", "13", "123", NOT, True, "1", "", "1"),
        ("4", "123", "123", NOT, True, "1", "", "1"),
        ("1", "123", "123", None, True, "", "", "1"),
        # It cannot be reached.
        ("2", "123", "23", None, True, "", "", "2"),
        ("2", "123", "123", None, True, "", "", "2"),
        ("2", "123", "123", BUSY, True, "", "1", "2"),  # its data process was tried, in vain
        ("2", "13", "23", None, True, "3", "", "3"),
        ("4", "123", "23", None, True, "3", "", "3"),  # the first one that can
        ("4", "123", "23", None, True, "23", "2", "3"),
        ("1", "123", "123", None, False, "23", "", "2"),
        # Nobody can.
        ("2", "123", "2", None, False, "", "", "node-2 has regions to fetch, node-1 is silent, node-3 is silent"),
        ("4", "13", "23", None, True, "", "", "node-1 is silent, node-3 refuses: its disk has failed"),
        ("4", "1", "23", None, True, "", "1", "node-1 alone is in sync"),
    ],
)
def test_who_serves_a_client(
    asked_at: str,
    in_sync: str,
    up: str,
    told: dict[str, Any] | None,
    can: bool,
    takes: str,
    failed: str,
    expected: str,
) -> None:
    there = There(up, told, takes)
    owning = owning_at(Here(f"node-{asked_at}", can, False), in_sync, there)
    answer = asyncio.run(owning.attach("disk", names(failed), Wanted.ANEW))
    address = f"192.0.2.{expected}:{worker_of(FAMILY_ID, WORKERS)}"
    if expected == asked_at:
        assert answer == {"own": True, "address": address}
    elif expected.isdigit():
        assert answer == {"node": f"node-{expected}", "address": address}
    else:
        assert answer == {"error": f"no node can serve disk now: {expected}; nbdserver status says what to do"}
    assert not set(names(failed)) & {node for _, node in there.asked}


def test_what_this_node_owns_is_served_here_and_nobody_is_asked() -> None:
    there = There("123", BUSY, "123")
    owning = owning_at(Here("node-2", False, True), "12", there)
    answer = asyncio.run(owning.attach("disk@monday", (), Wanted.SOON))
    assert answer == {"own": True, "address": f"192.0.2.2:{worker_of(FAMILY_ID, WORKERS)}"}
    assert there.asked == []


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (NOT, {"error": "node-1 does not serve disk at this moment"}),  # it is moving it
        (None, {"error": "node-1 does not serve disk at this moment"}),  # its program is replaced
        (BUSY, {"node": "node-1", "address": f"192.0.2.1:{worker_of(FAMILY_ID, WORKERS)}"}),
    ],
)
def test_who_is_patient_does_not_replace_an_owner_that_is_up(
    told: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    owning = owning_at(Here("node-2", True, False), "123", There("123", told, ""))
    assert asyncio.run(owning.attach("disk", (), Wanted.SOON)) == expected


@pytest.mark.parametrize("wanted", [Wanted.AGAIN, Wanted.SOON])
def test_who_goes_on_moves_nothing_away_from_an_owner_that_has_no_clients_yet(wanted: Wanted) -> None:
    here = Here("node-2", True, False)
    answer = asyncio.run(owning_at(here, "123", There("123", IDLE, "")).attach("disk", (), wanted))
    assert (answer["node"], here.taken) == ("node-1", 0)


def test_a_node_that_has_just_lost_a_family_does_not_take_it_back_at_once() -> None:
    here = Here("node-1", True, False)
    owning = owning_at(here, "123", There("123", NOT, ""))
    expected = {"error": "node-1 does not serve disk at this moment"}
    assert asyncio.run(owning.attach("disk", (), Wanted.SOON)) == expected
    assert here.taken == 0
    here.takes = True  # it does so on somebody else's account
    assert asyncio.run(owning.attach("disk", (), Wanted.SOON))["own"]
    here.takes = False
    assert asyncio.run(owning.attach("disk", (), Wanted.AGAIN))["own"]


def test_a_node_that_has_not_joined_yet_takes_over_what_it_can_or_says_so() -> None:
    owning = owning_at(Here("node-2", True, False), "12", None)
    assert asyncio.run(owning.attach("disk", (), Wanted.ANEW)) == {"own": True, "address": ""}
    owning = owning_at(Here("node-3", True, False), "12", None)
    assert "no node can serve disk now" in asyncio.run(owning.attach("disk", (), Wanted.ANEW))["error"]
    assert asyncio.run(owning.attach("other", (), Wanted.ANEW)) == {"error": "the cluster has no volume 'other'"}


@pytest.mark.parametrize(
    ("asked_at", "in_sync", "up", "told", "can", "takes", "failed", "expected"),
    [
        ("2", "123", "123", BUSY, True, "", "", "1"),
        ("2", "123", "123", IDLE, True, "", "", "1"),  # unlike a client it moves nothing
        ("2", "123", "123", None, True, "", "", "1"),  # it is asked all the same
        ("2", "123", "123", NOT, True, "", "", "2"),  # it is up, and owns nothing
        ("2", "123", "123", NOT, False, "1", "", "1"),
        ("2", "123", "123", NOT, False, "3", "", "3"),  # its disk has failed
        ("2", "123", "23", None, True, "", "", "2"),
        ("4", "123", "23", None, True, "3", "", "3"),
        ("2", "123", "123", None, True, "", "1", "2"),
    ],
)
def test_where_a_command_is_done(
    asked_at: str,
    in_sync: str,
    up: str,
    told: dict[str, Any] | None,
    can: bool,
    takes: str,
    failed: str,
    expected: str,
) -> None:
    owning = owning_at(Here(f"node-{asked_at}", can, False), in_sync, There(up, told, takes))
    node = asyncio.run(owning.for_command(FAMILY, names(failed)))
    assert node == f"node-{expected}"
