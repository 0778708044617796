"""Becoming a member, and getting a snapshot when messages cannot bring the own copy up to date: the joiner's side.

Theory: a table of states; every step is asked for again until it is answered, and every failure leads back to ASKING,
with another delegate. What was received of a snapshot stays, as long as the epoch does.

Rules
- READY is said only when the copy is exact and persisted.
- `attempt` is drawn for each join and names all that belongs to it; what has another one is not listened to.
- A stream that brings nothing for PROGRESS_S is given up.
"""

from collections.abc import Callable
from enum import Enum
from random import Random
from typing import Any

from metadata.directory.outbox import Outbox
from metadata.directory.registry_keys import Member
from metadata.directory.replica import Replica
from protocol.directory import NOWHERE, NodeKind
from protocol.directory_control import (
    Active,
    Delegate,
    Join,
    JoinRefused,
    Ready,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotEntries,
    SnapshotRefused,
    SnapshotRequest,
    Subscribe,
    unpack_starts,
)
from protocol.invariant import invariant

RETRY_S = 0.2
RETRY_LIMIT_S = 2.0
PROGRESS_S = 5.0
CATCH_UP_S = 20.0  # less than the master holds the messages for


class Joining(Enum):
    """How far a node is."""

    IDLE = "idle"
    ASKING = "asking the master for a delegate"
    FETCHING = "receiving a snapshot"
    CATCHING_UP = "catching up with the messages since"
    READY = "ready, not yet acknowledged"


class Step(Enum):
    """What makes it go on."""

    NEEDED = "needed"
    DELEGATE_NAMED = "delegate named"
    NO_SNAPSHOT_NEEDED = "no snapshot needed"
    LAST_ENTRY = "last entry"
    EXACT = "exact and persisted"
    ACTIVE = "acknowledged"
    BROKEN = "broken off"


TRANSITIONS: dict[Joining, dict[Step, Joining]] = {
    Joining.IDLE: {Step.NEEDED: Joining.ASKING},
    Joining.ASKING: {
        Step.DELEGATE_NAMED: Joining.FETCHING,
        Step.NO_SNAPSHOT_NEEDED: Joining.READY,
        Step.ACTIVE: Joining.IDLE,
        Step.BROKEN: Joining.ASKING,
    },
    Joining.FETCHING: {Step.LAST_ENTRY: Joining.CATCHING_UP, Step.BROKEN: Joining.ASKING},
    Joining.CATCHING_UP: {Step.EXACT: Joining.READY, Step.BROKEN: Joining.ASKING},
    Joining.READY: {Step.ACTIVE: Joining.IDLE, Step.BROKEN: Joining.ASKING},
}

OpenStream = Callable[[str, Any, Callable[[Any], None], Callable[[str], None]], Callable[[], None]]
"""(address, first body, heard, failed) -> what gives the stream up; `failed` is called once, if it ends before that."""


class Joiner:
    """One node's way into the cluster."""

    def __init__(
        self,
        me: Member,
        prefixes: tuple[str, ...],
        replica: Replica,
        outbox: Outbox,
        random: Random,
        now: Callable[[], float],
        open_stream: OpenStream,
    ) -> None:
        self.state = Joining.IDLE
        self.snapshots = 0
        """Begun so far."""
        self._me = me
        self._prefixes = prefixes
        self._replica = replica
        self._outbox = outbox
        self._random = random
        self._now = now
        self._open_stream = open_stream
        self._attempt = 0
        self._master = 0
        self._epoch = 0
        self._end = NOWHERE
        self._since_s = float("-inf")
        self._needs_snapshot = False
        self._give_up: Callable[[], None] | None = None
        self._due_at_s = float("inf")
        self._tries = 0

    def _move(self, step: Step) -> None:
        after = TRANSITIONS[self.state].get(step)
        invariant(after is not None, f"a join that is {self.state.value} cannot be {step.value}")
        assert after is not None  # for the type checker
        self.state = after
        self._tries = 0
        self._since_s = self._now()
        self._due_at_s = self._now() if after is not Joining.IDLE else float("inf")

    def need(self, master: int, epoch: int, needs_snapshot: bool) -> None:
        """This node is not what it should be under the master of `epoch`; nothing happens if that is known."""
        is_other = (master, epoch) != (self._master, self._epoch)
        if self.state is not Joining.IDLE and not is_other and (self._needs_snapshot or not needs_snapshot):
            return
        if self.state is Joining.IDLE and not is_other and not needs_snapshot:
            # Acknowledged a moment ago: the update that says so is on its way. If not, the same join asks again.
            if self._now() < self._since_s + RETRY_S:
                return
        else:
            self._attempt = self._random.getrandbits(63) + 1
        if self.state is not Joining.IDLE:
            self._break_off()
        else:
            self._move(Step.NEEDED)
        self._master, self._epoch, self._needs_snapshot = master, epoch, needs_snapshot

    def cancel(self) -> None:
        """Not wanted any more: the node is the master, or ends."""
        self._close_stream()
        self.state = Joining.IDLE
        self._due_at_s = float("inf")

    def broken(self) -> None:
        """What the snapshot was to go on with is gone: begin again."""
        if self.state is not Joining.IDLE:
            self._needs_snapshot = True
            self._replica.stage_drop()
            self._break_off()

    def _break_off(self) -> None:
        self._close_stream()
        tries = self._tries
        self._move(Step.BROKEN)
        self._tries = min(tries + 1, 10)
        self._due_at_s = self._now() + self._pause_s()

    def _pause_s(self) -> float:
        return min(RETRY_S * (1 << self._tries), RETRY_LIMIT_S) * (0.5 + self._random.random() / 2)

    def _close_stream(self) -> None:
        if self._give_up is not None:
            self._give_up()
            self._give_up = None

    # --- what the master says ---

    def delegate(self, answer: Delegate) -> None:
        if self.state is not Joining.ASKING or answer.attempt != self._attempt or answer.epoch != self._epoch:
            return
        if not self._needs_snapshot:
            self._move(Step.NO_SNAPSHOT_NEEDED)
            return
        self._move(Step.DELEGATE_NAMED)
        self._due_at_s = self._now() + PROGRESS_S
        staging = self._replica.staging
        if staging is not None and staging.master == self._epoch and staging.end is None:
            after, held_from = staging.after, staging.begin
        else:
            after, held_from = "", NOWHERE
        request = SnapshotRequest(self._attempt, self._epoch, after, held_from, self._prefixes)
        attempt = self._attempt
        self._give_up = self._open_stream(
            answer.streams,
            request,
            lambda body: self._heard(attempt, body),
            lambda reason: self._failed(attempt),
        )

    def refused(self, answer: JoinRefused) -> None:
        if answer.attempt == self._attempt and self.state in (Joining.READY, Joining.CATCHING_UP):
            self.broken()

    def active(self, answer: Active) -> None:
        if answer.attempt == self._attempt and answer.epoch == self._epoch:
            self.is_member()

    def is_member(self) -> None:
        """The master has acknowledged it, or the copy itself says so."""
        if self.state is Joining.READY or (self.state is Joining.ASKING and not self._needs_snapshot):
            self._move(Step.ACTIVE)

    # --- what the delegate says ---

    def _heard(self, attempt: int, body: Any) -> None:
        if self.state is not Joining.FETCHING or attempt != self._attempt or body.attempt != attempt:
            return
        replica = self._replica
        match body:
            case SnapshotBegin():
                self.snapshots += 1
                replica.stage(body.position, self._epoch, unpack_starts(body.history))
            case SnapshotEntries() if replica.staging is not None:
                replica.stage_entries(body.entries)
            case SnapshotEnd() if replica.staging is not None:
                self._close_stream()
                self._end = body.position
                self._move(Step.LAST_ENTRY)
                replica.stage_end(body.position, self._now())
                return
            case SnapshotRefused():
                self._break_off()
                return
            case _:
                return
        self._due_at_s = self._now() + PROGRESS_S

    def _failed(self, attempt: int) -> None:
        if self.state is Joining.FETCHING and attempt == self._attempt:
            self._give_up = None
            self._break_off()

    # --- time ---

    @property
    def due_at_s(self) -> float:
        return self._due_at_s

    def tick(self) -> None:
        """Say again what has not been answered."""
        if self.state is Joining.IDLE or (now_s := self._now()) < self._due_at_s:
            return
        self._due_at_s = now_s + self._pause_s()
        self._tries = min(self._tries + 1, 10)
        match self.state:
            case Joining.ASKING:
                me = self._me
                self._outbox.send(
                    self._master, Join(self._attempt, me.kind, me.name, me.datagrams, me.streams, self._prefixes)
                )
            case Joining.FETCHING:
                self._break_off()
            case Joining.CATCHING_UP:
                self._catch_up(now_s)
            case Joining.READY:
                self._outbox.send(self._master, Ready(self._attempt, self._epoch, self._replica.store.persisted))

    def _catch_up(self, now_s: float) -> None:
        staging = self._replica.staging
        if staging is not None and now_s > self._since_s + CATCH_UP_S:
            self.broken()
        elif staging is not None and self._me.kind is NodeKind.SECOND:
            self._outbox.send(self._master, Subscribe(self._epoch, staging.begin, self._prefixes))
        elif staging is None:
            self.persisted()

    def persisted(self) -> None:
        """The store has synced something."""
        is_installed = self._replica.staging is None and self._replica.store.persisted >= self._end
        if self.state is Joining.CATCHING_UP and is_installed:
            self._needs_snapshot = False
            self._move(Step.EXACT)
