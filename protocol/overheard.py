"""A handshake as whoever passes its bytes on hears it: options go one way, replies the other, and at its end the client
has been told what it may ask from then on, and how.

Theory: a client whose session is in another process may outlive that session. Then the same options are said to another
server, which answers them anew; what it answers is not passed on, but it must hold what the client was told (`Told`).
Nobody overhears a session of this process: what it has agreed on is said in one option (`agreed`).

Rules
- Options are passed on as they come, but nothing behind one that may end the handshake (EXPORT_NAME, GO) until that is
  answered: it may be a request.
- Who says something that cannot be followed is refused (OverheardError); what a server refuses is between it and the
  client.
- Bounds: OPTIONS_LIMIT_BYTES of options, and of one reply.
"""

from collections import deque
from dataclasses import dataclass

from protocol import nbd
from protocol.agreement import Agreement, ReplyStyle
from protocol.handshake import HandshakeState
from protocol.layout import derive
from protocol.nbd import Info, Option, OptionReply, TransmissionFlag

OPTIONS_LIMIT_BYTES = 1 << 20

_EXPORT_NAME_REPLY = derive(nbd.ExportNameReply)
_INFO_EXPORT = derive(nbd.InfoExport)
_ENDING = (Option.EXPORT_NAME, Option.GO)
_SAID_WITH_EACH_WRITE = int(
    TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)
"""Whether an export may be written to; that may have changed since, as for any client that is there."""


class OverheardError(Exception):
    """Bytes that are no handshake, or one that is too long."""


@dataclass(frozen=True)
class Told:
    """What a client was told at the end of its handshake."""

    style: ReplyStyle
    size_bytes: int
    flags: int
    """Of the transmission."""
    contexts: tuple[tuple[int, str], ...]
    """(identifier, name) of each that was selected."""

    def holds(self, now: "Told") -> bool:
        """Whether it holds where `now` is told: an export may have grown, or be read-only."""
        return (
            self.style is now.style
            and self.size_bytes <= now.size_bytes
            and self.contexts == now.contexts
            and self.flags | _SAID_WITH_EACH_WRITE == now.flags | _SAID_WITH_EACH_WRITE
        )


class Overheard:
    """One handshake, from a state on between two of its options."""

    def __init__(self, state: HandshakeState) -> None:
        self.told: Told | None = None
        """Once the handshake has ended well."""
        self.refusal = ""
        """Why the export that was named last was refused."""
        self.is_refused_for_good = False
        """Whether it is of no use to ask again: the client may not use it, not now."""
        self._no_zeroes = state.no_zeroes
        self._style = state.style
        self._contexts = tuple((context.id, context.name) for context in state.contexts)
        self._selected: tuple[tuple[int, str], ...] = ()  # by the SET_META_CONTEXT that is being answered
        self._export = (0, 0)  # size and flags, as the last reply has them
        self._options = bytearray()  # that were passed on
        self._option_at = 0  # where in them the last one begins
        self._header = bytearray()  # of the option that is passed on
        self._option = 0
        self._left_bytes = 0  # of its data
        self._unanswered: deque[int] = deque()
        self._waits = False  # for the answer to one that may end the handshake
        self._replies = bytearray()  # the beginning of one

    @classmethod
    def agreed(cls, agreement: Agreement) -> "Overheard":
        """One that has ended in this agreement, from `HandshakeState.before` it on."""
        offer = agreement.offer
        overheard = cls(HandshakeState.before(agreement))
        overheard.told = Told(agreement.style, offer.size_bytes, agreement.flags, overheard._contexts)
        named = nbd.InfoRequest.build({"name": offer.name.encode(), "wanted": []})
        overheard._options += nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, int(Option.GO), len(named)) + named
        return overheard

    @property
    def options(self) -> bytes:
        """What was passed on of the client's, but for each GO that was refused: the next server might not refuse it."""
        return bytes(self._options)

    def ask(self, data: memoryview) -> int:
        """The client says this; returns how much of it is to be passed on now. OverheardError."""
        taken = 0
        while taken < len(data) and not self._waits and self.told is None:
            piece = data[taken : taken + (self._left_bytes or nbd.OPTION_HEADER.size - len(self._header))]
            taken += len(piece)
            self._options += piece
            if self._left_bytes:
                self._left_bytes -= len(piece)
            else:
                self._begin(piece)
            if not self._left_bytes and not self._header:
                self._waits = self._option in _ENDING and bool(self._unanswered)
        if len(self._options) > OPTIONS_LIMIT_BYTES:
            raise OverheardError(f"its handshake is longer than {OPTIONS_LIMIT_BYTES} bytes")
        return taken

    def _begin(self, piece: memoryview) -> None:
        """An option begins, or goes on beginning."""
        self._header += piece
        if len(self._header) == nbd.OPTION_HEADER.size:
            magic, self._option, self._left_bytes = nbd.OPTION_HEADER.unpack(self._header)
            if magic != nbd.OPTION_MAGIC:
                raise OverheardError(f"an option starts with {magic:#018x}")
            self._unanswered.append(self._option)
            self._option_at = len(self._options) - len(self._header)
            self._header.clear()

    def answer(self, data: bytes) -> bytes:
        """The server says this; returns what of it comes behind the handshake, once that has ended. OverheardError."""
        self._replies += data
        while self.told is None and self._next():
            pass
        if self.told is None:
            if len(self._replies) > OPTIONS_LIMIT_BYTES:
                raise OverheardError(f"a reply is longer than {OPTIONS_LIMIT_BYTES} bytes")
            return b""
        behind, self._replies = bytes(self._replies), bytearray()
        return behind

    def _next(self) -> bool:
        """Hear one reply, if it is whole."""
        if not self._unanswered:
            if self._replies:
                raise OverheardError("a reply that nobody has asked for")
            return False
        option = self._unanswered[0]
        if option == Option.EXPORT_NAME:
            return self._export_name()
        if len(self._replies) < nbd.OPTION_REPLY_HEADER.size:
            return False
        magic, about, kind, length = nbd.OPTION_REPLY_HEADER.unpack_from(self._replies)
        if magic != nbd.OPTION_REPLY_MAGIC or about != option:
            raise OverheardError("a reply to another option")
        end = nbd.OPTION_REPLY_HEADER.size + length
        if len(self._replies) < end:
            return False
        body = bytes(self._replies[nbd.OPTION_REPLY_HEADER.size : end])
        del self._replies[:end]
        self._reply(option, kind, body)
        return True

    def _export_name(self) -> bool:
        size_bytes = _EXPORT_NAME_REPLY.size + (0 if self._no_zeroes else nbd.PADDING_BYTES)
        if len(self._replies) < size_bytes:
            return False
        self._export = _EXPORT_NAME_REPLY.unpack_from(self._replies)
        del self._replies[:size_bytes]
        self._end()
        return True

    def _reply(self, option: int, kind: int, body: bytes) -> None:
        if kind == OptionReply.INFO:
            if len(body) == _INFO_EXPORT.size and int.from_bytes(body[:2], "big") == Info.EXPORT:
                self._export = _INFO_EXPORT.unpack(body)[1:]
        elif kind == OptionReply.META_CONTEXT:
            if option == Option.SET_META_CONTEXT:
                (context_id,) = nbd.META_CONTEXT_REPLY_START.unpack_from(body)
                name = body[nbd.META_CONTEXT_REPLY_START.size :].decode(errors="replace")
                self._selected += ((context_id, name),)
        elif kind == OptionReply.ACK:
            self._acknowledged(option)
        elif kind & nbd.OPTION_REPLY_IS_ERROR:
            self._refused(option, kind, body)

    def _acknowledged(self, option: int) -> None:
        if option == Option.GO:
            self._end()
            return
        self._unanswered.popleft()
        if option == Option.STRUCTURED_REPLY:
            self._style = ReplyStyle.STRUCTURED
        elif option == Option.EXTENDED_HEADERS:
            self._style = ReplyStyle.EXTENDED
        elif option == Option.SET_META_CONTEXT:
            self._contexts, self._selected = self._selected, ()

    def _refused(self, option: int, kind: int, reason: bytes) -> None:
        self._unanswered.popleft()
        if option == Option.GO:
            self.is_refused_for_good = kind in (OptionReply.ERR_POLICY, OptionReply.ERR_TLS_REQD)
            self.refusal = reason.decode(errors="replace")
            if self._waits:
                self._waits = False
                del self._options[self._option_at :]
        elif option == Option.SET_META_CONTEXT:
            self._contexts, self._selected = (), ()

    def _end(self) -> None:
        self._waits = False
        size_bytes, flags = self._export
        self.told = Told(self._style, size_bytes, flags, self._contexts)
