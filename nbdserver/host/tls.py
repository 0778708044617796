"""TLS over a connection: another Connection, which its session uses in the place of the one below.

Theory: OpenSSL turns bytes into bytes, from one `MemoryBIO` into another; the socket below stays where it is. What has
arrived is decrypted straight into the receiver's buffer, as much as fits, and delivered as one batch; a batch of
replies is joined, encrypted and sent with one call of the connection below. A connection that is not encrypted knows
nothing of this module.

Rules
- Clear text that arrived behind the request for TLS never gets here: the handshake of NBD has closed the connection.
- Bounds: a handshake has `HANDSHAKE_LIMIT_BYTES` (and the time that its session gives it). What arrives is worked off
  for `TURN_S` at a time, and while anything is left, nothing more is read. `unsent_bytes` are those of the connection
  below.
- Records without data (a change of keys costs some 15 µs and has 27 bytes) take time from nobody else: OpenSSL works
  off all that it is given, so it is given slices, which are large only for who sends data in them. Who sends
  `USELESS_LIMIT_BYTES` of such records is disconnected; each byte of data pays for `DATA_WORTH` of them.
- Whatever is wrong with a peer's bytes ends its connection alone, with the alert that TLS has for it.
- No renegotiation, no session tickets: each connection shows its certificate.
- A name counts only if the certificate was verified against the clients' CA.
- New certificates are for new connections; those that cannot be used leave the old ones in force.

Known weakness: the handshake runs on the loop: some 0.6 ms with the keys that `nbdserver cert` makes, 1.8 ms with RSA
of 2048 bits. There is no way for another process to go on with such a connection.
"""

import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from metadata.seams import Buffer, Connection, Receiver

HANDSHAKE_LIMIT_BYTES = 128 << 10  # a chain of certificates is some KiB
INPUT_BYTES = 256 << 10  # received at once
LEAST_SLICE_BYTES, MOST_SLICE_BYTES = 2 << 10, 32 << 10  # at once into OpenSSL
RECORD_BYTES = 17 << 10  # the largest: slices that bring no data may be parts of one
TURN_S = 2e-3
USELESS_LIMIT_BYTES = 64 << 10  # a record has 16 KiB, and arrives in pieces
DATA_WORTH = 64
WRITE_BYTES = 64 << 10  # encrypted at once: four records; OpenSSL's buffer gets no larger

Established = Callable[[str, str], None]
"""Called with version and cipher, and the name in the verified certificate or "", before the first byte; the receiver's
`lost` is called if it does not come to that."""

Secure = Callable[[Connection, Receiver, Established], Connection]
"""Puts TLS over a connection, for its receiver."""


class TlsError(Exception):
    """Certificates that cannot be used; one line."""


class Tls:
    """What the connections of a loop share, and how many handshakes there were."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """`call_soon` of the loop that the connections live on."""
        self.handshakes = 0
        self.failures = 0
        self._call_soon = call_soon
        self._input = memoryview(bytearray(INPUT_BYTES))  # of all: nothing stays in it

    def with_certificates(self, context: ssl.SSLContext) -> Secure:
        """What makes TLS with these certificates over a connection, as its server."""

        def secure(below: Connection, receiver: Receiver, established: Established) -> Connection:
            connection = TlsConnection(below, context, receiver, self._input, self._call_soon)
            connection.begin(lambda: self._done(connection, established), self._failed)
            return connection

        return secure

    def _done(self, connection: "TlsConnection", established: Established) -> None:
        self.handshakes += 1
        established(connection.cipher, connection.certificate)

    def _failed(self) -> None:
        self.failures += 1


def make_context(certificate: Path, key: Path, client_ca: Path | None, verify_clients: bool) -> ssl.SSLContext:
    """A server's certificate with its key, and the CA of its clients, whose certificates are asked for if there is one
    and demanded if `verify_clients`. TlsError."""
    for what, path in (("certificate", certificate), ("key", key), ("client_ca", client_ca)):
        if path is not None:
            _check_readable(what, path)
    context = server_context(ssl.TLSVersion.TLSv1_2)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(
                f"tls.key: {key} is not the key of {certificate}; name the two that belong together"
            ) from None
        raise TlsError(
            f"tls.certificate, tls.key: {certificate} and {key} are not a certificate and its key in PEM without a"
            f" password ({_reason(error)}); make them with: nbdserver cert node"
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise TlsError(f"tls.client_ca: {client_ca} has no certificate in PEM ({_reason(error)})") from None
        context.verify_mode = ssl.CERT_REQUIRED if verify_clients else ssl.CERT_OPTIONAL
    return context


def server_context(least: ssl.TLSVersion) -> ssl.SSLContext:
    """A server's, without certificates yet: no renegotiation, no session tickets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = least
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def _check_readable(what: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise TlsError(f"tls.{what}: {path} cannot be read: {error.strerror}") from None


def _no_password() -> str:
    raise ssl.SSLError(1, "it has a password")


class TlsConnection:
    """One end of TLS: a Connection to its receiver, and the Receiver of the connection below."""

    def __init__(
        self,
        below: Connection,
        context: ssl.SSLContext,
        receiver: Receiver,
        shared: memoryview,
        call_soon: Callable[[Callable[[], None]], object],
        is_server: bool = True,
    ) -> None:
        """`shared` is memory that nothing stays in: what is not used at once is copied out of it."""
        self.peer_name = below.peer_name
        self.cipher = ""
        self.certificate = ""
        self.application_protocol = ""
        """What both sides agreed on (ALPN), if they did."""
        self._is_server = is_server
        self._below = below
        self._receiver: Receiver | None = receiver
        self._shared = shared
        self._call_soon = call_soon
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self._established: Callable[[], None] | None = None
        self._failed: Callable[[], None] | None = None
        self._handshake_bytes = 0
        self._input = memoryview(b"")  # received, not given to OpenSSL yet
        self._slice_bytes = LEAST_SLICE_BYTES
        self._given_bytes = 0  # the last slice
        self._without_data_bytes = 0  # the slices since the last one that brought data
        self._useless_bytes = 0
        self._reading = True
        self._paused_below = False
        self._scheduled = False

    def begin(self, established: Callable[[], None], failed: Callable[[], None]) -> None:
        """Take the place of the receiver of the connection below; one of the two is called, once."""
        self._established, self._failed = established, failed
        self._below.redirect(self)
        if not self._is_server:
            self._go_on_with_handshake()  # the client speaks first

    # --- Connection ---

    @property
    def spins(self) -> bool:
        return self._below.spins

    @spins.setter
    def spins(self, spins: bool) -> None:
        self._below.spins = spins

    @property
    def unsent_bytes(self) -> int:
        return self._below.unsent_bytes

    def send(self, buffers: Sequence[Buffer]) -> None:
        if self._receiver is None:
            return
        view = memoryview(buffers[0] if len(buffers) == 1 else b"".join(buffers))
        write, outgoing = self._tls.write, self._outgoing
        pieces: list[Buffer] = []
        position, size_bytes = 0, len(view)
        try:
            while position < size_bytes:
                position += write(view[position : position + WRITE_BYTES])
                if outgoing.pending >= WRITE_BYTES:
                    pieces.append(outgoing.read())
        except ssl.SSLError as error:
            reason = f"TLS: {_reason(error)}"
            self._call_soon(lambda: self._end(reason))  # never from inside `send`
            return
        if outgoing.pending:
            pieces.append(outgoing.read())
        self._below.send(pieces)

    def at_round_end(self, callback: Callable[[], None]) -> None:
        self._below.at_round_end(callback)  # a round below brings the receiver one delivery; a turn of our own is none

    def pause_reading(self) -> None:
        self._reading = False
        self._watch(False)

    def resume_reading(self) -> None:
        self._reading = True
        if self._receiver is not None and not self._scheduled:
            self._schedule()  # something may be left that is decrypted without another byte

    def has_hung_up(self) -> bool:
        return not self._reading and self._below.has_hung_up()

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver = None
            self._say_that_it_ends()
            self._below.close()
            self._forget()

    def abort(self) -> None:
        self._receiver = None
        self._below.abort()
        self._forget()

    def detach(self) -> None:
        return None

    def redirect(self, receiver: Receiver) -> None:
        self._receiver = receiver

    # --- Receiver ---

    def buffer(self) -> memoryview:
        return self._shared

    def received(self, size_bytes: int) -> None:
        self._input = self._shared[:size_bytes]
        self._go_on()
        if self._input:
            self._input = memoryview(bytes(self._input))

    def drained(self) -> None:
        if self._receiver is not None:
            self._receiver.drained()

    def lost(self, reason: str) -> None:
        self._end(reason)

    # --- working off what has arrived ---

    def _go_on(self) -> None:
        """Decrypt into the receiver's buffer and deliver it, once; the rest in another turn of the loop."""
        receiver = self._receiver
        if receiver is None:
            return
        if self._established is not None:
            self._go_on_with_handshake()
            return
        if not self._reading:
            return
        size_bytes, dry, end = self._decrypt(receiver.buffer())
        if self._outgoing.pending:
            self._below.send([self._outgoing.read()])
        if size_bytes:
            receiver.received(size_bytes)
        if end:
            self._end(end)
        elif self._receiver is None:
            return
        elif dry:
            self._watch(self._reading)
        else:
            self._watch(False)
            if self._reading:
                self._schedule()

    def _decrypt(self, room: memoryview) -> tuple[int, bool, str]:
        """Fill `room`: (bytes in it, whether nothing is left to decrypt, why the connection ends or "")."""
        read, incoming = self._tls.read, self._incoming
        position, size_bytes = 0, len(room)
        judged = 0
        stop_s = 0.0
        while position < size_bytes:
            try:
                got_bytes = read(size_bytes - position, room[position:])
            except ssl.SSLWantReadError:
                if self._is_useless(position - judged):
                    return position, True, "TLS: records without data"
                judged = position
                if not self._input:
                    return position, True, ""
                if not stop_s:
                    stop_s = monotonic() + TURN_S
                elif monotonic() >= stop_s:
                    break
                self._given_bytes = incoming.write(self._input[: self._slice_bytes])
                self._input = self._input[self._given_bytes :]
                continue
            except ssl.SSLError as error:
                return position, True, f"TLS: {_reason(error)}"
            if not got_bytes:
                return position, True, "the client closed the connection"
            position += int(got_bytes)
        return position, False, ""

    def _is_useless(self, data_bytes: int) -> bool:
        """The last slice brought so much data: judge the peer, and how large the next slice is."""
        given_bytes, self._given_bytes = self._given_bytes, 0
        if not given_bytes:
            return False
        self._without_data_bytes += given_bytes
        if 2 * data_bytes >= self._without_data_bytes:
            self._slice_bytes = min(2 * self._slice_bytes, MOST_SLICE_BYTES)
        elif data_bytes or self._without_data_bytes > RECORD_BYTES:
            self._slice_bytes = max(self._slice_bytes // 2, LEAST_SLICE_BYTES)
        if data_bytes:
            self._without_data_bytes = 0
        self._useless_bytes = max(0, self._useless_bytes + given_bytes - DATA_WORTH * data_bytes)
        return self._useless_bytes > USELESS_LIMIT_BYTES

    def _go_on_with_handshake(self) -> None:
        """All of the input goes in at once: it is bounded."""
        self._handshake_bytes += len(self._input)
        self._incoming.write(self._input)
        self._input = memoryview(b"")
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            if self._outgoing.pending:
                self._below.send([self._outgoing.read()])
            if self._handshake_bytes > HANDSHAKE_LIMIT_BYTES:
                self._end(f"TLS: more than {HANDSHAKE_LIMIT_BYTES >> 10} KiB of handshake")
            return
        except ssl.SSLError as error:
            self._end(f"TLS: {_reason(error)}")
            return
        established, self._established = self._established, None
        self._failed = None
        cipher = self._tls.cipher()
        self.cipher = f"{self._tls.version()} {cipher[0] if cipher else ''}"
        self.certificate = certificate_name(self._tls.getpeercert() or {})
        self.application_protocol = self._tls.selected_alpn_protocol() or ""
        if self._outgoing.pending:
            self._below.send([self._outgoing.read()])
        if established is not None:
            established()
        self._go_on()  # what came along with the end of the handshake

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        self._go_on()

    def _watch(self, wanted: bool) -> None:
        if wanted and self._paused_below:
            self._paused_below = False
            self._below.resume_reading()
        elif not wanted and not self._paused_below:
            self._paused_below = True
            self._below.pause_reading()

    # --- ending ---

    def _end(self, reason: str) -> None:
        """Close, with what TLS has to say about it, and tell the receiver."""
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        self._say_that_it_ends()
        self._below.close()
        self._forget()
        receiver.lost(reason)

    def _say_that_it_ends(self) -> None:
        """Send the alert of a failure, or close_notify."""
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError):
            pass  # it does not wait for the peer's
        if self._outgoing.pending:
            self._below.send([self._outgoing.read()])

    def _forget(self) -> None:
        """No cycle stays; a handshake that did not end has failed."""
        failed, self._established, self._failed = self._failed, None, None
        self._input = memoryview(b"")
        if failed is not None:
            failed()


def certificate_name(certificate: dict[str, Any]) -> str:
    """The subject's common name, or the first DNS name, of what `getpeercert` returns."""
    names = [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]
    names += [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    return str(names[0]) if names else ""


def _reason(error: ssl.SSLError) -> str:
    """What OpenSSL calls it, readable."""
    verify = getattr(error, "verify_message", "")
    reason = (error.reason or str(error.args[-1])).replace("_", " ").lower()
    return f"{reason}: {verify}" if verify else reason
