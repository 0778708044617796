"""Where a node listens to its peers: the first frame of a stream says which family it is about, or that it is about a
client of another node.

Rules
- A stream that does not begin within OPEN_LIMIT_S is closed; at most STRANGERS of them wait.
"""

from collections.abc import Callable

from metadata.seams import Clock, Connection, Network
from nbdserver.replication.peer_stream import PeerStream
from protocol.peer import Frame, Open, Refusal, Refused
from protocol.peer_clients import Forward, Keep

OPEN_LIMIT_S = 5.0
STRANGERS = 256


class PeerServer:
    """`family(id)` returns what accepts a stream for that family, or None."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        address: str,
        family: Callable[[bytes], Callable[[PeerStream, Open], None] | None],
        forwarded: Callable[[PeerStream, Forward | Keep], None] | None = None,
    ) -> None:
        """`forwarded` gets streams about clients of other nodes. Raises OSError if it cannot listen there."""
        self._clock = clock
        self._family = family
        self._forwarded = forwarded
        self._strangers: dict[PeerStream, None] = {}
        self._stop = network.listen(address, self._accept)

    def close(self) -> None:
        """Take no more; what is open stays."""
        self._stop()
        for stream in list(self._strangers):
            stream.close()
        self._strangers.clear()

    def _accept(self, connection: Connection) -> PeerStream | None:
        if len(self._strangers) >= STRANGERS:
            return None
        stream = PeerStream(connection, self._received, self._lost)
        self._strangers[stream] = None
        self._clock.call_later(OPEN_LIMIT_S, lambda: self._timed_out(stream))
        return stream

    def _received(self, stream: PeerStream, frame: Frame) -> None:
        self._strangers.pop(stream, None)
        if isinstance(frame, Forward | Keep) and self._forwarded is not None:
            self._forwarded(stream, frame)
            return
        if not isinstance(frame, Open):
            stream.close()
            return
        accept = self._family(frame.family)
        if accept is None:
            stream.close(Refused(0, Refusal.NOT_HERE))
        else:
            accept(stream, frame)

    def _lost(self, stream: PeerStream, reason: str) -> None:
        self._strangers.pop(stream, None)

    def _timed_out(self, stream: PeerStream) -> None:
        if stream in self._strangers:
            del self._strangers[stream]
            stream.close()
