"""A master's term: numbering, publishing, resending and the heartbeat, from the first message of an epoch on.

Theory: whoever holds the highest epoch that a majority has promised numbers the updates. Each is taken into the
master's own copy first and leaves at the end of the turn, with all others of that turn, in as few datagrams as hold
them. The buffer of the own copy is the retransmit buffer.

Rules
- Nothing is resent beyond the budget: RESEND_PER_S messages a second in bursts of RESEND_BURST. The rest is refused as
  *not now*, so that a burst of losses is spread over time and over the relays.
- Second-kind nodes get whole updates, in order, each over its own stream: `links`.
- A number of a report is published once in an epoch: lower ones of the same node are old.

Known weakness: every first-kind node gets its own copy of each datagram from the master's network card; there is no
multicast and no tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from metadata.directory.confirmations import Confirmations
from metadata.directory.outbox import Outbox
from metadata.directory.replica import Replica
from metadata.ranges import numbers_of, runs_of
from protocol.directory import (
    UPDATES_ROOM_BYTES,
    Heartbeat,
    Message,
    Position,
    Ranges,
    Reason,
    Refusal,
    Update,
    Updates,
    cut,
)

HEARTBEAT_S = 0.25
HEARTBEAT_NODES_PER_S = 2000  # heartbeats a second at most: beyond 500 nodes they are rarer
TAIL_S = 0.03  # after the last update of a burst: its loss is noticed a round trip later, not a heartbeat later
LOSSY_S = 10.0  # after a request: the network loses datagrams, perhaps that heartbeat too, so others follow soon
RESEND_PER_S = 2000.0
RESEND_BURST = 500.0
MESSAGES_A_FRAME = 255  # the count has one byte


class Budget:
    """So many a second, in bursts of so many."""

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._left, self._at_s = burst, now_s

    def take(self, now_s: float) -> bool:
        """One more, if there is one left."""
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Resending:
    """Answers requests from a buffer: a master's, or a relay's."""

    def __init__(self, replica: Replica, outbox: Outbox, now_s: float) -> None:
        self._replica = replica
        self._outbox = outbox
        self._budget = Budget(RESEND_PER_S, RESEND_BURST, now_s)
        self.resent = 0
        self.refused = 0

    def answer(self, node: int, epoch: int, ranges: Ranges, is_master: bool, now_s: float) -> None:
        """Resend what is here and may be sent now, refuse the rest by name."""
        found: list[Message] = []
        refused: dict[Reason, list[int]] = {}
        buffer = self._replica.buffer
        for sequence in numbers_of(ranges):
            message = buffer.get(sequence)
            if message is None:
                is_gone = is_master and sequence < buffer.floor
                refused.setdefault(Reason.GONE if is_gone else Reason.NOT_HERE, []).append(sequence)
            elif self._budget.take(now_s):
                found.append(message)
            else:
                refused.setdefault(Reason.NOT_NOW, []).append(sequence)
        self.resent += len(found)
        for messages in frames(found):
            self._outbox.send(node, Updates(epoch, False, messages))
        for reason, sequences in refused.items():
            self.refused += len(sequences)
            # At most as many ranges as were asked for in one request, split by the budget once: they fit.
            self._outbox.send(node, Refusal(epoch, reason, buffer.floor, runs_of(sequences)))


def frames(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Messages in their order, as many in each piece as a datagram holds."""
    found: list[tuple[Message, ...]] = []
    piece: list[Message] = []
    room_bytes = UPDATES_ROOM_BYTES
    for message in messages:
        if piece and (message.size_bytes > room_bytes or len(piece) == MESSAGES_A_FRAME):
            found.append(tuple(piece))
            piece, room_bytes = [], UPDATES_ROOM_BYTES
        piece.append(message)
        room_bytes -= message.size_bytes
    if piece:
        found.append(tuple(piece))
    return found


@dataclass
class Link:
    """A second-kind node that gets what is under its prefixes, over its stream."""

    node: int
    prefixes: tuple[str, ...]

    def wants(self, update: Update) -> bool:
        """What it subscribes to, and what it reported itself."""
        return update.key.startswith(self.prefixes) or update.origin == self.node


class Term:
    """One master's work on the messages of one epoch."""

    def __init__(
        self, epoch: int, me: int, replica: Replica, confirmations: Confirmations, outbox: Outbox, now_s: float
    ) -> None:
        self.epoch = epoch
        self.replica = replica
        self.confirmations = confirmations
        self.audience: tuple[int, ...] = ()
        """First-kind nodes, members and joining ones, without this one."""
        self.links: dict[int, Link] = {}
        self.published = 0
        self._me = me
        self._outbox = outbox
        self._resending = Resending(replica, outbox, now_s)
        self._unsent: list[tuple[Update, list[Message]]] = []
        self._numbers: dict[int, int] = {}
        self._heartbeat_at_s = now_s
        self._tail_s = 0.0
        self._lossy_until_s = 0.0
        for entry in replica.map.entries():
            self.saw(entry.update)
        replica.begin_epoch(epoch)

    def saw(self, update: Update) -> None:
        """A report has been taken: it and lower ones of the same node are old from here on."""
        if update.number > self._numbers.get(update.origin, 0):
            self._numbers[update.origin] = update.number

    def is_old(self, update: Update) -> bool:
        """A report that was published already, or overtaken by a newer one of the same node."""
        return update.number <= self._numbers.get(update.origin, 0)

    def publish(self, update: Update) -> int:
        """Number an update and take it into the own copy; `flush` sends it. Its (last) sequence."""
        first = self.replica.position.sequence + 1
        payloads = cut(update.encode())
        messages = [
            Message(self.epoch, first + part, part, len(payloads), payload) for part, payload in enumerate(payloads)
        ]
        self.replica.publish(messages, update)
        self.saw(update)
        self._unsent.append((update, messages))
        self.published += 1
        return messages[-1].sequence

    def flush(self, now_s: float) -> None:
        """Send what was published in this turn, and persist it."""
        unsent, self._unsent = self._unsent, []
        if unsent:
            wants_position = self.confirmations.is_waiting
            for messages in frames([message for _, of_update in unsent for message in of_update]):
                self._send_all(Updates(self.epoch, wants_position, messages))
            for link in self.links.values():
                wanted = [message for update, of_update in unsent if link.wants(update) for message in of_update]
                for messages in frames(wanted):
                    self._outbox.send(link.node, Updates(self.epoch, False, messages))
            self._tail_s = TAIL_S
            self._heartbeat_at_s = min(self._heartbeat_at_s, now_s + TAIL_S)
        self.replica.store.flush()

    def _send_all(self, body: Updates | Heartbeat) -> None:
        if self.audience:
            self._outbox.send_all(self.audience, body)

    def link(self, link: Link, position: Position) -> None:
        """Send a second-kind node what it lacks, then all that follows. Its position is in the buffer's reach."""
        self.links[link.node] = link
        update: list[Message] = []
        wanted: list[Message] = []
        for message in self.replica.buffer.since(position.sequence):
            update.append(message)
            if message.part + 1 == message.parts:
                if link.wants(Update.decode(b"".join(part.payload for part in update))):
                    wanted += update
                update = []
        for messages in frames(wanted):
            self._outbox.send(link.node, Updates(self.epoch, False, messages))
        self._outbox.send(link.node, self.heartbeat())

    def reaches(self, position: Position) -> bool:
        """True if what follows `position` is in the buffer, and it is on this history."""
        is_in_buffer = position.sequence + 1 >= self.replica.buffer.floor
        return self.replica.history.has(position) and is_in_buffer

    # --- heartbeat ---

    @property
    def heartbeat_interval_s(self) -> float:
        return heartbeat_interval_s(len(self.audience))

    @property
    def due_at_s(self) -> float:
        return self._heartbeat_at_s

    def beat(self, now_s: float) -> None:
        """Send the heartbeat if it is time."""
        if now_s >= self._heartbeat_at_s:
            interval_s = self.heartbeat_interval_s
            self._tail_s = 2 * self._tail_s if now_s < self._lossy_until_s else 0.0
            self._heartbeat_at_s = now_s + (self._tail_s if 0.0 < self._tail_s < interval_s else interval_s)
            heartbeat = self.heartbeat()
            self._send_all(heartbeat)
            for node in self.links:
                self._outbox.send(node, heartbeat)
            self.replica.buffer.expire(now_s)

    def beat_soon(self, now_s: float) -> None:
        """Something was confirmed that others wait for."""
        self._heartbeat_at_s = min(self._heartbeat_at_s, now_s + TAIL_S)

    def heartbeat(self) -> Heartbeat:
        replica = self.replica
        return Heartbeat(
            self.epoch,
            replica.position.sequence,
            self.confirmations.confirmed,
            replica.buffer.floor,
            self.confirmations.is_waiting,
            replica.history.starts,
        )

    # --- resending ---

    def requested(self, node: int, ranges: Ranges, now_s: float) -> None:
        self._lossy_until_s = now_s + LOSSY_S
        self._resending.answer(node, self.epoch, ranges, True, now_s)


def heartbeat_interval_s(nodes: int) -> float:
    """How often a master of so many nodes beats."""
    return max(HEARTBEAT_S, nodes / HEARTBEAT_NODES_PER_S)
