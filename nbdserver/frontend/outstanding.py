"""What a client has asked for and was not answered, as whoever forwards it keeps it: to ask for it again elsewhere.

Theory: a request is kept as its bytes, by its cookie, from when it is sent until its reply is there whole. Nothing else
is looked at: which requests are good is decided where they are served.

Rules
- A change that overlaps one that was not answered waits until that is, and so does a request whose cookie is in use.
  Behind it everything waits. So nothing that was answered overlaps a change that is asked for again and is older: that
  one can be done twice, and undoes nothing (docs/replication.md).
- Replies are given out whole: what is asked for again is answered from the beginning. The replies of one stream do not
  interleave: our servers send the chunks of one reply together.
- Bounds: KEPT_LIMIT_BYTES and KEPT_LIMIT requests, and one more of at most 32 MiB.
"""

from bisect import bisect_left, bisect_right

from nbdserver.frontend.receive_buffer import ReceiveBuffer
from protocol import nbd
from protocol.agreement import ReplyStyle
from protocol.nbd import Command, ReplyFlag
from protocol.transmission import payload_bytes

KEPT_LIMIT_BYTES = 16 << 20
KEPT_LIMIT = 1024

_READ, _DISC = int(Command.READ), int(Command.DISC)
_CHANGES = frozenset(map(int, (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)))
_DONE = int(ReplyFlag.DONE)
_SIMPLE_BYTES = nbd.SIMPLE_REPLY.size
_SIMPLE_MAGIC = nbd.SIMPLE_REPLY_MAGIC.to_bytes(4, "big")
_COMMAND_AT = 7  # its low byte, in a request of either form
_LENGTH_AT = nbd.REQUEST.size - 4
_CHUNK_LIMIT_BYTES = 2 * nbd.MAXIMUM_PAYLOAD_BYTES  # the largest read, with what stands before its data


class OutOfStepError(Exception):
    """Bytes that cannot be followed: there is no telling where the next request or reply begins."""


class Outstanding:
    """The requests of one connection that wait for their replies."""

    def __init__(self, style: ReplyStyle) -> None:
        self.missing_bytes = 0
        """What the buffer that was looked at last has to hold, from where that ended, to go on."""
        self.is_held = False
        """Whether a request waits for the reply to another one, or for room."""
        self.answered = 0
        """Replies that there were."""
        self._kept: dict[int, bytes] = {}
        self._last = b""  # the request that has no reply and none behind it
        self._kept_bytes = 0
        self._starts: list[int] = []  # of the ranges that are being changed, in their order; none overlap
        self._ends: list[int] = []
        self._extended = style is ReplyStyle.EXTENDED
        self._request = nbd.EXTENDED_REQUEST if self._extended else nbd.REQUEST
        self._chunk = (
            (nbd.EXTENDED_REPLY, nbd.EXTENDED_REPLY_MAGIC)
            if self._extended
            else (nbd.STRUCTURED_REPLY, nbd.STRUCTURED_REPLY_MAGIC)
        )
        self._magic = nbd.EXTENDED_REQUEST_MAGIC if self._extended else nbd.REQUEST_MAGIC

    def __len__(self) -> int:
        return len(self._kept)

    def again(self) -> list[bytes]:
        """All of them, in their order, to be sent once more."""
        return [*self._kept.values(), *([self._last] if self._last else [])]

    @property
    def is_ending(self) -> bool:
        """Whether the client has said that it asks for nothing more."""
        return bool(self._last)

    # --- requests ---

    def take(self, buffer: ReceiveBuffer) -> int:
        """Keep the requests in a buffer that may be sent now; returns where they end. OutOfStepError."""
        data, view, position, end = buffer.data, buffer.view, buffer.start, buffer.end
        unpack, header_bytes, extended = self._request.unpack_from, self._request.size, self._extended
        self.is_held = False
        self.missing_bytes = header_bytes
        while position + header_bytes <= end and not self._last:
            magic, flags, command, cookie, offset, length = unpack(data, position)
            if magic != self._magic:
                raise OutOfStepError(f"a request starts with {magic:#010x}: the stream is out of step")
            payload = payload_bytes(extended, flags, command, length)
            if payload > nbd.MAXIMUM_PAYLOAD_BYTES:
                raise OutOfStepError(f"a payload of {payload} bytes is over the limit of {nbd.MAXIMUM_PAYLOAD_BYTES}")
            stop = position + header_bytes + payload
            if stop > end:
                self.missing_bytes = stop - position
                break
            if command == _DISC:
                self._last = bytes(view[position:stop])
            elif self._has_to_wait(command, cookie, offset, length):
                self.is_held = True
                break
            else:
                self._kept[cookie] = bytes(view[position:stop])
                self._kept_bytes += stop - position
            position = stop
        return position

    def _has_to_wait(self, command: int, cookie: int, offset: int, length: int) -> bool:
        """Whether a request may not be sent yet; if it may, note what it changes."""
        if cookie in self._kept or self._kept_bytes >= KEPT_LIMIT_BYTES or len(self._kept) >= KEPT_LIMIT:
            return True
        if command in _CHANGES and length:
            starts, ends = self._starts, self._ends
            index = bisect_right(starts, offset)
            if (index and ends[index - 1] > offset) or (index < len(starts) and starts[index] < offset + length):
                return True
            starts.insert(index, offset)
            ends.insert(index, offset + length)
        return False

    # --- replies ---

    def answer(self, buffer: ReceiveBuffer) -> int:
        """Forget the requests to which a buffer has whole replies; returns where those end. OutOfStepError."""
        position, end = buffer.start, buffer.end
        self.missing_bytes = _SIMPLE_BYTES
        while position + _SIMPLE_BYTES <= end:
            is_simple = buffer.data[position : position + 4] == _SIMPLE_MAGIC
            after = (self._simple_reply if is_simple else self._chunks)(buffer.data, position, end)
            if after > end:
                self.missing_bytes = after - position
                break
            position = after
        return position

    def _simple_reply(self, data: bytearray, position: int, end: int) -> int:
        """Where it ends; if it is whole, its request is forgotten."""
        _, error, cookie = nbd.SIMPLE_REPLY.unpack_from(data, position)
        request = self._request_of(cookie)
        after = position + _SIMPLE_BYTES
        if request[_COMMAND_AT] == _READ and not error:
            after += int.from_bytes(request[_LENGTH_AT:], "big")
        if after <= end:
            self._forget(cookie, request)
        return after

    def _chunks(self, data: bytearray, position: int, end: int) -> int:
        """Where the chunks of one reply end, or where more is missing; if all are there, their request is forgotten."""
        header, expected = self._chunk
        about = None
        while position + header.size <= end:
            magic, flags, _, cookie, *_, length = header.unpack_from(data, position)
            if magic != expected or about not in (None, cookie) or length > _CHUNK_LIMIT_BYTES:
                raise OutOfStepError(f"a reply starts with {magic:#010x}: the stream is out of step")
            about = cookie
            position += header.size + length
            if position <= end and flags & _DONE:
                self._forget(cookie, self._request_of(cookie))
                return position
        return position + header.size

    def _request_of(self, cookie: int) -> bytes:
        request = self._kept.get(cookie)
        if request is None:
            raise OutOfStepError("a reply to a request that nobody has made")
        return request

    def _forget(self, cookie: int, request: bytes) -> None:
        """It was answered."""
        if request[_COMMAND_AT] in _CHANGES:
            *_, offset, length = self._request.unpack_from(request)
            if length:
                index = bisect_left(self._starts, offset)
                del self._starts[index], self._ends[index]
        del self._kept[cookie]
        self._kept_bytes -= len(request)
        self.answered += 1
