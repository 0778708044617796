"""One connection of the real Network: a connected, non-blocking stream socket.

Theory: what is sent leaves with the call that sends it. What the kernel does not take then is queued, as is what takes
more than AT_ONCE_BYTES, and leaves when the socket can be written to again; nothing else is sent before it. The
network serves it when something has arrived or can leave (network.py).

Rules
- `lost` is called from the loop, never from inside `send`; after `close` or `abort` nothing is called any more.
- Who is paused by another one in the same round is not read, although it had been found readable before.
- A receiver that raises loses its own connection, nobody else's.
- A connection that is closed while something is queued takes its last bytes for LINGER_S at most.
- `detach` gives the socket away as it is.
"""

import asyncio
import logging
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from metadata.seams import Buffer, Receiver
from nbdserver.host.addresses import address_name
from nbdserver.host.listening import socket_cookie

if TYPE_CHECKING:
    from nbdserver.host.network import SocketNetwork

BUFFERS_A_SEND = 1024  # IOV_MAX
MORE_BYTES = 96 << 10  # received at once: there is probably more
AT_ONCE_BYTES = 8 << 20  # given to the kernel by one call of `send`; what is more is queued
QUEUED_AT_ONCE_BYTES = 1 << 20  # of what is queued, before others are served: a fast peer takes all that it can get
SEND_BUFFER_BYTES = 2 << 20  # of the kernel's, a connection: a batch of replies leaves with one call
LINGER_S = 10.0  # how long a closed connection may still take its last bytes

KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 3
UNACKNOWLEDGED_LIMIT_MS = 60_000  # a peer that acknowledges nothing for so long is gone

_SO_SNDBUFFORCE = 32  # not named in Python's socket module
_READABLE = select.EPOLLIN
_WRITABLE = select.EPOLLOUT

_log = logging.getLogger(__name__)


class SocketConnection:
    """As the seam says; begins with `start`."""

    def __init__(self, network: "SocketNetwork", connected: socket.socket, address: Any) -> None:
        connected.setblocking(False)
        _enlarge_send_buffer(connected)
        self.peer_name = _peer_name(connected, address)
        if connected.family != socket.AF_UNIX:
            _tune_tcp(connected)
        self.spins = True
        self._network = network
        self._socket = connected
        self._descriptor = connected.fileno()
        self._receive_into = connected.recv_into
        self._send_message = connected.sendmsg
        self._receiver: Receiver | None = None
        self._queue: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._reading = True
        self._registered_mask = 0
        self._closing = False
        self._closed = False
        self._linger: asyncio.TimerHandle | None = None

    def start(self, receiver: Receiver) -> None:
        """Begin to deliver what arrives."""
        self._receiver = receiver
        self._watch()

    # --- the seam ---

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def send(self, buffers: Sequence[Buffer]) -> None:
        if self._closed or self._closing:
            return
        if self._queue:
            self._enqueue(buffers, 0)
            return
        size_bytes = sum(map(len, buffers))
        if size_bytes > AT_ONCE_BYTES:
            self._enqueue(buffers, 0)
            self._watch()
            return
        try:
            sent_bytes = self._send_message(buffers if len(buffers) <= BUFFERS_A_SEND else buffers[:BUFFERS_A_SEND])
        except BlockingIOError:
            sent_bytes = 0
        except OSError as error:
            self._break(error)
            return
        if sent_bytes != size_bytes:
            self._enqueue(buffers, sent_bytes)
            self._watch()
        elif self.spins:
            network = self._network
            network.has_replied = True
            if not network.is_serving:
                network.replied_later()

    def at_round_end(self, callback: Callable[[], None]) -> None:
        round_end = self._network.round_end
        if round_end is None:
            callback()
        else:
            round_end.append(callback)

    def pause_reading(self) -> None:
        self._reading = False
        self._watch()

    def resume_reading(self) -> None:
        self._reading = True
        self._watch()

    def has_hung_up(self) -> bool:
        if self._closed or self._reading:
            return False
        looking = select.poll()
        looking.register(self._descriptor, select.POLLRDHUP)
        return bool(looking.poll(0))

    def close(self) -> None:
        if self._closed or self._closing:
            return
        self._receiver = None
        if not self._queue:
            self.abort()
            return
        self._closing = True
        self._reading = False
        self._network.leaving.add(self)
        self._watch()
        self._linger = self._network.loop.call_later(LINGER_S, self.abort)

    def abort(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._receiver = None
        self._network.leaving.discard(self)
        if self._linger is not None:
            self._linger.cancel()
        self._queue.clear()
        self._unsent_bytes = 0
        if self._registered_mask:
            self._network.unregister(self._descriptor)
        self._socket.close()

    def redirect(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def detach(self) -> tuple[int, int, bytes] | None:
        if self._closed or self._closing:
            return None
        self._closed = True
        self._receiver = None
        if self._registered_mask:
            self._network.unregister(self._descriptor)
        unsent = b"".join(self._queue)
        self._queue.clear()
        self._unsent_bytes = 0
        cookie = socket_cookie(self._socket)
        return self._socket.detach(), cookie, unsent

    # --- events ---

    def _ready(self, mask: int) -> None:
        try:
            if mask & _WRITABLE and self._queue:
                self._send_queued()
            if mask & ~_WRITABLE and (self._reading or mask & ~(_READABLE | _WRITABLE)):
                self._receive()
        except Exception:
            _log.exception("the session of %s failed; its connection is closed", self.peer_name)
            self._lose("an internal error of the server")

    def _receive(self) -> None:
        receiver = self._receiver
        if receiver is None or not self._reading:
            if not self._closed:
                self._lose("the connection broke")
            return
        try:
            room = receiver.buffer()
            size_bytes = self._receive_into(room)
            if size_bytes >= MORE_BYTES and len(room) > size_bytes:
                size_bytes += self._receive_more(room[size_bytes:])
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error.strerror or str(error))
            return
        if size_bytes:
            receiver.received(size_bytes)
        else:
            self._lose("the client closed the connection")

    def _receive_more(self, room: memoryview) -> int:
        """What the peer sent while the first part was taken, so that a stream of big requests comes in batches."""
        try:
            return self._receive_into(room)
        except BlockingIOError:
            return 0

    def _send_queued(self) -> None:
        queue, given_bytes = self._queue, 0
        while queue:
            buffers: list[memoryview] = []
            for view in islice(queue, BUFFERS_A_SEND):
                buffers.append(view)
                given_bytes += len(view)
                if given_bytes >= QUEUED_AT_ONCE_BYTES:
                    break  # what one view has beyond that goes along
            try:
                sent_bytes = self._send_message(buffers)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(error.strerror or str(error))
                return
            self._unsent_bytes -= sent_bytes
            while sent_bytes:
                first = queue[0]
                if sent_bytes >= len(first):
                    sent_bytes -= len(first)
                    queue.popleft()
                else:
                    queue[0] = first[sent_bytes:]
                    sent_bytes = 0
            if given_bytes >= QUEUED_AT_ONCE_BYTES and queue:
                return  # the socket can still be written to: the loop comes back
        if self._closing:
            self.abort()
            return
        self._watch()
        if self._receiver is not None:
            self._receiver.drained()

    def _enqueue(self, buffers: Sequence[Buffer], skip_bytes: int) -> None:
        for buffer in buffers:
            size_bytes = len(buffer)
            if skip_bytes >= size_bytes:
                skip_bytes -= size_bytes
                continue
            view = memoryview(buffer)[skip_bytes:]
            # What can be written to is memory that its sender uses again.
            self._queue.append(view if view.readonly else memoryview(bytes(view)))
            self._unsent_bytes += size_bytes - skip_bytes
            skip_bytes = 0

    def _watch(self) -> None:
        """Register for the events that are wanted now; for none, leave: epoll reports a hang-up unasked."""
        if self._closed or (self._receiver is None and not self._closing):
            return
        mask = (_READABLE if self._reading else 0) | (_WRITABLE if self._queue else 0)
        if mask == self._registered_mask:
            return
        if not mask:
            self._network.unregister(self._descriptor)
        elif self._registered_mask:
            self._network.modify(self._descriptor, mask)
        else:
            self._network.register(self._descriptor, mask, self._ready)
        self._registered_mask = mask

    def _break(self, error: OSError) -> None:
        """Sending failed: tell the receiver, but not from inside its own call."""
        self._queue.clear()
        self._unsent_bytes = 0
        self._network.loop.call_soon(self._lose, error.strerror or str(error))

    def _lose(self, reason: str) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            receiver.lost(reason)


def _peer_name(connected: socket.socket, address: Any) -> str:
    if connected.family == socket.AF_UNIX:
        credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        process_id, user_id, _ = memoryview(credentials).cast("i").tolist()
        return f"unix:pid={process_id},uid={user_id}"
    return address_name(address)


def _enlarge_send_buffer(connected: socket.socket) -> None:
    """Beyond net.core.wmem_max if that is allowed; a smaller buffer only costs more calls."""
    try:
        connected.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    except OSError:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def _tune_tcp(connected: socket.socket) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_LIMIT_MS)
