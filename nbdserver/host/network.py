"""The real Network: TCP, UDP and unix sockets, read and written without asyncio's transports.

Theory: all sockets sit in one epoll instance of our own, and only that instance's descriptor is known to the asyncio
loop. One wake of the loop so serves every ready connection, and *spins*: after a batch it asks the epoll again,
without sleeping, for up to `SPIN_S`. The next request of a client that waits for its reply arrives within that time,
and is then not paid for with a sleep and a wake-up of the process, which cost more than the request itself.

Rules
- Each ready connection gets one `received` a round; nobody is served twice while another one waits.
- The loop gets its turn after the round in which a callback became ready to run there (a completion of another
  thread, say), and after `WAKE_S` at the latest, however busy the sockets are: its timers do not show.
- It spins only while that pays: `Spinning` decides; and only after a reply to a connection that `spins`: who waits
  for another node leaves the processor to it. Nor does it while threads have work: they need the interpreter to
  begin it and to hand it over, and the client that waits for them sends nothing.
- `lost` is called from the loop, never from inside `send`; after `close` or `abort` nothing is called any more.
- A receiver that raises loses its own connection, nobody else's. What it wants at the end of the round must not raise.
- Sockets that another process opened are taken as they are: `inherit` says at which address a listening one is used
  instead of a new one, `adopt` makes a connection of a connected one; `detach` gives one away.

Known weakness: to see that callbacks are ready it looks at the asyncio loop's own queue, which has no public name; on
a loop without it they wait for up to `WAKE_S`.
"""

import asyncio
import logging
import select
import socket
from collections import deque
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Any

from metadata.seams import CONNECT_TIMEOUT_S, Buffer, Connection, Receiver
from nbdserver.host.addresses import address_name
from nbdserver.host.completions import Completions
from nbdserver.host.connecting import Connecting
from nbdserver.host.datagrams import SocketDatagrams
from nbdserver.host.listening import close_listening, listening_sockets, socket_cookie
from nbdserver.host.spinning import SPIN_S, Spinning

WAKE_S = 400e-6  # the longest stay outside the loop; entering it costs some 10 µs
EVENTS_A_ROUND = 64
BUFFERS_A_SEND = 1024  # IOV_MAX
ACCEPTS_A_ROUND = 16
MORE_BYTES = 96 << 10  # received at once: there is probably more
SEND_BUFFER_BYTES = 2 << 20  # of the kernel's, a connection: a batch of replies leaves with one call
ACCEPT_PAUSE_S = 0.1  # when descriptors have run out
LINGER_S = 10.0  # how long a closed connection may still take its last bytes

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

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: Completions | None = None) -> None:
        """`threads`: those that it does not spin beside, and that are told when one connection alone is served."""
        self.loop = loop
        self._threads = threads or Completions(loop)
        self._served = -1  # the descriptor that alone was ready last
        self.is_serving = False
        self._spin_asked = False
        self.has_replied = False  # to a connection that spins, since a spin or the last wake
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self.round_end: list[Callable[[], None]] | None = None  # while a round of several connections is served
        self._spinning = Spinning()
        self._loop_callbacks: Collection[object] = getattr(loop, "_ready", ())
        self._inherited: dict[str, list[socket.socket]] = {}
        self.leaving: set[SocketConnection] = set()
        """Closed connections whose peers have still to take their last bytes; for LINGER_S at most."""
        loop.add_reader(self._epoll.fileno(), self._wake)

    def listen(self, address: str, accept: Callable[[Connection], Receiver | None]) -> Callable[[], None]:
        """As the seam says; ValueError for an address of another form and for a unix path that is too long."""
        inherited = self._inherited.pop(address, None)
        sockets = inherited or listening_sockets(address)
        listeners = [_Listener(self, listening, inherited is None, accept) for listening in sockets]

        def stop() -> None:
            for listener in listeners:
                listener.close()

        return stop

    def connect(
        self,
        address: str,
        connected: Callable[[Connection], Receiver | None],
        failed: Callable[[str], None],
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Callable[[], None]:
        """As the seam says; OSError if no descriptor is left."""
        return Connecting(self, address, connected, failed, timeout_s).give_up

    def open_datagrams(self, address: str, received: Callable[[str, bytes], None]) -> SocketDatagrams:
        """As the seam says."""
        return SocketDatagrams(self, address, received)

    def inherit(self, address: str, descriptor: int) -> None:
        """The next `listen` at this address uses this listening socket, with others that were given for it; the file of
        a unix one stays when it is closed: others have the socket too."""
        inherited = socket.socket(fileno=descriptor)
        inherited.setblocking(False)
        self._inherited.setdefault(address, []).append(inherited)

    def adopt(self, descriptor: int) -> "SocketConnection":
        """A connection of a connected socket, to be started. OSError if its peer has gone."""
        connected = socket.socket(fileno=descriptor)
        try:
            address = connected.getpeername() if connected.family != socket.AF_UNIX else ""
            return SocketConnection(self, connected, address)
        except OSError:
            connected.close()
            raise

    def close(self) -> None:
        """Leave the loop. Connections must have been closed."""
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    # --- for connections, listeners and datagrams ---

    def connection(self, connected: socket.socket, address: Any) -> "SocketConnection":
        """A connection of a connected socket, to be started."""
        return SocketConnection(self, connected, address)

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

    def replied_later(self) -> None:
        """A reply left that had to wait for something: its client's next request may be about to come."""
        if not self._spin_asked:
            self._spin_asked = True
            self.loop.call_soon(self._spin_after_reply)

    def _wake(self) -> None:
        """Serve what is ready, round by round, and spin for what is about to come."""
        now_s = monotonic()
        if self.has_replied:
            self.has_replied = False
            self._spinning.woken(now_s, self._threads.held_until_s)
        self._serve(self._epoll.poll(0, EVENTS_A_ROUND), now_s)

    def _spin_after_reply(self) -> None:
        self._spin_asked = False
        now_s = monotonic()
        self._spinning.batch_ended(now_s)
        self._serve(self._spin(now_s), now_s)

    def _serve(self, events: list[tuple[int, int]], now_s: float) -> None:
        poll, handlers, callbacks, spinning = self._epoll.poll, self._handlers, self._loop_callbacks, self._spinning
        stop_s = now_s + WAKE_S
        self.is_serving = True
        while events:
            if len(events) == 1:
                ((descriptor, mask),) = events
                if descriptor != self._served:
                    self._served = descriptor
                    self._threads.alone_since_s = now_s
                ready = handlers.get(descriptor)
                if ready is not None:
                    ready(mask)
            else:
                self._threads.alone_since_s = now_s
                self._serve_round(events)
            now_s = monotonic()
            spinning.batch_ended(now_s)
            if now_s >= stop_s or callbacks:
                break
            events = poll(0, EVENTS_A_ROUND) or self._spin(now_s)
        self.is_serving = False

    def _spin(self, now_s: float) -> list[tuple[int, int]]:
        """Ask for events until there are some, as long as that is worth it."""
        events: list[tuple[int, int]] = []
        if self.has_replied and self._spinning.wanted and not self._threads.under_way:
            poll, callbacks = self._epoll.poll, self._loop_callbacks
            spin_until_s = now_s + SPIN_S
            while not (events or callbacks) and now_s < spin_until_s:
                events = poll(0, EVENTS_A_ROUND)
                now_s = monotonic()
            if not callbacks:
                self.has_replied = False
                self._spinning.spun(now_s, bool(events))
        return events

    def _serve_round(self, events: list[tuple[int, int]]) -> None:
        """Serve several, then end the round for those who asked for it."""
        round_end: list[Callable[[], None]] = []
        self.round_end = round_end
        for descriptor, mask in events:
            ready = self._handlers.get(descriptor)
            if ready is not None:
                ready(mask)
        self.round_end = None
        for callback in round_end:
            callback()


class _Listener:
    """A listening socket."""

    def __init__(
        self,
        network: SocketNetwork,
        listening: socket.socket,
        owned: bool,
        accept: Callable[[Connection], Receiver | None],
    ) -> None:
        self._network = network
        self._socket = listening
        self._owned = owned
        self._accept = accept
        self._closed = False
        network.register(listening.fileno(), _READABLE, self._ready)

    def close(self) -> None:
        """Stop listening; the file of a unix socket that is ours goes."""
        if self._closed:
            return
        self._closed = True
        if self._socket.fileno() in self._network._handlers:
            self._network.unregister(self._socket.fileno())
        close_listening(self._socket, self._owned)

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
