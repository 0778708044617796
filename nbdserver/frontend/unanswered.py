"""What a client has asked for and was not answered when its session ends here and the client goes on elsewhere.

Theory: nothing is kept for this as requests come. Those that wait for the device are known to `Deferred` and
`ColdReads`, in a form that they need anyway (`Request`); those of the batch that is in flight are told by the replies
that wait for it (`Batch`), and are still where they were received (`ReceiveBuffer.set_aside`); all others have not been
looked at. Together they are bytes as the client has sent them, and whoever goes on takes them for just received.

Rules
- The client's order is kept. What is deferred and not in the batch has come before it.
- A change with FUA that waits for its flush only is not done again: it was acknowledged, and a later one of the same
  blocks may have been. It is asked for as a FLUSH under its cookie, whose reply is the same.
- A read is asked for with DF where there is that: what has begun as one chunk may be told in one.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from metadata.seams import Buffer
from protocol import nbd
from protocol.agreement import Agreement, ReplyStyle
from protocol.nbd import Command, CommandFlag
from protocol.transmission import payload_bytes


class Request(NamedTuple):
    """One request, as it was received."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


@dataclass(frozen=True)
class Entered:
    """A client in the transmission phase that has no server any more."""

    agreement: Agreement
    """With the export's name as it is now."""
    lineage: int
    """Of the export, as Forwarded has it (peer_clients.py)."""
    received: bytes
    """Requests, the last one perhaps cut off."""
    skip_bytes: int
    """That come next, and are the rest of a payload that was refused."""


def flush_of(cookie: int, offset: int) -> Request:
    """A flush that is answered as the request with this cookie."""
    return Request(0, int(Command.FLUSH), cookie, offset, 0)


def read_of(cookie: int, offset: int, length: int) -> Request:
    """A read that is answered in one chunk, where the style has chunks."""
    return Request(int(CommandFlag.DF), int(Command.READ), cookie, offset, length)


def asked_again(
    style: ReplyStyle, waiting: Sequence[Request], batch: memoryview, cookies: Collection[int]
) -> list[Buffer]:
    """The bytes of what was not answered, in the client's order: the `waiting` requests, some of which may be in the
    `batch` of requests too, and those of the batch with these cookies."""
    left: dict[int, list[Request]] = {}
    for request in waiting:
        left.setdefault(request.cookie, []).append(request)
    again: list[Buffer] = []
    for cookie, packed in _requests_in(style, batch):
        if cookie in left:
            again += [_pack(style, request) for request in left.pop(cookie)]
        elif cookie in cookies:
            again.append(packed)
    return [*(_pack(style, request) for requests in left.values() for request in requests), *again]


def _requests_in(style: ReplyStyle, batch: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Their cookies, and each as it is in a batch of whole requests."""
    extended = style is ReplyStyle.EXTENDED
    header = nbd.EXTENDED_REQUEST if extended else nbd.REQUEST
    position = 0
    while position < len(batch):
        _, flags, command, cookie, _, length = header.unpack_from(batch, position)
        stop = position + header.size + payload_bytes(extended, flags, command, length)
        yield cookie, batch[position:stop]
        position = stop


def _pack(style: ReplyStyle, request: Request) -> bytes:
    flags, command, cookie, offset, length, payload = request
    if style is ReplyStyle.SIMPLE:
        flags &= ~int(CommandFlag.DF)
    if style is ReplyStyle.EXTENDED:  # whose replies tell the offset
        return nbd.EXTENDED_REQUEST.pack(nbd.EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload
    if command == Command.FLUSH:
        offset = 0
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload
