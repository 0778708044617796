"""The log read back: the modifications that follow one, for a replica that lacks them.

Theory. A segment's row in the usage table names its last txid, so the first segment that may have what is asked for is
found without reading. From its beginning its records are walked, in large pieces off the loop, and then those of the
segments that follow. What was recycled leaves a gap, and that shows: txids have none.

Rules
- Only what `end` says is read: what lies behind a cut is not.
- A segment is held while it is read (`begin_read`); one that is freed between two pieces is a gap.
- A block whose checksum is wrong is not sent: it is a gap too, and whoever asks takes a copy of the region. It is
  repaired, if it is still the block of its MBA.
- Where the last answer ended is remembered, for the one who goes on from there.
- A walk does not refer to itself: no collector would free what it has read.

Known weakness: an older place in a segment is found by walking from its beginning.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from metadata.seams import Files
from nbdserver.logdisk.pacing import guarded
from nbdserver.logdisk.records import Record, next_record
from nbdserver.logdisk.repair import BadBlock
from protocol.disk import (
    BLOCK_BYTES,
    LAYER_ROW,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    TREE,
    WRITE,
    body_bytes,
    chain_key,
    wrong_blocks,
)
from protocol.peer import Modification, Position

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_READ_BYTES = 1 << 20
_MOST_READ_BYTES = 2 * _READ_BYTES

Answer = Callable[[int, Sequence[Modification] | None], None]


class LogReading:
    """Reads the log of one open family."""

    def __init__(self, disk: LogDisk, files: Files) -> None:
        self._disk = disk
        self._files = files
        self.place = (0, 0, 0, 0)  # (txid, segment, its sequence, offset behind the txid's record)
        self.piece_bytes = _READ_BYTES  # that are read at a time; more where records turn out to be a little longer

    def bytes_after(self, txid: int) -> int:
        """How long the log is behind a txid, about: in the segment that has it txids are taken to lie evenly."""
        table = self._disk.maps.segments
        later = [each for each in table.in_use if table.txid[each] > txid]
        if not later:
            return 0
        first = min(later, key=table.sequence.__getitem__)
        before = max((known for each in table.in_use if (known := table.txid[each]) <= txid), default=0)
        passed = table.end[first] * (txid - before) // (table.txid[first] - before)
        return sum(table.end[each] for each in later) - passed

    def read(self, after: Position, limit_bytes: int, done: Answer) -> None:
        """See ReplicaLog.modifications."""
        _Walk(self, self._disk, self._files, after, limit_bytes, done)


class _Walk:
    """One answer on its way."""

    def __init__(
        self, reading: LogReading, disk: LogDisk, files: Files, after: Position, limit_bytes: int, done: Answer
    ) -> None:
        self._reading = reading
        self._disk = disk
        self._files = files
        self._txid = after.txid
        self._left_bytes = limit_bytes
        self._done = done
        self._found: list[Modification] = []
        self._segment = self._sequence = self._offset = 0
        disk.call_soon(guarded(disk.fail, lambda: self._begin(after)))

    def _go_on(self) -> None:
        guarded(self._disk.fail, self._next_piece)()

    def _begin(self, after: Position) -> None:
        disk = self._disk
        if disk.failure:
            self._done(errnos.EIO, None)
        elif disk.log.history.position(after.txid) != after or after.txid > disk.log.txid:
            self._done(0, None)
        else:
            self._find()
            self._next_piece()

    def _find(self) -> None:
        """Stand at the beginning of the first segment that ends behind what is there already, or where the last answer
        ended."""
        table = self._disk.maps.segments
        txid, segment, sequence, offset = self._reading.place
        if txid == self._txid and segment in table.in_use and table.sequence[segment] == sequence:
            self._segment, self._sequence, self._offset = segment, sequence, offset
            return
        self._enter_oldest(each for each in table.in_use if table.txid[each] > self._txid)

    def _enter_oldest(self, segments: Iterable[int]) -> None:
        """Stand at the beginning of the first of them in the log; nowhere if there is none."""
        table = self._disk.maps.segments
        self._segment = min(segments, key=table.sequence.__getitem__, default=0)
        self._sequence = table.sequence[self._segment]
        self._offset = SEGMENT_HEADER_BYTES

    def _next_piece(self, length: int = 0) -> None:
        disk, table = self._disk, self._disk.maps.segments
        if self._txid >= disk.log.txid or (self._found and self._left_bytes <= 0):
            self._answer()
            return
        if not self._segment or table.sequence[self._segment] != self._sequence:
            self._answer()  # freed meanwhile, or never there
            return
        length = min(length or self._reading.piece_bytes, table.end[self._segment] - self._offset)
        if length <= 0:
            self._enter_oldest(each for each in table.in_use if table.sequence[each] > self._sequence)
            disk.call_soon(self._go_on)
            return
        segment = self._segment
        disk.pool.begin_read(segment)
        self._files.read_later(
            disk.pool.handles[segment], [(length, self._offset)], guarded(disk.fail, partial(self._got, segment))
        )

    def _got(self, segment: int, errno: int, data: list[bytes]) -> None:
        disk = self._disk
        disk.pool.end_read(segment)
        if errno or disk.failure:
            self._done(errno or errnos.EIO, None)
            return
        base = self._offset
        key = chain_key(self._sequence, disk.maps.segments.salt[segment])
        at = 0
        while True:
            record = next_record(key, data[0], base, at)
            if isinstance(record, int):
                break
            if not self._take(record, data[0], base):
                self._answer()
                return
            at = record.end - base
            self._offset = record.end
            if self._left_bytes <= 0 or at >= len(data[0]):
                break
        if not at:
            if isinstance(record, int) and record > len(data[0]):
                self._reading.piece_bytes = min(record, _MOST_READ_BYTES)
                self._next_piece(record)
            else:
                self._answer()  # its chain is broken there
            return
        self._go_on()

    def _take(self, record: Record, data: bytes, base: int) -> bool:
        """Note a record that is asked for; False if there is a gap before it."""
        if record.kind not in (WRITE, TREE) or record.txid <= self._txid:
            return True
        at = record.data_offset - base
        blocks = memoryview(data)[at : at + record.blocks * BLOCK_BYTES]
        if record.txid != self._txid + 1:
            return False
        if wrong := wrong_blocks(blocks, record.checksums):
            bad = [BadBlock(record.mbas[block], self._segment, at + base + block * BLOCK_BYTES) for block in wrong]
            self._disk.repairs.want_all(bad, lambda lost: None)
            return False
        extents = len(record.extents) >> 1 if record.kind == WRITE else len(record.rows) // LAYER_ROW.size
        start = record.offset + RECORD_HEADER_BYTES - base
        body = data[start : start + body_bytes(record.kind, extents, record.blocks)]
        found = Modification(
            record.epoch, record.txid, record.kind, record.layer, extents, record.blocks, body,
            (blocks,) if record.blocks else (),
        )  # fmt: skip
        self._found.append(found)
        self._txid = record.txid
        self._left_bytes -= found.size_bytes
        self._reading.place = (record.txid, self._segment, self._sequence, record.end)
        return True

    def _answer(self) -> None:
        is_gap = not self._found and self._txid < self._disk.log.txid
        self._done(0, None if is_gap else self._found)
