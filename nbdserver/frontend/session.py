"""One NBD client: the handshake, then the requests, over a connection.

Theory: a session is the Receiver of its connection. It owns the receive buffer and has two phases: bytes go to
`Handshake`, and after an agreement to `Transmission`. It knows its export from the agreement until the connection is
gone.

A session whose handshake names an export of another process or node leaves: `leaves` takes its connection and what it
agreed on to where the handshake goes on (`HandshakingClient`), and a session is made of it there by `arrived`. It comes
back, with a `refusal`, if there is no node that serves it.

Rules
- The handshake, that of TLS included, has `HANDSHAKE_TIMEOUT_S`; replies that the peer does not take stop it from being
  answered. With TLS the connection is replaced by one that encrypts; nothing else changes.
- Whatever ends the connection, `_gone` runs exactly once: the export forgets the session, the server is told.
- When another node serves its export from now on it *leaves*, with what was not answered, and its client goes on there.
- A session in transmission can be *frozen*: it stands still between two of its requests, and `hand_over` turns it into
  its state, from which another process makes a session that goes on. The peer sees a pause.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from metadata.seams import Clock, Connection, Receiver, Timer
from nbdserver.frontend.receive_buffer import NORMAL_BYTES, ReceiveBuffer
from nbdserver.frontend.transmission import UNSENT_LIMIT_BYTES, Transmission
from nbdserver.frontend.unanswered import Entered
from nbdserver.volume.admission import Admission, TlsMode
from nbdserver.volume.counters import Counters
from nbdserver.volume.export import Elsewhere, Export, ExportError, Exports, volume_of
from nbdserver.volume.peer import Peer
from protocol.agreement import Agreement, ElsewhereError, Offer, OptionRefusedError
from protocol.handover import ClientState, HandshakingClient
from protocol.handshake import Close, Enter, GoElsewhere, Handshake, HandshakeState, Reply, StartTls
from protocol.nbd import OptionReply

HANDSHAKE_TIMEOUT_S = 10.0  # anew in each process that it goes on in
HANDSHAKE_BUFFER_BYTES = 4 << 10  # who only connects costs no more than this

Secure = Callable[[Connection, Receiver, Callable[[str, str], None]], Connection]
"""`Secure` of host/tls.py."""


Unsettled = Callable[[Peer, str, float], bool]
"""Whether another connection of this host to this volume, which came by way of another node, may have been given up
before the one that came here at this time, and nobody has told us."""

GoesOn = Callable[["Session"], bool]
"""Takes a session's client (`leave`) to the node that serves its export from now on; False if that cannot be."""

Leaves = Callable[["Session", Connection, HandshakingClient, GoElsewhere], None]
"""Gets a session, its connection, which has sent everything, what goes on with it, and where."""


@dataclass(frozen=True)
class ClientInfo:
    """What is shown of a client."""

    id: int
    peer: Peer
    export: str  # "" during the handshake
    since_s: float  # Clock.now when it connected
    in_flight: int  # requests that wait for the device
    received_bytes: int
    unsent_bytes: int
    requests: int
    read_bytes: int
    write_bytes: int
    forwarded_to: str = ""  # the node that serves it, if that is another one


class Session:
    """A client's connection. Also the Offers of its handshake and the ExportSession of its export."""

    def __init__(
        self,
        session_id: int,
        connection: Connection,
        clock: Clock,
        exports: Exports,
        gone: Callable[["Session", str], None],
        resumed: ClientState | None = None,
        secure: Secure | None = None,
        arrived: HandshakingClient | None = None,
        leaves: Leaves | None = None,
        refusal: str = "",
        via: str = "",
        unsettled: Unsettled | None = None,
        goes_on: GoesOn | None = None,
    ) -> None:
        """`gone(session, reason)` is called once, when the connection is closed or lost; not when it `leaves`. Without
        `secure` there is no TLS, without `leaves` there is no other process. A `refusal` answers whoever asks for an
        export of another node. `via` is the node that it has come to, if that is another one. Who is `unsettled` leaves
        before it enters its export, as if that were another node's. `goes_on` is asked when its export moves.

        With `resumed` it begins in the transmission phase (OptionRefusedError if its export does not have it any
        more), and serves once `resume` is called. With `arrived` it begins in the handshake, and goes on when `go_on`
        is called.
        """
        self.id = session_id
        self.frozen = False
        self.continues = arrived is not None and arrived.continues > 0
        """Whether its client has used the export before, elsewhere."""
        self.is_dismissed = False
        """Whether the operator has disconnected it: whoever has brought it shall not do so again."""
        self.peer = Peer(connection.peer_name)
        self.export: Export | None = None
        self.counters = Counters()
        self._connection = connection
        self._clock = clock
        self._exports = exports
        self._report_gone = gone
        self._leaves = leaves
        self._refusal = refusal
        self._unsettled = unsettled
        self._goes_on = goes_on
        self._secure = secure
        self._since_s = clock.now()
        self._received_bytes = 0
        self._buffer = ReceiveBuffer(HANDSHAKE_BUFFER_BYTES)
        self._handshake: Handshake | None = None
        self._transmission: Transmission | None = None
        self._agreement: Agreement | None = None
        self._handshake_paused = False
        self._going: GoElsewhere | None = None  # once the peer has taken every reply
        self._over = False
        self._timeout: Timer | None = None
        if arrived is not None:
            self.peer = Peer(arrived.peer_name, arrived.tls, arrived.certificate, via)
            self._since_s = arrived.since_s
            self._handshake = Handshake.resume(self, arrived.handshake, secure is not None, bool(arrived.tls))
            self._timeout = clock.call_later(HANDSHAKE_TIMEOUT_S, self._handshake_timed_out)
        elif resumed is None:
            tls = exports.tls(self.peer)
            offered = secure is not None and tls is not TlsMode.OFF
            self._handshake = Handshake(self, offered, tls is TlsMode.REQUIRED)
            self._timeout = clock.call_later(HANDSHAKE_TIMEOUT_S, self._handshake_timed_out)
            connection.send([self._handshake.greeting()])
        else:
            self._since_s = resumed.since_s
            self.enter(resumed.agreement.offer.name)
            self._transmit(resumed.agreement, resumed.received)

    def info(self) -> ClientInfo:
        """For those who list clients."""
        return ClientInfo(
            id=self.id,
            peer=self.peer,
            export=self.export.name if self.export is not None else "",
            since_s=self._since_s,
            in_flight=self._transmission.in_flight if self._transmission is not None else 0,
            received_bytes=self._received_bytes,
            unsent_bytes=self._connection.unsent_bytes,
            requests=self.counters.requests,
            read_bytes=self.counters.read_bytes,
            write_bytes=self.counters.write_bytes,
        )

    @property
    def is_over(self) -> bool:
        """Whether its connection is gone, or given away."""
        return self._over

    def has_hung_up(self) -> bool:
        """Whether the client has closed its connection while that is not read."""
        return self._transmission is not None and self._connection.has_hung_up()

    def disconnect(self, reason: str) -> None:
        """Drop the connection now; waiting requests run to their end unanswered."""
        if not self._over:
            self._connection.abort()
            self._gone(reason)

    def shut_down(self) -> None:
        """Finish what was taken, then close."""
        if self._transmission is not None:
            self._transmission.shut_down()
        else:
            self._close("the server is shutting down")

    # --- handing over ---

    def freeze(self, frozen: Callable[[], None]) -> None:
        """Finish what was taken and stand still, then `frozen()`; in the handshake: close."""
        if self._transmission is None:
            self._close("the server hands over clients that have entered an export, not those in the handshake")
            return

        def stands_still() -> None:
            self.frozen = True
            frozen()

        self._transmission.freeze(stands_still)

    def hand_over(self) -> tuple[int, ClientState] | None:
        """Leave, once frozen: (descriptor, state) for another process to go on with. None if that cannot be: a TLS
        session stays in its process, whether that is this one or another, and the other node of one that has come to
        it has to bring it again."""
        if not self.frozen or self._over or self._transmission is None or self._agreement is None:
            return None
        if self.peer.tls or self.peer.via:
            return None
        assert self.export is not None
        # By the name that it has now: it may have been renamed since the handshake.
        offer = replace(self._agreement.offer, name=self.export.name)
        detached = self._connection.detach()
        if detached is None:
            return None
        descriptor, cookie, unsent = detached
        state = ClientState(
            cookie=cookie,
            id=self.id,
            since_s=self._since_s,
            agreement=replace(self._agreement, offer=offer),
            skip_bytes=self._transmission.skip_bytes,
            received=bytes(self._buffer.view[self._buffer.start : self._buffer.end]),
            unsent=unsent,
        )
        self._leave()
        return descriptor, state

    def moved(self, reason: str) -> None:
        """ExportSession: another node serves the export from now on."""
        if not self._over and (self._goes_on is None or not self._goes_on(self)):
            self.disconnect(reason)

    def leave(self) -> tuple[Connection, HandshakingClient, Entered] | None:
        """Leave for good, with what was not answered: for another server to go on with. None if that cannot be."""
        transmission, agreement, export = self._transmission, self._agreement, self.export
        if self._over or self.frozen or transmission is None or agreement is None or export is None:
            return None
        if not export.lineage or (received := transmission.leave()) is None:
            return None
        agreement = replace(agreement, offer=replace(agreement.offer, name=export.name))
        entered = Entered(agreement, export.lineage, received, transmission.skip_bytes)
        self._leave()
        return self._connection, self._client(HandshakeState.before(agreement)), entered

    def _client(self, state: HandshakeState) -> HandshakingClient:
        """It, where its handshake goes on from this state."""
        peer = self.peer
        return HandshakingClient(self.id, self._since_s, peer.name, peer.tls, peer.certificate, state)

    def resume(self, state: ClientState) -> None:
        """Serve, where another process stopped."""
        if self._transmission is not None:
            self._transmission.resume(state.skip_bytes, state.unsent)

    def go_on(self) -> None:
        """Go on with the handshake that arrived."""
        self._go_on_with_handshake()

    # --- Receiver ---

    def buffer(self) -> memoryview:
        return self._buffer.room()

    def received(self, size_bytes: int) -> None:
        self._received_bytes += size_bytes
        self._buffer.end += size_bytes
        if self._transmission is not None:
            self._transmission.received()
        else:
            self._go_on_with_handshake()

    def drained(self) -> None:
        if self._transmission is not None:
            self._transmission.drained()
        elif self._handshake_paused and not self._over:
            self._handshake_paused = False
            if self._going is not None:
                self._go_elsewhere(self._going)
                return
            self._go_on_with_handshake()
            if not self._handshake_paused and not self._over:
                self._connection.resume_reading()

    def lost(self, reason: str) -> None:
        self._gone(reason)

    # --- handshake ---

    def _go_on_with_handshake(self) -> None:
        handshake, buffer = self._handshake, self._buffer
        if handshake is None or self._over or self._handshake_paused:
            return
        handshake.receive(buffer.view[buffer.start : buffer.end])
        buffer.used(buffer.end)
        while (event := handshake.next_event()) is not None:
            if event.data:
                self._connection.send([event.data])
            if isinstance(event, Enter):
                self._enter(event, handshake.leftover())
                return
            if isinstance(event, Close):
                self._close(event.reason)
                return
            if isinstance(event, GoElsewhere):
                self._go_elsewhere(event)
                return
            if isinstance(event, StartTls):
                assert self._secure is not None
                self._connection = self._secure(self._connection, self, self._secured)
                return
            if isinstance(event, Reply) and self._connection.unsent_bytes > UNSENT_LIMIT_BYTES:
                self._handshake_paused = True
                self._connection.pause_reading()
                return

    def _go_elsewhere(self, going: GoElsewhere) -> None:
        """The handshake stands before an option that another process or node answers."""
        self._going = going
        if self._connection.unsent_bytes:
            self._handshake_paused = True
            self._connection.pause_reading()
            return
        assert self._handshake is not None
        assert self._leaves is not None
        client = self._client(self._handshake.leave())
        self._leave()
        self._leaves(self, self._connection, client, going)

    def _secured(self, tls: str, certificate: str) -> None:
        """The TLS handshake has ended well."""
        if self._handshake is not None:
            self.peer = self.peer.over_tls(tls, certificate)
            self._handshake.tls_established()

    def _enter(self, event: Enter, leftover: bytes) -> None:
        if self.export is None or self._over:
            return
        if self._timeout is not None:
            self._timeout.cancel()
        self._handshake = None
        self._transmit(event.agreement, leftover).process()

    def _transmit(self, agreement: Agreement, received: bytes) -> Transmission:
        """Begin the transmission phase of an export that was entered."""
        assert self.export is not None
        self._agreement = agreement
        self._buffer.reserve(NORMAL_BYTES)
        self._buffer.put(received)
        self._transmission = Transmission(
            self._connection, self._clock, self.export, agreement, self._buffer, self.counters, self._close
        )
        return self._transmission

    def _handshake_timed_out(self) -> None:
        self.disconnect(f"no export was entered in {HANDSHAKE_TIMEOUT_S:.0f} s")

    # --- Offers ---

    def list(self) -> Iterable[tuple[str, str]]:
        return [(export.name, export.description) for export in self._exports.visible(self.peer)]

    def offer(self, name: str) -> Offer:
        return self._offer_of(self._find(name))

    def bitmaps(self, name: str) -> Mapping[str, int]:
        return self._find(name).device.bitmaps()

    def enter(self, name: str) -> Offer:
        export = self._find(name)
        volume = volume_of(export.name)
        if self._unsettled is not None and self._unsettled(self.peer, volume, self._since_s):
            raise ElsewhereError(None, volume)  # it comes back when that is settled
        try:
            export.enter(self)
        except ExportError as error:
            raise OptionRefusedError(OptionReply.ERR_POLICY, str(error)) from error
        self.export = export
        return self._offer_of(export)

    def _find(self, name: str) -> Export:
        export = self._exports.find(name) if name else self._exports.default(self.peer)
        admission = Admission.NO if export is None else export.admits(self.peer)
        if admission is Admission.NEEDS_TLS:
            raise OptionRefusedError(OptionReply.ERR_TLS_REQD, f"{name} is used over TLS only")
        if admission is Admission.NOT_OVER_TLS:
            raise OptionRefusedError(OptionReply.ERR_POLICY, f"{name} is not used over TLS")
        if export is None or admission is Admission.NO:
            wanted = f"there is no export {name!r}" if name else "there is no default export: name one"
            raise OptionRefusedError(OptionReply.ERR_UNKNOWN, wanted)
        if isinstance(export, Elsewhere):
            if export.worker is None and self._refusal:
                raise OptionRefusedError(OptionReply.ERR_UNKNOWN, self._refusal)
            raise ElsewhereError(export.worker, export.name)
        return export

    def _offer_of(self, export: Export) -> Offer:
        return Offer(export.name, export.device.size_bytes, export.read_only, export.description)

    # --- ending ---

    def _close(self, reason: str) -> None:
        """Close after what was sent has left."""
        if not self._over:
            self._connection.close()
            self._gone(reason)

    def _gone(self, reason: str) -> None:
        if not self._over:
            self._leave()
            self._report_gone(self, reason)

    def _leave(self) -> None:
        self._over = True
        if self._timeout is not None:
            self._timeout.cancel()
        if self._transmission is not None:
            self._transmission.lost()
        self._handshake = self._transmission = None  # they refer back to the session: no cycle stays
        if self.export is not None:
            self.export.leave(self)
