"""The next step of a family's replicas towards where they shall be.

Theory: pure. What is wanted (how many replicas, which nodes they shall leave) and what is (who has one, who is in sync)
gives one step; when that is made, the next look gives the next one. Whoever owns the family at the moment makes it, so
it goes on after any owner's death.

     an owner that shall go hands the family on ─► who shall go is replaced ─► all that stay are in sync ─► it is let go

Rules
- Nobody goes before somebody else has its place: as long as there are too few nodes, who shall go stays.
- A node that goes without being lost is let go by the owner when all that stay are in sync (ReplicaSet.leaving).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from metadata.replica_set import ReplicaSet
from nbdserver.node.errors import ConflictError
from nbdserver.node.spread import Place, choose


@dataclass(frozen=True)
class Step:
    """What is to be done; nothing if all is as it shall be."""

    placement: tuple[str, ...] = ()
    """The nodes that shall have a replica, the others let go as soon as these are in sync."""
    owner: str = ""
    """Who shall own the family from now on."""
    problem: str = ""
    """Why what is wanted cannot be had, whatever is done."""


def next_step(wanted: int, leave: Collection[str], value: ReplicaSet, me: str, places: Sequence[Place]) -> Step:
    """For the owner `me` of a family that shall have so many replicas, none of them on the nodes of `leave`."""
    staying = value.staying
    go = [node for node in staying if node in leave]
    keep = [node for node in staying if node not in leave]
    while len(keep) > wanted:
        keep.remove(_least_needed(keep, value, me, places))
    problem = ""
    try:
        while len(keep) < wanted:
            keep = list(choose([place for place in places if place.node not in leave], len(keep) + 1, keep))
    except ConflictError:
        missing = wanted - len(keep)
        problem = f"there are {missing} nodes too few for {wanted} replicas"
        keep += sorted(go, key=lambda node: (node != me, value.member(node) is None))[:missing]
    if me in leave:
        able = {place.node for place in places if not place.obstacle}
        heirs = [node for node in staying if node not in leave and node in able and value.member(node) is not None]
        if heirs:
            return Step(owner=heirs[0], problem=problem)
        if me not in keep:
            keep.append(me)
    return Step(problem=problem) if set(keep) == set(staying) else Step(tuple(keep), problem=problem)


def _least_needed(keep: Sequence[str], value: ReplicaSet, me: str, places: Sequence[Place]) -> str:
    """Of replicas of which there are too many: never the owner's; one that is not in sync, or that fails together with
    another, or where room is scarcest."""
    known = {place.node: place for place in places}
    domains = [known[node].fault_domain for node in keep if node in known]

    def need(node: str) -> tuple[bool, bool, int]:
        place = known.get(node)
        is_alone = place is not None and domains.count(place.fault_domain) == 1
        return value.member(node) is not None, is_alone, place.free_bytes if place is not None else 0

    return min((node for node in keep if node != me), key=need)
