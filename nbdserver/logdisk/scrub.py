"""Reading everything that a family keeps, to find what has rotted while there is a backup to restore it from.

    segments in the order of the log ──► pieces from the device ──► records ──► CRC of every block
                                                                                  │ wrong
                 names of volumes and snapshots ◄── their logical maps ◄── still the block of its MBA?

Theory. A client's read checks what it reads; what nobody reads rots unseen. The segments are read one after the other,
in large pieces, past the page cache: what is in memory says nothing about the device. A record's header has the CRC of
each of its blocks, so neither map is needed as long as all is well. A block with a wrong one is looked up in the middle
map: if its MBA is elsewhere by now the block is dead, and no damage.

A segment that cannot be read in order (the device refuses, or a header has rotted) is done block by block: a walk over
the middle map says which blocks live in it.

Positions. Segments have rising sequence numbers, so "everything up to N is done" survives recycling, checkpoints, the
cleaner and restarts. What is written or moved after the beginning is not looked at again: it was right when it was
written, and the cleaner checks what it moves.

Rules
- A segment is held (`begin_read`) while one piece of it is read, not longer, and is known by its sequence number before
  and after: one that was recycled meanwhile is done.
- At most `bytes_per_s`, and BUSY_SHARE of that while clients move more than the scrub does. CRCs in slices.
- Nothing is condemned: a damaged block is repaired if another replica has it (suspects.py), otherwise it is reported
  with what shows it, and the volume goes on.

Known weakness: a piece in flight delays a client's cold read by as long as the device takes for it; a record that is
larger than a piece is read whole. Sorting the segments at the start takes some 2 ms for a terabyte.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from metadata.pages import PAGE_BLOCKS, PAGE_SHIFT, Page, PageMap
from metadata.seams import Buffer, Clock, Files, Timer
from nbdserver.logdisk.maps import CHECKSUM, OFFSET
from nbdserver.logdisk.pacing import Job, Pace
from nbdserver.logdisk.page_walk import PageWalk
from nbdserver.logdisk.records import Record, extents_of, next_record
from nbdserver.logdisk.repair import BadBlock
from nbdserver.logdisk.suspects import Suspect, Suspects
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, EXTENT_DATA, SEAL, SEGMENT_HEADER_BYTES, WRITE, chain_key, wrong_blocks

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

PIECE_BYTES = 1 << 20
_BLOCKS_A_STEP = 64  # some 0.03 ms
_SKIPPED_AT_ONCE = 256
_MOST_BROKEN = 16  # segments done block by block in one walk: some 6 MiB of addresses


@dataclass(frozen=True)
class Progress:
    """How far a scrub is; what it takes to go on after a restart."""

    sequence: int = 0
    """Every segment up to this one is done."""
    stop: int = 0
    """The newest one when it began; 0: it begins."""
    done_bytes: int = 0
    total_bytes: int = 0
    damaged_blocks: int = 0


class Scrub:
    """One scrub of an open family; ends by itself, with `finished(failure)`."""

    def __init__(
        self,
        disk: LogDisk,
        files: Files,
        clock: Clock,
        begin: Progress,
        bytes_per_s: int,
        moved_bytes: Callable[[], int],
        finished: Callable[[str], None],
    ) -> None:
        self._disk = disk
        self._maps = disk.maps
        self._table = disk.maps.segments
        self._pool = disk.pool
        self._files = files
        self._clock = clock
        self._moved_bytes = moved_bytes
        self._finished = finished
        self.pace = Pace(bytes_per_s, clock.now(), moved_bytes())
        self.running = True
        self._reading = False
        self._stopped = False
        self._whole = not begin.stop  # begun in this life of the family
        stop = begin.stop or disk.log.sequence
        sequence = self._table.sequence
        segments = sorted(
            (sequence[segment], segment, self._table.end[segment])
            for segment in self._table.in_use
            if begin.sequence < sequence[segment] <= stop
        )
        self._segments = iter(segments)
        left_bytes = sum(end for _, _, end in segments)
        self.progress = replace(begin, stop=stop, total_bytes=begin.done_bytes + left_bytes)
        self._before_bytes = begin.done_bytes  # in the segments that are done
        self._segment = self._sequence = self._offset = self._end = self._planned_bytes = 0
        self._suspects = Suspects(disk, self._safe, self._begin_walk, self._note_damaged)
        self._broken: list[tuple[int, int]] = []  # (segment, sequence)
        self._addresses: tuple[array[int], array[int]] = array("Q"), array("I")
        self._timer: Timer | None = None
        self._walk: PageWalk | None = None
        self._soon(self._next_segment)

    def stop(self) -> None:
        """Read nothing more; `finished` is not called. Whoever closes the family waits until it is not `busy`."""
        self._stopped = True
        self.running = False
        if self._timer is not None:
            self._timer.cancel()
        if self._walk is not None:
            self._walk.stop()

    @property
    def busy(self) -> bool:
        """Whether a read is under way off the loop."""
        return self._reading or (self._walk is not None and self._walk.reading)

    # -- segments

    def _next_segment(self) -> None:
        for _ in range(_SKIPPED_AT_ONCE):
            following = next(self._segments, None)
            if following is None:
                self._read_broken()
                return
            self._sequence, self._segment, self._planned_bytes = following
            self._end = self._table.end[self._segment] if self._is_there() else 0
            self._offset = SEGMENT_HEADER_BYTES
            if self._end > self._offset and self._table.live[self._segment]:
                self._read(PIECE_BYTES)
                return
            self._segment_done()
        self._soon(self._next_segment)

    def _is_there(self) -> bool:
        """Whether the segment still lives the life in which it was met."""
        return self._table.sequence[self._segment] == self._sequence

    def _segment_done(self) -> None:
        self._before_bytes += self._planned_bytes
        self.progress = replace(self.progress, sequence=self._sequence, done_bytes=self._before_bytes)

    def _read(self, length: int) -> None:
        if not self._is_there() or not self._table.live[self._segment]:
            self._segment_done()
            self._next_segment()
            return
        offset = self._offset
        length = min(length, self._end - offset)
        self._pool.begin_read(self._segment)
        self._reading = True
        self._files.read_device_later(
            self._pool.handles[self._segment], length, offset, partial(self._arrived, self._segment, offset)
        )

    def _arrived(self, segment: int, base: int, errno: int, data: Buffer) -> None:
        self._reading = False
        self._pool.end_read(segment)
        if self._is_over():
            return
        if errno:
            self._safe(self._give_up)(f"it cannot be read at {base} (errno {errno})")
        else:
            Job(self._clock, self._verify(data, base), lambda: None, self._failed)

    def _verify(self, data: Buffer, base: int) -> Iterator[None]:
        """Check the whole records in a piece of the segment, in slices."""
        key = chain_key(self._sequence, self._table.salt[self._segment])
        if not self._is_there():
            self._go_on(len(data))
            return
        at = 0
        record: Record | int = 0
        while base + at < self._end:
            record = next_record(key, data, base, at)
            if isinstance(record, int):
                break
            for first in range(0, record.blocks, _BLOCKS_A_STEP):
                count = min(_BLOCKS_A_STEP, record.blocks - first)
                begin = record.data_offset - base + first * BLOCK_BYTES
                blocks = data[begin : begin + count * BLOCK_BYTES]
                for wrong in wrong_blocks(blocks, record.checksums[first : first + count]):
                    self._suspect(record, first + wrong)
                yield
            at = record.end - base
            if record.kind == SEAL:
                self._end = record.end
            yield
            if self._is_over():
                return
        self._offset = base + at
        if at:
            self._suspects.look(lambda: self._go_on(at))
        elif isinstance(record, int) and len(data) < record <= self._end - base:
            self._go_on(0, record)
        else:
            self._give_up(f"its chain of records is broken at {base}")

    def _go_on(self, read_bytes: int, length: int = PIECE_BYTES) -> None:
        """The next piece, when it is due."""
        if self._offset >= self._end:
            self._segment_done()
            self._wait(read_bytes, self._next_segment)
        else:
            self.progress = replace(self.progress, done_bytes=self._before_bytes + self._offset)
            self._wait(read_bytes, lambda: self._read(length))

    def _wait(self, read_bytes: int, go_on: Callable[[], None]) -> None:
        wait_s = self.pace.wait_s(read_bytes, self._moved_bytes(), self._clock.now())
        self._timer = self._clock.call_later(wait_s, self._safe(go_on))

    def _give_up(self, why: str) -> None:
        """The segment cannot be read in order."""
        if self._is_there():
            self._broken.append((self._segment, self._sequence))
            self._disk.report(
                "segment-not-scrubbed", {"segment": self._segment, "reason": f"{why}; block by block then"}
            )
        self._offset = self._end
        self._suspects.look(lambda: self._go_on(0))

    def _suspect(self, record: Record, block: int) -> None:
        offset = record.data_offset + block * BLOCK_BYTES
        bad = BadBlock(record.mbas[block], self._segment, offset)
        self._suspects.add(Suspect(bad, _lba_of(record, block), 0))

    def _note_damaged(self) -> None:
        self.progress = replace(self.progress, damaged_blocks=self.progress.damaged_blocks + 1)

    # -- block by block

    def _read_broken(self) -> None:
        """Find the live blocks of segments that could not be read in order, and read each."""
        if not self._broken:
            self._suspects.find_unnamed(lambda: self._finish(""))
            return
        broken, self._broken = self._broken[:_MOST_BROKEN], self._broken[_MOST_BROKEN:]
        lives = dict(broken)
        mbas, places = self._addresses = array("Q"), array("I")

        def look(number: int, page: Page) -> None:
            for segment in lives.keys() & set(page[:PAGE_BLOCKS]):
                for index in range(PAGE_BLOCKS):
                    if page[index] == segment:
                        mbas.append(number << PAGE_SHIFT | index)
                        places.extend((segment, page[OFFSET + index], page[CHECKSUM + index]))

        self._begin_walk(self._maps.middle, look, lambda: self._read_block(lives, 0))

    def _read_block(self, lives: dict[int, int], at: int) -> None:
        """Read the block at `at` of `_addresses`, then the next one."""
        mbas, places = self._addresses
        while at < len(mbas):
            segment, offset, checksum = places[3 * at : 3 * at + 3]
            if self._table.sequence[segment] == lives[segment]:
                break
            at += 1
        else:
            self._read_broken()
            return

        def arrived(errno: int, data: list[bytes]) -> None:
            self._reading = False
            self._pool.end_read(segment)
            if self._is_over():
                return
            if errno or crc32c(data[0]) != checksum:
                self._suspects.add(Suspect(BadBlock(mbas[at], segment, offset), -1, errno))
            next_block = partial(self._wait, BLOCK_BYTES, partial(self._read_block, lives, at + 1))
            self._safe(self._suspects.look)(next_block)

        self._pool.begin_read(segment)
        self._reading = True
        self._files.read_later(self._pool.handles[segment], [(BLOCK_BYTES, offset)], arrived)

    # -- the end

    def _begin_walk(self, page_map: PageMap, look: Callable[[int, Page], None], done: Callable[[], None]) -> None:
        self._walk = PageWalk(self._disk, self._clock, page_map, look, self._safe(done), self._failed)

    def _finish(self, failure: str) -> None:
        self.stop()
        if not failure and self._whole:
            self._disk.damage.is_all(self._suspects.found)
        if not failure:
            self.progress = replace(self.progress, done_bytes=self.progress.total_bytes)
        self._finished(failure)

    def _failed(self, error: Exception) -> None:
        if not self._stopped:
            self._finish(f"an internal error: {error!r}")

    # -- inside

    def _is_over(self) -> bool:
        """Whether it was stopped, or ends here because the family has failed."""
        if self._disk.failure and not self._stopped:
            self._finish("the volume has failed")
        return self._stopped

    def _safe(self, callback: Callable[..., None]) -> Callable[..., None]:
        """`callback`, unless the scrub is over; what it raises ends the scrub alone."""

        def call(*arguments: object) -> None:
            if self._is_over():
                return
            try:
                callback(*arguments)
            except Exception as error:
                self._failed(error)

        return call

    def _soon(self, callback: Callable[[], None]) -> None:
        self._clock.call_soon(self._safe(callback))


def _lba_of(record: Record, block: int) -> int:
    """The LBA of a record's block; -1 if the record does not say."""
    if record.kind == WRITE:
        for lba, count, kind in extents_of(record):
            if kind != EXTENT_DATA:
                continue
            if block < count:
                return lba + block
            block -= count
    return -1
