"""Carrying a client's requests to whoever serves its volume, and the replies back, through the end of one server after
the other.

Theory: the client's connection stays; the other one, to the process that serves it (its *server* here), comes and goes.
The handshake is passed on as it comes, and overheard (protocol/overheard.py). From then on requests are kept until they
are answered (outstanding.py). The next server is told the same handshake again, whose replies the client has had, and
then all that is kept.

    begin: the handshake ─► requests and replies ─► the server is lost
                                   ▲                        │
                                   └── begin: told again ◄──┘ ◄── its session in this process has ended (unanswered.py)

Rules
- The client gets replies whole: of what one server began to say nothing is mixed with what the next one says.
- A server whose handshake does not hold what the client was told gets no request of it.
- While there is no server, requests are taken until there is no room for them; then the client is not read.
- When the client is gone, what was sent is still delivered, and then the server's end is closed.
- Bounds: outstanding.py for requests; UNSENT_LIMIT_BYTES of replies that the client does not take, then its server is
  not read; HANDSHAKE_BYTES of a handshake that waits for its server.
"""

from dataclasses import replace
from typing import Protocol

from metadata.seams import Clock, Connection, Timer
from nbdserver.frontend.forwarding import UNSENT_LIMIT_BYTES
from nbdserver.frontend.outstanding import OutOfStepError, Outstanding
from nbdserver.frontend.receive_buffer import NORMAL_BYTES, ReceiveBuffer
from nbdserver.frontend.transmission import SHRINK_DELAY_S
from nbdserver.frontend.unanswered import Entered
from protocol.handshake import HandshakeState
from protocol.overheard import Overheard, OverheardError

HANDSHAKE_BYTES = 4 << 10


class CarriedEvents(Protocol):
    """Who finds servers for it."""

    def entered(self) -> None:
        """The server takes requests."""

    def server_lost(self, reason: str) -> None:
        """It does not any more, and is left: another one is wanted. `reason` may be what it says of the export."""

    def ended(self, reason: str) -> None:
        """The client is gone, or could not be carried on, and its connection is closed or about to be."""


class Carried:
    """One client; the Receiver of its connection."""

    def __init__(
        self,
        clock: Clock,
        client: Connection,
        state: HandshakeState,
        events: CarriedEvents,
        entered: Entered | None = None,
    ) -> None:
        """Its handshake goes on from this state; that of one that has `entered` is over, and is told again."""
        self.outstanding: Outstanding | None = None
        """Once the client is in the transmission phase."""
        self._clock = clock
        self._client = client
        self._events: CarriedEvents | None = events
        self._state = state
        self._first = Overheard(state) if entered is None else Overheard.agreed(entered.agreement)
        self._again: Overheard | None = None  # what the next server is told
        self._requests = ReceiveBuffer(NORMAL_BYTES)
        self._server: _ServerEnd | None = None
        self._is_paused = False  # the client
        self._is_finishing = False
        self._shrinks: Timer | None = None
        self._skip_bytes = 0  # of a refused payload, still to come
        if entered is None:
            self._requests.put(state.received)
        else:
            self.outstanding = Outstanding(entered.agreement.style)
            self._skip_bytes = entered.skip_bytes
            # More may be received before what is here is looked at.
            self._requests.reserve(len(entered.received) + NORMAL_BYTES)
            self._requests.put(entered.received)
            self._shrinks = clock.call_later(SHRINK_DELAY_S, self._shrink)
            self._clock.call_soon(self._go_on)

    def state(self) -> HandshakeState:
        """Where the handshake stands that the next server is told."""
        if not self._first.options:
            try:
                self._requests.used(self._requests.start + self._first.ask(self._held()))
            except OverheardError as error:
                reason = str(error)
                self._clock.call_soon(lambda: self._fail(reason))
        return replace(self._state, received=self._first.options)

    def give_back(self) -> HandshakeState:
        """The whole state of a handshake that no server has heard of; it is over here."""
        self._events = None
        return replace(self._state, received=self._first.options + bytes(self._held()))

    def begin(self, server: Connection, brought: bytes) -> None:
        """This is its server now, which has been told `state`, and has said `brought` since."""
        end = self._server = _ServerEnd(self, server)
        if self.outstanding is not None:
            self._again = Overheard(self.state())
            self._again.ask(memoryview(self._first.options))
        server.redirect(end)
        if brought:
            end.replies.put(brought)
            self._clock.call_soon(end.go_on)
        self._go_on()

    def leave(self) -> None:
        """It has no server from now on; what that says is not heard."""
        server, self._server = self._server, None
        self._again = None
        if server is not None:
            server.connection.abort()

    def take_no_more(self) -> None:
        """Only what was asked for is answered from now on."""
        self._is_finishing = True
        self._client.pause_reading()

    def close(self) -> None:
        """Drop all, now."""
        self.leave()
        self._client.abort()
        self._end("")

    @property
    def has_server(self) -> bool:
        """Whether requests go somewhere at this moment."""
        return self._server is not None and self.outstanding is not None and self._again is None

    # --- the client's end ---

    def buffer(self) -> memoryview:
        return self._requests.room()

    def received(self, size_bytes: int) -> None:
        if self._skip_bytes:
            size_bytes = self._skip(size_bytes)
        self._requests.end += size_bytes
        self._go_on()

    def _skip(self, size_bytes: int) -> int:
        """How much of so many bytes that were received is left without what is to be skipped."""
        view, end = self._requests.view, self._requests.end
        skipped = min(size_bytes, self._skip_bytes)
        self._skip_bytes -= skipped
        view[end : end + size_bytes - skipped] = view[end + skipped : end + size_bytes]
        return size_bytes - skipped

    def drained(self) -> None:
        """The client has taken all replies."""
        if self._server is not None:
            self._server.connection.resume_reading()

    def lost(self, reason: str) -> None:
        if self._server is not None:
            self._server.connection.close()
            self._server = None
        self._end(reason)

    def _held(self) -> memoryview:
        requests = self._requests
        return requests.view[requests.start : requests.end]

    def _go_on(self) -> None:
        """Pass on what the client has said, as far as that may be."""
        if self._is_finishing:
            return
        try:
            if self.outstanding is None:
                self._pass_options()
            else:
                self._pass_requests(self.outstanding)
        except (OverheardError, OutOfStepError) as error:
            self._fail(str(error))

    def _pass_options(self) -> None:
        requests, server = self._requests, self._server
        if server is not None:
            held = self._held()
            taken = self._first.ask(held)
            if taken:
                server.connection.send([held[:taken]])
                requests.used(requests.start + taken)
        self._pause(requests.end - requests.start >= HANDSHAKE_BYTES)

    def _pass_requests(self, outstanding: Outstanding) -> None:
        requests, start = self._requests, self._requests.start
        position = outstanding.take(requests)
        if position != start:
            if self.has_server:
                assert self._server is not None
                self._server.connection.send([requests.view[start:position]])
            requests.used(position)
        self._make_room(requests, outstanding.missing_bytes)
        self._pause(outstanding.is_held or outstanding.is_ending)

    def _pause(self, is_paused: bool) -> None:
        if is_paused != self._is_paused:
            self._is_paused = is_paused
            (self._client.pause_reading if is_paused else self._client.resume_reading)()

    # --- the server's end ---

    def heard(self, server: "_ServerEnd") -> None:
        """It has said something."""
        if server is not self._server:
            return
        try:
            if self.outstanding is None:
                self._hear_handshake(server)
            elif self._again is not None:
                self._hear_again(server, self._again)
            if self.has_server and self.outstanding is not None:
                self._pass_replies(server, self.outstanding)
        except (OverheardError, OutOfStepError) as error:
            self._lose(f"what it says cannot be followed: {error}")

    def _hear_handshake(self, server: "_ServerEnd") -> None:
        said = server.take()
        behind = self._first.answer(said)
        self._client.send([said[: len(said) - len(behind)]])
        if self._first.told is None:
            self._pass_options()  # what has waited for an answer
            return
        self.outstanding = Outstanding(self._first.told.style)
        server.replies.put(behind)
        self._say_entered()

    def _hear_again(self, server: "_ServerEnd", again: Overheard) -> None:
        behind = again.answer(server.take())
        if again.told is None:
            if again.is_refused_for_good:
                self._fail(again.refusal)
            elif again.refusal:
                self._lose(again.refusal)
            return
        assert self.outstanding is not None
        assert self._first.told is not None
        if not self._first.told.holds(again.told):
            self._fail("what it was told of the volume does not hold any more")
            return
        self._again = None
        server.replies.put(behind)
        kept = self.outstanding.again()
        if kept:
            server.connection.send(kept)
        self._say_entered()

    def _say_entered(self) -> None:
        if self._events is not None:
            self._events.entered()
        self._go_on()

    def _pass_replies(self, server: "_ServerEnd", outstanding: Outstanding) -> None:
        replies, start = server.replies, server.replies.start
        position = outstanding.answer(replies)
        if position != start:
            self._client.send([replies.view[start:position]])
            replies.used(position)
            if self._client.unsent_bytes > UNSENT_LIMIT_BYTES:
                server.connection.pause_reading()
        self._make_room(replies, outstanding.missing_bytes)
        if self._is_paused:
            self._go_on()

    def server_lost(self, server: "_ServerEnd", reason: str) -> None:
        """Its connection is gone."""
        if server is self._server:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        """There is no server any more."""
        self.leave()
        if self.outstanding is None:
            self._fail(f"the server was lost during the handshake: {reason}")
        elif self.outstanding.is_ending and not len(self.outstanding):
            self._fail("the client disconnected")
        elif self._events is not None:
            self._events.server_lost(reason)

    # --- both ---

    def _fail(self, reason: str) -> None:
        """It ends here, when what was said to it has left."""
        self.leave()
        self._client.close()
        self._end(reason)

    def _end(self, reason: str) -> None:
        events, self._events = self._events, None  # no cycle stays
        if self._shrinks is not None:
            self._shrinks.cancel()
        if events is not None and reason:
            events.ended(reason)

    def _make_room(self, buffer: ReceiveBuffer, missing_bytes: int) -> None:
        """So that one request, or one reply, fits."""
        if missing_bytes > buffer.capacity_bytes:
            buffer.reserve(max(missing_bytes, 2 * buffer.capacity_bytes))
            if self._shrinks is None:
                self._shrinks = self._clock.call_later(SHRINK_DELAY_S, self._shrink)

    def _shrink(self) -> None:
        """Give memory back that large ones have taken."""
        self._shrinks = None
        are_normal = self._requests.shrink()
        if self._server is not None:
            are_normal &= self._server.replies.shrink()
        if not are_normal:
            self._shrinks = self._clock.call_later(SHRINK_DELAY_S, self._shrink)


class _ServerEnd:
    """The Receiver of a connection to a server."""

    def __init__(self, carried: Carried, connection: Connection) -> None:
        self.connection = connection
        self.replies = ReceiveBuffer(NORMAL_BYTES)
        self._carried = carried

    def take(self) -> bytes:
        """All that it has said, which is used then."""
        replies = self.replies
        said = bytes(replies.view[replies.start : replies.end])
        replies.used(replies.end)
        return said

    def go_on(self) -> None:
        self._carried.heard(self)

    def buffer(self) -> memoryview:
        return self.replies.room()

    def received(self, size_bytes: int) -> None:
        self.replies.end += size_bytes
        self._carried.heard(self)

    def drained(self) -> None:
        """Nobody waits for it: what is sent is bounded by what is kept."""

    def lost(self, reason: str) -> None:
        self._carried.server_lost(self, reason)
