"""One client that is served by another node, or waits until it is known which.

Theory: the client waits in the middle of its handshake until it is known who serves its volume. To another node it goes
by a stream of its own, which begins with FORWARD and what the handshake has agreed on; after FORWARDED its requests are
carried there (carrying.py). When that node does not serve it any more (it died, hangs, has given the volume up), it is
asked again who does, and the client is carried on there: it sees a pause.

     asked ─► here: its session goes on in this process
           ─► there: connect, FORWARD ─► FORWARDED: carried ─► lost: asked again, for AGAIN_S
                                      ─► refused, or lost: asked again
           ─► nobody, or ATTACH_S are over: its session goes on here, where it is told why

Rules
- Nothing of a client that waits is lost: what it sends is kept, within bounds.
- A process that has not answered for FORWARD_S (keeping.py) is left, and drops the client too: what it was asked for it
  does not do later, when it was asked for again elsewhere.
- A client that has hung up is looked for at each beat, before what it has asked for is sent to another node, and before
  another one of its host is forwarded: while the other node takes nothing it is not heard of. What it has asked for and
  was not taken is dropped.
- A client goes on only with the same volume, with all that was acknowledged: the FORWARDED of the next node has to have
  the same `lineage`.
- It ends when no node has served it for AGAIN_S, or when what it asks for was sent TRIES times and never answered: what
  makes one node fail shall not go round.
- When this node owns the volume itself later, the client is carried to its own process: it may move again.
- One that was served in this process until this node lost the volume (`entered`) begins like one whose server was lost.

Known weakness: a client whose volume was renamed since it came asks for it by the old name, and is not carried on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from metadata.seams import Connection, Timer
from nbdserver.frontend.carrying import Carried
from nbdserver.frontend.keeping import Keeping
from nbdserver.frontend.session import ClientInfo
from nbdserver.frontend.unanswered import Entered
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.volume.peer import Peer
from nbdserver.volume.wanted import Wanted
from protocol.handover import HandshakingClient, encode_handshaking
from protocol.peer import Frame
from protocol.peer_clients import Forward, Forwarded

if TYPE_CHECKING:
    from nbdserver.frontend.attaching import Attaching

ATTACH_S = 15.0  # a takeover waits for a grant to run out, and for members that do not answer
AGAIN_S = 120.0
"""So long may a client be without a node that serves it: time for a machine to start again, and as long as Linux leaves
a task that waits for a disk without a word. Initiators of iSCSI wait as long."""
PATIENT_S = 1.5  # with an owner that is not silent: it moves its volume, or is started again
RETRY_S = 0.25
TRIES = 8
FINISH_S = 0.3
"""What was asked for is answered in this time, when this process ends."""


@dataclass(frozen=True)
class Here:
    """It is served by this node now, by the process at this address."""

    address: str


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


class AwayClient:
    """One client."""

    def __init__(
        self,
        attaching: "Attaching",
        connection: Connection,
        client: HandshakingClient,
        export: str,
        ended: Callable[[str], None],
        entered: Entered | None = None,
    ) -> None:
        self.export = export
        self.peer = Peer(client.peer_name, client.tls, client.certificate)
        self._attaching = attaching
        self._clock = attaching.clock
        self._connection = connection
        self._client = client
        self._ended: Callable[[str], None] | None = ended
        self._carried = Carried(self._clock, connection, client.handshake, self, entered)
        self._failed: tuple[str, ...] = ()
        self._there: There | None = None
        self._number = 0  # of it, for that node
        self._served_as = 0  # the number that it had where it was served last
        self._keeping: Keeping | None = None
        self._give_up: Callable[[], None] | None = None  # connecting
        self._stream: PeerStream | None = None
        self._begun_s: float | None = None  # when it began to be carried there
        self._lineage = 0  # of what it enters, or has entered
        self._waits_since_s: float | None = None  # for another node
        self._lost_at = ""  # the address of the owner that was lost
        self._entered_s = 0.0
        self._tries = 0
        self._answered_before = 0
        self._timer: Timer = self._clock.call_later(ATTACH_S if entered is None else AGAIN_S, self._too_late)
        self._retry: Timer | None = None
        self._reason = "no node has answered"
        connection.redirect(self._carried)
        connection.resume_reading()
        if entered is None:
            attaching.settle(self.peer, export, client.since_s, self._ask_again)
        else:
            self._lineage, self._served_as = entered.lineage, attaching.next_number()
            self._wait(attaching.node, "it does not serve the volume any more", 0.0)

    # --- Away ---

    def info(self) -> ClientInfo:
        """Away."""
        outstanding = self._carried.outstanding
        return ClientInfo(
            id=self._client.id,
            peer=self.peer,
            export=self.export,
            since_s=self._client.since_s,
            in_flight=len(outstanding) if outstanding is not None else 0,
            received_bytes=0,
            unsent_bytes=self._connection.unsent_bytes,
            requests=0,
            read_bytes=0,
            write_bytes=0,
            forwarded_to=self._there.node if self._there is not None else "",
        )

    def shut_down(self) -> None:
        """Away."""
        if not self._carried.has_server:
            self.disconnect("the server is shutting down")
        else:
            self._carried.take_no_more()
            self._clock.call_later(FINISH_S, lambda: self.disconnect("the server is shutting down"))

    def disconnect(self, reason: str) -> None:
        """Away: with all that is on its way."""
        if self._ended is not None:
            self._carried.close()
            self._end(reason)

    def drop_if_gone(self) -> None:
        """The client may have hung up while it was not read: nobody was told."""
        if self._connection.has_hung_up():
            self.disconnect("it has hung up while what it had asked for waited")

    def silent(self) -> None:
        """The process that it was or shall be forwarded to does not answer (keeping.py)."""
        assert self._there is not None
        node = self._there.node
        if self._begun_s is None and self._carried.outstanding is None:
            self._not_taken("it does not answer")
            return
        self._leave_server("it does not answer")
        self._failed = (node,)

    def not_there(self, since_s: float) -> None:
        """The process that it is forwarded to did not have it any more at some time after this one (keeping.py)."""
        if self._begun_s is not None and self._begun_s < since_s:
            self._leave_server("it has ended the connection, unheard")

    def _leave_server(self, reason: str) -> None:
        assert self._there is not None
        if self._carried.outstanding is None:
            self.disconnect(f"{self._there.node}: {reason}")
        else:
            self._carried.leave()
            self.server_lost(reason)

    def _end(self, reason: str) -> None:
        ended, self._ended = self._ended, None
        self._leave_there()
        self._timer.cancel()
        if self._retry is not None:
            self._retry.cancel()
        if ended is not None:
            ended(reason)

    # --- who serves it ---

    def _ask_again(self) -> None:
        self._retry = None
        self.drop_if_gone()
        if self._ended is not None:
            self._attaching.ask(self.export, self._failed, self._wanted(), self._answered)

    def _wanted(self) -> Wanted:
        """The owner that was lost, unless it was silent, has some time to be one again, or to give the volume to
        another."""
        if self._waits_since_s is None:
            return Wanted.ANEW
        if self._failed:
            return Wanted.AGAIN
        has_time = self._clock.now() - self._waits_since_s < PATIENT_S or self._attaching.returns(self._lost_at)
        return Wanted.SOON if has_time else Wanted.AGAIN

    def _answered(self, answer: Answer) -> None:
        if self._ended is None:
            return
        if isinstance(answer, There):
            self._go(answer)
        elif self._waits_since_s is None:
            self._come_back("" if isinstance(answer, Here) else f"{self.export} cannot be served now: {answer.reason}")
        elif isinstance(answer, Here):
            self._go(There(self._attaching.node, answer.address))
        else:
            self._reason = answer.reason
            self._ask_soon()

    def _ask_soon(self) -> None:
        self._retry = self._clock.call_later(RETRY_S, self._ask_again)

    def _too_late(self) -> None:
        if self._waits_since_s is not None:
            self.disconnect(f"no node has served {self.export} for {AGAIN_S:.0f} s: {self._reason}")
            return
        self._come_back(f"{self.export} cannot be served now: {self._reason} in {ATTACH_S:.0f} s")

    def _come_back(self, refusal: str) -> None:
        """Its session goes on here."""
        connection = self._connection
        client = replace(self._client, handshake=self._carried.give_back())
        self._end("")
        session = self._attaching.server.arrive(connection, client, refusal)
        if session is None:
            connection.abort()
            return
        connection.redirect(session)
        connection.resume_reading()
        session.go_on()

    # --- to another node ---

    def _go(self, there: There) -> None:
        self._there = there
        network = self._attaching.network
        if network is None:
            self._not_taken("this node does not speak to others yet")
            return
        self._number, keeping = self._attaching.keep(self, there.address, network)
        self._keeping = keeping

        def connected(connection: Connection) -> PeerStream:
            self._give_up = None
            stream = self._stream = PeerStream(connection, self._received_frame, lambda _, why: self._not_taken(why))
            others = keeping.others(self)
            client = replace(self._client, handshake=self._carried.state(), continues=self._served_as)
            forwarder, node = self._attaching.forwarder, self._attaching.node
            stream.send(Forward(forwarder, self._number, node, self.export, others, encode_handshaking(client)))
            return stream

        self._give_up = network.connect(there.address, connected, self._not_taken)

    def _leave_there(self) -> None:
        """Drop what there is between here and the other node, but for what is carried."""
        if self._give_up is not None:
            self._give_up()
        if self._stream is not None:
            self._stream.close()
        if self._keeping is not None:
            self._keeping.remove(self._number)
        self._give_up = self._stream = self._keeping = self._there = self._begun_s = None

    def _not_taken(self, reason: str) -> None:
        """That node does not take it: ask again, soon."""
        assert self._there is not None
        self._reason = f"{self._there.node}: {reason}"
        if self._waits_since_s is None:
            self._failed = (*self._failed, self._there.node)[-16:]
        else:
            self._failed = ()
        self._leave_there()
        self._ask_soon()

    def _received_frame(self, stream: PeerStream, frame: Frame) -> None:
        self.drop_if_gone()
        if self._ended is None:
            return
        if not isinstance(frame, Forwarded):
            self._not_taken("it answers in a way that this program does not know")
        elif frame.refusal and frame.is_final and self._waits_since_s is not None:
            self.disconnect(frame.refusal)
        elif frame.refusal:
            self._not_taken(frame.refusal)
        elif self._waits_since_s is not None and frame.lineage != self._lineage:
            self.disconnect(f"{self.export} is not what it was: acknowledged writes may be gone, or it was made anew")
        else:
            self._stream = None
            if self._waits_since_s is None:
                self._timer.cancel()  # its handshake has the time that it has there
            self._lineage, self._begun_s = frame.lineage, self._clock.now()
            self._carried.begin(*stream.give_away())

    # --- CarriedEvents ---

    def entered(self) -> None:
        self._timer.cancel()
        assert self._there is not None
        self._entered_s, self._served_as = self._clock.now(), self._number
        self._attaching.has_returned(self._there.address)
        if self._waits_since_s is not None:
            waited_s = self._entered_s - self._waits_since_s
            self._waits_since_s = None
            self._report("client-goes-on", node=self._there.node, waited_s=round(waited_s, 3))

    def server_lost(self, reason: str) -> None:
        assert self._there is not None
        if self._waits_since_s is not None:
            self._not_taken(reason)
            return
        node, self._lost_at = self._there.node, self._there.address
        self._leave_there()
        if not self._lineage:
            self.disconnect(f"{node} has dropped it, and its program does not let clients go on elsewhere: {reason}")
            return
        if self._is_in_vain():
            self.disconnect(f"what it asks for was sent {TRIES} times, and never answered; the last time: {reason}")
            return
        self._timer = self._clock.call_later(AGAIN_S, self._too_late)
        self._wait(node, reason, 0.0 if self._clock.now() - self._entered_s > RETRY_S else RETRY_S)

    def _wait(self, node: str, reason: str, ask_in_s: float) -> None:
        """It has no server from now on; that of this node was the last."""
        self._reason, self._failed, self._waits_since_s = f"{node}: {reason}", (), self._clock.now()
        self._report("client-waits", node=node, reason=reason)
        self._retry = self._clock.call_later(ask_in_s, self._ask_again)

    def _is_in_vain(self) -> bool:
        """Whether node after node was asked the same, and lost."""
        outstanding = self._carried.outstanding
        assert outstanding is not None
        is_vain = len(outstanding) > 0 and outstanding.answered == self._answered_before
        self._tries = self._tries + 1 if is_vain else 1
        self._answered_before = outstanding.answered
        return self._tries > TRIES

    def ended(self, reason: str) -> None:
        if self._ended is not None:
            self._end(reason)

    def _report(self, kind: str, **fields: object) -> None:
        self._attaching.server.report(
            kind, {"client": self._client.id, "peer": self.peer.name, "export": self.export, **fields}
        )
