"""The server's side of the fixed newstyle handshake: bytes in, events out.

Theory: a state machine as a table (`TRANSITIONS`). Bytes are put in with `receive`; `next_event` then returns one
event at a time, or None when it needs more bytes. A move that is missing from the table is a violation by the peer:
the connection closes. (`_move` treats one as our own fault: everything that a peer can do has its move.) One call
handles at most one option, so the caller can stop asking while its client does not take the replies. What exports
there are, and who may enter them, is asked of `Offers`; refusals are `OptionRefusedError`.

Rules
- Every option but EXPORT_NAME gets a final reply; an option that is unknown, too long or malformed gets an error and
  is skipped to its last byte, so that the stream stays in step.
- What an option negotiated counts only if the option succeeded; a failed SET_META_CONTEXT clears the contexts.
  Which contexts there are, and what selects them: contexts.py.
- An export may live in another process or node (`ElsewhereError`). The handshake then stands before the option that
  names it, which nobody has answered: its `HandshakeState` is all that is needed there to go on.
- After TLS starts, nothing negotiated before it counts, and bytes that were sent before it are an attack: the
  connection closes. Where TLS is required, nothing but STARTTLS and ABORT is done before it.

Known weakness: a client may pipeline options, which the protocol forbids; they are answered in order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from construct import ConstructError

from protocol import nbd
from protocol.agreement import (
    Agreement,
    ElsewhereError,
    Offer,
    Offers,
    OptionRefusedError,
    ReplyStyle,
    transmission_flags,
)
from protocol.contexts import Context, listed, needs_bitmaps, selected
from protocol.invariant import InvariantError, invariant
from protocol.nbd import HandshakeFlag, Info, Option, OptionReply

OPTION_LIMIT_BYTES = 64 << 10  # a name, a list of queries: more than any client sends, less than a receive buffer
OPTION_LIMIT = 1024  # options a connection; a client that lists and asks about each export opens a connection for each
QUERY_LIMIT = 64  # queries in one LIST_META_CONTEXT or SET_META_CONTEXT

# As an int: the complement of a flag enum holds only the bits that have a name.
_CLIENT_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


class State(Enum):
    """Where a handshake stands."""

    CLIENT_FLAGS = "awaits the client's flags"
    OPTION = "awaits an option"
    OPTION_DATA = "awaits an option's data"
    SKIP = "skips a refused option's data"
    TLS = "awaits the end of the TLS handshake"
    TRANSMISSION = "handed over to transmission"
    ELSEWHERE = "goes on in another process or node"
    CLOSED = "closed"


class Move(Enum):
    """What makes a handshake go on."""

    FLAGS_AGREED = "flags agreed"
    HEADER = "option header"
    HEADER_TOO_BIG = "option header, length over the bound"
    ANSWERED = "answered"
    SKIPPED = "last byte skipped"
    ENTERED = "EXPORT_NAME or GO accepted"
    TLS_ACCEPTED = "STARTTLS accepted"
    TLS_ESTABLISHED = "TLS established"
    ABORTED = "ABORT"
    NOT_HERE = "export lives elsewhere"
    VIOLATION = "violation"


TRANSITIONS: dict[State, dict[Move, State]] = {
    State.CLIENT_FLAGS: {Move.FLAGS_AGREED: State.OPTION, Move.VIOLATION: State.CLOSED},
    State.OPTION: {
        Move.HEADER: State.OPTION_DATA,
        Move.HEADER_TOO_BIG: State.SKIP,
        Move.VIOLATION: State.CLOSED,
    },
    State.OPTION_DATA: {
        Move.ANSWERED: State.OPTION,
        Move.ENTERED: State.TRANSMISSION,
        Move.TLS_ACCEPTED: State.TLS,
        Move.ABORTED: State.CLOSED,
        Move.VIOLATION: State.CLOSED,
        Move.NOT_HERE: State.ELSEWHERE,
    },
    State.SKIP: {Move.SKIPPED: State.OPTION},
    State.TLS: {Move.TLS_ESTABLISHED: State.OPTION, Move.VIOLATION: State.CLOSED},
    State.TRANSMISSION: {},
    State.ELSEWHERE: {},
    State.CLOSED: {},
}


@dataclass(frozen=True)
class Reply:
    """Bytes to send; the handshake goes on."""

    data: bytes


@dataclass(frozen=True)
class StartTls:
    """Send `data`, do a TLS handshake, then call `tls_established`."""

    data: bytes


@dataclass(frozen=True)
class Enter:
    """Send `data`; what `leftover` returns, and all that follows, are requests."""

    data: bytes
    agreement: Agreement


@dataclass(frozen=True)
class GoElsewhere:
    """Go on with the handshake's `leave()` where the export lives, as ElsewhereError says."""

    worker: int | None
    export: str
    data: bytes = b""


@dataclass(frozen=True)
class Close:
    """Send `data` and close the connection."""

    data: bytes
    reason: str


Event = Reply | StartTls | Enter | GoElsewhere | Close


@dataclass(frozen=True)
class HandshakeState:
    """A handshake between two options."""

    no_zeroes: bool
    options: int  # that there were
    style: ReplyStyle
    contexts: tuple[Context, ...]
    contexts_export: str
    received: bytes  # from the next option on

    @classmethod
    def before(cls, agreement: Agreement) -> "HandshakeState":
        """Where a GO for the export leads to this agreement."""
        return cls(True, 0, agreement.style, agreement.contexts, agreement.offer.name, b"")


class Handshake:
    """One connection's handshake. Call `greeting` once, then `receive` and `next_event`."""

    def __init__(self, offers: Offers, tls_offered: bool = False, tls_required: bool = False) -> None:
        self.state = State.CLIENT_FLAGS
        self._offers = offers
        self._tls_offered = tls_offered
        self._tls_missing = tls_required
        self._tls_done = False
        self._received = bytearray()
        self._no_zeroes = False
        self._options = 0
        self._option = 0
        self._length = 0
        self._forget_negotiated()

    def greeting(self) -> bytes:
        """The server's first bytes."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        return _build(nbd.Greeting, flags=int(flags))

    def receive(self, data: bytes | memoryview) -> None:
        """Take bytes from the peer."""
        self._received += data

    @classmethod
    def resume(cls, offers: Offers, state: HandshakeState, tls_offered: bool, tls_done: bool) -> "Handshake":
        """Go on where another process stopped; `tls_done`: over TLS, so that it is not offered again."""
        handshake = cls(offers, tls_offered)
        handshake.state = State.OPTION
        handshake._tls_done = tls_done
        handshake._no_zeroes, handshake._options = state.no_zeroes, state.options
        handshake._style = state.style
        handshake._contexts, handshake._contexts_export = state.contexts, state.contexts_export
        handshake._received += state.received
        return handshake

    def leave(self) -> HandshakeState:
        """What another process needs to go on; the option that named its export is the first in it, and counts as one
        there again: what two processes send to each other for ever ends at OPTION_LIMIT."""
        invariant(self.state is State.ELSEWHERE, "only a handshake that was sent away is handed over")
        return HandshakeState(
            self._no_zeroes, self._options, self._style, self._contexts, self._contexts_export, bytes(self._received)
        )

    def leftover(self) -> bytes:
        """Bytes behind the handshake: the first requests."""
        invariant(self.state is State.TRANSMISSION, "only a finished handshake has bytes left over")
        return bytes(self._received)

    def tls_established(self) -> None:
        """The connection is encrypted from here on; all that was negotiated before is forgotten."""
        self._move(Move.TLS_ESTABLISHED)
        self._tls_done = True
        self._tls_missing = False
        self._forget_negotiated()

    def next_event(self) -> Event | None:
        """The next thing to do, or None: more bytes are needed (or nothing follows)."""
        while True:
            if self.state is State.OPTION_DATA:
                if len(self._received) < self._length:
                    return None
                return self._answer(self._take(self._length))
            if self.state is State.SKIP:
                skipped = min(self._length, len(self._received))
                del self._received[:skipped]
                self._length -= skipped
                if self._length:
                    return None
                self._move(Move.SKIPPED)
            elif self.state is State.OPTION:
                if len(self._received) < nbd.OPTION_HEADER.size:
                    return None
                event = self._header(*nbd.OPTION_HEADER.unpack(self._take(nbd.OPTION_HEADER.size)))
                if event is not None:
                    return event
            elif self.state is State.CLIENT_FLAGS:
                if len(self._received) < nbd.CLIENT_FLAGS.size:
                    return None
                (flags,) = nbd.CLIENT_FLAGS.unpack(self._take(nbd.CLIENT_FLAGS.size))
                if flags & ~_CLIENT_FLAGS:
                    return self._violation(f"client flags {flags:#x} are not among those offered")
                self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
                self._move(Move.FLAGS_AGREED)
            else:
                return None

    # --- moving ---

    def _move(self, move: Move) -> None:
        target = TRANSITIONS[self.state].get(move)
        if target is None:
            raise InvariantError(f"{move} is not possible while the handshake {self.state.value}")
        self.state = target

    def _violation(self, reason: str) -> Close:
        self._move(Move.VIOLATION)
        return Close(b"", reason)

    def _take(self, size_bytes: int) -> bytes:
        data = bytes(self._received[:size_bytes])
        del self._received[:size_bytes]
        return data

    def _forget_negotiated(self) -> None:
        self._style = ReplyStyle.SIMPLE
        self._contexts: tuple[Context, ...] = ()
        self._contexts_export = ""

    def _header(self, magic: int, option: int, length: int) -> Event | None:
        """Go on to the option's data; an event if its header already decides."""
        if magic != nbd.OPTION_MAGIC:
            return self._violation("an option does not start with IHAVEOPT: this is no NBD client, or an oldstyle one")
        self._options += 1
        if self._options > OPTION_LIMIT:
            return self._violation(f"more than {OPTION_LIMIT} options on one connection")
        self._option, self._length = option, length
        if length <= OPTION_LIMIT_BYTES:
            self._move(Move.HEADER)
            return None
        if option == Option.EXPORT_NAME:
            return self._violation("an export name longer than any may be")
        self._move(Move.HEADER_TOO_BIG)
        if option == Option.SET_META_CONTEXT:
            self._contexts = ()
        if self._tls_missing:
            return Reply(self._error(OptionReply.ERR_TLS_REQD, _TLS_REQUIRED))
        return Reply(self._error(OptionReply.ERR_TOO_BIG, f"option data is limited to {OPTION_LIMIT_BYTES} bytes"))

    def _answer(self, data: bytes) -> Event:
        answer = _ANSWERS.get(self._option)
        try:
            if self._tls_missing and self._option not in _BEFORE_TLS:
                raise OptionRefusedError(OptionReply.ERR_TLS_REQD, _TLS_REQUIRED)
            if answer is None:
                raise OptionRefusedError(OptionReply.ERR_UNSUP, f"option {self._option} is not known here")
            event = answer(self, data)
        except OptionRefusedError as refused:
            event = Reply(self._error(refused.reply, str(refused)))
        except ElsewhereError as elsewhere:
            header = nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, self._option, self._length)
            self._received[:0] = header + data
            self._move(Move.NOT_HERE)
            return GoElsewhere(elsewhere.worker, elsewhere.export)
        if isinstance(event, Reply):
            self._move(Move.ANSWERED)
        return event

    # --- packing ---

    def _reply(self, kind: OptionReply, payload: bytes = b"") -> bytes:
        header = nbd.OPTION_REPLY_HEADER.pack(nbd.OPTION_REPLY_MAGIC, self._option, int(kind), len(payload))
        return header + payload

    def _error(self, kind: OptionReply, message: str) -> bytes:
        return self._reply(kind, message.encode()[: nbd.STRING_LIMIT_BYTES])

    def _acknowledge(self) -> bytes:
        return self._reply(OptionReply.ACK)

    # --- options ---

    def _refuse_data(self, data: bytes) -> None:
        if data:
            raise OptionRefusedError(OptionReply.ERR_INVALID, f"{Option(self._option).name} takes no data")

    def _export_name(self, data: bytes) -> Event:
        """EXPORT_NAME cannot report an error: what is refused ends the connection."""
        try:
            if self._tls_missing:
                raise OptionRefusedError(OptionReply.ERR_TLS_REQD, _TLS_REQUIRED)
            if self._style is ReplyStyle.EXTENDED:
                raise OptionRefusedError(OptionReply.ERR_INVALID, "extended headers need GO in place of EXPORT_NAME")
            offer = self._offers.enter(_text(data))
        except OptionRefusedError as refused:
            return self._violation(str(refused))
        agreement = self._agree(offer)
        frame = nbd.ExportNameReply if self._no_zeroes else nbd.ExportNameReplyPadded
        self._move(Move.ENTERED)
        return Enter(_build(frame, size_bytes=offer.size_bytes, flags=agreement.flags), agreement)

    def _abort(self, data: bytes) -> Event:
        reply = self._acknowledge()
        self._move(Move.ABORTED)
        return Close(reply, "the client aborted the handshake")

    def _list(self, data: bytes) -> Event:
        self._refuse_data(data)
        replies = [
            self._reply(
                OptionReply.SERVER, _build(nbd.ServerReply, name=name.encode(), description=description.encode())
            )
            for name, description in self._offers.list()
        ]
        return Reply(b"".join(replies) + self._acknowledge())

    def _starttls(self, data: bytes) -> Event:
        self._refuse_data(data)
        if self._tls_done:
            raise OptionRefusedError(OptionReply.ERR_INVALID, "TLS is already in use")
        if not self._tls_offered:
            raise OptionRefusedError(OptionReply.ERR_POLICY, "this server is not set up for TLS")
        if self._received:
            return self._violation("bytes in clear text behind STARTTLS")
        reply = self._acknowledge()
        self._move(Move.TLS_ACCEPTED)
        return StartTls(reply)

    def _structured_reply(self, data: bytes) -> Event:
        self._refuse_data(data)
        if self._style is ReplyStyle.EXTENDED:
            raise OptionRefusedError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are already in use")
        self._style = ReplyStyle.STRUCTURED
        return Reply(self._acknowledge())

    def _extended_headers(self, data: bytes) -> Event:
        self._refuse_data(data)
        self._style = ReplyStyle.EXTENDED
        return Reply(self._acknowledge())

    def _info(self, data: bytes) -> Event:
        name, items = _parse_info(data)
        offer = self._offers.offer(name)
        return Reply(self._information(self._agree(offer), name, items) + self._acknowledge())

    def _go(self, data: bytes) -> Event:
        name, items = _parse_info(data)
        agreement = self._agree(self._offers.enter(name))
        self._move(Move.ENTERED)
        return Enter(self._information(agreement, name, items) + self._acknowledge(), agreement)

    def _information(self, agreement: Agreement, asked_name: str, items: list[int]) -> bytes:
        """The INFO replies: the export and its size constraints always, name and description when asked for or due."""
        offer = agreement.offer
        payloads = [
            _build(nbd.InfoExport, size_bytes=offer.size_bytes, flags=agreement.flags),
            _build(
                nbd.InfoBlockSize,
                minimum_bytes=nbd.MINIMUM_BLOCK_BYTES,
                preferred_bytes=nbd.PREFERRED_BLOCK_BYTES,
                maximum_payload_bytes=nbd.MAXIMUM_PAYLOAD_BYTES,
            ),
        ]
        if Info.NAME in items or asked_name != offer.name:
            payloads.append(_build(nbd.InfoName, name=offer.name.encode()))
        if Info.DESCRIPTION in items and offer.description:
            payloads.append(_build(nbd.InfoDescription, description=offer.description.encode()))
        return b"".join(self._reply(OptionReply.INFO, payload) for payload in payloads)

    def _list_meta_context(self, data: bytes) -> Event:
        _, queries, bitmaps = self._parse_meta_context(data)
        replies = [self._context(0, name) for name in listed(queries, bitmaps)]
        return Reply(b"".join(replies) + self._acknowledge())

    def _set_meta_context(self, data: bytes) -> Event:
        self._contexts = ()
        offer, queries, bitmaps = self._parse_meta_context(data)
        self._contexts = selected(queries, bitmaps)
        self._contexts_export = offer.name
        replies = [self._context(context.id, context.name) for context in self._contexts]
        return Reply(b"".join(replies) + self._acknowledge())

    def _context(self, context_id: int, name: str) -> bytes:
        return self._reply(OptionReply.META_CONTEXT, nbd.META_CONTEXT_REPLY_START.pack(context_id) + name.encode())

    def _parse_meta_context(self, data: bytes) -> tuple[Offer, list[str], Mapping[str, int]]:
        """(the export, the queries, its bitmaps as far as they are needed)."""
        if self._style is ReplyStyle.SIMPLE:
            raise OptionRefusedError(
                OptionReply.ERR_INVALID, "metadata contexts need structured replies or extended headers"
            )
        parsed = _parse(nbd.MetaContextRequest, data)
        if len(parsed.queries) > QUERY_LIMIT:
            raise OptionRefusedError(OptionReply.ERR_TOO_BIG, f"at most {QUERY_LIMIT} queries in one option")
        offer = self._offers.offer(_text(parsed.name))
        queries = [_text(query) for query in parsed.queries]
        return offer, queries, self._offers.bitmaps(offer.name) if needs_bitmaps(queries) else {}

    def _agree(self, offer: Offer) -> Agreement:
        contexts = self._contexts if self._contexts_export == offer.name else ()
        return Agreement(offer, self._style, contexts, transmission_flags(offer, self._style, bool(contexts)))


_ANSWERS: dict[int, Callable[[Handshake, bytes], Event]] = {
    Option.EXPORT_NAME: Handshake._export_name,
    Option.ABORT: Handshake._abort,
    Option.LIST: Handshake._list,
    Option.STARTTLS: Handshake._starttls,
    Option.INFO: Handshake._info,
    Option.GO: Handshake._go,
    Option.STRUCTURED_REPLY: Handshake._structured_reply,
    Option.LIST_META_CONTEXT: Handshake._list_meta_context,
    Option.SET_META_CONTEXT: Handshake._set_meta_context,
    Option.EXTENDED_HEADERS: Handshake._extended_headers,
}
_BEFORE_TLS = (Option.STARTTLS, Option.ABORT, Option.EXPORT_NAME)  # the last of them ends the connection
_TLS_REQUIRED = "this server is used over TLS only"


def state_diagram() -> str:
    """The table as a Mermaid state diagram, for the documents."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.CLIENT_FLAGS.name}"]
    for state, moves in TRANSITIONS.items():
        lines += [f"    {state.name} --> {target.name}: {move.value}" for move, target in moves.items()]
        if not moves:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join(lines) + "\n"


def _build(frame: Any, **fields: object) -> bytes:
    built: bytes = frame.build(fields)
    return built


def _parse(frame: Any, data: bytes) -> Any:
    try:
        return frame.parse(data)
    except ConstructError as error:
        raise OptionRefusedError(OptionReply.ERR_INVALID, "the lengths in the option's data do not add up") from error


def _text(data: bytes) -> str:
    if len(data) > nbd.STRING_LIMIT_BYTES:
        raise OptionRefusedError(OptionReply.ERR_TOO_BIG, f"strings are limited to {nbd.STRING_LIMIT_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise OptionRefusedError(OptionReply.ERR_INVALID, "a string is not UTF-8") from error
    if "\0" in text:
        raise OptionRefusedError(OptionReply.ERR_INVALID, "a string holds a zero byte")
    return text


def _parse_info(data: bytes) -> tuple[str, list[int]]:
    parsed = _parse(nbd.InfoRequest, data)
    return _text(parsed.name), list(parsed.wanted)
