"""Step by step towards where replicas shall be: nobody goes before somebody else has its place."""

from dataclasses import replace

import pytest

from metadata.replica_set import Member, ReplicaSet
from nbdserver.node.placing import Step, next_step
from nbdserver.node.spread import Place

GIB = 1 << 30
PLACES = [Place(f"n{number}", f"rack{number}", (10 - number) * GIB) for number in range(1, 6)]


def replica_set(placement: str, in_sync: str = "", leaving: str = "") -> ReplicaSet:
    members = tuple(Member(node, 1) for node in (in_sync or placement).split())
    return ReplicaSet(1, "n1", members, tuple(placement.split()), leaving=tuple(leaving.split()))


def step(value: ReplicaSet, wanted: int = 3, leave: str = "", places: list[Place] = PLACES) -> Step:
    return next_step(wanted, leave.split(), value, "n1", places)


def test_what_is_as_it_shall_be_stays() -> None:
    assert step(replica_set("n1 n2 n3")) == Step()
    assert step(replica_set("n1 n2 n3", in_sync="n1")) == Step()
    assert step(replica_set("n1 n2 n3 n4", leaving="n4")) == Step()


def test_more_are_added_and_too_many_are_let_go_the_owner_never() -> None:
    assert step(replica_set("n1"), 3) == Step(("n1", "n2", "n3"))
    assert step(replica_set("n1 n2 n3"), 2) == Step(("n1", "n2"))
    assert step(replica_set("n1 n2 n3", in_sync="n1 n3"), 2) == Step(("n1", "n3"))
    assert step(replica_set("n1 n2 n3"), 1) == Step(("n1",))
    together = [Place("n1", "a", 1), Place("n2", "b", 1), Place("n3", "a", 9)]
    assert step(replica_set("n1 n2 n3"), 2, places=together) == Step(("n1", "n2"))


def test_who_shall_go_is_replaced() -> None:
    assert step(replica_set("n1 n2 n3"), leave="n2") == Step(("n1", "n3", "n4"))
    assert step(replica_set("n1 n2 n3 n4", in_sync="n1 n2 n3", leaving="n2"), leave="n2") == Step()


def test_an_owner_that_shall_go_hands_the_family_on_first_to_one_that_has_everything_and_is_up() -> None:
    assert step(replica_set("n1 n2 n3"), leave="n1") == Step(owner="n2")
    silent = [replace(place, obstacle="is silent") if place.node == "n2" else place for place in PLACES]
    assert step(replica_set("n1 n2 n3"), leave="n1", places=silent) == Step(owner="n3")
    assert step(replica_set("n1 n2 n3", in_sync="n1"), leave="n1") == Step(("n2", "n3", "n4", "n1"))
    assert step(replica_set("n1 n2 n3 n4", in_sync="n1"), leave="n1") == Step()


@pytest.mark.parametrize(("leave", "owner"), [("n1", "n2"), ("n2", ""), ("n3", "")])
def test_with_too_few_nodes_who_shall_go_stays_and_owns_nothing(leave: str, owner: str) -> None:
    found = step(replica_set("n1 n2 n3"), leave=leave, places=PLACES[:3])
    assert (found.placement, found.owner) == ((), owner)
    assert found.problem == "there are 1 nodes too few for 3 replicas"


def test_it_ends_for_an_owner_that_is_drained() -> None:
    """The steps of n1, then those of whoever it hands the family to."""
    value, me = replica_set("n1 n2 n3"), "n1"
    for _ in range(10):
        found = next_step(3, ["n1"], value, me, PLACES)
        if found == Step():
            break
        if found.owner:
            me = found.owner
        else:
            value = replica_set(" ".join(found.placement))  # made, in sync, and the others let go
    assert (set(value.placement), me) == ({"n2", "n3", "n4"}, "n2")
