"""Cleaning: live blocks of thinly used segments move to the end of the log, so that the next checkpoint frees the
segments.

Theory. The victim is chosen by cost-benefit, (1 - u) · age / (1 + u) with u the live share (Rosenblum and Ousterhout,
"The Design and Implementation of a Log-Structured File System", 1992): a cold segment is worth cleaning at a higher u
than a hot one, whose blocks die by themselves. Under load garbage may grow to a share of the live data, because what
waits longer is emptier; at rest it is brought down further, so that `df` comes close to the live data.

A move is (MBA, old PBA, new PBA). It changes only the middle map, however many layers refer to the MBA, and takes
effect only if the MBA still has the old PBA (Rule.MOVE_ONLY_IF_UNCHANGED). The victim's headers say which MBAs were
written there; the middle map says which of them still are.

Rules
- A block is moved only if its CRC is right. One with a wrong one is repaired if another replica has it; otherwise it
  is reported, and its segment kept for this life.
- An append that fails otherwise than for want of room condemns the family, like a client's.
- Moves use the reserve of segments, because they are how a full disk gets room.
- One victim at a time, read in large pieces off the loop, worked through in slices.

Known weakness: one open segment serves clients and cleaner, so hot and cold blocks mix; choosing a victim looks at
every segment (some 3 ms for a terabyte).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from errno import ENOSPC
from functools import partial

from metadata.pages import PAGE_MASK, PAGE_SHIFT
from metadata.seams import Clock, Files
from nbdserver.logdisk.log import Log
from nbdserver.logdisk.maps import CHECKSUM, OFFSET, Maps, Need
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.pacing import DEFAULT_SHARE, Job
from nbdserver.logdisk.records import Record, next_record
from nbdserver.logdisk.repair import BadBlock, Told
from nbdserver.logdisk.segments import CLEANER_KEEPS, SegmentPool
from protocol.checksum import crc32c
from protocol.disk import (
    BLOCK_BYTES,
    MOVE,
    MOVE_BLOCK_BYTES,
    SEAL,
    SEGMENT_HEADER_BYTES,
    chain_key,
)

_READ_BYTES = 1 << 20
_MOVE_BLOCKS = 32  # a record: some 0.1 ms on the loop
_BUSY_GARBAGE = 0.5, 8  # of the live data, and at least segments: what may lie about while clients write
_THOROUGH_GARBAGE = 0.1, 2
_OVERRUN = 2.0  # times what may lie about: clients write faster than the cleaner cleans, and have to wait
_MOST_SHARE = 0.75
_WORTHWHILE = 0.8  # live share above which a segment is not cleaned: each victim gains something, so it comes to an end
_URGENTLY_WORTHWHILE = 0.95  # the same on a full disk


class Cleaner:
    """Cleans one victim after the other while `wanted` says so."""

    def __init__(
        self,
        files: Files,
        clock: Clock,
        log: Log,
        maps: Maps,
        pool: SegmentPool,
        make_room: Callable[[], bool],
        appended: Callable[[], None],
        finished: Callable[[], None],
        parted: Callable[[Exception], None],
        report: Callable[[str, dict[str, object]], None],
        repair: Callable[[BadBlock, Told], None],
    ) -> None:
        self.running = False
        self.blocks_moved = 0
        self.blocks_skipped = 0
        self.segments_cleaned = 0
        self.urgent = False  # the disk is full: anything gained is worth it
        self._files = files
        self._clock = clock
        self._log = log
        self._maps = maps
        self._pool = pool
        self._make_room = make_room
        self._appended = appended
        self._finished = finished
        self._parted = parted
        self._report = report
        self._repair = repair
        self._damaged: dict[int, int] = {}  # segment → sequence number of the life that cannot be cleaned
        self._victim = 0
        self._sequence = 0
        self._offset = 0
        self._stopped = False
        # Of blocks that were moved one by one: a segment that holds so many has no garbage.
        self._capacity_blocks = max(1, pool.record_bytes // (BLOCK_BYTES + MOVE_BLOCK_BYTES))

    # -- when and what

    @property
    def garbage_bytes(self) -> int:
        """Bytes that could be live in the segments with live blocks, but for the open one, and are not."""
        table = self._maps.segments
        in_open = table.live[self._log.segment] if self._log.offset else 0
        used = table.segments_with_live_blocks - (in_open > 0)
        return (used * self._capacity_blocks - self._maps.live_blocks + in_open) * BLOCK_BYTES

    def wanted(self, thorough: bool) -> bool:
        """Whether there is more garbage than may lie about; less may at rest, or when room is short (`thorough`)."""
        if self.urgent:
            return True
        return self.garbage_bytes > self._allowed(_THOROUGH_GARBAGE if thorough else _BUSY_GARBAGE)

    def is_overrun(self) -> bool:
        """Whether there is so much garbage that clients have to wait for the cleaner."""
        return self.running and self.garbage_bytes > _OVERRUN * self._allowed(_BUSY_GARBAGE)

    def _allowed(self, limits: tuple[float, int]) -> int:
        share, segments = limits
        return max(segments * self._pool.segment_bytes, int(self._maps.live_blocks * BLOCK_BYTES * share))

    def _share(self) -> float:
        """Of the loop's time: the more, the nearer it is to being overrun."""
        if self.urgent:
            return _MOST_SHARE
        over = self.garbage_bytes / (_OVERRUN * self._allowed(_BUSY_GARBAGE))
        return min(_MOST_SHARE, max(DEFAULT_SHARE, over * over * _MOST_SHARE))

    def choose(self) -> int:
        """The best victim, or 0."""
        table = self._maps.segments
        live, lsns = table.live, table.lsn
        newest = self._log.lsn
        worthwhile = _URGENTLY_WORTHWHILE if self.urgent else _WORTHWHILE
        # Without a further segment only a victim that goes whole into the open one brings one.
        room = self._capacity_blocks if self._pool.can_take(CLEANER_KEEPS) else self._log.room_blocks(MOVE, 0) - 1
        best, best_score = 0, 0.0
        for segment in table.in_use:
            blocks = live[segment]
            if not 0 < blocks <= room or segment == self._log.segment:
                continue
            if self._damaged.get(segment) == table.sequence[segment]:
                continue
            used = min(1.0, blocks / self._capacity_blocks)
            if used > worthwhile:
                continue
            score = (1 - used) * (newest - lsns[segment] + 1) / (1 + used)
            if score > best_score:
                best, best_score = segment, score
        return best

    def start(self) -> bool:
        """Clean the best victim; False if there is none."""
        if self.running or self._stopped or self._log.is_failed:
            return self.running
        victim = self.choose()
        if not victim:
            return False  # or a checkpoint has to free something first
        self.running = True
        self._victim = victim
        self._sequence = self._maps.segments.sequence[victim]
        self._offset = SEGMENT_HEADER_BYTES
        self._pool.begin_read(victim)
        self._read(_READ_BYTES)
        return True

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped = True

    # -- one victim

    def _read(self, length: int) -> None:
        end = self._maps.segments.end[self._victim]
        length = min(length, end - self._offset)
        if length <= 0 or self._is_over():
            self._finish()
            return
        offset = self._offset
        self._files.read_later(
            self._pool.handles[self._victim],
            [(length, offset)],
            lambda errno, data: self._got(errno, data[0] if data else b"", offset),
        )

    def _is_over(self) -> bool:
        """Whether the victim needs no more work: it is empty, freed meanwhile even, or everything ends."""
        table = self._maps.segments
        emptied = not table.live[self._victim] or table.sequence[self._victim] != self._sequence
        return emptied or self._stopped

    def _got(self, errno: int, data: bytes, base: int) -> None:
        if self._is_over():
            self._finish()
            return
        if errno or not data:
            self._give_up("it cannot be read", errno)
            return
        end = self._maps.segments.end[self._victim]
        records, needed = self._whole_records(data, base, end)
        if not records:
            if needed > len(data) and base + needed <= end:
                self._read(needed)
            else:
                self._give_up("its chain of records is broken", 0)
            return
        self._offset = records[-1].end
        Job(self._clock, self._work(records, data, base), lambda: None, self._failed, self._share())

    def _whole_records(self, data: bytes, base: int, end: int) -> tuple[list[Record], int]:
        """Whole records in the piece of the victim that begins at `base`, and the bytes that the next one takes."""
        key = chain_key(self._sequence, self._maps.segments.salt[self._victim])
        records: list[Record] = []
        at = 0
        while True:
            found = next_record(key, data, base, at)
            if isinstance(found, int):
                return records, found
            records.append(found)
            at = found.end - base
            if found.kind == SEAL or found.end >= end:
                return records, 0

    def _work(self, records: list[Record], data: bytes, base: int) -> Iterator[None]:
        """Move the live blocks of `records`, then ask for the next piece; a step for each few blocks."""
        for position, record in enumerate(records):
            for first in range(0, record.blocks, _MOVE_BLOCKS):
                blocks = range(first, min(first + _MOVE_BLOCKS, record.blocks))
                need = self._missing(record, blocks)
                if need:
                    # Come back for the rest when the middle map's pages are there.
                    rest = [_tail_of(record, first), *records[position + 1 :]]
                    self._maps.load(need, partial(self._resume, rest, data, base))
                    return
                if not self._move(record, blocks, data, base):
                    self._finish()  # no room: another time
                    return
                yield
        self._read(_READ_BYTES)

    def _resume(self, records: list[Record], data: bytes, base: int) -> None:
        Job(self._clock, self._work(records, data, base), lambda: None, self._failed, self._share())

    def _missing(self, record: Record, blocks: range) -> Need:
        middle = self._maps.middle
        pages = {record.mbas[block] >> PAGE_SHIFT for block in blocks}
        return [(middle, number) for number in pages if middle.get(number) is None]

    def _move(self, record: Record, blocks: range, data: bytes, base: int) -> bool:
        maps, victim = self._maps, self._victim
        mbas, old, checksums = array("Q"), array("I"), array("I")
        moved: list[bytes] = []
        for block in blocks:
            mba = record.mbas[block]
            page = maps.middle.get(mba >> PAGE_SHIFT)
            assert page is not None  # `_missing` has just looked
            index = mba & PAGE_MASK
            offset = record.data_offset + block * BLOCK_BYTES
            unchanged = page[index] == victim and page[OFFSET + index] == offset
            if not unchanged and holds(Rule.MOVE_ONLY_IF_UNCHANGED):
                self.blocks_skipped += 1
                continue
            content = data[offset - base : offset - base + BLOCK_BYTES]
            if crc32c(content) != page[CHECKSUM + index]:
                self._damaged_block(BadBlock(mba, victim, offset))
                continue
            mbas.append(mba)
            old.extend((victim, offset))
            checksums.append(page[CHECKSUM + index])
            moved.append(content)
        if not mbas:
            return True
        while mbas:
            room = self._log.room_blocks(MOVE, 0)
            if room <= 0:
                if not self._make_room():
                    return False
                continue
            self._append(mbas[:room], old[: 2 * room], checksums[:room], moved[:room])
            mbas, old, checksums, moved = mbas[room:], old[2 * room :], checksums[room:], moved[room:]
        return True

    def _append(self, mbas: array[int], old: array[int], checksums: array[int], data: list[bytes]) -> None:
        maps = self._maps
        crash_point("clean-before-append")
        offset = self._log.append_move(mbas, old, checksums, data)
        crash_point("clean-after-append")
        for block, mba in enumerate(mbas):
            maps.set_middle(mba, self._log.segment, offset + block * BLOCK_BYTES, checksums[block])
        self.blocks_moved += len(mbas)
        self._appended()

    def _finish(self) -> None:
        victim, self._victim = self._victim, 0
        self._pool.end_read(victim)
        if not self._maps.segments.live[victim]:
            self.segments_cleaned += 1
        self.running = False
        self._finished()

    def _give_up(self, why: str, errno: int) -> None:
        victim = self._victim
        self._damaged[victim] = self._sequence
        self._pool.end_read(victim)
        self._victim = 0
        self.running = False
        self._report("segment-not-cleaned", {"segment": victim, "reason": why, "errno": errno})
        self._finished()

    def _failed(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno == ENOSPC:
            self._finish()
            return
        self._pool.end_read(self._victim)
        self._victim = 0
        self.running = False
        self._parted(error)

    def _damaged_block(self, bad: BadBlock) -> None:
        self._damaged[bad.segment] = self._sequence

        def told(is_right: bool) -> None:
            if not is_right:
                self._report("checksum-error", {**bad._asdict(), "by": "cleaner"})

        self._repair(bad, told)


def _tail_of(record: Record, first: int) -> Record:
    """The record without its first blocks, which were worked through."""
    return Record(
        record.kind, record.layer, record.epoch, record.txid, record.lsn, record.durable_lsn, record.previous_crc,
        record.crc, record.offset, record.data_offset + first * BLOCK_BYTES, record.blocks - first,
        record.extents, record.mbas[first:], record.old, record.checksums[first:], record.successor,
        record.successor_salt, record.rows,
    )  # fmt: skip
