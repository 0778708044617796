"""What a process that forwards clients and one that they are forwarded to say about them, here on the forwarder's side.

Theory: a stream of a client that is silent tells neither side whether the other one lives. So there is one more stream,
as long as there are clients: KEEP, each beat, says which clients are still there; KEPT says that it was heard. Time is
counted from when the KEEP was sent that is answered. The other side may ask for a KEEP (LOOK).

Rules
- When nothing has been heard for FORWARD_S (grants.py), the clients are told (`silent`), and the process there has
  dropped them too or is about to (forwarded.py).
- The other side answers with a KEEP of its own when it does not have all of them; who is not named in it, and was there
  when the beat was sent that it answers, is told (`not_there`): of a connection whose end was lost nobody else tells.
- A stream that is lost is opened again; that alone costs no client anything.
- The last client that goes is told of, too: a process that reads nothing from its connection does not see it end.
"""

from collections.abc import Callable
from typing import Protocol

from metadata.seams import Clock, Connection, Network
from nbdserver.replication.grants import BEAT_S, FORWARDER_COUNTS_S
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.volume.peer import Peer
from protocol.peer import Frame
from protocol.peer_clients import Keep, Kept, Look


class KeptClient(Protocol):
    """A client that is forwarded."""

    peer: Peer
    export: str

    def drop_if_gone(self) -> None:
        """Look whether it is still there."""

    def not_there(self, since_s: float) -> None:
        """The other process did not have it any more at some time after this one."""

    def silent(self) -> None:
        """The other process has not been heard of for FORWARD_S."""


class Keeping:
    """The clients that are forwarded to one address."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        address: str,
        forwarder: bytes,
        last: Callable[[], int],
        ended: Callable[[], object],
        returns: Callable[[float], None],
    ) -> None:
        """`last()` is the highest number of a client that was given. `ended()` is called when there are none here.
        `returns(seconds)`: the other process is replaced, and its clients are served again within that time."""
        self.clients: dict[int, KeptClient] = {}
        self._clock = clock
        self._network = network
        self._address = address
        self._forwarder = forwarder
        self._last = last
        self._ended = ended
        self._returns = returns
        self._heard_s = clock.now()
        self._beat = 0
        self._sent_s: dict[int, float] = {}  # of beats without an answer
        self._stream: PeerStream | None = None
        self._give_up: Callable[[], None] | None = None
        clock.call_later(BEAT_S, self._tick)
        self._connect()

    def add(self, number: int, client: KeptClient) -> None:
        """A client is on its way there."""
        self.clients[number] = client

    def remove(self, number: int) -> None:
        """It is not any more."""
        self.clients.pop(number, None)

    def drop_gone(self) -> None:
        """Forget the clients that have hung up."""
        for client in list(self.clients.values()):
            client.drop_if_gone()

    def others(self, client: KeptClient) -> tuple[int, ...]:
        """The numbers of those of a client's host and export that are still there besides it."""
        self.drop_gone()
        return tuple(
            number
            for number, other in self.clients.items()
            if other is not client and (other.peer.host, other.export) == (client.peer.host, client.export)
        )

    def _close(self) -> None:
        """Say for the last time what there is to say: nobody is there."""
        if self._give_up is not None:
            self._give_up()
        if self._stream is not None:
            self._stream.close(self._keep())
        self._give_up = self._stream = None
        self._ended()

    def _tick(self) -> None:
        if self._clock.now() - self._heard_s >= FORWARDER_COUNTS_S:
            for client in list(self.clients.values()):
                client.silent()
        self.drop_gone()
        if not self.clients:
            self._close()
            return
        self._clock.call_later(BEAT_S, self._tick)
        if self._stream is not None:
            self._send(self._stream)
        elif self._give_up is None:
            self._connect()

    def _connect(self) -> None:
        self._give_up = self._network.connect(self._address, self._connected, self._failed)

    def _connected(self, connection: Connection) -> PeerStream:
        self._give_up = None
        stream = self._stream = PeerStream(connection, self._received, lambda _, why: self._failed(why))
        self._send(stream)
        return stream

    def _failed(self, _reason: str) -> None:
        self._stream = self._give_up = None

    def _send(self, stream: PeerStream) -> None:
        frame = self._keep()
        self._sent_s[frame.beat] = self._clock.now()
        stream.send(frame)

    def _keep(self, look: int = 0) -> Keep:
        self._beat += 1
        return Keep(self._forwarder, self._beat, self._last(), tuple(self.clients), look)

    def _received(self, stream: PeerStream, frame: Frame) -> None:
        if isinstance(frame, Look):
            self.drop_gone()
            stream.send(self._keep(frame.number))
        elif isinstance(frame, Keep) and not frame.beat:
            self._returns(float(frame.last))
        elif isinstance(frame, Keep) and frame.beat in self._sent_s:
            for number, client in list(self.clients.items()):
                if number not in frame.numbers:
                    client.not_there(self._sent_s[frame.beat])
        elif isinstance(frame, Kept):
            for beat in [beat for beat in self._sent_s if beat <= frame.beat]:
                self._heard_s = max(self._heard_s, self._sent_s.pop(beat))
