"""Clients that have come to other nodes and are served here, where their volume is.

Theory: a forwarder is a process of another node. It numbers its clients as they come, and says at each beat which
of them are still there (keeping.py has its side). A client's session here is one like any other; its peer is the
client, not the forwarder.

Rules
- Before a client is served, those of its host and export that came to the same forwarder before it, and have gone
  there, are dropped here: what they had asked for is not done after what is asked for anew.
- Nor is it served before every other forwarder that has clients of its host and export has said, after it came, which
  of them are still there (LOOK); those that it does not name are dropped. So is a client that comes here directly.
- A number that the forwarder has given up is not served, whenever it comes.
- A forwarder that names clients which are not here is told which are: that one was ended it may never have heard.
- When the program is replaced its clients are dropped, and their forwarders told that it returns: a KEEP of beat 0, and
  its `last` is how many seconds that may take.
- One that the operator has disconnected here does not go on when it is brought again.
- The clients of a forwarder that has not been heard of for FORWARD_S are dropped: it has dropped them too.

Known weakness: what a client has sent to a node that does not know yet that it has gone may be done after what it asks
for anew.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from metadata.seams import Clock
from nbdserver.frontend.server import Server
from nbdserver.frontend.session import Session
from nbdserver.replication.grants import BEAT_S, SERVER_COUNTS_S
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.volume.export import Exports, volume_of
from nbdserver.volume.peer import Peer
from protocol.handover import HandoverError, HandshakingClient, decode_handshaking
from protocol.peer import Frame
from protocol.peer_clients import Forward, Forwarded, Keep, Kept, Look
from protocol.peer_frames import encode

DISMISSED_LIMIT = 1024
RETURN_S = 20.0
"""So long may the next program take until it serves what this one has; a takeover may wait for members that do not
answer."""


class ForwardedClients:
    """The clients of other nodes."""

    def __init__(self, clock: Clock, server: Server, exports: Exports) -> None:
        self._clock = clock
        self._server = server
        self._exports = exports
        self._forwarders: dict[bytes, _Forwarder] = {}
        self._waiting: list[_Waiting] = []
        self._looks = 0
        server.unsettled, server.leaving = self.unsettled, self._say_that_it_returns

    def accept(self, stream: PeerStream, frame: Forward | Keep) -> None:
        """A stream begins with this frame."""
        stream.lost_stream = _ignore
        if isinstance(frame, Keep):
            stream.received_frame = self._received
            self._received(stream, frame)
        else:
            refused = self._forward(stream, frame)
            if refused is not None:
                stream.close(refused)

    # --- clients that come ---

    def _forward(self, stream: PeerStream, frame: Forward) -> Forwarded | None:
        """Take a client in, or say why not."""
        if self._exports.lookup(frame.export) is None:
            return Forwarded(f"it does not serve {frame.export}")
        try:
            client = decode_handshaking(frame.client)
        except HandoverError as error:
            return Forwarded(str(error))
        host = Peer(client.peer_name, client.tls, client.certificate, frame.node).host
        forwarder = self._heard(frame.forwarder)
        if forwarder.has_dismissed(client.continues):
            return Forwarded("disconnected by the operator", is_final=True)
        for number in forwarder.of(host, frame.export):
            if number < frame.number and number not in frame.others:
                forwarder.drop(number, f"{frame.node} has it no more, and its host has come again")
        take = partial(self._take, stream, frame, client)
        self._wait(_Waiting(host, frame.export, self._clock.now(), frame.forwarder, take))
        return None

    def _take(self, stream: PeerStream, frame: Forward, client: HandshakingClient) -> None:
        forwarder = self._forwarders.get(frame.forwarder)
        if not stream.is_open:
            return
        if forwarder is None or (frame.number <= forwarder.last and frame.number not in forwarder.kept):
            stream.close(Forwarded("the client was given up"))
            return
        export = self._exports.lookup(frame.export)
        if export is None:
            stream.close(Forwarded(f"it does not serve {frame.export} any more"))
            return
        connection, brought = stream.give_away()
        session = self._server.arrive_from_node(connection, client, frame.node) if not brought else None
        if session is None:
            connection.send(encode(Forwarded("it takes no more clients")))
            connection.close()
            return
        forwarder.sessions[frame.number] = session
        connection.send(encode(Forwarded(lineage=export.lineage)))
        connection.redirect(session)
        session.go_on()

    def _say_that_it_returns(self) -> None:
        """The next program will serve them: nobody needs to take over what is served here."""
        for key, forwarder in self._forwarders.items():
            if forwarder.stream is not None:
                forwarder.stream.send(Keep(key, 0, int(RETURN_S), ()))

    # --- connections of one host by several ways ---

    def unsettled(self, peer: Peer, volume: str, since_s: float) -> bool:
        """As Unsettled of a session."""
        return bool(self._doubtful(peer.host, volume, since_s))

    def settle(self, peer: Peer, volume: str, since_s: float, done: Callable[[], None]) -> None:
        """Find out, and then `done()`: every connection of this host to this volume that came by way of another node
        is known to have been there still when the one that came here at `since_s` was, or is dropped."""
        self._clock.call_soon(lambda: self._wait(_Waiting(peer.host, volume, since_s, b"", done)))

    def _wait(self, waiting: "_Waiting") -> None:
        self._waiting.append(waiting)
        for forwarder in self._doubts(waiting):
            self._look_at(forwarder)
        self._go_on()

    def _go_on(self) -> None:
        """Those for whom everything is settled wait no longer."""
        for waiting in list(self._waiting):
            if not self._doubts(waiting):
                self._waiting.remove(waiting)
                waiting.done()

    def _doubts(self, waiting: "_Waiting") -> list["_Forwarder"]:
        return self._doubtful(waiting.host, waiting.volume, waiting.since_s, waiting.forwarder)

    def _doubtful(self, host: str, volume: str, since_s: float, known: bytes = b"") -> list["_Forwarder"]:
        """Forwarders, but for the `known` one, that have clients of this host and volume and have not been asked since
        then."""
        return [
            forwarder
            for key, forwarder in self._forwarders.items()
            if key != known and forwarder.looked_s < since_s and forwarder.of(host, volume)
        ]

    def _look_at(self, forwarder: "_Forwarder") -> None:
        """Ask it, if it can be asked; else it is when it says something, or is silent for too long."""
        if forwarder.stream is not None:
            self._looks += 1
            forwarder.looks[self._looks] = self._clock.now()
            forwarder.stream.send(Look(self._looks))

    # --- what forwarders say ---

    def _received(self, stream: PeerStream, frame: Frame) -> None:
        if not isinstance(frame, Keep):
            stream.close()
            return
        forwarder = self._heard(frame.forwarder)
        if forwarder.stream is not stream:
            forwarder.stream = stream
            forwarder.looks.clear()  # nobody answers them
        forwarder.last, forwarder.kept = max(frame.last, forwarder.last), frozenset(frame.numbers)
        for number in list(forwarder.sessions):
            if number <= frame.last and number not in forwarder.kept:
                forwarder.drop(number, "the node that it had come to has it no more")
        here = tuple(number for number, session in forwarder.sessions.items() if not session.is_over)
        if not set(frame.numbers) <= set(here):
            stream.send(Keep(frame.forwarder, frame.beat, 0, here))
        stream.send(Kept(frame.beat))
        for number in [number for number in forwarder.looks if number <= frame.look]:
            forwarder.looked_s = max(forwarder.looked_s, forwarder.looks.pop(number))
        self._go_on()
        for waiting in self._waiting:
            if forwarder in self._doubts(waiting) and not forwarder.is_asked_since(waiting.since_s):
                self._look_at(forwarder)

    def _heard(self, forwarder: bytes) -> "_Forwarder":
        if not self._forwarders:
            self._clock.call_later(BEAT_S, self._drop_silent)
        found = self._forwarders.setdefault(forwarder, _Forwarder())
        found.heard_s = self._clock.now()
        return found

    def _drop_silent(self) -> None:
        now_s = self._clock.now()
        for key, forwarder in list(self._forwarders.items()):
            if now_s - forwarder.heard_s > SERVER_COUNTS_S:
                for number in list(forwarder.sessions):
                    forwarder.drop(number, "the node that it had come to is silent")
                del self._forwarders[key]
        if self._forwarders:
            self._clock.call_later(BEAT_S, self._drop_silent)
        self._go_on()


@dataclass(frozen=True)
class _Waiting:
    """A client that waits until connections of its host that came by other ways are settled."""

    host: str
    volume: str
    since_s: float
    forwarder: bytes
    """That it has come by, which has said already which of them are there."""
    done: Callable[[], None]


class _Forwarder:
    """A process of another node."""

    def __init__(self) -> None:
        self.heard_s = 0.0
        self.last = 0
        self.kept: frozenset[int] = frozenset()  # of the clients up to `last`
        self.sessions: dict[int, Session] = {}
        self.stream: PeerStream | None = None  # on which it says KEEP
        self.looks: dict[int, float] = {}  # without an answer as yet: when they were sent
        self.looked_s = 0.0  # when that was sent which was answered last
        self._dismissed: deque[int] = deque(maxlen=DISMISSED_LIMIT)  # numbers that the operator has disconnected

    def of(self, host: str, volume: str) -> list[int]:
        """The numbers of its clients of this host and volume."""
        return [
            number
            for number, session in self.sessions.items()
            if session.peer.host == host and session.export is not None and volume_of(session.export.name) == volume
        ]

    def is_asked_since(self, since_s: float) -> bool:
        """Whether it will say who was there after that time."""
        return any(sent_s >= since_s for sent_s in self.looks.values())

    def drop(self, number: int, reason: str) -> None:
        session = self.sessions.pop(number)
        if session.is_dismissed:
            self._dismissed.append(number)
        session.disconnect(reason)

    def has_dismissed(self, number: int) -> bool:
        """Whether the operator has disconnected this one here."""
        session = self.sessions.get(number)
        return number in self._dismissed or (session is not None and session.is_dismissed)


def _ignore(_stream: PeerStream, _reason: str) -> None:
    """A stream of a forwarder is lost: it opens another one, or is silent."""
