"""Letting nodes in: the master's side of joins.

Theory: the master names a delegate, holds the messages that the delegate asks for, and in the end waits until a
majority of the voters has what the new node has. It never sends a copy itself unless it is alone. So a join costs it a
handful of datagrams, one swap in the registry and one update, whatever the map holds.

Rules
- A node that is listed as a voter is active only after the registry has it; a node whose name was a voter's takes that
  one's place, because a name has one node: the one with the disk.
- JOINS_LIMIT at once; one that gives no sign for HOLD_S is forgotten. Everything may come twice.
- The same join that asks again gets another delegate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from metadata.directory.confirmations import Confirmations
from metadata.directory.outbox import Outbox
from metadata.directory.registry_keys import Member
from metadata.directory.term import Term
from protocol.directory import NOWHERE, Action, NodeKind, Position, Reason, Update
from protocol.directory_control import Active, Delegate, Held, Hold, Join, JoinRefused, Ready

JOINS_LIMIT = 16
HOLD_S = 30.0
ABANDONED_S = 120.0  # a node that is alive and says nothing of its join for so long has forgotten it
DONE_LIMIT = 1024  # joins whose ACTIVE may have to be said again
RETRY_S = 0.1


@dataclass
class _Join:
    member: Member
    until_s: float
    asked_s: float
    """When it last said something of this join."""
    delegates: set[int] = field(default_factory=set)
    """Those named so far."""
    ready: Position = NOWHERE
    is_confirmed: bool = False
    is_changing: bool = False


class Admission:
    """The joins of one term."""

    def __init__(
        self,
        term: Term,
        confirmations: Confirmations,
        me: Member,
        members: Callable[[], dict[int, Member]],
        suspects: Callable[[int], bool],
        change_voters: Callable[[dict[int, str | None], Callable[[], None]], bool],
        outbox: Outbox,
        random: Random,
    ) -> None:
        """`members()` by id; `change_voters({id: name, or None to strike it}, taken)` asks the registry: False if it
        cannot be asked now."""
        self.messages = 0
        """Received and sent for joins."""
        self._term = term
        self._confirmations = confirmations
        self._me = me
        self._members = members
        self._suspects = suspects
        self._change_voters = change_voters
        self._outbox = outbox
        self._random = random
        self._joins: dict[int, _Join] = {}
        self._done: dict[int, int] = {}
        self._retry_at_s = float("inf")

    def joining(self) -> dict[int, Member]:
        """First-kind nodes that hear the messages already."""
        return {
            join.member.node: join.member for join in self._joins.values() if join.member.kind is NodeKind.FIRST
        }  # fmt: skip

    def _send(self, node: int, body: Join | Delegate | Held | Active | JoinRefused) -> None:
        self.messages += 1
        self._outbox.send(node, body)

    # --- what nodes say ---

    def join(self, node: int, body: Join, now_s: float) -> bool:
        """A node wants in; True if the audience has changed."""
        self.messages += 1
        if self._done.get(body.attempt) == node:  # it was under way while the last step was made
            self._send(node, Active(body.attempt, self._term.epoch))
            return False
        for attempt, other in list(self._joins.items()):
            if other.member.node == node and attempt != body.attempt:
                self._forget(attempt)
        join = self._joins.get(body.attempt)
        is_new = join is None
        member = Member(node, body.node_kind, body.name, body.datagrams, body.streams)
        if join is None:
            if len(self._joins) >= JOINS_LIMIT:
                self._send(node, JoinRefused(body.attempt, self._term.epoch, Reason.NOT_NOW))
                return False
            join = self._joins[body.attempt] = _Join(member, now_s + HOLD_S, now_s)
        join.until_s, join.asked_s = now_s + HOLD_S, now_s
        delegate = self._delegate_for(join)
        join.delegates.add(delegate.node)
        self._send(node, Delegate(body.attempt, self._term.epoch, delegate.node, delegate.streams))
        return is_new

    def _delegate_for(self, join: _Join) -> Member:
        busy = {other.member.node for other in self._joins.values()} | {self._me.node}
        able = [
            member
            for member in self._members().values()
            if member.kind is NodeKind.FIRST and member.node not in busy and not self._suspects(member.node)
        ]
        fresh = [member for member in able if member.node not in join.delegates]
        if able and not fresh:
            join.delegates.clear()
        # With nobody else the master pays for the join itself.
        return self._random.choice(sorted(fresh or able or [self._me], key=lambda member: member.node))

    def hold(self, node: int, body: Hold, now_s: float) -> None:
        """A delegate asks for the messages after its position to be kept."""
        self.messages += 1
        join = self._joins.get(body.attempt)
        is_held = (
            join is not None
            and body.epoch == self._term.epoch
            and join.member.node == body.joiner
            and self._term.replica.history.has(body.position)
            and self._term.replica.buffer.hold(body.attempt, body.position.sequence, now_s + HOLD_S)
        )
        self._send(node, Held(body.attempt, self._term.epoch, is_held))

    def ready(self, node: int, body: Ready, now_s: float) -> None:
        """A joiner's copy is exact and persisted."""
        self.messages += 1
        if body.epoch != self._term.epoch:
            return
        if self._done.get(body.attempt) == node:
            self._send(node, Active(body.attempt, self._term.epoch))
            return
        join = self._joins.get(body.attempt)
        if join is None or join.member.node != node or not self._term.replica.history.has(body.position):
            self._send(node, JoinRefused(body.attempt, self._term.epoch, Reason.HOLD_BROKEN))
            return
        join.until_s, join.asked_s = now_s + HOLD_S, now_s
        self._term.replica.buffer.release(body.attempt)
        self._confirmations.persisted(node, body.position)
        if join.ready == NOWHERE:
            join.ready = body.position
            # From here on nothing that it has can be missing in a later master's copy.
            self._confirmations.wait(self._term.replica.position.sequence, lambda: self._confirmed(body.attempt))
            self._term.beat_soon(now_s)
        elif join.is_confirmed:
            self._go_on(body.attempt)

    def alive(self, node: int, now_s: float) -> None:
        """A sign of a joining node."""
        for attempt, join in self._joins.items():
            if join.member.node == node and now_s < join.asked_s + ABANDONED_S:
                join.until_s = now_s + HOLD_S
                self._term.replica.buffer.extend(attempt, now_s + HOLD_S)

    # --- steps ---

    def _confirmed(self, attempt: int) -> None:
        join = self._joins.get(attempt)
        if join is not None:
            join.is_confirmed = True
            self._go_on(attempt)

    def _go_on(self, attempt: int) -> None:
        join = self._joins.get(attempt)
        if join is None or join.is_changing or not join.is_confirmed:
            return
        member = join.member
        if member.kind is NodeKind.SECOND or member.node in self._confirmations.voters:
            self._activate(attempt)
            return
        # All that wait go into one swap.
        waiting = {
            number: other
            for number, other in self._joins.items()
            if other.is_confirmed and not other.is_changing and other.member.kind is NodeKind.FIRST
        }
        changes: dict[int, str | None] = {}
        names = {other.member.name: other.member.node for other in waiting.values()}
        for known in self._members().values():
            if names.get(known.name, known.node) != known.node:
                changes[known.node] = None
        for other in waiting.values():
            if names[other.member.name] == other.member.node:
                changes[other.member.node] = other.member.name

        def taken() -> None:
            for number, other in waiting.items():
                if other.member.node in self._confirmations.voters:
                    self._activate(number)

        if self._change_voters(changes, taken):
            for other in waiting.values():
                other.is_changing = True

    def _activate(self, attempt: int) -> None:
        join = self._joins.pop(attempt, None)
        if join is None:
            return
        self._done[attempt] = join.member.node
        while len(self._done) > DONE_LIMIT:
            del self._done[next(iter(self._done))]
        member = join.member
        if self._term.replica.map.get(member.key) != member.encode():
            self._term.publish(Update(Action.PUT, member.key, member.encode()))
        self._send(member.node, Active(attempt, self._term.epoch))

    def _forget(self, attempt: int) -> None:
        join = self._joins.get(attempt)
        if join is not None and not join.is_changing:
            del self._joins[attempt]
            self._term.replica.buffer.release(attempt)

    def voters_settled(self) -> None:
        """A change of voters is over, whatever came of it: the next one may go on."""
        for join in self._joins.values():
            join.is_changing = False
        for attempt in list(self._joins):
            self._go_on(attempt)

    def tick(self, now_s: float) -> bool:
        """Forget joins without a sign of life, go on with those that had to wait; True if the audience has changed."""
        gone = [attempt for attempt, join in self._joins.items() if join.until_s <= now_s]
        for attempt in gone:
            self._forget(attempt)
        for attempt in list(self._joins):
            self._go_on(attempt)
        return bool(gone)
