"""Sending a snapshot of the own copy to a node that joins: the delegate's side.

Theory: the live map is read in the order of its keys, a frame at a time, as fast as the other side takes it. Nothing is
copied or frozen: what changes meanwhile reaches the joiner as messages, because the master has been asked first to hold
them from here on. So a snapshot costs the delegate what it sends, and the master nothing.

Rules
- Nothing is sent before the master holds the messages, except to a new master that collects: nobody publishes then.
- A snapshot belongs to one epoch: when that ends, so does the stream.
- SNAPSHOTS_LIMIT at once; a frame has about FRAME_BYTES, and the next one follows when the last has left.
"""

from collections.abc import Callable
from dataclasses import dataclass

from metadata.directory.outbox import Outbox
from metadata.directory.replica import Replica
from metadata.directory.streams import FrameStream
from protocol.directory import NOWHERE, Position, Reason
from protocol.directory_control import (
    Entry,
    Held,
    Hold,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotEntries,
    SnapshotRefused,
    SnapshotRequest,
    pack_starts,
)

SNAPSHOTS_LIMIT = 4
FRAME_BYTES = 64 << 10
ENTRIES_A_LOOK = 256
HOLD_RETRY_S = 0.2
HOLD_TRIES = 10


@dataclass
class _Sending:
    stream: FrameStream
    request: SnapshotRequest
    held: Position
    """What the master is asked to hold."""
    after: str
    tries: int
    due_at_s: float
    has_begun: bool = False


class Delegate:
    """The snapshots that this node sends."""

    def __init__(self, replica: Replica, outbox: Outbox, master: Callable[[], tuple[int, int]]) -> None:
        """`master()`: (id, epoch) of the master that this node follows or is; epoch 0 for none."""
        self._replica = replica
        self._outbox = outbox
        self._master = master
        self._sending: dict[FrameStream, _Sending] = {}
        self.bytes_sent = 0

    def requested(self, stream: FrameStream, request: SnapshotRequest, now_s: float) -> None:
        """Somebody wants a snapshot over this stream."""
        replica = self._replica
        _, epoch = self._master()
        is_collecting = request.attempt == 0 and replica.store.promised == request.epoch > epoch
        if replica.staging is not None or replica.position == NOWHERE:
            stream.send(SnapshotRefused(request.attempt, Reason.NOT_HERE))
        elif not is_collecting and (request.epoch != epoch or request.attempt == 0):
            stream.send(SnapshotRefused(request.attempt, Reason.OTHER_EPOCH))
        elif len(self._sending) >= SNAPSHOTS_LIMIT and stream not in self._sending:
            stream.send(SnapshotRefused(request.attempt, Reason.NOT_NOW))
        else:
            goes_on = replica.history.has(request.held_from) and request.held_from <= replica.position
            held, after = (request.held_from, request.after) if goes_on else (replica.position, "")
            sending = self._sending[stream] = _Sending(stream, request, held, after, 0, now_s)
            if is_collecting:
                self._begin(sending)
            else:
                self._ask(sending, now_s)

    def _ask(self, sending: _Sending, now_s: float) -> None:
        sending.tries += 1
        sending.due_at_s = now_s + HOLD_RETRY_S
        master, epoch = self._master()
        if sending.tries > HOLD_TRIES or epoch != sending.request.epoch:
            self._refuse(sending, Reason.NOT_NOW)
            return
        self._outbox.send(master, Hold(sending.request.attempt, sending.stream.peer, epoch, sending.held))

    def held(self, answer: Held) -> None:
        """The master's answer."""
        for sending in list(self._sending.values()):
            if sending.request.attempt != answer.attempt or sending.has_begun:
                continue
            if answer.is_held and answer.epoch == sending.request.epoch:
                self._begin(sending)
            elif sending.held != self._replica.position:
                # What it went on from is gone: from the beginning.
                sending.held, sending.after = self._replica.position, ""
            else:
                self._refuse(sending, Reason.HOLD_BROKEN)

    def _begin(self, sending: _Sending) -> None:
        replica, request = self._replica, sending.request
        sending.has_begun = True
        sending.stream.send(
            SnapshotBegin(request.attempt, request.epoch, sending.held, pack_starts(replica.history.starts))
        )
        sending.stream.on_drained = lambda: self._go_on(sending)
        self._go_on(sending)

    def _go_on(self, sending: _Sending) -> None:
        """Send until something waits for the other side."""
        stream, request = sending.stream, sending.request
        while stream in self._sending and not stream.unsent_bytes:
            entries, is_last = self._next(sending)
            if entries:
                body = SnapshotEntries(request.attempt, tuple(entries)).encode()
                self.bytes_sent += len(body)
                stream.send_encoded(SnapshotEntries.kind, body)
            if is_last:
                stream.send(SnapshotEnd(request.attempt, request.epoch, self._replica.position))
                self.ended(stream)

    def _next(self, sending: _Sending) -> tuple[list[Entry], bool]:
        """The next entries that the joiner wants; True with the last ones."""
        prefixes = sending.request.prefixes
        wanted: list[Entry] = []
        size_bytes = 0
        while size_bytes < FRAME_BYTES:
            entries = self._replica.map.after(sending.after, ENTRIES_A_LOOK)
            if not entries:
                return wanted, True
            for entry in entries:
                sending.after = entry.update.key
                if not prefixes or entry.update.key.startswith(prefixes):
                    wanted.append(entry)
                    size_bytes += len(entry.update.key) + len(entry.update.value) + 64
                    if size_bytes >= FRAME_BYTES:
                        break
        return wanted, False

    def _refuse(self, sending: _Sending, reason: Reason) -> None:
        self.ended(sending.stream)
        sending.stream.send(SnapshotRefused(sending.request.attempt, reason))

    def ended(self, stream: FrameStream) -> None:
        """The stream is gone, or has all it asked for."""
        if self._sending.pop(stream, None) is not None:
            stream.on_drained = None

    def epoch_changed(self) -> None:
        """Another master: what was being sent is of no use."""
        for sending in list(self._sending.values()):
            self._refuse(sending, Reason.OTHER_EPOCH)

    # --- time ---

    @property
    def due_at_s(self) -> float:
        if not self._sending:
            return float("inf")
        return min((one.due_at_s for one in self._sending.values() if not one.has_begun), default=float("inf"))

    def tick(self, now_s: float) -> None:
        """Ask again for what the master has not answered."""
        for sending in list(self._sending.values()):
            if not sending.has_begun and sending.due_at_s <= now_s:
                self._ask(sending, now_s)
