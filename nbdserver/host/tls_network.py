"""The Network between the nodes of a cluster: streams are TLS with certificates on both sides, datagrams as they are.

Theory: one TCP address serves all that nodes say to each other (their data processes have others); the application
protocol that TLS agrees on (ALPN) says what a stream is for. Whoever has a certificate of the cluster's CA is a node of
the cluster; which of them it is, the protocol above proves with the cluster's key. So a certificate is verified against
the CA, not against an address: nodes move.

Rules
- A stream of nodes is delivered only when the other side has shown a certificate of the CA. Calls also come from a node
  that has none yet: `on_call` decides whom it answers.
- A handshake has HANDSHAKE_S, whatever the peer does; MOST_HANDSHAKES of those who connect are served at a time. What
  fails is told once, by `refused` and to who connects.
- Contexts are asked for at each stream, so that renewed certificates are for new streams.

Known weakness: a handshake runs on the loop, as in `tls.py`; nodes keep their streams.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from metadata.seams import CONNECT_TIMEOUT_S, Clock, Connection, Datagrams, Network, Receiver, Timer
from nbdserver.host.tls import INPUT_BYTES, TlsConnection, TlsError, server_context

HANDSHAKE_S = 5.0
MOST_HANDSHAKES = 128
STREAM_PROTOCOL = "nbdserver-directory"
CALL_PROTOCOL = "nbdserver-call"
DATA_PROTOCOL = "nbdserver-data"
LEAST_VERSION = ssl.TLSVersion.TLSv1_3

Accept = Callable[[Connection], Receiver | None]


@dataclass(frozen=True)
class PeerContexts:
    """A node's certificates, ready for use."""

    server: ssl.SSLContext
    client: ssl.SSLContext


def make_peer_contexts(ca: Path, certificate: Path, key: Path) -> PeerContexts:
    """Both ends' contexts of a node. TlsError."""
    return _make_contexts(ca, certificate, key, ssl.CERT_OPTIONAL, [STREAM_PROTOCOL, CALL_PROTOCOL])


def make_data_contexts(ca: Path, certificate: Path, key: Path) -> PeerContexts:
    """The same for streams between data processes."""
    return _make_contexts(ca, certificate, key, ssl.CERT_REQUIRED, [DATA_PROTOCOL])


def _make_contexts(ca: Path, certificate: Path, key: Path, verify: ssl.VerifyMode, taken: list[str]) -> PeerContexts:
    """Of who takes streams of these protocols, and offers those of the first."""
    server = server_context(LEAST_VERSION)
    _load(server, ca, certificate, key)
    server.verify_mode = verify
    server.set_alpn_protocols(taken)
    return PeerContexts(server, make_client_context(ca, certificate, key, taken[0]))


def make_client_context(ca: Path, certificate: Path, key: Path, protocol: str) -> ssl.SSLContext:
    """For streams of this protocol to other nodes. TlsError."""
    context = make_nameless_context(protocol)
    _load(context, ca, certificate, key)
    return context


def make_nameless_context(protocol: str) -> ssl.SSLContext:
    """For streams of this protocol to nodes, of who has no certificate and knows no CA yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = LEAST_VERSION
    context.check_hostname = False  # the CA signs nodes of this cluster and nobody else
    context.set_alpn_protocols([protocol])
    return context


def _load(context: ssl.SSLContext, ca: Path, certificate: Path, key: Path) -> None:
    for path in (ca, certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise TlsError(f"{path} cannot be read: {error.strerror}") from None
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise TlsError(f"{ca} has no certificate in PEM") from None
    try:
        context.load_cert_chain(certificate, key, password=b"")
    except ssl.SSLError:
        raise TlsError(f"{certificate} and {key} are not a certificate and its key in PEM without a password") from None


class TlsNetwork:
    """Streams over TLS on another Network."""

    def __init__(
        self,
        below: Network,
        clock: Clock,
        contexts: Callable[[], PeerContexts],
        refused: Callable[[str, str], None],
        on_call: Callable[[TlsConnection], Receiver | None],
        protocol: str = STREAM_PROTOCOL,
    ) -> None:
        """`refused(peer, reason)` is told of each stream that did not come to be; `on_call(connection)` takes the calls
        that come in, also those without a certificate. What is delivered are streams of `protocol`."""
        self._below = below
        self._clock = clock
        self._contexts = contexts
        self._refused = refused
        self._on_call = on_call
        self._protocol = protocol
        self._shared = memoryview(bytearray(INPUT_BYTES))
        self._handshakes = 0

    def open_datagrams(self, address: str, received: Callable[[str, bytes], None]) -> Datagrams:
        """As the seam says."""
        return self._below.open_datagrams(address, received)

    def listen(self, address: str, accept: Accept) -> Callable[[], None]:
        """As the seam says."""

        def accept_below(connection: Connection) -> Receiver | None:
            if self._handshakes >= MOST_HANDSHAKES:
                return None

            def arrived(stream: TlsConnection) -> Receiver | None:
                self._handshakes -= 1
                if stream.application_protocol == CALL_PROTOCOL:
                    return self._on_call(stream)
                if stream.application_protocol != self._protocol or not stream.certificate:
                    self._refused(stream.peer_name, "TLS: it shows no certificate of this cluster's CA")
                    return None
                return accept(stream)

            def failed(reason: str) -> None:
                self._handshakes -= 1
                self._refused(connection.peer_name, reason)

            self._handshakes += 1

            return _Handshake(
                self._clock, connection, self._contexts().server, True, self._shared, arrived, failed
            ).stream

        return self._below.listen(address, accept_below)

    def connect(
        self,
        address: str,
        connected: Accept,
        failed: Callable[[str], None],
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Callable[[], None]:
        """As the seam says."""
        handshakes: list[_Handshake] = []

        def failed_above(reason: str) -> None:
            if "certificate" in reason.lower():
                self._refused(address, reason)
            failed(reason)

        def connected_below(connection: Connection) -> Receiver | None:
            handshake = _Handshake(
                self._clock, connection, self._contexts().client, False, self._shared, connected, failed_above
            )
            handshakes.append(handshake)
            return handshake.stream

        stop_connecting = self._below.connect(address, connected_below, failed, timeout_s)

        def give_up() -> None:
            stop_connecting()
            for handshake in handshakes:
                handshake.give_up()

        return give_up


class _Handshake:
    """A stream until both sides have shown who they are; the Receiver of what goes wrong before."""

    def __init__(
        self,
        clock: Clock,
        connection: Connection,
        context: ssl.SSLContext,
        is_server: bool,
        shared: memoryview,
        arrived: Callable[[TlsConnection], Receiver | None],
        failed: Callable[[str], None],
    ) -> None:
        self._arrived = arrived
        self._failed = failed
        self._is_over = False
        self._timer: Timer = clock.call_later(HANDSHAKE_S, self._too_late)
        self.stream = TlsConnection(connection, context, self, shared, clock.call_soon, is_server=is_server)
        self.stream.begin(self._established, lambda: None)

    def _established(self) -> None:
        self._end()
        receiver = self._arrived(self.stream)
        if receiver is None:
            self.stream.close()
        else:
            self.stream.redirect(receiver)

    def _too_late(self) -> None:
        self.lost(f"TLS: no handshake in {HANDSHAKE_S:g} s")
        self.stream.abort()

    def give_up(self) -> None:
        """Nothing is called any more, unless the stream has arrived."""
        if not self._is_over:
            self._end()
            self.stream.abort()

    def _end(self) -> None:
        self._is_over = True
        self._timer.cancel()

    # --- the Receiver, before there is another one ---

    def buffer(self) -> memoryview:
        raise AssertionError("nothing is delivered before the handshake has ended")

    def received(self, size_bytes: int) -> None:
        raise AssertionError("nothing is delivered before the handshake has ended")

    def drained(self) -> None:
        pass

    def lost(self, reason: str) -> None:
        if not self._is_over:
            self._end()
            self._failed(reason)
