"""A candidate: makes this node the owner of a family, or finds that it may not be.

     wait out the own grant ─► swap: owner, epoch ─► open the members ─► fetch the longest log ─► swap: the set ─► Owner

Rules (docs/replication.md has the reasons)
- While it waits and swaps, this node's replica grants nothing (3).
- Who is not whole completes itself from a whole member first; if none is whole all members must be opened, the longest
  log wins, and the generation rises (16).
- Members that could not be opened, or are not whole, are out of the set before anything is ordered (5).
- If none was whole only those whose logs end where the longest does stay in the set; the others return like any that
  were away.
- A replica that has regions to fetch is not complete, whatever its log says.

Known weakness: a log that the winner's does not go back to cannot be completed here; its holder has to take over.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from metadata.replica_set import Change, Member, ReplicaSet, ReplicaSets
from metadata.seams import Clock, Timer
from nbdserver.replication.append_frames import AppendFrame
from nbdserver.replication.in_sync_set import is_whole, opened_at
from nbdserver.replication.link import Link
from nbdserver.replication.replica import FETCH_LIMIT_BYTES, Replica
from nbdserver.replication.replica_log import common_position
from protocol.peer import Cut, Fetched, Modification, Opened, Position, Refusal, Refused, Skip

OPEN_WAIT_S = 1.0
"""For members, as long as one whole log is there."""
OPEN_ALL_WAIT_S = 10.0
"""For all of them, if none is."""


class TakeoverEvents(Protocol):
    """Whose candidate it is."""

    def links(self, value: ReplicaSet, events: "Takeover") -> Mapping[str, Link]:
        """Links to the other nodes of the placement, by name, under the value's epoch."""

    def taken(self, value: ReplicaSet, links: Mapping[str, Link]) -> None:
        """This node is the owner now."""

    def not_taken(self, reason: str) -> None:
        """It is not, and the links are closed."""


class Takeover:
    """One try. It ends with `taken` or `not_taken`, unless it is cancelled."""

    def __init__(
        self,
        clock: Clock,
        registry: ReplicaSets,
        key: str,
        node: str,
        replica: Replica,
        value: ReplicaSet,
        events: TakeoverEvents,
    ) -> None:
        self.epoch = value.epoch
        self._clock = clock
        self._registry = registry
        self._key = key
        self._node = node
        self._replica = replica
        self._log = replica.log
        self._value = value
        self._events = events
        self._links: Mapping[str, Link] = {}
        self._timer: Timer | None = None
        self._change: Change | None = None
        self._is_over = False
        self._is_looking = False
        self._looks_until_s = 0.0
        self._looks_longest_s = 0.0
        replica.withhold(value.epoch)
        self._wait()

    def cancel(self) -> None:
        """Without a word; idempotent."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._change is not None:
            self._change.cancel()
        for link in self._links.values():
            link.close()

    def _fail(self, reason: str) -> None:
        if not self._is_over:
            self.cancel()
            self._events.not_taken(reason)

    # --- the registry ---

    def _wait(self) -> None:
        """Until the own grant has run out."""
        self._timer = None
        wait_s = self._replica.granted_until_s - self._clock.now()
        if wait_s > 0:
            self._timer = self._clock.call_later(wait_s, self._wait)
            return
        self._make(self._value.changed(owner=self._node, epoch=self._value.epoch + 1), self._swapped)

    def _make(self, new: ReplicaSet, then: Callable[[ReplicaSet], None]) -> None:
        def made(is_made: bool, there: ReplicaSet | None) -> None:
            self._change = None
            if is_made and there is not None:
                then(there)
            else:
                self._fail("the registry's value was changed by another")

        self._change = Change(self._clock, self._registry, self._key, self._value, new, made)

    def _swapped(self, value: ReplicaSet) -> None:
        self._value = value
        self.epoch = value.epoch
        self._replica.own(value.epoch)
        self._log.promise(value.epoch, self._promised)

    def _promised(self, errno: int) -> None:
        if self._is_over:
            return
        if errno:
            self._fail(f"the epoch could not be persisted (errno {errno})")
            return
        self._log.settle(self._begin_to_look)  # what is under way for the last owner comes first

    # --- the members ---

    def _begin_to_look(self, errno: int) -> None:
        if self._is_over:
            return
        now_s = self._clock.now()
        self._looks_until_s, self._looks_longest_s = now_s + OPEN_WAIT_S, now_s + OPEN_ALL_WAIT_S
        self._is_looking = True
        self._links = self._events.links(self._value, self)
        self._look()

    def _look(self) -> None:
        """Decide, if enough members are open."""
        self._timer = None
        if not self._is_looking:
            return
        others = [member for member in self._value.in_sync if member.node != self._node]
        found = [(member, opened_at(member.node, self._links)) for member in others]
        opened = [(member, each) for member, each in found if each is not None]
        complete = {member.node: each for member, each in opened if self._is_complete(member, each)}
        us = self._value.member(self._node)
        log = self._log
        are_we_complete = us is not None and is_whole(us, log.incarnations) and not log.resync_count
        now_s = self._clock.now()
        if len(opened) == len(others) or ((complete or are_we_complete) and now_s >= self._looks_until_s):
            self._is_looking = False
            self._decide({member.node: each for member, each in opened}, complete, are_we_complete)
        elif now_s >= self._looks_longest_s:
            self._fail("no whole member can be opened")
        else:
            self._timer = self._clock.call_later(0.1, self._look)

    def _is_complete(self, member: Member, opened: Opened) -> bool:
        return is_whole(member, opened.incarnations) and not opened.resync

    def _decide(self, opened: dict[str, Opened], complete: dict[str, Opened], are_we_complete: bool) -> None:
        """Whose log wins, and who is in the set."""
        generation = self._value.generation
        if not complete and not are_we_complete:
            complete = {node: each for node, each in opened.items() if not each.resync}
            generation += 1
        if self._log.resync_count:
            self._fail("it has regions to fetch")
            return
        settle_set = partial(self._settle_set, list(complete), generation)
        winner = self._longest(complete)
        is_ours_good = are_we_complete or generation > self._value.generation
        if winner is None or (is_ours_good and complete[winner].last <= self._log.last):
            settle_set()
            return
        target = complete[winner]
        link = self._links[winner]
        common = common_position(self._log.epochs, target.epochs)

        def aligned(errno: int) -> None:
            if errno:
                self._fail(f"the log could not be cut (errno {errno})")
            elif not self._is_over:
                self._fetch(link, target.last, settle_set)

        if common < self._log.last:
            self._log.cut(common, aligned)
        else:
            aligned(0)

    def _longest(self, complete: Mapping[str, Opened]) -> str | None:
        """Which of the others has the longest log (rule 6)."""
        return max(complete, key=lambda node: complete[node].last, default=None)

    def _fetch(self, link: Link, to: Position, completed: Callable[[], None]) -> None:
        """Append what the winner has and we have not."""
        if self._is_over:
            return
        if self._log.last >= to:
            completed()
            return

        def fetched(frame: Fetched | None) -> None:
            if self._is_over:
                return
            if frame is None or frame.is_gone or not frame.modifications:
                self._fail("the longest log cannot be read")
                return
            self._log.append(frame.modifications, appended)

        def appended(errno: int) -> None:
            if errno:
                self._fail(f"the longest log could not be appended (errno {errno})")
            else:
                self._fetch(link, to, completed)

        link.fetch(self._log.last, FETCH_LIMIT_BYTES, fetched)

    # --- the set ---

    def _settle_set(self, nodes: Sequence[str], generation: int) -> None:
        """We, and whoever is complete."""
        members = [Member(self._node, self._log.incarnation)]
        none_was_whole = generation > self._value.generation
        for node in nodes:
            opened = opened_at(node, self._links)
            if opened is not None and not (none_was_whole and opened.last != self._log.last):
                members.append(Member(node, opened.incarnation))
        members.sort(key=lambda member: member.node)
        self._make(self._value.changed(in_sync=tuple(members), generation=generation), self._settled)

    def _settled(self, value: ReplicaSet) -> None:
        self._is_over = True
        self._events.taken(value, self._links)

    # --- LinkEvents ---

    def frames(self, modifications: Sequence[Modification]) -> Sequence[AppendFrame]:
        """Nothing is sent yet."""
        return ()

    def send_ordered(self) -> None:
        """Nothing is ordered yet."""

    def opened(self, link: Link) -> None:
        """It is looked at in turn."""
        if self._is_looking:
            if self._timer is not None:
                self._timer.cancel()
            self._look()

    def appended(self, link: Link) -> None:
        """Nothing is sent yet."""

    def aligned(self, link: Link, frame: Cut | Skip) -> None:
        """Nothing is sent yet."""

    def may_skip(self, link: Link) -> bool:
        """Nothing is sent yet."""
        return False

    def copied(self, link: Link) -> None:
        """Nothing is sent yet."""

    def refused(self, link: Link, refused: Refused) -> None:
        """Another candidate is further."""
        if refused.reason is Refusal.EPOCH and refused.epoch > self.epoch:
            self._fail(f"{link.node} obeys epoch {refused.epoch}")
