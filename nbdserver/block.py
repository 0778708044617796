"""The one narrow block interface between NBD sessions and what stores bytes.

Theory: a wake of the loop brings many requests. Each is first tried *inline*: `read`, `write`, `discard` and `extents`
answer at once or say that they cannot (None, False), at the cost of one function call and no object. What cannot be
answered inline (a map page that is not in memory, a block that is not in the page cache, a full disk, a damaged block)
goes to `later`, which takes a callback; reads go to `fetch` first, many at once, which makes them ready to be tried
again. So the hot path has no callbacks, and the slow path has one door.

Rules
- Offsets and lengths have been checked against `size_bytes` and the export's settings by the session: they are
  trusted here.
- `write` and `discard` that returned True belong to the *open batch*; none of it is acknowledged before `commit`
  returned 0. The data given to `write` must stay unchanged until then. Nothing may be awaited between the first of
  them and `commit`.
- `later` operations commit themselves before their callback. Callbacks come from the loop, never from inside the call.
- An operation that returned None or False changed nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from metadata.seams import Buffer, Done

BLOCK_BYTES = 4096

HOLE = 1  # extent flags, as in NBD's base:allocation
ZERO = 2
DIRTY = 1  # extent flag, as in qemu:dirty-bitmap

SPARSE_READ_BYTES = 256 << 10
"""Reads from here on are told which parts are holes."""

IN_FLIGHT = -1
"""Of `commit`: the batch is in the log here; whether it is acknowledged is told later."""


class Operation(IntEnum):
    """What `BlockDevice.later` can be asked for."""

    READ = 0  # result: list[Buffer]
    WRITE = 1  # result: None
    DISCARD = 2  # result: None
    EXTENTS = 3  # result: list[tuple[int, int]]
    CACHE = 4  # result: None; brings the range into the page cache


Extents = list[tuple[int, int]]
BlockRoom = tuple[list[memoryview], Any]
"""Memory for one block, twice: as a list of its writable view, for a scattered read, and as what `crc32c` takes."""


class RunRoom(NamedTuple):
    """Memory for blocks one after the other: as its writable view, and each block by itself, twice."""

    view: memoryview
    blocks: list[BlockRoom]
    sums: list[Any]  # the second part of each of `blocks`


Later = Callable[[int, "Sequence[Buffer] | Extents | None"], None]
"""Called with (errno, result); the result is None unless errno is 0."""


class BlockDevice(Protocol):
    """A disk of `size_bytes` bytes."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """Buffers that together hold the range, or None: ask `later`."""

    def read_blocks(self, offsets: Sequence[int], rooms: Sequence[BlockRoom], first: int) -> Sequence[int]:
        """Fill `rooms` from number `first` on with the blocks at `offsets`, without a gap where one is not at hand;
        returns which ones (0: the first) are not. The room behind the last may have been written to."""

    def read_run(self, offset: int, blocks: int, room: RunRoom, first: int) -> bool:
        """Fill `blocks` blocks of `room` from number `first` on with what begins at `offset`, a multiple of the
        block. False, and always if there are holes in SPARSE_READ_BYTES or more: ask `extents` and `read`; the room may
        have been written to."""

    def write(self, offset: int, data: memoryview) -> bool:
        """Add to the open batch, or False: ask `later` (with a copy of the data)."""

    def discard(self, offset: int, length: int) -> bool:
        """Add "reads as zeros, takes no room" for exactly this range to the open batch, or False: ask `later`."""

    def extents(self, offset: int, length: int, limit: int) -> Extents | None:
        """At most `limit` (length, flags) pairs from `offset` on, neighbours of equal flags merged; may stop early
        but never covers less than one byte; or None: ask `later`."""

    def commit(self) -> int:
        """Append the open batch to the log as one record. 0: all of it is acknowledged; IN_FLIGHT: `acknowledged` says;
        an errno: the client has to take all of it as failed, though a part may have happened."""

    def acknowledged(self, done: Done) -> None:
        """After a commit that was IN_FLIGHT: `done(0)` when all that was committed so far is acknowledged, or `done`
        with an errno as of `commit`. In the order of the calls. Never, if that cannot be known any more: whoever made
        the device sees to it that its clients go on elsewhere, or are disconnected."""

    def fetch(self, ranges: Sequence[tuple[int, int]], done: Callable[[], None]) -> bool:
        """Bring what these (offset, length) ranges lack to hand; `done()` when that is over, and they may be asked for
        inline again, which may fail again. False, and nothing done, where that cannot help: ask `later`."""

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        """Do the operation when what it needs is there. `data` is for WRITE, `limit` for EXTENTS."""

    def bitmaps(self) -> Mapping[str, int]:
        """The older snapshots that `changed` can compare with: their names and numbers, the oldest first."""

    def changed(self, since: int, offset: int, length: int, limit: int, done: Later) -> None:
        """As EXTENTS of `later`, with DIRTY where the content may differ from that in the snapshot of number `since`;
        ESTALE if that is gone."""

    def flush(self, done: Done) -> None:
        """`done(0)` when everything acknowledged before this call is durable; at once if it is."""
