"""The stream of a link: made, and made again when it is lost.

     connecting ─► opening ─► open ─► lost, or not answered in time ─► connecting

Rules
- There is one stream at a time; what an earlier one brings is not told any more.
- An address that is not known yet is asked for again.
- Whoever has the stream says when it is open (`is_open`); until then it has OPEN_TIMEOUT_S.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from metadata.seams import Clock, Connection, Network, Timer
from nbdserver.replication.peer_stream import PeerStream
from protocol.peer import Frame

RECONNECT_S = 0.2
OPEN_TIMEOUT_S = 2.0


class StreamEvents(Protocol):
    """Whose stream it is."""

    def connected(self, stream: PeerStream) -> None:
        """There is one: open it."""

    def received(self, stream: PeerStream, frame: Frame) -> None: ...

    def lost(self, reason: str) -> None:
        """There is none any more, or could not be one. `again`, if one is wanted."""


class Dialling:
    """One link's. `address()` is "" while it is not known."""

    def __init__(self, clock: Clock, network: Network, address: Callable[[], str], events: StreamEvents) -> None:
        self.stream: PeerStream | None = None
        self._clock = clock
        self._network = network
        self._address = address
        self._events = events
        self._give_up: Callable[[], None] | None = None
        self._timer: Timer | None = None

    def begin(self) -> None:
        """Make a stream."""
        self._timer = None
        address = self._address()
        if address:
            self._give_up = self._network.connect(address, self._connected, self._failed, OPEN_TIMEOUT_S)
        else:
            self._failed("it is not known where it listens")

    def again(self) -> None:
        """Make one in a moment."""
        self._cancel_timer()
        self._timer = self._clock.call_later(RECONNECT_S, self.begin)

    def is_open(self) -> None:
        """It has been answered."""
        self._cancel_timer()

    def forget(self) -> None:
        """End the stream, and do not make another; idempotent."""
        self._cancel_timer()
        stream, self.stream = self.stream, None
        if self._give_up is not None:
            self._give_up()
            self._give_up = None
        if stream is not None:
            stream.close()

    def _connected(self, connection: Connection) -> PeerStream:
        self._give_up = None
        stream = self.stream = PeerStream(connection, self._received, self._lost)
        self._timer = self._clock.call_later(OPEN_TIMEOUT_S, partial(self._timed_out, stream))
        self._events.connected(stream)
        return stream

    def _failed(self, reason: str) -> None:
        self._give_up = None
        self._events.lost(reason)

    def _received(self, stream: PeerStream, frame: Frame) -> None:
        if stream is self.stream:
            self._events.received(stream, frame)

    def _lost(self, stream: PeerStream, reason: str) -> None:
        if stream is self.stream:
            self._events.lost(reason)

    def _timed_out(self, stream: PeerStream) -> None:
        self._timer = None
        if stream is self.stream:
            self._events.lost(f"it has not answered for {OPEN_TIMEOUT_S:g} s")

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
