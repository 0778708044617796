"""Replies that carry one block each, side by side in memory, so that a batch of them leaves with one `send`.

Theory: the commonest reply is a header and 4,096 bytes. Here it has a *slot*: the kernel reads the block from the page
cache straight into it, its checksum is computed where it lies, and neighbouring slots are one buffer to send. Nothing
is allocated or copied a reply, and `sendmsg` walks over one buffer instead of two a reply.

Rules
- The slots are one set for each size of header, shared by all connections: filled and sent within one batch, on the
  loop's thread. `Connection.send` copies what it cannot send at once.
- A slot counts only when its reader said so; what a failed attempt left there is overwritten by the next.

Known weakness: replies beyond `SLOTS` in one batch, and reads of other lengths, take the general way.
"""

import ctypes
from functools import cache
from typing import Any

from nbdserver.block import BLOCK_BYTES, BlockRoom

SLOTS = 64


class BlockReplies:
    """`SLOTS` slots of a header of `header_bytes` and a block."""

    def __init__(self, header_bytes: int) -> None:
        self.stride_bytes = header_bytes + BLOCK_BYTES
        self.memory = bytearray(SLOTS * self.stride_bytes)
        self.view = memoryview(self.memory)
        self.rooms: list[BlockRoom] = [self._room(slot * self.stride_bytes + header_bytes) for slot in range(SLOTS)]

    def _room(self, start: int) -> BlockRoom:
        # google-crc32c takes no memoryview of writable memory, but a ctypes array.
        data: Any = (ctypes.c_char * BLOCK_BYTES).from_buffer(self.memory, start)
        return [self.view[start : start + BLOCK_BYTES]], data


@cache
def block_replies(header_bytes: int) -> BlockReplies:
    """The process's slots behind headers of this size."""
    return BlockReplies(header_bytes)
