"""The log of one family: appends records to the open segment, goes from segment to segment, makes what was appended
durable.

    segment 3                          segment 7 (its successor)
    | header | record | record | SEAL ──►| header | record | ...

Theory. One batch is one record is one `pwritev` at the end of the open segment; nothing else touches a disk in the
write path. Each header's CRC is the next one's `previous_crc`, across segments too, so the log is one chain and
replay needs no other index. When a record does not fit, a seal names the successor and its salt and the successor's
header goes on with the chain.

Flush. One fdatasync in flight at a time, off the loop; whoever asks meanwhile shares the next one. It covers every
segment with unsynced records, the oldest first, because a later segment is reached only through the earlier ones.
A client that flushes after each write (a database's journal) would wait twice, for its write and then for its flush. So
when that has become a *habit*, the sync begins with the write, and the flush that follows shares it.

Rules
- A record is acknowledged only after its `pwritev` returned (Rule.ACK_AFTER_APPEND).
- A failed fdatasync is fatal (Rule.FSYNC_FAILURE_IS_FATAL): `failed` is called, no flush is ever answered with
  success again.
- After a failed append the same bytes are written again or nothing is: the chain did not move.

Known weakness: a batch larger than what is left of the open segment is cut in two; the rest of the room of a segment
that is smaller than one block and its header stays unused.
"""

import random
from array import array
from collections.abc import Callable, Sequence
from typing import cast

from metadata.epochs import EpochHistory
from metadata.family_state import Checkpoint
from metadata.seams import Buffer, Done, Files
from metadata.segment_table import SegmentTable
from nbdserver.logdisk.committed import Committed
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.segments import SegmentPool
from protocol.disk import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    MOVE,
    MOVE_BLOCK_BYTES,
    RECORD_HEADER_BYTES,
    REGION,
    SEAL,
    SEAL_BODY,
    SEAL_BYTES,
    SEGMENT_HEADER_BYTES,
    TREE,
    WRITE,
    WRITE_BLOCK_BYTES,
    chain_key,
    pack_record_header,
    pack_segment_header,
)
from protocol.invariant import invariant
from protocol.peer import Epochs, Modification, Position

MAX_BYTES_A_BLOCK = RECORD_HEADER_BYTES + EXTENT_BYTES + WRITE_BLOCK_BYTES + BLOCK_BYTES
"""Of the log, for a block that is a record of its own."""

ALIGNED_BLOCKS = 32
"""From so many on the data begins at a page of the file, where there is room: a block that is read alone then takes one
page of the cache instead of two, and that is worth 2 KiB of 128. For a short record it is not."""

HABIT_RECORDS = 4
"""So many flushes after one record each, and the next one is expected; a wrong guess costs one sync and ends it."""


class Log:
    """The append end of a family's log. Positions are of the *next* record."""

    def __init__(
        self,
        files: Files,
        pool: SegmentPool,
        table: SegmentTable,
        rng: random.Random,
        family: bytes,
        position: Checkpoint,
        epoch: int,
        history: EpochHistory,
        committed: Committed,
        failed: Callable[[str], None],
    ) -> None:
        self.segment = position.segment
        self.offset = position.offset  # 0: the segment's life has not begun
        self.lsn = position.lsn  # of the last record
        self.txid = position.txid
        self.epoch = epoch
        self.history = history
        self.committed = committed
        self.tap: Callable[[Modification], None] | None = None  # hears what is ordered here
        self.splices: set[int] = set()  # lsns of those that the next checkpoint makes superfluous
        self.previous_crc = position.previous_crc
        self.sequence = position.sequence
        self.salt = position.salt
        self.durable_lsn = position.lsn
        self.durable_txid = position.txid
        self.appended_bytes = 0
        self.records = 0
        self.syncs = 0
        self.sync_requests = 0
        self.is_failed = False
        self._key = chain_key(position.sequence, position.salt)
        self._files = files
        self._pool = pool
        self._table = table
        self._random = rng
        self._family = family
        self._failed = failed
        self._unsynced: list[int] = []  # segments, oldest first
        self._syncing = False
        self._waiting: list[tuple[int, Done]] = []  # (lsn, done)
        self._flushed_lsn = position.lsn  # of the last record when a flush was asked for last
        self._habit = 0  # how often, lately, exactly one record came before a flush

    # -- room

    def room_blocks(self, kind: int, extents: int) -> int:
        """Blocks that one record of that many extents may still have in the open segment; below 0: not even the
        header."""
        offset = self.offset or SEGMENT_HEADER_BYTES
        room = self._pool.segment_bytes - SEAL_BYTES - offset - RECORD_HEADER_BYTES
        a_block = BLOCK_BYTES + (WRITE_BLOCK_BYTES if kind == WRITE else MOVE_BLOCK_BYTES)
        return (room - extents * EXTENT_BYTES) // a_block

    @property
    def room_blocks_of_single_blocks(self) -> int:
        """Blocks that still fit into the open segment even if each is a record of its own."""
        offset = self.offset or SEGMENT_HEADER_BYTES
        return max(0, self._pool.segment_bytes - SEAL_BYTES - offset) // MAX_BYTES_A_BLOCK

    def has_room_for_bytes(self, size_bytes: int) -> bool:
        """Whether a record with so much body and data fits into the open segment."""
        offset = self.offset or SEGMENT_HEADER_BYTES
        return offset + RECORD_HEADER_BYTES + size_bytes <= self._pool.segment_bytes - SEAL_BYTES

    def begin_if_needed(self) -> bool:
        """Begin the life of a family's first segment; False if there is no room for it."""
        if self.offset:
            return True
        if not self._pool.take_number(self.segment):
            return False
        self._begin(self.segment, self.sequence, self.salt)
        return True

    def next_segment(self, keep: int) -> bool:
        """Seal the open segment and go on in another; False (and nothing done) if no file but `keep` of the spare
        ones is to be had. Raises OSError; the log is then as before."""
        successor = self._pool.take(keep)
        if not successor:
            return False
        salt = self._random.randbytes(8) if holds(Rule.SALT_DRAWN_PER_LIFE) else bytes(8)
        body = SEAL_BODY.pack(successor, 0, salt)
        try:
            # The successor's header first: nothing leads to it before the seal, and behind a seal nothing may follow.
            sealed = self._pack(SEAL, 0, 0, 0, body)
            self._write_segment_header(successor, self.sequence + 1, salt, sealed[1])
            crash_point("segment-before-seal")
            self._append_packed(sealed, 0, ())
        except OSError:
            self._pool.return_unused(successor)
            raise
        crash_point("segment-after-seal")
        self._enter(successor, self.sequence + 1, salt)
        return True

    def go_on_in(self, segment: int, sequence: int) -> None:
        """After recovery: go on in a fresh segment, whatever is in the last one behind its last good record."""
        self._begin(segment, sequence, self._random.randbytes(8))

    def begin_epoch(self, epoch: int) -> None:
        """Whatever is appended from now on is ordered here, under this epoch, the highest so far."""
        self.epoch = epoch
        self.history.begin(epoch, self.txid + 1)

    @property
    def last(self) -> Position:
        """Of the newest modification."""
        return self.history.position(self.txid)

    @property
    def durable(self) -> Position:
        """Of the newest one that is durable."""
        return self.history.position(self.durable_txid)

    @property
    def is_committed(self) -> bool:
        """Whether all of it is: a checkpoint may stand at its end."""
        return self.txid <= self.committed.txid

    # -- records

    def append_write(
        self, layer: int, extents: "array[int]", mbas: "array[int]", checksums: "array[int]", data: Sequence[Buffer]
    ) -> int:
        """Append one modification and return the offset of its first data block in the open segment.

        `extents` holds (lba, count | kind << 32) pairs. Raises OSError; the log is then as before.
        """
        body = extents.tobytes() + mbas.tobytes() + checksums.tobytes()
        self.txid += 1
        try:
            offset = self._append(WRITE, layer, len(extents) >> 1, len(mbas), body, data)
        except OSError:
            self.txid -= 1
            raise
        if self._habit:
            self._anticipate_flush()
        if self.tap is not None:
            blocks = cast(Sequence[bytes | memoryview], data)
            self.tap(Modification(self.epoch, self.txid, WRITE, layer, len(extents) >> 1, len(mbas), body, blocks))
        return offset

    def append_tree(self, rows: Sequence[bytes]) -> None:
        """Append a change of the tree of layers: one modification. Raises OSError; the log is then as before."""
        self.txid += 1
        body = b"".join(rows)
        try:
            self._append(TREE, 0, len(rows), 0, body, ())
        except OSError:
            self.txid -= 1
            raise
        if self.tap is not None:
            self.tap(Modification(self.epoch, self.txid, TREE, 0, len(rows), 0, body, ()))

    def skip(self, to: Position, ends: Epochs) -> None:
        """What follows from now on follows this modification of another log, whose history becomes this one's."""
        self.txid = to.txid
        self.epoch = to.epoch
        self.history.take_over(ends)

    def append_replicated(self, modification: Modification) -> int:
        """Append what another node ordered; returns as `append_write`. Raises OSError; the log is then as before."""
        before = self.epoch, self.txid
        self.epoch, self.txid = modification.epoch, modification.txid
        try:
            offset = self._append(
                modification.kind, modification.layer, modification.extents, modification.blocks, modification.body,
                modification.data,
            )  # fmt: skip
        except OSError:
            self.epoch, self.txid = before
            raise
        self.history.note(modification.epoch, modification.txid)
        return offset

    def append_region(self, runs: int, blocks: int, body: bytes, data: Sequence[Buffer]) -> int:
        """Append a part of a region as another replica has it; returns as `append_write`. Raises OSError."""
        return self._append(REGION, 0, runs, blocks, body, data)

    def append_move(
        self, mbas: "array[int]", old: "array[int]", checksums: "array[int]", data: Sequence[Buffer]
    ) -> int:
        """Append moved blocks (`old`: segment and offset pairs) and return the offset of the first. Raises OSError."""
        return self._append(MOVE, 0, 0, len(mbas), mbas.tobytes() + old.tobytes() + checksums.tobytes(), data)

    def _append(self, kind: int, layer: int, extents: int, blocks: int, body: bytes, data: Sequence[Buffer]) -> int:
        return self._append_packed(self._pack(kind, layer, extents, blocks, body), blocks, data)

    def _pack(self, kind: int, layer: int, extents: int, blocks: int, body: bytes) -> tuple[bytes, int]:
        """Everything of the record before its data, and the CRC of its header."""
        padding = self._padding_bytes(len(body), blocks)
        header, crc = pack_record_header(
            self._key,
            kind,
            extents,
            layer,
            self.epoch,
            self.previous_crc,
            self.txid,
            self.lsn + 1,
            self.durable_lsn,
            blocks,
            body,
            padding is not None,
        )
        return (header + bytes(padding) if padding else header), crc

    def _padding_bytes(self, body_bytes: int, blocks: int) -> int | None:
        """What stands before the data of a record that is aligned; None for one that is not."""
        if blocks < ALIGNED_BLOCKS:
            return None
        begin = self.offset + RECORD_HEADER_BYTES + body_bytes
        padding = -begin % BLOCK_BYTES
        fits = begin + padding + blocks * BLOCK_BYTES <= self._pool.segment_bytes - SEAL_BYTES
        return padding if fits else None

    def _append_packed(self, packed: tuple[bytes, int], blocks: int, data: Sequence[Buffer]) -> int:
        header, crc = packed
        offset = self.offset
        data_offset = offset + len(header)
        end = data_offset + blocks * BLOCK_BYTES
        crash_point("append-before")
        self._files.append(self._pool.handles[self.segment], (header, *data), offset)
        crash_point("append-after")
        self.previous_crc = crc
        self.lsn += 1
        self.offset = end
        self.records += 1
        self.appended_bytes += end - offset
        if not self._unsynced or self._unsynced[-1] != self.segment:
            self._unsynced.append(self.segment)
        self._table.appended(self.segment, end, self.txid, self.lsn)
        return data_offset

    def _begin(self, segment: int, sequence: int, salt: bytes) -> None:
        self._write_segment_header(segment, sequence, salt, self.previous_crc)
        self._enter(segment, sequence, salt)

    def _write_segment_header(self, segment: int, sequence: int, salt: bytes, previous_crc: int) -> None:
        crash_point("segment-before-open")
        header = pack_segment_header(self._family, segment, self.epoch, sequence, salt, previous_crc)
        self._files.append(self._pool.handles[segment], (header,), 0)

    def _enter(self, segment: int, sequence: int, salt: bytes) -> None:
        self._table.begin(segment, sequence, salt)
        self._table.appended(segment, SEGMENT_HEADER_BYTES, self.txid, self.lsn)
        self.segment, self.sequence, self.salt = segment, sequence, salt
        self.offset = SEGMENT_HEADER_BYTES
        self._key = chain_key(sequence, salt)
        self._unsynced.append(segment)

    # -- durability

    def sync(self, done: Done) -> None:
        """`done(0)` when every record appended before this call is durable, at once if it is already; `done(EIO)` if
        that can never be said."""
        self.sync_requests += 1
        self._habit = min(self._habit + 1, HABIT_RECORDS) if self.lsn == self._flushed_lsn + 1 else 0
        self._flushed_lsn = self.lsn
        if self.durable_lsn == self.lsn and not self.is_failed:
            done(0)
            return
        self._waiting.append((self.lsn, done))
        if not self._syncing:
            self._start_sync()

    def _anticipate_flush(self) -> None:
        """A record was appended: begin the sync for it, unless the one before it was followed by no flush."""
        if self.lsn > self._flushed_lsn + 1:
            self._habit = 0
        elif self._habit == HABIT_RECORDS and not self._syncing:
            self._start_sync()

    def _start_sync(self) -> None:
        covered, txid = self.lsn, self.txid
        segments = list(self._unsynced)
        if not holds(Rule.FLUSH_OLDEST_FIRST):
            segments = segments[-1:]
        self._syncing = True
        self.syncs += 1
        crash_point("flush-before-sync")
        handles = [self._pool.handles[segment] for segment in segments]
        in_sync = set(self._unsynced)
        self._files.fdatasync_later(handles, lambda errno: self._synced(errno, covered, txid, in_sync))

    def _synced(self, errno: int, covered: int, txid: int, segments: set[int]) -> None:
        try:
            ready = self._note_synced(errno, covered, txid, segments)
        except Exception as error:
            self._failed(f"an internal error: {error!r}")
            return
        for done in ready:
            done(0)

    def _note_synced(self, errno: int, covered: int, txid: int, segments: set[int]) -> list[Done]:
        """Take a sync's outcome; returns those whom it satisfies."""
        crash_point("flush-after-sync")
        self._syncing = False
        if self.is_failed:
            return []
        if errno and holds(Rule.FSYNC_FAILURE_IS_FATAL):
            self._failed(f"fdatasync failed with errno {errno}")
            return []
        invariant(covered >= self.durable_lsn, "durable lsn only rises")
        self.durable_lsn, self.durable_txid = covered, txid
        # What was appended to a segment while it was synced needs another sync.
        newest = self._table.lsn
        self._unsynced = [each for each in self._unsynced if each not in segments or newest[each] > covered]
        ready = [done for lsn, done in self._waiting if lsn <= covered]
        self._waiting = [(lsn, done) for lsn, done in self._waiting if lsn > covered]
        if self._waiting:
            self._start_sync()
        return ready

    def fail(self) -> list[Done]:
        """Nothing of this log can be promised any more; returns those who wait for a sync, to be told EIO."""
        self.is_failed = True
        waiting, self._waiting = self._waiting, []
        return [done for _, done in waiting]

    def position(self, next_mba: int, next_hole: int, live_blocks: int) -> Checkpoint:
        """Where replay goes on after the present state."""
        return Checkpoint(
            self.lsn,
            self.txid,
            self.epoch,
            self.segment,
            self.offset,
            self.previous_crc,
            self.sequence,
            self.salt,
            next_mba,
            next_hole,
            live_blocks,
        )
