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
- What somebody wants to do at the end of a round must not raise.
- Sockets that another process opened are taken as they are: `inherit` says at which address a listening one is used
  instead of a new one, `adopt` makes a connection of a connected one.

Known weakness: to see that callbacks are ready it looks at the asyncio loop's own queue, which has no public name; on
a loop without it they wait for up to `WAKE_S`.
"""

import asyncio
import logging
import select
import socket
from collections.abc import Callable, Collection
from time import monotonic

from metadata.seams import CONNECT_TIMEOUT_S, Connection, Receiver
from nbdserver.host.completions import Completions
from nbdserver.host.connecting import Connecting
from nbdserver.host.connection import SocketConnection
from nbdserver.host.datagrams import SocketDatagrams
from nbdserver.host.listening import close_listening, listening_sockets
from nbdserver.host.spinning import CREDIT_LIMIT, SPIN_S, Spinning

WAKE_S = 400e-6  # the longest stay outside the loop; entering it costs some 10 µs
EVENTS_A_ROUND = 64
ACCEPTS_A_ROUND = 16
ACCEPT_PAUSE_S = 0.1  # when descriptors have run out

_READABLE = select.EPOLLIN

_log = logging.getLogger(__name__)


class SocketNetwork:
    """Connections over the host's sockets, on a running asyncio loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, threads: Completions | None = None, may_spin: bool = True
    ) -> None:
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
        self._spinning = Spinning(CREDIT_LIMIT if may_spin else 0)
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

    def adopt(self, descriptor: int) -> SocketConnection:
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
