"""The real Network: TCP and unix sockets, read and written without asyncio's transports.

Theory: all sockets sit in one epoll instance of our own, and only that instance's descriptor is known to the asyncio
loop. One wake of the loop so serves every ready connection, and *spins*: after a batch it asks the epoll again,
without sleeping, for up to `SPIN_S`. The next request of a client that waits for its reply arrives within that time,
and is then not paid for with a sleep and a wake-up of the process, which cost more than the request itself.

Rules
- Each ready connection gets one `received` a round; nobody is served twice while another one waits.
- The loop gets its turn after the round in which a callback became ready to run there (a completion of another
  thread, say), and after `WAKE_S` at the latest, however busy the sockets are: its timers do not show.
- It spins only while that pays: `Spinning` decides.
- `lost` is called from the loop, never from inside `send`; after `close` or `abort` nothing is called any more.
- A receiver that raises loses its own connection, nobody else's.

Known weakness: to see that callbacks are ready it looks at the asyncio loop's own queue, which has no public name; on
a loop without it they wait for up to `WAKE_S`.
"""

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Any

from metadata.seams import Buffer, Connection, Receiver
from nbdserver.host.spinning import SPIN_S, Spinning

WAKE_S = 400e-6  # the longest stay outside the loop; entering it costs some 10 µs
EVENTS_A_ROUND = 64
BUFFERS_A_SEND = 1024  # IOV_MAX
ACCEPTS_A_ROUND = 16
LISTEN_BACKLOG = 128
MORE_BYTES = 96 << 10  # received at once: there is probably more
SEND_BUFFER_BYTES = 2 << 20  # of the kernel's, a connection: a batch of replies leaves with one call
ACCEPT_PAUSE_S = 0.1  # when descriptors have run out
LINGER_S = 10.0  # how long a closed connection may still take its last bytes
UNIX_PATH_LIMIT_BYTES = 107

KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 3
UNACKNOWLEDGED_LIMIT_MS = 60_000  # a peer that acknowledges nothing for so long is gone

_SO_SNDBUFFORCE = 32  # not named in Python's socket module
_READABLE = select.EPOLLIN
_WRITABLE = select.EPOLLOUT

_log = logging.getLogger(__name__)


class SocketNetwork:
    """Connections over the host's sockets, on a running asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._spinning = Spinning()
        self._loop_callbacks: Collection[object] = getattr(loop, "_ready", ())
        loop.add_reader(self._epoll.fileno(), self._wake)

    def listen(self, address: str, accept: Callable[[Connection], Receiver | None]) -> Callable[[], None]:
        """As the seam says; ValueError for an address of another form and for a unix path that is too long."""
        listeners = [_Listener(self, listening, accept) for listening in _listening_sockets(address)]

        def stop() -> None:
            for listener in listeners:
                listener.close()

        return stop

    def close(self) -> None:
        """Leave the loop. Connections must have been closed."""
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    # --- for connections and listeners ---

    def register(self, descriptor: int, mask: int, ready: Callable[[int], None]) -> None:
        """Call `ready(mask)` when one of the events in `mask` is there."""
        self._handlers[descriptor] = ready
        self._epoll.register(descriptor, mask)

    def modify(self, descriptor: int, mask: int) -> None:
        """Change the events that are waited for."""
        self._epoll.modify(descriptor, mask)

    def unregister(self, descriptor: int) -> None:
        """Stop waiting for events."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    # --- the wake ---

    def _wake(self) -> None:
        """Serve what is ready, round by round, and spin for what is about to come."""
        poll, handlers, callbacks, spinning = self._epoll.poll, self._handlers, self._loop_callbacks, self._spinning
        now_s = monotonic()
        spinning.woken(now_s)
        stop_s = now_s + WAKE_S
        events = poll(0, EVENTS_A_ROUND)
        while events:
            for descriptor, mask in events:
                ready = handlers.get(descriptor)
                if ready is not None:
                    ready(mask)
            now_s = monotonic()
            spinning.batch_ended(now_s)
            if now_s >= stop_s or callbacks:
                break
            events = poll(0, EVENTS_A_ROUND)
            if not events and spinning.wanted:
                spin_until_s = now_s + SPIN_S
                while not (events or callbacks) and now_s < spin_until_s:
                    events = poll(0, EVENTS_A_ROUND)
                    now_s = monotonic()
                if not callbacks:
                    spinning.spun(now_s, bool(events))


class _Listener:
    """A listening socket."""

    def __init__(
        self,
        network: SocketNetwork,
        listening: socket.socket,
        accept: Callable[[Connection], Receiver | None],
    ) -> None:
        self._network = network
        self._socket = listening
        self._accept = accept
        self._closed = False
        self._path = listening.getsockname() if listening.family == socket.AF_UNIX else None
        network.register(listening.fileno(), _READABLE, self._ready)

    def close(self) -> None:
        """Stop listening; the file of a unix socket goes."""
        if self._closed:
            return
        self._closed = True
        if self._socket.fileno() in self._network._handlers:
            self._network.unregister(self._socket.fileno())
        self._socket.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _ready(self, _mask: int) -> None:
        for _ in range(ACCEPTS_A_ROUND):
            try:
                accepted, address = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptor or memory is left: the ones waiting are served when some are free again.
                _log.warning("cannot accept connections for a moment: %s", error)
                self._network.unregister(self._socket.fileno())
                self._network.loop.call_later(ACCEPT_PAUSE_S, self._accept_again)
                return
            try:
                connection = SocketConnection(self._network, accepted, address)
                receiver = self._accept(connection)
            except OSError as error:
                _log.info("a client was gone before it was served: %s", error)
                accepted.close()
                continue
            if receiver is None:
                connection.abort()
            else:
                connection.start(receiver)

    def _accept_again(self) -> None:
        if not self._closed:
            self._network.register(self._socket.fileno(), _READABLE, self._ready)


class SocketConnection:
    """A connected, non-blocking stream socket."""

    def __init__(self, network: SocketNetwork, connected: socket.socket, address: Any) -> None:
        connected.setblocking(False)
        _enlarge_send_buffer(connected)
        self.peer_name = _peer_name(connected, address)
        if connected.family != socket.AF_UNIX:
            _tune_tcp(connected)
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
        try:
            sent_bytes = self._send_message(buffers if len(buffers) <= BUFFERS_A_SEND else buffers[:BUFFERS_A_SEND])
        except BlockingIOError:
            sent_bytes = 0
        except OSError as error:
            self._break(error)
            return
        if sent_bytes != sum(map(len, buffers)):
            self._enqueue(buffers, sent_bytes)
            self._watch()

    def pause_reading(self) -> None:
        self._reading = False
        self._watch()

    def resume_reading(self) -> None:
        self._reading = True
        self._watch()

    def close(self) -> None:
        if self._closed or self._closing:
            return
        self._receiver = None
        if not self._queue:
            self.abort()
            return
        self._closing = True
        self._reading = False
        self._watch()
        self._linger = self._network.loop.call_later(LINGER_S, self.abort)

    def abort(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._receiver = None
        if self._linger is not None:
            self._linger.cancel()
        self._queue.clear()
        self._unsent_bytes = 0
        if self._registered_mask:
            self._network.unregister(self._descriptor)
        self._socket.close()

    # --- events ---

    def _ready(self, mask: int) -> None:
        try:
            if mask & _WRITABLE and self._queue:
                self._send_queued()
            if mask & ~_WRITABLE:
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
        queue = self._queue
        while queue:
            buffers = [queue[index] for index in range(min(len(queue), BUFFERS_A_SEND))]
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
            self._queue.append(memoryview(buffer)[skip_bytes:])
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
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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


def _listening_sockets(address: str) -> list[socket.socket]:
    """The sockets of an address: one of a unix path, one of each address that a host name stands for."""
    if address.startswith("unix:"):
        return [_listen_at_path(address.removeprefix("unix:"))]
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r} is no address to listen at: give HOST:PORT, [V6]:PORT or unix:PATH")
    found = socket.getaddrinfo(
        host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
    )
    listening: list[socket.socket] = []
    try:
        for family, kind, protocol, _, target in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            listening.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setblocking(False)
            one.bind(target)
            one.listen(LISTEN_BACKLOG)
    except OSError:
        for one in listening:
            one.close()
        raise
    return listening


def _listen_at_path(path: str) -> socket.socket:
    """Listen at a unix path; a socket file at which nobody listens any more is replaced."""
    if len(os.fsencode(path)) > UNIX_PATH_LIMIT_BYTES:
        raise ValueError(
            f"the socket path {path} has {len(os.fsencode(path))} bytes; the system's limit is"
            f" {UNIX_PATH_LIMIT_BYTES}: choose a shorter one"
        )
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        try:
            listening.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_abandoned(path):
                raise
            os.unlink(path)
            listening.bind(path)
        listening.listen(LISTEN_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _is_abandoned(path: str) -> bool:
    """Whether the file is a socket at which nobody listens (connecting to any other file is refused too)."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
