"""Clients that want a volume of the cluster which is not served here: taken to the node that serves it.

Theory: who serves a volume, and whether that shall be this node from now on, is not known here but asked for
(`Ask`). The client waits meanwhile in the middle of its handshake. To another node it goes by a stream of its own,
which begins with FORWARD and what the handshake has agreed on; after FORWARDED the two connections stand back to back
(`Forwarding`).

     asked ─► here: its session goes on in this process
           ─► there: connect, FORWARD ─► FORWARDED: forwarded until one side closes
                                      ─► refused, or lost: asked again
           ─► nobody, or ATTACH_S are over: its session goes on here, where it is told why

Rules
- Nothing of a client that waits is lost: what it sends is kept, at most WAITING_BYTES of it.
- Whom the other node's process has not answered for FORWARD_S (keeping.py), its clients are dropped with all that is
  on its way: what they have asked for must not be done later, when they have asked for it again elsewhere.
- A client that has hung up is looked for at each beat, and before another one of its host is forwarded: while the other
  node takes nothing it is not heard of. What it has asked for and was not taken is dropped.
- Clients of one export that ask at the same time ask once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from metadata.seams import Clock, Connection, Network, Timer
from nbdserver.frontend.forwarding import Forwarding
from nbdserver.frontend.keeping import Keeping
from nbdserver.frontend.server import Server
from nbdserver.frontend.session import ClientInfo
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.volume.peer import Peer
from protocol.handover import HandshakingClient, encode_handshaking
from protocol.peer import Frame
from protocol.peer_clients import Forward, Forwarded

ATTACH_S = 15.0  # a takeover waits for a grant to run out, and for members that do not answer
RETRY_S = 0.25
WAITING_BYTES = 4 << 10
FINISH_S = 0.3
"""What was asked for is answered in this time, when this process ends."""


@dataclass(frozen=True)
class Here:
    """It is served by this node now."""


@dataclass(frozen=True)
class There:
    """It is served by another one, by the process at this address."""

    node: str
    address: str


@dataclass(frozen=True)
class Nobody:
    """No node can serve it: one line."""

    reason: str


Answer = Here | There | Nobody
Settle = Callable[[Peer, str, float, Callable[[], None]], None]
"""`settle` of forwarded.py."""
Ask = Callable[[str, tuple[str, ...], Callable[[Answer], None]], None]
"""Ask who serves a volume. The second argument names the nodes that were tried and do not. The third is called with the
answer, once, and not from inside."""


class Attaching:
    """The clients of this process that are away."""

    def __init__(self, clock: Clock, server: Server, forwarder: bytes, ask: Ask, settle: Settle) -> None:
        """`forwarder`: what this process is told by from all others, also from those before it."""
        self.clock = clock
        self.server = server
        self.forwarder = forwarder
        self.node = ""
        self.network: Network | None = None
        self.settle = settle
        self._ask = ask
        self._asked: dict[tuple[str, tuple[str, ...]], list[Callable[[Answer], None]]] = {}
        self._keeping: dict[str, Keeping] = {}
        self._last = 0
        server.attach = self.attach

    def connect_by(self, node: str, network: Network) -> None:
        """This node's name, and how it reaches the others."""
        self.node, self.network = node, network

    def attach(
        self, connection: Connection, client: HandshakingClient, export: str, ended: Callable[[str], None]
    ) -> "AwayClient":
        """As Attach of the server says."""
        return AwayClient(self, connection, client, export, ended)

    def ask(self, export: str, failed: tuple[str, ...], done: Callable[[Answer], None]) -> None:
        """As `Ask`, once for all who want to know the same."""
        waiting = self._asked.setdefault((export, failed), [])
        waiting.append(done)
        if len(waiting) == 1:
            self._ask(export, failed, lambda answer: self._answered(export, failed, answer))

    def _answered(self, export: str, failed: tuple[str, ...], answer: Answer) -> None:
        for done in self._asked.pop((export, failed)):
            done(answer)

    def keep(self, client: "AwayClient", address: str, network: Network) -> tuple[int, Keeping]:
        """A number for a client that goes to this address, and who looks whether that lives."""
        self._last += 1
        keeping = self._keeping.get(address)
        if keeping is None:
            keeping = self._keeping[address] = Keeping(
                self.clock,
                network,
                address,
                self.forwarder,
                lambda: self._last,
                lambda: self._keeping.pop(address),
            )
        keeping.add(self._last, client)
        return self._last, keeping


class AwayClient:
    """One client; the Receiver of its connection until it is forwarded."""

    def __init__(
        self,
        attaching: Attaching,
        connection: Connection,
        client: HandshakingClient,
        export: str,
        ended: Callable[[str], None],
    ) -> None:
        self.export = export
        self.peer = Peer(client.peer_name, client.tls, client.certificate)
        self._attaching = attaching
        self._clock = attaching.clock
        self._connection = connection
        self._client = client
        self._ended: Callable[[str], None] | None = ended
        self._room = memoryview(bytearray(WAITING_BYTES))
        self._waiting_bytes = 0
        self._failed: tuple[str, ...] = ()
        self._there: There | None = None
        self._number = 0  # of it, for that node
        self._keeping: Keeping | None = None
        self._give_up: Callable[[], None] | None = None  # connecting
        self._stream: PeerStream | None = None
        self._forwarding: Forwarding | None = None
        self._timer: Timer = self._clock.call_later(ATTACH_S, self._too_late)
        self._retry: Timer | None = None
        self._reason = "no node has answered"
        connection.redirect(self)
        connection.resume_reading()
        attaching.settle(self.peer, export, client.since_s, self._ask_again)

    # --- Away ---

    def info(self) -> ClientInfo:
        """Away."""
        return ClientInfo(
            id=self._client.id,
            peer=self.peer,
            export=self.export,
            since_s=self._client.since_s,
            in_flight=0,
            received_bytes=0,
            unsent_bytes=self._connection.unsent_bytes,
            requests=0,
            read_bytes=0,
            write_bytes=0,
            forwarded_to=self._there.node if self._there is not None else "",
        )

    def shut_down(self) -> None:
        """Away."""
        if self._forwarding is None:
            self.disconnect("the server is shutting down")
        else:
            self._connection.pause_reading()
            self._clock.call_later(FINISH_S, lambda: self.disconnect("the server is shutting down"))

    def disconnect(self, reason: str) -> None:
        """Away: with all that is on its way."""
        if self._ended is None:
            return
        self._leave_there()
        self._connection.abort()
        self._end(reason)

    def drop_if_gone(self) -> None:
        """The client may have hung up while the other node took nothing: nobody was told."""
        if self._forwarding is not None and self._connection.has_hung_up():
            self.disconnect("it has hung up while the other node took nothing")

    def silent(self) -> None:
        """The process that it was or shall be forwarded to does not answer (keeping.py)."""
        assert self._there is not None
        if self._forwarding is not None:
            self.disconnect(f"{self._there.node} does not answer")
        else:
            self._not_there("it does not answer")

    def _end(self, reason: str) -> None:
        ended, self._ended = self._ended, None
        self._timer.cancel()
        if self._retry is not None:
            self._retry.cancel()
        if ended is not None:
            ended(reason)

    # --- who serves it ---

    def _ask_again(self) -> None:
        if self._ended is not None:
            self._attaching.ask(self.export, self._failed, self._answered)

    def _answered(self, answer: Answer) -> None:
        if self._ended is None:
            return
        if isinstance(answer, There):
            self._go(answer)
        else:
            self._come_back("" if isinstance(answer, Here) else f"{self.export} cannot be served now: {answer.reason}")

    def _too_late(self) -> None:
        self._leave_there()
        self._come_back(f"{self.export} cannot be served now: {self._reason} in {ATTACH_S:.0f} s")

    def _come_back(self, refusal: str) -> None:
        """Its session goes on here."""
        connection, received = self._connection, self._taken()
        self._end("")
        state = self._client.handshake
        client = replace(self._client, handshake=replace(state, received=state.received + received))
        session = self._attaching.server.arrive(connection, client, refusal)
        if session is None:
            connection.abort()
            return
        connection.redirect(session)
        connection.resume_reading()
        session.go_on()

    def _taken(self) -> bytes:
        """What has come in while it waited."""
        return bytes(self._room[: self._waiting_bytes])

    # --- to another node ---

    def _go(self, there: There) -> None:
        self._there = there
        network = self._attaching.network
        if network is None:
            self._not_there("this node does not speak to others yet")
            return
        self._number, keeping = self._attaching.keep(self, there.address, network)
        self._keeping = keeping

        def connected(connection: Connection) -> PeerStream:
            self._give_up = None
            stream = self._stream = PeerStream(connection, self._received_frame, lambda _, why: self._not_there(why))
            others = keeping.others(self)
            client = encode_handshaking(self._client)
            forwarder, node = self._attaching.forwarder, self._attaching.node
            stream.send(Forward(forwarder, self._number, node, self.export, others, client))
            return stream

        self._give_up = network.connect(there.address, connected, self._not_there)

    def _leave_there(self) -> None:
        """Drop what there is between here and the other node."""
        if self._give_up is not None:
            self._give_up()
        if self._stream is not None:
            self._stream.close()
        forwarding, self._forwarding = self._forwarding, None
        if forwarding is not None:
            forwarding.close()
        if self._keeping is not None:
            self._keeping.remove(self._number)
        self._give_up = self._stream = self._keeping = self._there = None

    def _not_there(self, reason: str) -> None:
        """That node does not take it: ask again, soon."""
        assert self._there is not None
        self._reason = f"{self._there.node}: {reason}"
        self._failed = (*self._failed, self._there.node)[-16:]
        self._leave_there()
        self._retry = self._clock.call_later(RETRY_S, self._ask_again)

    def _received_frame(self, stream: PeerStream, frame: Frame) -> None:
        if not isinstance(frame, Forwarded):
            self._not_there("it answers in a way that this program does not know")
        elif frame.refusal:
            self._not_there(frame.refusal)
        else:
            self._forward(*stream.give_away())

    def _forward(self, other: Connection, brought: bytes) -> None:
        self._timer.cancel()
        self._stream = None
        forwarding = self._forwarding = Forwarding(self._connection, other, self._over)
        other.redirect(forwarding.server_end)
        self._connection.redirect(forwarding.client_end)
        if self._waiting_bytes:
            other.send([self._taken()])
        if brought:
            self._connection.send([brought])
        self._connection.resume_reading()

    def _over(self, _forwarding: Forwarding) -> None:
        """One side has closed."""
        if self._forwarding is None:
            return  # we have
        assert self._there is not None
        node = self._there.node
        self._forwarding = None
        self._leave_there()
        self._end(f"it was forwarded to {node}, until one side closed the connection")

    # --- Receiver ---

    def buffer(self) -> memoryview:
        return self._room[self._waiting_bytes :]

    def received(self, size_bytes: int) -> None:
        self._waiting_bytes += size_bytes
        if self._waiting_bytes == WAITING_BYTES:
            self._connection.pause_reading()

    def drained(self) -> None:
        """Everything had been sent before it left its session."""

    def lost(self, reason: str) -> None:
        self._leave_there()
        self._end(reason)
