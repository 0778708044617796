"""On which nodes the replicas of a family shall be.

Theory: replicas that fail together are one replica. So they are spread over fault domains first; within what that
leaves, the node that has promised the least of its room comes first. A pure function of what is known of the nodes: the
same picture gives the same answer, whichever node is asked.

Rules
- A node that is silent, draining, full, across a WAN, or at its `overcommit`, gets nothing new.
- Fewer fault domains than replicas is allowed; fewer nodes than replicas is refused.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from nbdserver.node.errors import ConflictError, counted, listed
from nbdserver.node.sizes import round_size

FULL_PERCENT = 95.0
"""Of the file system: such a node gets nothing new."""


@dataclass(frozen=True)
class Place:
    """A node, as far as it matters here."""

    node: str
    fault_domain: str
    free_bytes: int
    obstacle: str = ""
    """Why it gets no new replica, in a few words; "" if it may."""
    is_draining: bool = False
    """Whether it shall lose those that it has."""
    promisable_bytes: int | None = None
    """What it may promise beside what it has; None: without limit."""


def for_family(places: Sequence[Place], size_bytes: int, kept: Collection[str] = ()) -> list[Place]:
    """The same, where a replica of volumes of this size may not be put on nodes that cannot promise it; those of `kept`
    have one."""

    def for_one(place: Place) -> Place:
        if place.obstacle or place.node in kept or place.promisable_bytes is None:
            return place
        if place.promisable_bytes >= size_bytes:
            return place
        may = round_size(place.promisable_bytes)
        return replace(place, obstacle=f"may promise {may} more, not {round_size(size_bytes)} (overcommit)")

    return [for_one(place) for place in places]


def choose(places: Sequence[Place], replicas: int, kept: Collection[str] = (), first: str = "") -> tuple[str, ...]:
    """The nodes for so many replicas: those that are `kept`, and the best of the others. `first` is taken before others
    that are as good. ConflictError if there are too few."""
    chosen = list(kept)
    domains = Counter(place.fault_domain for place in places if place.node in chosen)
    left = [place for place in places if not place.obstacle and place.node not in chosen]
    while len(chosen) < replicas:
        if not left:
            obstacles = [f"{place.node} {place.obstacle}" for place in places if place.obstacle]
            why = f" ({listed(obstacles)})" if obstacles else ""
            raise ConflictError(
                f"{counted(replicas, 'replica')} need as many nodes, and there are {len(chosen)} that can have one"
                f"{why}; add a node, or choose fewer replicas"
            )
        best = min(
            left, key=lambda place: (domains[place.fault_domain], place.node != first, -place.free_bytes, place.node)
        )
        left.remove(best)
        chosen.append(best.node)
        domains[best.fault_domain] += 1
    return tuple(chosen)
