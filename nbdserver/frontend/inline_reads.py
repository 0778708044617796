"""Reads of whole blocks, answered in memory that is used again: the commonest request, a run of them at a time.

Theory: the reply to such a read is a header and data that the page cache holds. Here the kernel reads the data straight
to where it leaves from, behind the room of its header, and checksums are computed where it lies: nothing is allocated
or copied a reply. There are two kinds of room:

    slots   header|block header|block ...          reads of one block: neighbours, so a batch of them is one buffer
    runs    ... header|block|block|...|block ...   longer reads: blocks lie on multiples of 4096, and the header takes
                                                   the end of the block before, so each reply is one buffer

`whole_batch` answers a batch that is nothing but reads of one block, in the shortest way. `take` looks at a run of
requests whose headers differ in cookie and offset alone. It is told where they start and says where it stopped: at a
request of another kind, or when there is no more room. What is not at hand is given to `missed` (cold_reads.py) and
comes back through `again`.

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

from metadata.seams import Buffer
from nbdserver.block import BLOCK_BYTES, SPARSE_READ_BYTES, BlockDevice, BlockRoom, RunRoom
from nbdserver.frontend.cold_reads import MissedRead
from protocol import nbd
from protocol.agreement import ReplyStyle
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
        self.blocks = [_room(self.slots, slot * self.stride_bytes + header_bytes) for slot in range(SLOTS)]
        self.runs = bytearray(RUN_BLOCKS * BLOCK_BYTES)
        blocks = [_room(self.runs, block * BLOCK_BYTES) for block in range(RUN_BLOCKS)]
        self.run = RunRoom(memoryview(self.runs), blocks, [array for _, array in blocks])


def _room(memory: bytearray, start: int) -> BlockRoom:
    # google-crc32c takes no memoryview of writable memory, but a ctypes array.
    array = (ctypes.c_char * BLOCK_BYTES).from_buffer(memory, start)
    return [memoryview(memory)[start : start + BLOCK_BYTES]], array


@cache
def rooms(header_bytes: int) -> Rooms:
    """The process's rooms behind headers of this size."""
    return Rooms(header_bytes)


@cache
def _requests(extended: bool, count: int) -> Struct:
    return derive(nbd.ExtendedRequest if extended else nbd.Request, joined=3, times=count)


class InlineReads:
    """Answers the plain reads of one connection. Of the batch so far: `requests` taken, how many of them are
    `answered`, and `size_bytes` of data in these."""

    def __init__(
        self,
        style: ReplyStyle,
        device: BlockDevice,
        send: Callable[[Sequence[Buffer]], None],
        missed: Callable[[list[MissedRead]], bool],
    ) -> None:
        """`send` takes replies that leave before the batch is complete; `missed` takes reads that are not
        at hand, all or (False: there is no room for them) none."""
        self.requests = 0
        self.answered = 0
        self.size_bytes = 0
        self._replies: list[Buffer] = []
        self._style = style
        self._device = device
        self._send = send
        self._missed = missed
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
        self.first_slots = self._rooms.first_slots
        self._extended = extended
        self._slots_used = 0
        self._run_blocks_used = 0

    def take(self, view: memoryview, position: int, end: int, most_requests: int, most_bytes: int) -> tuple[int, int]:
        """Answer the plain reads of whole blocks from `position` on, or have them missed.

        At most `most_requests` of them, and none that begins after `most_bytes` of data. Returns the position behind
        the last one, and how many bytes of data that were.
        """
        count = min(
            (end - position) // self._request_bytes,
            most_requests,
            SLOTS - self._slots_used,
            most_bytes // BLOCK_BYTES + 1,
        )
        asked = self._requests(view[position : position + count * self._request_bytes])
        device_bytes, plain_read = self._device.size_bytes, self._plain_read
        cookies: list[int] = []
        offsets: list[int] = []
        taken = taken_bytes = 0
        for head, cookie, offset, length in asked:
            if head != plain_read or (offset | length) & (BLOCK_BYTES - 1) or offset + length > device_bytes:
                break
            if length == BLOCK_BYTES:
                cookies.append(cookie)
                offsets.append(offset)
            elif offsets or not 0 < length <= RUN_LIMIT_BYTES or taken_bytes > most_bytes:
                break
            elif self._take_run(cookie, offset, length) or (
                length < SPARSE_READ_BYTES and self._missed([(cookie, offset, length)])
            ):
                taken += 1
                taken_bytes += length
            else:
                break
        if offsets:
            blocks = self._take_blocks(cookies, offsets)
            taken += blocks
            taken_bytes += blocks * BLOCK_BYTES
        self.requests += taken
        return position + taken * self._request_bytes, taken_bytes

    def whole_batch(self, data: bytearray, count: int) -> int | None:
        """Answer `count` requests at the start of `data`, which are all of a batch, if they are plain reads of one
        block each; None, and nothing done, if not. The replies are in as many of `first_slots` as it says; the other
        reads are missed.
        """
        if count == 1:
            return self._lone_read(data)
        fields = _requests(self._extended, count).unpack_from(data)
        offsets: Sequence[int] = fields[2::4]
        if (
            fields[0::4] != (self._plain_read,) * count
            or fields[3::4] != (BLOCK_BYTES,) * count
            or reduce(or_, offsets) & (BLOCK_BYTES - 1)
            or max(offsets) + BLOCK_BYTES > self._device.size_bytes
        ):
            return None
        missing = self._device.read_blocks(offsets, self._rooms.blocks, 0)
        if not missing:
            self._pack_headers(fields[1::4], offsets, 0)
            return count
        cookies, offsets = list(fields[1::4]), list(offsets)
        if not self._miss(cookies, offsets, missing):
            return None
        self._pack_headers(cookies, offsets, 0)
        return len(offsets)

    def _lone_read(self, data: bytearray) -> int | None:
        head, cookie, offset, length = self._unpack_request(data)
        if (
            head != self._plain_read
            or length != BLOCK_BYTES
            or offset & (BLOCK_BYTES - 1)
            or offset + BLOCK_BYTES > self._device.size_bytes
        ):
            return None
        if self._device.read_blocks((offset,), self._rooms.blocks, 0):
            return 0 if self._missed([(cookie, offset, length)]) else None
        self._pack_header(self._rooms.slots, 0, cookie, offset, BLOCK_BYTES)
        return 1

    def again(self, reads: Sequence[MissedRead]) -> Sequence[MissedRead]:
        """Answer reads that were missed, between two batches, and send the replies; returns those that still are not at
        hand."""
        left: list[MissedRead] = []
        for first in range(0, len(reads), SLOTS):
            some = reads[first : first + SLOTS]
            cookies = [cookie for cookie, _, length in some if length == BLOCK_BYTES]
            offsets = [offset for _, offset, length in some if length == BLOCK_BYTES]
            missing = self._device.read_blocks(offsets, self._rooms.blocks, 0)
            left += [(cookies[index], offsets[index], BLOCK_BYTES) for index in missing]
            _drop(cookies, offsets, missing)
            self._pack_headers(cookies, offsets, 0)
            self._slots_used = len(offsets)
            left += [read for read in some if read[2] != BLOCK_BYTES and not self._take_run(*read)]
            replies = self.complete()
            if replies:
                self._send(replies)
        return left

    def _miss(self, cookies: list[int], offsets: list[int], missing: Sequence[int]) -> bool:
        """Have these missed, and take them out of the lists; False, and nothing done, if there is no room for them."""
        if not self._missed([(cookies[index], offsets[index], BLOCK_BYTES) for index in missing]):
            return False
        _drop(cookies, offsets, missing)
        return True

    def complete(self) -> Sequence[Buffer]:
        """The replies of the batch, which is over."""
        replies, self._replies = self._replies, []
        if self._slots_used:
            replies.append(self._rooms.slots_view[: self._slots_used * self._rooms.stride_bytes])
        self.requests = self.answered = self.size_bytes = self._slots_used = self._run_blocks_used = 0
        return replies

    def _take_blocks(self, cookies: list[int], offsets: list[int]) -> int:
        """Read one block each, or have them missed; up to the first for which there is no room. How many that were."""
        first, taken = self._slots_used, len(offsets)
        missing = self._device.read_blocks(offsets, self._rooms.blocks, first)
        if missing and not self._miss(cookies, offsets, missing):
            taken = missing[0]
            del cookies[taken:], offsets[taken:]
        self._pack_headers(cookies, offsets, first)
        self._slots_used = first + len(offsets)
        self.answered += len(offsets)
        self.size_bytes += len(offsets) * BLOCK_BYTES
        return taken

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
        self.answered += 1
        self.size_bytes += length
        return True

    def _pack_header(self, memory: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
        if self._style is ReplyStyle.SIMPLE:
            self._pack_into(memory, at, self._head, cookie)
        elif self._style is ReplyStyle.STRUCTURED:
            self._pack_into(memory, at, self._head, cookie, length + 8, offset)
        else:
            self._pack_into(memory, at, self._head, cookie, offset, length + 8, offset)


def _drop(cookies: list[int], offsets: list[int], indices: Sequence[int]) -> None:
    for index in reversed(indices):
        del cookies[index], offsets[index]
