"""The transmission phase: what a request may ask, and how replies look. Pure functions and packers, no state.

Theory: a request is a header of fixed size, with a payload behind it or not; `payload_bytes` says how much, `refuse`
says why a request is answered with an error before anything is done. A reply has one of three styles, agreed in the
handshake: each style is a class with the same methods, whose results are buffers ready to be sent. The session's hot
path inlines the two commonest requests and their replies with the same derived structs; a test holds both to one
another.

Rules
- `refuse` sees every request but those that the hot path has checked by itself, and knows nothing of devices.
- With structured replies a success without data is still told by a simple reply (the protocol allows it; it is
  shorter); errors travel in chunks, which carry a sentence.
- A read is answered by at most one content chunk if its DF flag is set.
"""

import errno
from collections.abc import Sequence
from itertools import starmap
from typing import Protocol

from construct import ConstructError

from protocol import nbd
from protocol.agreement import Agreement, ReplyStyle
from protocol.invariant import InvariantError
from protocol.nbd import Chunk, Command, CommandFlag, ReplyError, ReplyFlag

Buffer = bytes | bytearray | memoryview
Statuses = Sequence[tuple[int, Sequence[tuple[int, int]]]]
"""(context id, its (length, flags) extents) for each context."""

_DONE = int(ReplyFlag.DONE)
_NONE = int(Chunk.NONE)
_OFFSET_DATA = int(Chunk.OFFSET_DATA)
_OFFSET_HOLE = int(Chunk.OFFSET_HOLE)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_DF = int(CommandFlag.DF)
_STATUS_PAYLOAD = int(nbd.TransmissionFlag.BLOCK_STATUS_PAYLOAD)

# FUA is accepted on every command, because clients set it on every command. Plain ints: the complement of a flag enum
# holds only the bits that have a name.
_FLAGS: dict[int, int] = {
    int(command): int(CommandFlag.FUA | flags)
    for command, flags in {
        Command.READ: CommandFlag.DF,
        Command.WRITE: CommandFlag.PAYLOAD_LEN,
        Command.DISC: CommandFlag(0),
        Command.FLUSH: CommandFlag(0),
        Command.TRIM: CommandFlag(0),
        Command.CACHE: CommandFlag(0),
        Command.WRITE_ZEROES: CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        Command.BLOCK_STATUS: CommandFlag.REQ_ONE | CommandFlag.PAYLOAD_LEN,
    }.items()
}
_CHANGES = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)

_REPLY_ERRORS = frozenset(int(error) for error in ReplyError)
_TRANSLATED = {
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EROFS: errno.EPERM,
    errno.EACCES: errno.EPERM,
    errno.ESTALE: errno.EINVAL,  # what a dirty bitmap is compared with is gone
}

_MESSAGES = {
    errno.EPERM: b"the export is read-only",
    errno.EIO: b"the data cannot be read or written",
    errno.EINVAL: b"the request is not valid for this export",
    errno.ENOSPC: b"no space left",
    errno.EOVERFLOW: b"longer than the maximum payload of 32 MiB",
    errno.ENOTSUP: b"not faster than writing zeros",
    errno.ENOMEM: b"",
    errno.ESHUTDOWN: b"the server is shutting down",
    errno.ESTALE: b"the snapshot of a dirty bitmap was deleted: make a full backup, or use that of another snapshot",
}


def reply_error(error: int) -> int:
    """The errno that stands in a reply for this one: the protocol allows eight."""
    error = _TRANSLATED.get(error, error)
    return error if error in _REPLY_ERRORS else errno.EIO


_ERROR_PAYLOADS: dict[int, bytes] = {
    error: nbd.Error.build({"error": reply_error(error), "message": message}) for error, message in _MESSAGES.items()
}


def _error_payload(error: int) -> bytes:
    return _ERROR_PAYLOADS.get(error) or _ERROR_PAYLOADS[reply_error(error)]


def payload_bytes(extended: bool, flags: int, command: int, length: int) -> int:
    """How many bytes follow the request's header."""
    if extended:
        return length if flags & _PAYLOAD_LEN else 0
    return length if command == Command.WRITE else 0


def refuse(agreement: Agreement, size_bytes: int, read_only: bool, request: tuple[int, int, int, int]) -> int:
    """The errno with which a request (flags, command, offset, length) is answered at once, or 0.

    The length of a BLOCK_STATUS that carries a payload is judged by `parse_status_payload`.
    """
    flags, command, offset, length = request
    allowed = _FLAGS.get(command)
    extended = agreement.style is ReplyStyle.EXTENDED
    if allowed is None or flags & ~allowed or (flags & _PAYLOAD_LEN and not extended):
        return errno.EINVAL
    if flags & _DF and agreement.style is ReplyStyle.SIMPLE:
        return errno.EINVAL
    if command == Command.FLUSH or command == Command.DISC:
        # One that stands for a change of another node (frontend/unanswered.py) has that one's offset: replies tell it.
        return errno.EINVAL if length or (offset and not extended) else 0
    if command in _CHANGES and read_only:
        return errno.EPERM
    if command == Command.WRITE and extended and not flags & _PAYLOAD_LEN:
        return errno.EINVAL
    if command == Command.BLOCK_STATUS:
        if not agreement.context_ids or (flags & _PAYLOAD_LEN and not agreement.flags & _STATUS_PAYLOAD):
            return errno.EINVAL
        if flags & _PAYLOAD_LEN:
            return 0
    if length == 0:
        return errno.EINVAL
    if offset + length > size_bytes:
        return errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else errno.EINVAL
    if length > nbd.MAXIMUM_PAYLOAD_BYTES:
        if command == Command.WRITE:
            return errno.EINVAL
        if command == Command.READ:
            return errno.EINVAL if agreement.style is ReplyStyle.SIMPLE else errno.EOVERFLOW
    return 0


def parse_status_payload(agreement: Agreement, payload: bytes) -> tuple[int, tuple[int, ...]] | None:
    """(length, context ids) that a BLOCK_STATUS with a payload asks for, or None: EINVAL."""
    if len(payload) > nbd.BLOCK_STATUS_EXT_START.size + 4 * len(agreement.context_ids):
        return None
    try:
        parsed = nbd.BlockStatusPayload.parse(payload)
    except ConstructError:
        return None
    ids = tuple(parsed.context_ids)
    if not parsed.length or len(set(ids)) != len(ids) or not set(ids) <= set(agreement.context_ids):
        return None
    return parsed.length, ids


def shortened(extents: Sequence[tuple[int, int]], length: int, limit: int) -> list[tuple[int, int]]:
    """The (length, flags) extents that describe `length` bytes, at most `limit` of them."""
    kept = []
    for extent_bytes, flags in extents[:limit]:
        kept.append((min(extent_bytes, length), flags))
        length -= extent_bytes
        if length <= 0:
            break
    return kept


class Replies(Protocol):
    """Packs the replies of one style. `offset` is the request's; only the extended style uses it."""

    def success(self, cookie: int, offset: int) -> bytes:
        """The request is done, without data."""

    def error(self, cookie: int, offset: int, error: int) -> bytes:
        """The request failed with this errno, which is told as `reply_error` has it."""

    def data(self, cookie: int, offset: int, data_offset: int, length: int, done: bool) -> bytes:
        """What stands before `length` bytes of data at `data_offset`."""

    def hole(self, cookie: int, offset: int, hole_offset: int, hole_bytes: int, done: bool) -> bytes:
        """A range that reads as zeros."""

    def block_status(self, cookie: int, offset: int, described: Statuses) -> bytes:
        """A chunk for each context."""

    def unpack_success(self, reply: bytes) -> tuple[int, int]:
        """(cookie, offset) of what `success` packed; the offset is 0 where the style has none."""


class SimpleReplies:
    """The compact style: one reply a request."""

    def success(self, cookie: int, offset: int) -> bytes:
        return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, error: int) -> bytes:
        return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, reply_error(error), cookie)

    def data(self, cookie: int, offset: int, data_offset: int, length: int, done: bool) -> bytes:
        return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)

    def hole(self, cookie: int, offset: int, hole_offset: int, hole_bytes: int, done: bool) -> bytes:
        raise InvariantError("a simple reply cannot tell a hole")

    def block_status(self, cookie: int, offset: int, described: Statuses) -> bytes:
        raise InvariantError("a simple reply cannot tell a block status")

    def unpack_success(self, reply: bytes) -> tuple[int, int]:
        return nbd.SIMPLE_REPLY.unpack(reply)[2], 0


class StructuredReplies(SimpleReplies):
    """Structured chunks for data and errors, simple replies for successes without data."""

    def error(self, cookie: int, offset: int, error: int) -> bytes:
        payload = _error_payload(error)
        return self._chunk(_DONE, int(Chunk.ERROR), cookie, len(payload)) + payload

    def data(self, cookie: int, offset: int, data_offset: int, length: int, done: bool) -> bytes:
        return nbd.STRUCTURED_DATA.pack(
            nbd.STRUCTURED_REPLY_MAGIC, _DONE if done else 0, _OFFSET_DATA, cookie, length + 8, data_offset
        )

    def hole(self, cookie: int, offset: int, hole_offset: int, hole_bytes: int, done: bool) -> bytes:
        payload = nbd.OFFSET_HOLE.pack(hole_offset, hole_bytes)
        return self._chunk(_DONE if done else 0, _OFFSET_HOLE, cookie, len(payload)) + payload

    def block_status(self, cookie: int, offset: int, described: Statuses) -> bytes:
        chunks = []
        for left, (context_id, extents) in zip(reversed(range(len(described))), described, strict=True):
            payload = nbd.BLOCK_STATUS_START.pack(context_id) + b"".join(starmap(nbd.EXTENT.pack, extents))
            header = self._chunk(0 if left else _DONE, int(Chunk.BLOCK_STATUS), cookie, len(payload))
            chunks += [header, payload]
        return b"".join(chunks)

    def _chunk(self, flags: int, kind: int, cookie: int, length: int) -> bytes:
        return nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


class ExtendedReplies:
    """Extended chunks for everything."""

    def success(self, cookie: int, offset: int) -> bytes:
        return self._chunk(_DONE, _NONE, cookie, offset, 0)

    def error(self, cookie: int, offset: int, error: int) -> bytes:
        payload = _error_payload(error)
        return self._chunk(_DONE, int(Chunk.ERROR), cookie, offset, len(payload)) + payload

    def data(self, cookie: int, offset: int, data_offset: int, length: int, done: bool) -> bytes:
        return nbd.EXTENDED_DATA.pack(
            nbd.EXTENDED_REPLY_MAGIC, _DONE if done else 0, _OFFSET_DATA, cookie, offset, length + 8, data_offset
        )

    def hole(self, cookie: int, offset: int, hole_offset: int, hole_bytes: int, done: bool) -> bytes:
        payload = nbd.OFFSET_HOLE.pack(hole_offset, hole_bytes)
        return self._chunk(_DONE if done else 0, _OFFSET_HOLE, cookie, offset, len(payload)) + payload

    def block_status(self, cookie: int, offset: int, described: Statuses) -> bytes:
        chunks = []
        for left, (context_id, extents) in zip(reversed(range(len(described))), described, strict=True):
            start = nbd.BLOCK_STATUS_EXT_START.pack(context_id, len(extents))
            payload = start + b"".join(starmap(nbd.EXTENT_EXT.pack, extents))
            header = self._chunk(0 if left else _DONE, int(Chunk.BLOCK_STATUS_EXT), cookie, offset, len(payload))
            chunks += [header, payload]
        return b"".join(chunks)

    def unpack_success(self, reply: bytes) -> tuple[int, int]:
        _, _, _, cookie, offset, _ = nbd.EXTENDED_REPLY.unpack(reply)
        return cookie, offset

    def _chunk(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        return nbd.EXTENDED_REPLY.pack(nbd.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)


def replies_of(style: ReplyStyle) -> Replies:
    """The packer of a style."""
    if style is ReplyStyle.SIMPLE:
        return SimpleReplies()
    if style is ReplyStyle.STRUCTURED:
        return StructuredReplies()
    return ExtendedReplies()
