"""Clients that have come to other nodes and are served here, where their volume is.

Theory: a forwarder is a process of another node. It numbers its clients as they come, and says at each beat which
of them are still there (keeping.py has its side). A client's session here is one like any other; its peer is the
client, not the forwarder.

Rules
- Before a client is served, those of its host and export that came to the same forwarder before it, and have gone
  there, are dropped here: what they had asked for is not done after what is asked for anew.
- A number that the forwarder has given up is not served, whenever it comes.
- The clients of a forwarder that has not been heard of for a grant time are dropped: it has dropped them too.

Known weakness: a client that comes back by way of another node is not recognised as the same.
"""

from metadata.seams import Clock
from nbdserver.frontend.server import Server
from nbdserver.frontend.session import Session
from nbdserver.replication.grants import BEAT_S, REPLICA_COUNTS_S
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.volume.export import Exports
from nbdserver.volume.peer import Peer
from protocol.handover import HandoverError, HandshakingClient, decode_handshaking
from protocol.peer import Frame
from protocol.peer_clients import Forward, Forwarded, Keep, Kept
from protocol.peer_frames import encode


class ForwardedClients:
    """The clients of other nodes."""

    def __init__(self, clock: Clock, server: Server, exports: Exports) -> None:
        self._clock = clock
        self._server = server
        self._exports = exports
        self._forwarders: dict[bytes, _Forwarder] = {}

    def accept(self, stream: PeerStream, frame: Forward | Keep) -> None:
        """A stream begins with this frame."""
        stream.lost_stream = _ignore
        if isinstance(frame, Keep):
            stream.received_frame = self._received
            self._received(stream, frame)
        else:
            refusal = self._forward(stream, frame)
            if refusal:
                stream.close(Forwarded(refusal))

    def _forward(self, stream: PeerStream, frame: Forward) -> str:
        """Take a client in, or say why not."""
        if self._exports.lookup(frame.export) is None:
            return f"it does not serve {frame.export}"
        try:
            client = decode_handshaking(frame.client)
        except HandoverError as error:
            return str(error)
        forwarder = self._heard(frame.forwarder)
        if frame.number <= forwarder.last and frame.number not in forwarder.kept:
            return "the client was given up"
        self._drop_gone(forwarder, frame, client)
        connection, brought = stream.give_away()
        session = self._server.arrive_from_node(connection, client, frame.node) if not brought else None
        if session is None:
            connection.send(encode(Forwarded("it takes no more clients")))
            connection.close()
            return ""
        forwarder.sessions[frame.number] = session
        connection.send(encode(Forwarded()))
        connection.redirect(session)
        session.go_on()
        return ""

    def _drop_gone(self, forwarder: "_Forwarder", frame: Forward, client: HandshakingClient) -> None:
        host = Peer(client.peer_name, client.tls, client.certificate, frame.node).host
        for number, session in list(forwarder.sessions.items()):
            export = session.export
            if (
                number < frame.number
                and number not in frame.others
                and session.peer.host == host
                and (export is None or export.name.partition("@")[0] == frame.export)
            ):
                forwarder.drop(number, f"{frame.node} has it no more, and its host has come again")

    def _received(self, stream: PeerStream, frame: Frame) -> None:
        if not isinstance(frame, Keep):
            stream.close()
            return
        forwarder = self._heard(frame.forwarder)
        forwarder.last, forwarder.kept = max(frame.last, forwarder.last), frozenset(frame.numbers)
        for number in list(forwarder.sessions):
            if number <= frame.last and number not in forwarder.kept:
                forwarder.drop(number, "the node that it had come to has it no more")
        stream.send(Kept(frame.beat))

    def _heard(self, forwarder: bytes) -> "_Forwarder":
        if not self._forwarders:
            self._clock.call_later(BEAT_S, self._look)
        found = self._forwarders.setdefault(forwarder, _Forwarder())
        found.heard_s = self._clock.now()
        return found

    def _look(self) -> None:
        """Who is silent?"""
        now_s = self._clock.now()
        for key, forwarder in list(self._forwarders.items()):
            if now_s - forwarder.heard_s > REPLICA_COUNTS_S:
                for number in list(forwarder.sessions):
                    forwarder.drop(number, "the node that it had come to is silent")
                del self._forwarders[key]
        if self._forwarders:
            self._clock.call_later(BEAT_S, self._look)


class _Forwarder:
    """A process of another node."""

    def __init__(self) -> None:
        self.heard_s = 0.0
        self.last = 0
        self.kept: frozenset[int] = frozenset()  # of the clients up to `last`
        self.sessions: dict[int, Session] = {}

    def drop(self, number: int, reason: str) -> None:
        self.sessions.pop(number).disconnect(reason)


def _ignore(_stream: PeerStream, _reason: str) -> None:
    """A stream of a forwarder is lost: it opens another one, or is silent."""
