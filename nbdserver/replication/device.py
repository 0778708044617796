"""A replicated volume as a block device: that of the owner's own log, which answers when the others have it too.

Theory. Data is read from the own log and written into it; the owner sends what was ordered to the others and says when
it is acknowledged. So a commit is IN_FLIGHT, and a read is answered inline only if nothing that it shows is still to be
acknowledged and the owner may answer at this moment. What may not is read all the same, and told when it may be.

Rules (docs/replication.md has the reasons)
- Authority is asked for after the request has come (2).
- What a read shows is noted when it is read, and its answer waits for that (17): it never waits for what comes later.
- What is in the open batch has no txid yet: nothing is answered inline while there is one.
- Room is asked for before ordering (18), once a batch; a write that finds none waits until the owner has an answer.
- When the owner is deposed nobody is told anything any more: whoever has the device lets its clients go on elsewhere.
  Nor is anybody from when the own log could not be appended to: that deposes the owner, in this turn of the loop.
"""

import errno as errnos
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from metadata.seams import Buffer, Done
from nbdserver.block import BLOCK_BYTES, IN_FLIGHT, BlockDevice, BlockRoom, Extents, Later, Operation, RunRoom

_CHANGES = (Operation.WRITE, Operation.DISCARD)


class Ordering(Protocol):
    """What the device needs of an `Owner`."""

    is_deposed: bool

    @property
    def has_authority(self) -> bool: ...

    @property
    def is_settled(self) -> bool:
        """Whether everything ordered is acknowledged."""

    @property
    def ordered_txid(self) -> int:
        """Of the newest modification."""

    def room_bytes(self) -> int:
        """That may be ordered at once."""

    def ask_for_room(self, size_bytes: int, done: Done) -> None:
        """`done(0)` when so much may be ordered, or with an errno."""

    def commit(self, commit: Callable[[], int]) -> int: ...

    def when_committed(self, txid: int, done: Done) -> None: ...

    def flush(self, done: Done) -> None: ...

    def unacknowledged(self, lba: int, count: int) -> int: ...


class ReplicatedDevice:
    """`BlockDevice` of one head, on its owner."""

    def __init__(self, inner: BlockDevice, owner: Ordering) -> None:
        self._inner = inner
        self._owner = owner
        self._room_bytes = 0  # that the open batch may still take
        self._is_open = False  # there is an open batch
        self._has_failed = False  # the own log
        self._look_at_room()

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    # --- inline ---

    def _may_show(self, offset: int, length: int) -> bool:
        owner = self._owner
        if self._is_open or not owner.has_authority:
            return False
        return owner.is_settled or not self._newest(offset, length)

    def _newest(self, offset: int, length: int) -> int:
        """Txid that has to be acknowledged before the range may be shown."""
        first = offset // BLOCK_BYTES
        count = (offset + length + BLOCK_BYTES - 1) // BLOCK_BYTES - first
        return self._owner.unacknowledged(first, count)

    def read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        return self._inner.read(offset, length) if self._may_show(offset, length) else None

    def read_blocks(self, offsets: Sequence[int], rooms: Sequence[BlockRoom], first: int) -> Sequence[int]:
        if self._owner.is_settled and not self._is_open and self._owner.has_authority:
            return self._inner.read_blocks(offsets, rooms, first)
        shown = [index for index, offset in enumerate(offsets) if self._may_show(offset, BLOCK_BYTES)]
        if not shown:
            return range(len(offsets))
        missing = set(range(len(offsets))) - set(shown)
        missing.update(
            shown[each] for each in self._inner.read_blocks([offsets[index] for index in shown], rooms, first)
        )
        return sorted(missing)

    def read_run(self, offset: int, blocks: int, room: RunRoom, first: int) -> bool:
        return self._may_show(offset, blocks * BLOCK_BYTES) and self._inner.read_run(offset, blocks, room, first)

    def extents(self, offset: int, length: int, limit: int) -> Extents | None:
        return self._inner.extents(offset, length, limit) if self._may_show(offset, length) else None

    def write(self, offset: int, data: memoryview) -> bool:
        size_bytes = len(data)
        if size_bytes > self._room_bytes or not self._inner.write(offset, data):
            return False
        self._room_bytes -= size_bytes
        self._is_open = True
        return True

    def discard(self, offset: int, length: int) -> bool:
        if self._owner.is_deposed or not self._inner.discard(offset, length):
            return False
        self._is_open = True
        return True

    def commit(self) -> int:
        self._is_open = False
        if self._owner.is_deposed:
            return errnos.EIO  # to nobody: the open batch was never ordered
        self._look_at_room()
        errno = self._owner.commit(self._inner.commit)
        self._has_failed |= errno == errnos.EIO
        return errno if errno and not self._has_failed else IN_FLIGHT

    def _look_at_room(self) -> None:
        self._room_bytes = self._owner.room_bytes()

    def acknowledged(self, done: Done) -> None:
        if not self._has_failed:
            self._tell_when(self._owner.ordered_txid, lambda: done(0))

    def _tell_when(self, txid: int, tell: Callable[[], None]) -> None:
        """When everything up to `txid` is acknowledged; never, if that is not known any more."""

        def committed(errno: int) -> None:
            if not errno:
                tell()

        self._owner.when_committed(txid, committed)

    # --- what waits ---

    def fetch(self, ranges: Sequence[tuple[int, int]], done: Callable[[], None]) -> bool:
        return all(self._may_show(*each) for each in ranges) and self._inner.fetch(ranges, done)

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        if self._owner.is_deposed:
            return
        if operation is Operation.WRITE:
            self._look_at_room()
            if length > self._room_bytes:

                def asked(errno: int) -> None:
                    if errno:
                        done(errno, None)
                    else:
                        self._begin(operation, offset, length, data, done, limit)

                self._owner.ask_for_room(length, asked)
                return
        self._begin(operation, offset, length, data, done, limit)

    def _begin(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int
    ) -> None:
        def answered(errno: int, result: Sequence[Buffer] | Extents | None) -> None:
            owner = self._owner
            txid = owner.ordered_txid if operation in _CHANGES else self._newest(offset, length)
            self._tell_when(txid, lambda: done(errno, result))

        self._inner.later(operation, offset, length, data, answered, limit)

    def bitmaps(self) -> Mapping[str, int]:
        return self._inner.bitmaps()

    def changed(self, since: int, offset: int, length: int, limit: int, done: Later) -> None:
        def answered(errno: int, result: Sequence[Buffer] | Extents | None) -> None:
            self._tell_when(self._owner.ordered_txid, lambda: done(errno, result))

        self._inner.changed(since, offset, length, limit, answered)

    def flush(self, done: Done) -> None:
        def flushed(errno: int) -> None:
            if errno != errnos.ESHUTDOWN:
                done(errno)

        self._owner.flush(flushed)
