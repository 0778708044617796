"""A BlockDevice in memory: the twin of a disk, for tests of what stands before it.

In the mode `deferring` nothing is answered inline, so that every request goes through `later`; the blocks at the
offsets in `cold` are not, until `fetch` has brought in those of them that are `fetchable`. `commit_error`,
`flush_error` and `later_error` make the next one fail; `events` tells the order of commits, flushes and completions.
With `in_flight` commits are acknowledged by `acknowledge(errno)`.
`snapshot(name)` makes a bitmap; what differs from it is told by the content of whole grains.
"""

import errno
from collections.abc import Callable, Mapping, Sequence

from metadata.seams import Buffer, Done
from nbdserver.block import (
    BLOCK_BYTES,
    DIRTY,
    HOLE,
    IN_FLIGHT,
    SPARSE_READ_BYTES,
    ZERO,
    BlockRoom,
    Extents,
    Later,
    Operation,
    RunRoom,
)

GRAIN_BYTES = 4096


class MemoryDevice:
    """`size_bytes` of zeros. `soon` runs callbacks later (a Clock's `call_soon`)."""

    def __init__(self, size_bytes: int, soon: Callable[[Callable[[], None]], None], deferring: bool = False) -> None:
        self.size_bytes = size_bytes
        self.deferring = deferring
        self.cold: set[int] = set()
        self.fetchable: set[int] = set()
        self.data = bytearray(size_bytes)
        self.written = bytearray(-(-size_bytes // GRAIN_BYTES))
        self.commit_error = 0
        self.in_flight = False
        self.unacknowledged: list[Done] = []
        self.flush_error = 0
        self.later_error = 0
        self.events: list[str] = []
        self.snapshots: dict[str, int] = {}
        self.contents: dict[int, bytes] = {}
        self.commits = 0
        self.flushes = 0
        self._soon = soon
        self._open: list[tuple[int, memoryview | None, int]] = []
        self._view = memoryview(self.data)

    def read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        if self.deferring or offset in self.cold:
            return None
        return [bytes(self._view[offset : offset + length])]

    def read_blocks(self, offsets: Sequence[int], rooms: Sequence[BlockRoom], first: int) -> Sequence[int]:
        if self.deferring:
            return range(len(offsets))
        missing: list[int] = []
        for index, offset in enumerate(offsets):
            assert not offset % BLOCK_BYTES
            if offset in self.cold:
                missing.append(index)
            else:
                room = rooms[first + index - len(missing)]
                room[0][0][:] = self._view[offset : offset + BLOCK_BYTES]
        return missing

    def read_run(self, offset: int, blocks: int, room: RunRoom, first: int) -> bool:
        if self.deferring or offset in self.cold:
            return False
        length = blocks * BLOCK_BYTES
        if length >= SPARSE_READ_BYTES and any(flags for _, flags in self._extents(offset, length, 2)):
            return False
        room.view[first * BLOCK_BYTES : first * BLOCK_BYTES + length] = self._view[offset : offset + length]
        return True

    def write(self, offset: int, data: memoryview) -> bool:
        if self.deferring:
            return False
        self._open.append((offset, data, len(data)))
        return True

    def discard(self, offset: int, length: int) -> bool:
        if self.deferring:
            return False
        self._open.append((offset, None, length))
        return True

    def extents(self, offset: int, length: int, limit: int) -> Extents | None:
        return None if self.deferring else self._extents(offset, length, limit)

    def commit(self) -> int:
        self.commits += 1
        changes, self._open = self._open, []
        error, self.commit_error = self.commit_error, 0
        self.events.append(f"commit {len(changes)}" if not error else "commit failed")
        if not error:
            for offset, data, length in changes:
                self._apply(offset, data, length)
        return error or (IN_FLIGHT if self.in_flight else 0)

    def acknowledged(self, done: Done) -> None:
        self.unacknowledged.append(done)

    def acknowledge(self, error: int = 0) -> None:
        waiting, self.unacknowledged = self.unacknowledged, []
        for done in waiting:
            done(error)

    def fetch(self, ranges: Sequence[tuple[int, int]], done: Callable[[], None]) -> bool:
        if self.deferring:
            return False

        def fetched() -> None:
            self.events.append(f"fetched {len(ranges)}")
            self.cold -= self.fetchable
            done()

        self._soon(fetched)
        return True

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        def answer() -> None:
            error, self.later_error = self.later_error, 0
            self.events.append(f"later {operation.name}")
            result: Sequence[Buffer] | Extents | None = None
            if error:
                pass
            elif operation is Operation.READ:
                result = [bytes(self._view[offset : offset + length])]
            elif operation is Operation.WRITE:
                assert data is not None
                assert len(data) == length
                self._apply(offset, memoryview(data), length)
            elif operation is Operation.DISCARD:
                self._apply(offset, None, length)
            elif operation is Operation.EXTENTS:
                result = self._extents(offset, length, limit)
            done(error, result)

        self._soon(answer)

    def snapshot(self, name: str) -> None:
        self.snapshots[name] = len(self.contents) + 1
        self.contents[len(self.contents) + 1] = bytes(self.data)

    def bitmaps(self) -> Mapping[str, int]:
        return self.snapshots

    def changed(self, since: int, offset: int, length: int, limit: int, done: Later) -> None:
        def answer() -> None:
            self.events.append(f"changed since {since}")
            if since not in self.snapshots.values():
                done(errno.ESTALE, None)
            else:
                then = self.contents[since]
                grains = range(0, self.size_bytes, GRAIN_BYTES)
                dirty = bytes(then[at : at + GRAIN_BYTES] != self.data[at : at + GRAIN_BYTES] for at in grains)
                done(0, _runs(dirty, offset, length, limit, (0, DIRTY)))

        self._soon(answer)

    def flush(self, done: Done) -> None:
        assert not self._open, "flushed with an open batch"
        self.flushes += 1
        error, self.flush_error = self.flush_error, 0

        def answer() -> None:
            self.events.append("flushed")
            done(error)

        self._soon(answer)

    def _apply(self, offset: int, data: memoryview | None, length: int) -> None:
        stop = offset + length
        if data is not None:
            self._view[offset:stop] = data
            first, last = offset // GRAIN_BYTES, (stop - 1) // GRAIN_BYTES
            self.written[first : last + 1] = b"\1" * (last + 1 - first)
        else:
            self._view[offset:stop] = bytes(length)
            first, last = -(-offset // GRAIN_BYTES), stop // GRAIN_BYTES
            if last > first:
                self.written[first:last] = bytes(last - first)

    def _extents(self, offset: int, length: int, limit: int) -> Extents:
        return _runs(self.written, offset, length, limit, (HOLE | ZERO, 0))


def _runs(grains: bytes | bytearray, offset: int, length: int, limit: int, flags: tuple[int, int]) -> Extents:
    """The extents of a range whose grains are 0 or 1; `flags` of either."""
    found: Extents = []
    position, stop = offset, offset + length
    while position < stop and len(found) < limit:
        kind = grains[position // GRAIN_BYTES]
        other = grains.find(1 - kind, position // GRAIN_BYTES)
        edge = stop if other < 0 else min(stop, other * GRAIN_BYTES)
        found.append((edge - position, flags[kind]))
        position = edge
    return found
