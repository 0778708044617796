"""Who is in sync with an owner: replicas are removed, added and placed, in one change of the registry's value a time.

Theory. *Needed* are the other members, and a replica from the request to add it on: what they do not have is not
acknowledged, and without their grants nothing is answered. Whoever is not needed follows all the same. Every change
goes through here: this is the one place which knows what may be true in the registry by now.

Rules (docs/replication.md has the reasons)
- A member is needed until the registry has answered that it is none (8); a new one from the request on (9).
- A member that is not whole any more is removed like one that is silent (16).
- The registry is told of a member's newest incarnation as soon as it answers: an older one may be a copy's too (20).
- Who leaves stays until the others are there (19).

Known weakness: one change at a time: two replicas that die together are two swaps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from metadata.replica_set import Change, Member, ReplicaSet, ReplicaSets
from metadata.seams import Clock
from nbdserver.replication.grants import CANDIDATE_S
from nbdserver.replication.link import Link
from nbdserver.replication.placing import Placed, Placing
from protocol.peer import BEGINNING, Opened

Report = Callable[[str, dict[str, object]], None]
"""Tells of an event: its kind, and what belongs to it."""
_NOT_OWNED = "this node does not own the volume any more"


class SetEvents(Protocol):
    """Whose set it is."""

    def needed_changed(self, needed: Sequence[Link], has_link_to_all: bool) -> None:
        """These are needed from now on; whether there is a link to each of them."""

    def set_changed(self) -> None:
        """The registry has another value, which is this owner's."""

    def depose(self, reason: str) -> None:
        """The registry has a value that is not this owner's."""

    def has_everything(self, link: Link) -> bool:
        """Whether a replica that follows has all that is acknowledged, and grants."""

    def new_link(self, node: str) -> Link:
        """A link to another node of the placement."""


def is_whole(member: Member, incarnations: Sequence[int]) -> bool:
    """Whether a replica still is what the registry says that it was."""
    return member.incarnation in incarnations


def opened_at(node: str, links: Mapping[str, Link]) -> Opened | None:
    """What the replica on that node has said of itself on the stream that is there."""
    link = links.get(node)
    return link.opened if link is not None else None


WENT_DOWN = "its machine went down: what was not synced may be gone"
REPLACED = "its disk is empty: it was replaced"
PUT_BACK = "its disk was put back as it was at an earlier time"


def what_was_lost(incarnation: int, opened: Opened, committed_txid: int) -> str:
    """Why a replica that was known as `incarnation`, and had everything up to `committed_txid`, is not what it was, for
    people; "" if it is."""
    if incarnation in opened.incarnations:
        return PUT_BACK if opened.last.txid < committed_txid else ""
    if opened.last == BEGINNING:
        return REPLACED
    return WENT_DOWN if opened.incarnations[0] > incarnation else PUT_BACK


class InSyncSet:
    """The set of one owner."""

    def __init__(
        self,
        clock: Clock,
        registry: ReplicaSets,
        key: str,
        node: str,
        value: ReplicaSet,
        links: Mapping[str, Link],
        events: SetEvents,
        report: Report,
    ) -> None:
        """Begin with the value that names this node."""
        self.value = value
        self.links = dict(links)
        """To the other nodes of the placement."""
        self.adding = ""
        """The node of the replica that is being added."""
        self.lost: dict[str, str] = {}
        """By node: why the disk of a replica that came back was not what it had been, until it is in sync."""
        self._clock = clock
        self._registry = registry
        self._key = key
        self._node = node
        self._events = events
        self._report = report
        self._change: Change | None = None
        self._placing = Placing(clock)
        self._candidates: set[str] = set()  # members that want to own the family
        self._unfit: dict[str, str] = {}  # members that have to go, and why
        self._known = {member.node: member.incarnation for member in value.in_sync}  # the newest, as far as is known
        self._is_closed = False
        self._set_needed()

    def close(self) -> None:
        """This node is not the owner any more."""
        self._is_closed = True
        if self._change is not None:
            self._change.cancel()
        for link in self.links.values():
            link.close()
        self._placing.close(_NOT_OWNED)

    def _set_needed(self) -> None:
        others = [member.node for member in self.value.in_sync if member.node != self._node]
        if self.adding and self.adding not in others:
            others.append(self.adding)
        needed = [self.links[node] for node in others if node in self.links]
        self._events.needed_changed(needed, len(needed) == len(others))

    # --- what becomes of replicas ---

    def opened(self, link: Link, opened: Opened, committed_txid: int) -> None:
        """A replica says what it is."""
        node = link.node
        self._candidates.discard(node)
        member = self.value.member(node)
        known = self._known.get(node)
        why = "" if known is None else what_was_lost(known, opened, committed_txid if member is not None else 0)
        self._known[node] = opened.incarnation
        if why in (REPLACED, PUT_BACK):
            self.lost[node] = why
            self._report("replica-disk-changed", {"node": node, "reason": why})
        self._unfit.pop(node, None)
        if member is not None and (why or not is_whole(member, opened.incarnations)):
            self._unfit[node] = why or PUT_BACK
            self._remove_unfit()

    def starts_over(self, node: str) -> None:
        """A replica was told to begin as an empty one: it does not come back as what it was."""
        self._known.pop(node, None)

    def wants_to_own(self, node: str) -> None:
        """A member has said that it is a candidate."""
        self._candidates.add(node)

    def look(self, needed: Sequence[Link]) -> None:
        """Time has gone by: who is silent is removed."""
        now_s = self._clock.now()
        for link in needed:
            patience_s = CANDIDATE_S if link.node in self._candidates else 0.0
            if link.granted_until_s + patience_s <= now_s:
                self.remove(link.node, "it is silent")
        self._remove_unfit()
        self._note_newest()

    def _remove_unfit(self) -> None:
        for node, why in self._unfit.items():
            self.remove(node, why)

    def _note_newest(self) -> None:
        """Let the registry have a member's newest incarnation."""
        if self._change is not None or self._is_closed:
            return
        for member in self.value.in_sync:
            opened = opened_at(member.node, self.links)
            if opened is None or opened.incarnation == member.incarnation or member.node in self._unfit:
                continue
            if is_whole(member, opened.incarnations):
                self._make(self.value.with_member(Member(member.node, opened.incarnation)))
                return

    def remove(self, node: str, reason: str) -> None:
        """Have one member less, but for the last one."""
        member = self.value.member(node)
        if self._change is None and member is not None and len(self.value.in_sync) > 1:
            self._report("replica-removed", {"node": node, "reason": reason})
            self._make(self.value.without(node))

    def add_if_ready(self, link: Link) -> None:
        """Ask for a replica to be a member when it has everything."""
        if self._change is not None or self._is_closed or self.value.member(link.node) is not None:
            return
        opened = link.opened
        if opened is None or link.node not in self.value.staying or not self._events.has_everything(link):
            return
        self._report("replica-added", {"node": link.node})
        self.adding = link.node
        self._set_needed()
        self._make(self.value.with_member(Member(link.node, opened.incarnation)))

    # --- where they are ---

    def place(self, nodes: Sequence[str], done: Placed) -> None:
        """Have replicas on these nodes alone (placing.py)."""
        self._placing.ask(nodes, done)
        if self._is_closed:
            self._placing.close(_NOT_OWNED)
        self.place_if_due()

    def place_if_due(self) -> None:
        """Make the change of the placement that is due."""
        if self._change is not None or self._is_closed:
            return
        new = self._placing.next_value(self.value)
        if new is not None:
            self._report("placement-changed", {"placement": new.placement, "leaving": new.leaving})
            self._make(new)

    def _set_links(self) -> None:
        """To all nodes of the placement, and to no others."""
        for node in set(self.links) - set(self.value.placement):
            self.links.pop(node).close()
        for node in self.value.placement:
            if node not in self.links and node != self._node:
                self.links[node] = self._events.new_link(node)

    # --- the registry ---

    def heard(self, value: ReplicaSet) -> None:
        """The registry shows this value."""
        if value.epoch > self.value.epoch or (value.epoch == self.value.epoch and value.owner != self._node):
            self._events.depose(f"{value.owner} owns epoch {value.epoch}")

    def _make(self, new: ReplicaSet) -> None:
        self._change = Change(self._clock, self._registry, self._key, self.value, new, self._made)

    def _made(self, made: bool, there: ReplicaSet | None) -> None:
        self._change = None
        if there is None:
            self._events.depose("the registry has lost the family's value")
            return
        if there.epoch != self.value.epoch or there.owner != self._node:
            self._events.depose(f"{there.owner} owns epoch {there.epoch}")
            return
        self.adding = ""
        self.value = there
        self.lost = {node: why for node, why in self.lost.items() if there.member(node) is None or node in self._unfit}
        self._unfit = {node: why for node, why in self._unfit.items() if there.member(node) is not None}
        self._set_links()
        self._set_needed()
        self._check_members()
        self.place_if_due()
        self._events.set_changed()

    def _check_members(self) -> None:
        """A member that was asked for may be another one by now."""
        for member in self.value.in_sync:
            opened = opened_at(member.node, self.links)
            if opened is not None and not is_whole(member, opened.incarnations):
                self.remove(member.node, what_was_lost(member.incarnation, opened, 0))
