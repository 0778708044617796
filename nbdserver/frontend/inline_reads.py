"""Reads of whole blocks, answered in memory that is used again: the commonest request, a run of them at a time.

Theory: the reply to such a read is a header and data that the page cache holds. Here the kernel reads the data straight
to where it leaves from, behind the room of its header, and checksums are computed where it lies: nothing is allocated
or copied a reply. There are two kinds of room:

    slots   header|block header|block ...          reads of one block: neighbours, so a batch of them is one buffer
    runs    ... header|block|block|...|block ...   longer reads: blocks lie on multiples of 4096, and the header takes
                                                   the end of the block before, so each reply is one buffer

`whole_batch` answers a batch that is nothing but reads of one block, in the shortest way. `take` looks at a run of
requests whose headers differ in cookie and offset alone. It is told where they start and says where it stopped: at a
request of another kind, at one that is not at hand (`read` or `later` find out why), or when there is no more room.

Rules
- The rooms are one set for each size of header, shared by all connections: filled and sent within one batch, on the
  loop's thread. `Connection.send` copies what it cannot send at once. When the runs are full, what they hold leaves
  early: a read needs no commit.
- A room counts only when its reader said so; what a failed attempt left there is overwritten by the next.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, reduce
from operator import or_
from struct import Struct
from typing import Any

from metadata.seams import Buffer
from nbdserver.block import BLOCK_BYTES, BlockDevice, BlockRoom, RunRoom
from protocol import nbd
from protocol.handshake import ReplyStyle
from protocol.layout import derive

SLOTS = 64
RUN_BLOCKS = 132  # four replies of 128 KiB; a megabyte costs 5 % more a reply, as it leaves the second-level cache
RUN_LIMIT_BYTES = (RUN_BLOCKS - 1) * BLOCK_BYTES

_HEAD = {
    ReplyStyle.SIMPLE: nbd.SIMPLE_SUCCESS,
    ReplyStyle.STRUCTURED: nbd.STRUCTURED_WHOLE_DATA,
    ReplyStyle.EXTENDED: nbd.EXTENDED_WHOLE_DATA,
}
_HEADER = {
    ReplyStyle.SIMPLE: nbd.JOINED_SIMPLE_REPLY,
    ReplyStyle.STRUCTURED: nbd.JOINED_STRUCTURED_DATA,
    ReplyStyle.EXTENDED: nbd.JOINED_EXTENDED_DATA,
}


class Rooms:
    """Slots and runs behind headers of `header_bytes`."""

    def __init__(self, header_bytes: int) -> None:
        self.stride_bytes = header_bytes + BLOCK_BYTES
        self.slots = bytearray(SLOTS * self.stride_bytes)
        self.slots_view = memoryview(self.slots)
        self.first_slots = [(self.slots_view[: count * self.stride_bytes],) for count in range(SLOTS + 1)]
        self.blocks: list[BlockRoom] = [
            ([view], array)
            for view, array in (
                _room(self.slots, slot * self.stride_bytes + header_bytes, BLOCK_BYTES) for slot in range(SLOTS)
            )
        ]
        self.runs = bytearray(RUN_BLOCKS * BLOCK_BYTES)
        self.run = RunRoom(
            memoryview(self.runs),
            [_room(self.runs, block * BLOCK_BYTES, BLOCK_BYTES)[1] for block in range(RUN_BLOCKS)],
        )


def _room(memory: bytearray, start: int, size_bytes: int) -> tuple[memoryview, Any]:
    # google-crc32c takes no memoryview of writable memory, but a ctypes array.
    return memoryview(memory)[start : start + size_bytes], (ctypes.c_char * size_bytes).from_buffer(memory, start)


@cache
def rooms(header_bytes: int) -> Rooms:
    """The process's rooms behind headers of this size."""
    return Rooms(header_bytes)


@cache
def _requests(extended: bool, count: int) -> Struct:
    return derive(nbd.ExtendedRequest if extended else nbd.Request, joined=3, times=count)


class InlineReads:
    """Answers the plain reads of one connection. `count` and `size_bytes` are of the batch so far."""

    def __init__(
        self,
        style: ReplyStyle,
        device: BlockDevice,
        send: Callable[[Sequence[Buffer]], None],
    ) -> None:
        """`send` takes replies that leave before the batch is complete."""
        self.count = 0
        self.size_bytes = 0
        self._replies: list[Buffer] = []
        self._style = style
        self._device = device
        self._send = send
        extended = style is ReplyStyle.EXTENDED
        requests = nbd.JOINED_EXTENDED_REQUEST if extended else nbd.JOINED_REQUEST
        self._plain_read = nbd.PLAIN_EXTENDED_READ if extended else nbd.PLAIN_READ
        self._requests = requests.iter_unpack
        self._unpack_request = requests.unpack_from
        self._request_bytes = requests.size
        self._header_bytes = _HEADER[style].size
        self._pack_into = _HEADER[style].pack_into
        self._head = _HEAD[style]
        self._rooms = rooms(self._header_bytes)
        self._extended = extended
        self._slots_used = 0
        self._run_blocks_used = 0
        self._window = SLOTS  # requests looked at at once: few after one that was not at hand, as the next ones may be

    def take(self, view: memoryview, position: int, end: int, most_requests: int, most_bytes: int) -> tuple[int, int]:
        """Answer the plain reads of whole blocks from `position` on, as far as they are at hand.

        At most `most_requests` of them, and none that begins after `most_bytes` of data. Returns the position behind
        the last one answered, and how many bytes of data that were.
        """
        count = min(
            (end - position) // self._request_bytes,
            most_requests,
            self._window,
            SLOTS - self._slots_used,
            most_bytes // BLOCK_BYTES + 1,
        )
        asked = self._requests(view[position : position + count * self._request_bytes])
        device_bytes, plain_read = self._device.size_bytes, self._plain_read
        cookies: list[int] = []
        offsets: list[int] = []
        runs = run_bytes = 0
        missed = False
        for head, cookie, offset, length in asked:
            if head != plain_read or (offset | length) & (BLOCK_BYTES - 1) or offset + length > device_bytes:
                break
            if length == BLOCK_BYTES:
                cookies.append(cookie)
                offsets.append(offset)
            elif offsets or not 0 < length <= RUN_LIMIT_BYTES or run_bytes > most_bytes:
                break
            elif self._take_run(cookie, offset, length):
                runs += 1
                run_bytes += length
            else:
                missed = True
                break
        asked_blocks = len(offsets)
        blocks = self._take_blocks(cookies, offsets) if offsets else 0
        self._window = 1 if missed or blocks < asked_blocks else min(2 * self._window, SLOTS)
        taken, taken_bytes = runs + blocks, run_bytes + blocks * BLOCK_BYTES
        self.count += taken
        self.size_bytes += taken_bytes
        return position + taken * self._request_bytes, taken_bytes

    def whole_batch(self, data: bytearray, count: int) -> Sequence[Buffer] | None:
        """The replies to `count` requests at the start of `data`, which are all of a batch, if they are plain reads of
        one block each, and all at hand; None, and nothing done, if not."""
        if count == 1:
            return self._lone_read(data)
        if count > self._window:
            return None
        fields = _requests(self._extended, count).unpack_from(data)
        offsets = fields[2::4]
        if (
            fields[0::4] != (self._plain_read,) * count
            or fields[3::4] != (BLOCK_BYTES,) * count
            or reduce(or_, offsets) & (BLOCK_BYTES - 1)
            or max(offsets) + BLOCK_BYTES > self._device.size_bytes
        ):
            return None
        if self._device.read_blocks(offsets, self._rooms.blocks, 0) != count:
            self._window = 1
            return None
        self._pack_headers(fields[1::4], offsets, 0)
        return self._rooms.first_slots[count]

    def _lone_read(self, data: bytearray) -> Sequence[Buffer] | None:
        head, cookie, offset, length = self._unpack_request(data)
        if (
            head != self._plain_read
            or length != BLOCK_BYTES
            or offset & (BLOCK_BYTES - 1)
            or offset + BLOCK_BYTES > self._device.size_bytes
            or not self._device.read_blocks((offset,), self._rooms.blocks, 0)
        ):
            return None
        self._pack_header(self._rooms.slots, 0, cookie, offset, BLOCK_BYTES)
        return self._rooms.first_slots[1]

    def complete(self) -> Sequence[Buffer]:
        """The replies of the batch, which is over."""
        replies, self._replies = self._replies, []
        if self._slots_used:
            replies.append(self._rooms.slots_view[: self._slots_used * self._rooms.stride_bytes])
        self.count = self.size_bytes = self._slots_used = self._run_blocks_used = 0
        return replies

    def _take_blocks(self, cookies: list[int], offsets: list[int]) -> int:
        """Read one block each, as many as are at hand before the first that is not; how many that were."""
        first = self._slots_used
        count = self._device.read_blocks(offsets, self._rooms.blocks, first)
        if count < len(cookies):
            del cookies[count:], offsets[count:]
        self._pack_headers(cookies, offsets, first)
        self._slots_used = first + count
        return count

    def _pack_headers(self, cookies: Sequence[int], offsets: Sequence[int], slot: int) -> None:
        """Of replies of one block each, from a slot on."""
        memory, stride, pack_into, head = self._rooms.slots, self._rooms.stride_bytes, self._pack_into, self._head
        at = slot * stride
        if self._style is ReplyStyle.SIMPLE:
            for cookie in cookies:
                pack_into(memory, at, head, cookie)
                at += stride
        elif self._style is ReplyStyle.STRUCTURED:
            for cookie, offset in zip(cookies, offsets, strict=True):
                pack_into(memory, at, head, cookie, BLOCK_BYTES + 8, offset)
                at += stride
        else:
            for cookie, offset in zip(cookies, offsets, strict=True):
                pack_into(memory, at, head, cookie, offset, BLOCK_BYTES + 8, offset)
                at += stride

    def _take_run(self, cookie: int, offset: int, length: int) -> bool:
        """Read several blocks; False if they are not at hand."""
        blocks = length // BLOCK_BYTES
        first = self._run_blocks_used + 1  # behind the block whose end is the header
        if first + blocks > RUN_BLOCKS:
            self._send(self._replies)
            self._replies = []
            first = 1
        if not self._device.read_run(offset, blocks, self._rooms.run, first):
            return False
        start = first * BLOCK_BYTES - self._header_bytes
        self._pack_header(self._rooms.runs, start, cookie, offset, length)
        self._run_blocks_used = first + blocks
        self._replies.append(self._rooms.run.view[start : self._run_blocks_used * BLOCK_BYTES])
        return True

    def _pack_header(self, memory: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
        if self._style is ReplyStyle.SIMPLE:
            self._pack_into(memory, at, self._head, cookie)
        elif self._style is ReplyStyle.STRUCTURED:
            self._pack_into(memory, at, self._head, cookie, length + 8, offset)
        else:
            self._pack_into(memory, at, self._head, cookie, offset, length + 8, offset)
