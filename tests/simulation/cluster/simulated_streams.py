"""Streams of the simulated Network: what two sockets and the kernels under them do.

Theory: each end has a queue of bytes that the window does not take yet, a wire (bytes on their way, in order) and a
buffer of bytes that have arrived and were not read. The wire keeps the order whatever happens to it: loss and
partitions are delays, until the connection breaks.

     send ─► unsent ─(window)─► wire ─(path)─► arrived ─(received)─► the peer's receiver

Rules of this file
- Bytes come in pieces that have nothing to do with those that were sent, at most `buffer()` of them at a time.
- A process that is killed leaves its peers a reset; a machine without power leaves them nothing: they learn of it when
  they send to the machine after it is up again, or after SILENCE_LIMIT_S.
- `lost` is called from an event, never from inside `send`; after `close` or `abort` nothing is called any more.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from metadata.seams import Buffer, Receiver
from tests.simulation.cluster.paths import SILENCE_LIMIT_S, Path
from tests.simulation.cluster.scheduler import Life

if TYPE_CHECKING:
    from tests.simulation.cluster.simulated_network import Wires

WINDOW_BYTES = 256 << 10
PIECE_BYTES = 64 << 10
LINGER_S = 10.0
RETRANSMISSION_S = 0.2  # at least

_END = b""  # on the wire: the sender has closed
_RESET = None  # on the wire: the sender is not there any more


class SimulatedConnection:
    """One end of a stream."""

    def __init__(self, wires: "Wires", life: Life, peer_name: str, path: Path) -> None:
        self.peer_name = peer_name
        self.spins = True
        self.other: SimulatedConnection
        self.life = life
        self._wires = wires
        self._scheduler = wires.scheduler
        self._path = path
        self._receiver: Receiver | None = None
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._wire: deque[tuple[float, bytes | None]] = deque()
        self._wire_end_s = 0.0
        self._in_flight_bytes = 0  # sent, and not read by the other end
        self._arrived: deque[bytes] = deque()
        self._has_ended = False  # the other end has closed, after what arrived
        self._is_delivering = False
        self._reading = True
        self._closing = False
        self._closed = False
        self._lost_reason = ""  # before there was a receiver to tell

    # --- the seam ---

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def send(self, buffers: Sequence[Buffer]) -> None:
        if self._closed or self._closing:
            return
        data = b"".join(buffers)
        if data:
            self._unsent.append(data)
            self._unsent_bytes += len(data)
            self._transmit()

    def at_round_end(self, callback: Callable[[], None]) -> None:
        callback()  # data is delivered to one connection at a time

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._deliver_soon()

    def has_hung_up(self) -> bool:
        return self._has_ended and not self._reading

    def close(self) -> None:
        if self._closed or self._closing:
            return
        self._receiver = None
        if not self._unsent:
            self.abort()
            return
        self._closing = True
        self._scheduler.at(self._scheduler.now_s + LINGER_S, self.life, self.abort)

    def abort(self) -> None:
        if self._closed:
            return
        unread = bool(self._arrived)
        self._end()
        self._put_on_wire(_RESET if unread else _END)

    def redirect(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def detach(self) -> None:
        """A simulated socket cannot be given to another process."""
        return

    # --- for the network ---

    def start(self, receiver: Receiver) -> None:
        """Begin to deliver what arrives."""
        if self._lost_reason:
            self._scheduler.at(self._scheduler.now_s, self.life, receiver.lost, self._lost_reason)
            return
        self._receiver = receiver
        self._deliver_soon()

    def life_ended(self, power: bool) -> None:
        """Its process was killed, or its machine has no power."""
        self._end()
        if power:
            self._wire.clear()
            self._scheduler.after(SILENCE_LIMIT_S, self.other.lose, "Connection timed out")
        else:
            self._put_on_wire(_RESET)

    def lose(self, reason: str) -> None:
        """The connection is gone, from outside; the receiver is told when its process can hear it."""
        if not self._closed:
            self._scheduler.at(self._scheduler.now_s, self.life, self._lose, reason)

    # --- sending ---

    def _transmit(self) -> None:
        unsent = self._unsent
        while unsent and self._in_flight_bytes < WINDOW_BYTES:
            data = unsent[0]
            room = min(WINDOW_BYTES - self._in_flight_bytes, PIECE_BYTES, self._wires.piece_bytes(len(data)))
            if len(data) <= room:
                unsent.popleft()
                piece = data
            else:
                piece, unsent[0] = data[:room], data[room:]
            self._unsent_bytes -= len(piece)
            self._in_flight_bytes += len(piece)
            self._put_on_wire(piece)
        if unsent or not self._closing:
            return
        self._end()
        self._put_on_wire(_END)

    def _acknowledged(self) -> None:
        """There is room in the window again."""
        if self._closed or not self._unsent:
            return
        self._transmit()
        if not self._unsent and self._receiver is not None:
            self._receiver.drained()

    def _put_on_wire(self, item: bytes | None) -> None:
        scheduler, wire = self._scheduler, self._wire
        delay_s = self._path.delay_s()
        if item:
            delay_s += self._wires.retransmission_s()
            fault = self._wires.stream_fault()
            if fault == "stream reset":
                self.lose("Connection reset by peer")
                item = _RESET
            elif fault == "stream corruption":
                item = self._wires.damaged(item)
        self._wire_end_s = max(self._wire_end_s, scheduler.now_s + delay_s)
        wire.append((self._wire_end_s, item))
        if len(wire) == 1:
            scheduler.at(self._wire_end_s, None, self._arrive)

    def _arrive(self) -> None:
        """The first of the wire has come to the other end, and what follows it at once."""
        scheduler, wire = self._scheduler, self._wire
        if not wire:
            return
        if self._path.blocks:
            wait_s = RETRANSMISSION_S * (1.0 + 7.0 * scheduler.random.random())
            scheduler.after(wait_s, self._arrive)
            return
        while wire and wire[0][0] <= scheduler.now_s:
            self.other._take(wire.popleft()[1])
        if wire:
            scheduler.at(wire[0][0], None, self._arrive)

    # --- receiving ---

    def _take(self, item: bytes | None) -> None:
        if self._closed:
            # There is nobody for it. A kernel that is up says so; a machine without power says nothing.
            if item and self._wires.is_powered(self.life):
                self._wires.scheduler.after(self._path.delay_s(), self.other.lose, "Connection reset by peer")
            return
        if item is None:
            self._arrived.clear()
            self.lose("Connection reset by peer")
            return
        if item:
            self._arrived.append(item)
        else:
            self._has_ended = True
        self._deliver_soon()

    def _deliver_soon(self) -> None:
        if self._is_delivering or not self._reading or self._receiver is None:
            return
        if self._arrived or self._has_ended:
            self._is_delivering = True
            self._scheduler.at(self._scheduler.now_s + self._wires.wake_s(), self.life, self._deliver)

    def _deliver(self) -> None:
        self._is_delivering = False
        receiver = self._receiver
        if receiver is None or not self._reading:
            return
        if not self._arrived:
            if self._has_ended:
                self._lose("the client closed the connection")
            return
        arrived = b"".join(self._arrived)
        self._arrived.clear()
        room = receiver.buffer()
        size_bytes = min(len(room), len(arrived))
        room[:size_bytes] = arrived[:size_bytes]
        if size_bytes < len(arrived):
            self._arrived.append(arrived[size_bytes:])
        other = self.other
        other._in_flight_bytes -= size_bytes
        if other._unsent:
            self._scheduler.at(self._scheduler.now_s + self._path.delay_s(), other.life, other._acknowledged)
        self._wires.delivered(arrived[:size_bytes])
        receiver.received(size_bytes)
        self._deliver_soon()

    # --- the end ---

    def _end(self) -> None:
        self._closed = True
        self._closing = False
        self._receiver = None
        self._unsent.clear()
        self._unsent_bytes = 0
        self._arrived.clear()
        self._wires.forget(self)

    def _lose(self, reason: str) -> None:
        if self._closed:
            return
        receiver, is_closing = self._receiver, self._closing
        self._end()
        if receiver is not None:
            receiver.lost(reason)
        elif not is_closing:
            self._lost_reason = reason
