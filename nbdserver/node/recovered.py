"""What the cluster's registry is to hold when it is made anew from what the nodes know: decided, not done.

Theory: pure. Every node keeps of each family of which it has a replica the newest value of the Family and of its
ReplicaSet that it has heard of, and has on its disk in which incarnations the replica was open. Whoever acts on a
ReplicaSet has written it down first (channel_registry.py). A later one than the newest that is told can only have been
made by one of *its* members, because only they may own the family. So if all of these have told, it is the last one.
One of them may have asked for a later one that adds a member, and not know what became of that: then that member may
own the family by now, and has to tell too.

Rules
- A family needs the word of every member of the newest in-sync set that anybody tells. Without one it is left out,
  unless whoever asks says that this node shall not be waited for: then what it alone has acknowledged is lost, and the
  generation rises.
- A member that tells and is not what it was (its disk was put back) stays in the set: who takes over finds that out.
- A replica set is numbered higher than any that anybody may have heard of before: what was made and is not acted on is
  never taken for a later one.
- A family that any node knows to be deleted stays deleted.
- What the registry still holds counts like one more word.

Known weakness: names and settings are as the nodes heard of them last: a change of the last moment before the registry
was lost may be missing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from metadata.registry import Family
from metadata.replica_set import Member, ReplicaSet
from nbdserver.node.errors import listed
from protocol.peer import Position

NUMBERS = 1000
"""By so much numbers rise. One that nobody acts on is higher by one."""


@dataclass(frozen=True)
class Word:
    """What a node says of its replica of one family."""

    family: Family
    kept: ReplicaSet | None
    """The newest that it has heard of."""
    incarnation: int
    """In which it is open; 0: it is not."""
    last: Position
    promised_epoch: int
    resync_regions: int
    asked: ReplicaSet | None = None
    """The last one with a new member that it has asked the registry for."""

    @property
    def is_complete(self) -> bool:
        """Whether its log has everything up to its end."""
        return bool(self.incarnation) and not self.resync_regions


@dataclass(frozen=True)
class Verdict:
    """What becomes of one family."""

    family: Family
    value: ReplicaSet | None = None
    """What its replica set is to be; None: it is left out."""
    problem: str = ""
    """Why it cannot be told, and what would help."""
    loss: str = ""
    """What is lost, where nodes are not waited for."""
    is_final: bool = False
    """Whether it is left out for good: no node that is waited for could help."""


def verdict(
    family: Family, words: Mapping[str, Word], registered: ReplicaSet | None, without: Collection[str]
) -> Verdict:
    """Of the newest value of a family, from the words of nodes that have a replica, and what the registry holds."""
    sets = [word.kept for word in words.values() if word.kept is not None]
    sets += [registered] if registered is not None else []
    if not sets:
        return Verdict(family, problem="no node keeps who was in sync", is_final=bool(without))
    newest = max(sets, key=lambda value: value.number)
    asked = [word.asked for word in words.values() if word.asked is not None and word.asked.number > newest.number]
    needed = dict.fromkeys(member.node for value in (newest, *asked) for member in value.in_sync)
    silent = [node for node in needed if node not in words or not words[node].incarnation]
    promised = max((word.promised_epoch for word in words.values()), default=0)
    waited_for = [node for node in silent if node not in without]
    if waited_for:
        return Verdict(
            family, problem=f"it needs the word of {listed(waited_for)}, which may have gone on without others"
        )
    if promised > newest.epoch and not without:
        return Verdict(family, problem=f"a replica obeys epoch {promised}, of which no node that answers tells more")
    if not silent and promised <= newest.epoch:
        return Verdict(family, _numbered(newest))
    return _without(family, words, newest, silent, promised)


def _without(
    family: Family, words: Mapping[str, Word], newest: ReplicaSet, silent: Sequence[str], promised: int
) -> Verdict:
    members = tuple(member for member in newest.in_sync if member.node not in silent)
    if not members:
        complete = [node for node, word in words.items() if word.is_complete]
        if not complete:
            return Verdict(family, problem="no node that answers has all of it", is_final=True)
        best = max(complete, key=lambda node: words[node].last)
        members = (Member(best, words[best].incarnation),)
    nodes = [member.node for member in members]
    value = newest.changed(
        epoch=max(newest.epoch, promised) + 1,
        owner=newest.owner if newest.owner in nodes else nodes[0],
        in_sync=members,
        placement=tuple(dict.fromkeys((*newest.placement, *nodes))),
        leaving=tuple(node for node in newest.leaving if node in nodes),
        generation=newest.generation + 1,
    )
    gone = listed(list(silent)) or "nodes that are away"
    return Verdict(
        family, _numbered(value), loss=f"what {gone} acknowledged and {listed(nodes)} had not heard of is lost"
    )


def _numbered(value: ReplicaSet) -> ReplicaSet:
    return replace(value, number=value.number + NUMBERS)


def with_free_names(families: Sequence[Family]) -> list[Family]:
    """The same, with names that are used once: who told an old name keeps it with a part of its family's id."""
    taken: set[str] = set()
    found = []
    for family in families:
        volumes = []
        for volume in family.volumes:
            name = volume.name if volume.name not in taken else f"{volume.name}-{family.id[:8]}"
            taken.add(name)
            volumes.append(replace(volume, name=name))
        found.append(replace(family, volumes=tuple(volumes)))
    return found
