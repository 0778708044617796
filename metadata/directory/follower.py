"""An agent's side of an epoch: whom it follows, what it asks for, what it promises and says it has.

Theory: the heartbeat says which history to follow and how far it goes; messages and stubs do the rest. Whatever this
node cannot get by messages it marks in `needs_snapshot`, and the joiner gets it.

Rules
- Nothing of an epoch below the promised one is listened to, and a promise is answered only when it is persisted.
- A stub that a master says it cannot resend any more is asked of relays; after GONE_TRIES the copy needs a snapshot.
- A position is told every POSITION_S, and at once when the master wants to know of one that has been persisted now.
"""

from collections.abc import Callable, Sequence
from random import Random

from metadata.directory.outbox import Outbox
from metadata.directory.replica import Replica
from metadata.directory.stubs import Source
from metadata.directory.suspicion import Suspicion
from metadata.directory.term import Resending, heartbeat_interval_s
from protocol.directory import (
    NOWHERE,
    Heartbeat,
    Message,
    NodeKind,
    Position,
    PositionReport,
    Refusal,
    Request,
    Starts,
    Updates,
)
from protocol.directory_control import Collect, Promise, Subscribed, unpack_starts

POSITION_S = 1.0
POSITIONS_PER_S = 1000.0  # that one master is told
GONE_TRIES = 4


class Follower:
    """What a node does while another one is the master."""

    def __init__(
        self,
        me: int,
        kind: NodeKind,
        replica: Replica,
        outbox: Outbox,
        random: Random,
        relays: Callable[[], Sequence[int]],
        now_s: float,
    ) -> None:
        """`relays()`: the first-kind nodes that may have what the master does not send."""
        self.master = 0
        """Id of the last master heard."""
        self.epoch = 0
        """Of that master; 0 for none since the start or the last promise."""
        self.is_following = False
        """True while messages of that epoch can be taken."""
        self.needs_snapshot = False
        self.confirmed = 0
        """The highest sequence that the master said is confirmed, in this epoch."""
        self.suspicion: Suspicion | None = None
        self.requests = 0
        self._me = me
        self._kind = kind
        self._replica = replica
        self._outbox = outbox
        self._random = random
        self._relays = relays
        self._resending = Resending(replica, outbox, now_s)
        self._floor = 0
        self._installs = 0
        self._wanted = 0  # sequence whose persisting the master wants to know of
        self._told = NOWHERE
        self._promise_to: tuple[int, int] | None = None
        self._position_at_s = now_s

    # --- the master ---

    def heartbeat(self, sender: int, heartbeat: Heartbeat, now_s: float) -> bool:
        """True if its master is the one to follow, or has become it now."""
        if heartbeat.epoch < self._replica.store.promised:
            return False
        if heartbeat.epoch != self.epoch or not (self.is_following or self.needs_snapshot):
            self._enter(sender, heartbeat.epoch, heartbeat.history, now_s)
        self.master = sender
        if self.suspicion is not None:
            self.suspicion.heard(now_s)
        self._floor = heartbeat.floor
        self.confirmed = max(self.confirmed, heartbeat.confirmed)
        replica = self._replica
        if self._kind is NodeKind.SECOND:
            self._pass_to(heartbeat.newest)
        elif self._is_taking:
            replica.queue.notice(heartbeat.newest, now_s)
        if heartbeat.wants_position and self.is_following:
            self._wanted = max(self._wanted, heartbeat.newest)
            self._tell(replica.store.persisted)
        return True

    def _enter(self, sender: int, epoch: int, starts: Starts, now_s: float) -> None:
        replica = self._replica
        if epoch != self.epoch:
            self.suspicion = Suspicion(heartbeat_interval_s(len(self._relays())), now_s)
            self.confirmed = self._wanted = 0
            self._told = NOWHERE
            if replica.staging is not None and replica.staging.master != epoch:
                replica.stage_drop()
        self.master, self.epoch = sender, epoch
        if self.suspicion is not None:
            self.suspicion.heard(now_s)
        replica.store.promise(epoch)
        if self._kind is NodeKind.SECOND:
            return  # it follows when the master says so (`subscribed`)
        self.is_following = replica.staging is None and replica.follow(starts)
        self.needs_snapshot = not self.is_following

    def updates(self, updates: Updates, now_s: float) -> None:
        """Messages, from the master or resent by anyone. MalformedError: an update that is not understood."""
        if updates.epoch != self.epoch or updates.epoch < self._replica.store.promised:
            return
        replica = self._replica
        if self._kind is NodeKind.SECOND:
            self._take_filtered(updates.messages)
            return
        if not self._is_taking:
            return
        for message in updates.messages:
            replica.insert(message, now_s)
        if updates.wants_position and updates.messages:
            self._wanted = max(self._wanted, updates.messages[-1].sequence)
        replica.drain(now_s)
        self.installed()

    def installed(self) -> None:
        """Look whether a snapshot has taken the place of the copy."""
        replica = self._replica
        if self.epoch and replica.installs != self._installs:
            self._installs = replica.installs
            self.is_following = replica.history.epoch_of(replica.position.sequence + 1) == self.epoch
            # A copy of a newer epoch than the one known here is no worse for that: its master will be heard.
            self.needs_snapshot = replica.position.epoch < self.epoch and not self.is_following

    @property
    def _is_taking(self) -> bool:
        return self.is_following or self._replica.is_receiving

    def subscribed(self, sender: int, answer: Subscribed, now_s: float) -> None:
        """The stream of a second-kind node brings what follows its position."""
        if self._kind is NodeKind.FIRST or answer.epoch < self._replica.store.promised:
            return
        starts = unpack_starts(answer.history)
        self._enter(sender, answer.epoch, starts, now_s)
        if self._replica.staging is None:
            self.is_following = self._replica.follow(starts)
            self.needs_snapshot = not self.is_following

    def _take_filtered(self, messages: Sequence[Message]) -> None:
        replica = self._replica
        for message in messages:
            if replica.staging is not None:
                if replica.staging.end is not None:
                    replica.stage_filtered(message)
            elif self.is_following:
                replica.take_filtered(message)
        replica.store.flush()

    def _pass_to(self, newest: int) -> None:
        replica = self._replica
        if replica.staging is not None:
            if replica.staging.end is not None:
                replica.stage_pass_to(newest)
                self.installed()
        elif self.is_following:
            replica.pass_to(newest)
            replica.store.flush()

    def refusal(self, refusal: Refusal, now_s: float) -> None:
        if refusal.epoch == self.epoch:
            self._replica.queue.refused(refusal.ranges, now_s)

    def requested(self, node: int, request: Request, now_s: float) -> None:
        """Another agent asks this one as a relay."""
        if self.is_following and request.epoch == self.epoch:
            self._resending.answer(node, self.epoch, request.ranges, False, now_s)

    def suspects(self, now_s: float) -> bool:
        """True if the master has been silent for too long."""
        return self.suspicion is not None and self.suspicion.suspects(now_s)

    # --- promises and positions ---

    def collect(self, sender: int, collect: Collect) -> None:
        """A new master asks for the promise."""
        store = self._replica.store
        if collect.epoch < store.promised:
            return
        if collect.epoch > store.promised:
            self.is_following = False
            self.epoch = 0
            self._replica.stage_drop()
            store.promise(collect.epoch)
        elif self.epoch == collect.epoch:
            return  # its term has begun: it has its majority
        self._promise_to = (sender, collect.epoch)
        store.flush()
        if not store.is_writing:
            self.persisted(store.persisted, store.promised)

    def persisted(self, position: Position, promised: int) -> None:
        """The store has synced this much."""
        if self._promise_to is not None and promised == self._promise_to[1] == self._replica.store.promised:
            sender, epoch = self._promise_to
            self._promise_to = None
            self._outbox.send(sender, Promise(epoch, position))
        if self.is_following and position.sequence >= self._wanted > self._told.sequence:
            self._tell(position)

    def _tell(self, position: Position) -> None:
        if self.master and self.epoch:
            self._told = position
            self._outbox.send(self.master, PositionReport(self.epoch, position))

    # --- time ---

    @property
    def due_at_s(self) -> float:
        if not self.epoch:
            return float("inf")
        if self._kind is NodeKind.SECOND or not self._is_taking:
            return self._position_at_s
        return min(self._position_at_s, self._replica.queue.due_at_s)

    def tick(self, now_s: float) -> None:
        """Ask for what is missing, and say from time to time how far this node is."""
        if not self.epoch:
            return
        if now_s >= self._position_at_s:
            interval_s = max(POSITION_S, len(self._relays()) / POSITIONS_PER_S)
            self._position_at_s = now_s + interval_s * (0.9 + 0.2 * self._random.random())
            self._tell(self._replica.store.persisted)
        if self._kind is NodeKind.FIRST and self._is_taking:
            self._request(now_s)

    def _request(self, now_s: float) -> None:
        queue = self._replica.queue
        for source, ranges in queue.due(now_s):
            node = self.master
            if source is Source.RELAY:
                relays = [relay for relay in self._relays() if relay not in (self._me, self.master)]
                node = self._random.choice(relays) if relays else self.master
            self.requests += 1
            self._outbox.send(node, Request(self.epoch, ranges))
        if queue.taken + 1 < self._floor and queue.next_tries >= GONE_TRIES:
            self.needs_snapshot = True
            self.is_following = False
