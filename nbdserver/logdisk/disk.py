"""A disk kept in a log: the block interface over maps, log, checkpoints and cleaning of one family.

Theory. What arrives in one wake becomes one record: `write` checks that the pages it needs are in memory and puts the
data into the open batch; `commit` looks up or gives out the MBAs, appends one record with one `pwritev` and moves the
middle map. A read is two lookups and one `preadv` from the page cache for each contiguous run, and every block's CRC
is checked. Everything that has to wait (pages, cold data, room, damage) says None or False here and is asked again
through `later` (slow_path).

Rules
- Maps are changed only after the append returned: a failed append changed nothing.
- A batch is applied in its order; a discard or a partial block commits what came before it first.
- `_blocked` is one flag for all reasons why a write may not go on inline.

Known weakness: one volume in a family, one layer in a volume.
"""

from __future__ import annotations

import errno as errnos
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metadata.family_state import (
    Checkpoint,
    Family,
    OpenState,
    put_checkpoint,
    put_family,
    put_open_state,
    read_checkpoint,
    read_family,
    read_open_state,
    read_pending_holes,
)
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page
from metadata.seams import Buffer, Clock, Done, Files, Store
from nbdserver.block import HOLE, ZERO, Extents, Later, Operation
from nbdserver.logdisk.background import Background
from nbdserver.logdisk.checkpoint import Checkpointer
from nbdserver.logdisk.cleaner import Cleaner
from nbdserver.logdisk.log import Log
from nbdserver.logdisk.maps import CHECKSUM, EPOCH_SHIFT, MAX_PENDING_HOLES, OFFSET, Maps
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.recovery import RecoveryError, Replay
from nbdserver.logdisk.segments import DIRECTORY, SegmentPool
from nbdserver.logdisk.slow_path import SlowPath
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, EXTENT_HOLE, WRITE, DamagedValueError, block_splitter

LAYER = 1
SMALL_HOLE_BLOCKS = 4096  # up to here a discard is worked into the maps at once
_MOST_EXTENT_BLOCKS = 1 << 31
_ZEROS = memoryview(bytes(PAGE_BLOCKS * BLOCK_BYTES))
_ZERO_BLOCK = (bytes(BLOCK_BYTES),)
_SPLIT_BLOCKS = 256
_MOST_DAMAGED_LBAS = 1024  # remembered for `status`

Report = Callable[[str, dict[str, object]], None]


class DiskError(Exception):
    """The family cannot be opened; the text says why and what to do."""


@dataclass(frozen=True)
class DiskSettings:
    """What can be chosen for a family while it is open."""

    cache_bytes: int = 512 << 20  # for pages of both maps
    checkpoint_bytes: int = 512 << 20  # of log, after which a checkpoint starts: what a recovery replays
    checkpoint_interval_s: float = 30.0


class LogDisk:
    """An open family with its one volume. Make one with `open`; all methods are for the loop's thread."""

    # -- making and opening

    @classmethod
    def format(
        cls, files: Files, store: Store, family: bytes, size_bytes: int, segment_bytes: int, rng: random.Random
    ) -> None:
        """Make an empty family in an empty directory and store."""
        files.make_directory(DIRECTORY)
        files.sync_directory(".")
        batch = store.batch()
        put_family(batch, Family(family, size_bytes, segment_bytes))
        put_open_state(batch, OpenState(1, 0, True, ""))
        # The first segment's life begins with the first write; its salt is drawn now, so that replay can tell it.
        put_checkpoint(batch, Checkpoint(0, 0, 0, 1, 0, 0, 1, rng.randbytes(8), 1 << EPOCH_SHIFT, 1, 0))
        store.write(batch)

    @classmethod
    def open(
        cls,
        files: Files,
        store: Store,
        clock: Clock,
        rng: random.Random,
        settings: DiskSettings,
        epoch: int,
        boot_id: str,
        report: Report,
        progress: Callable[[int], None] = lambda _: None,
    ) -> LogDisk:
        """Open for writing: replay the log, make the tail durable, begin `epoch`. Raises DiskError."""
        try:
            return cls(files, store, clock, rng, settings, epoch, boot_id, report, progress)
        except (DamagedValueError, RecoveryError) as error:
            raise DiskError(str(error)) from error
        except OSError as error:
            raise DiskError(f"the family's files cannot be read: {error}") from error

    def __init__(
        self,
        files: Files,
        store: Store,
        clock: Clock,
        rng: random.Random,
        settings: DiskSettings,
        epoch: int,
        boot_id: str,
        report: Report,
        progress: Callable[[int], None],
    ) -> None:
        self.settings = settings
        self.family = read_family(store)
        self.opened = read_open_state(store)
        if epoch <= self.opened.epoch:
            raise DiskError(f"epoch {epoch} is not later than {self.opened.epoch}, under which it was last opened")
        self.failure = ""
        self.report = report
        self.damaged_lbas: set[int] = set()
        self._files = files
        self._store = store
        self._clock = clock
        self._blocked = False
        self._closing = False
        # Reads and writes of the batch loop go straight to these.
        self.maps = maps = Maps(store, settings.cache_bytes, self.fail)
        self.pool = pool = SegmentPool(files, self.family.segment_bytes, report)
        self.log = self._recover(rng, epoch, boot_id, progress)
        self.checkpointer = Checkpointer(clock, store, self.log, maps, pool, self.fail)
        if self._replayed or not self.opened.clean:
            self.checkpointer.make_now()
        self.cleaner = Cleaner(
            files, clock, self.log, maps, pool, lambda: self._next_segment(True), self._after_append, report
        )
        self._logical_pages = maps.logical.pages
        self._middle_pages = maps.middle.pages
        self._live = maps.segments.live
        self._handles = pool.handles
        self._read_cached = files.read_cached
        # The open batch.
        self._lbas: list[int] = []
        self._counts: list[int] = []
        self._data: list[Buffer] = []
        self._checksums = array("I")
        self._batch_errno = 0
        self.reads = self.writes = self.discards = self.batches = self.batch_blocks = self.blocks_read = 0
        self.client_blocks_written = 0
        self.slow_path = SlowPath(self, files, clock)
        self.background = Background(self, clock)

    def _recover(self, rng: random.Random, epoch: int, boot_id: str, progress: Callable[[int], None]) -> Log:
        store, maps, pool = self._store, self.maps, self.pool
        start = read_checkpoint(store)
        maps.segments.load(store.range(*maps.segments.key_range()))
        maps.regions.load(store.range(*maps.regions.key_range()))
        maps.holes = read_pending_holes(store)
        maps.next_mba, maps.next_hole, maps.live_blocks = start.next_mba, start.next_hole, start.live_blocks
        pool.adopt(maps.segments.in_use)
        replay = Replay(self._files, store, pool, maps, self.family.family, progress)
        recovered = replay.run(start)
        self._replayed = recovered.records
        generation = self.opened.generation
        if not self.opened.clean and self.opened.boot_id != boot_id:
            generation += 1
            self.report("generation-raised", {"generation": generation, "reason": "power loss or reboot while open"})
        if not self.opened.clean:
            if holds(Rule.TAIL_SYNCED_BEFORE_SERVING):
                self._files.fdatasync(replay.rewrite_tail(recovered.tail))
            crash_point("replay-after-tail")
            self.report("recovered", {"records": recovered.records, "blocks": recovered.blocks})
        log = Log(self._files, pool, maps.segments, rng, self.family.family, recovered.position, epoch, self.fail)
        if not self.opened.clean:
            replay.begin_fresh_segment(log)
        self.opened = OpenState(generation, epoch, False, boot_id)
        batch = store.batch()
        put_open_state(batch, self.opened)
        store.write(batch)
        maps.begin_epoch(epoch)
        return log

    # -- BlockDevice: inline

    @property
    def size_bytes(self) -> int:
        return self.family.size_bytes

    def read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """See BlockDevice."""
        if length == BLOCK_BYTES and not offset & 4095:
            lba = offset >> 12
            page = self._logical_pages.get(lba >> PAGE_SHIFT)
            if page is not None:
                mba = page[lba & PAGE_MASK]
                if not mba:
                    self.blocks_read += 1
                    return _ZERO_BLOCK
                middle = self._middle_pages.get(mba >> PAGE_SHIFT)
                if middle is not None:
                    index = mba & PAGE_MASK
                    data = self._read_cached(self._handles[middle[index]], BLOCK_BYTES, middle[OFFSET + index])
                    if data is None or crc32c(data) != middle[CHECKSUM + index]:
                        return None
                    self.blocks_read += 1
                    return (data,)
        if self.failure:
            return None
        return self._read_range(offset, length)

    def _read_range(self, offset: int, length: int) -> Sequence[Buffer] | None:
        first = offset >> 12
        stop = (offset + length + BLOCK_BYTES - 1) >> 12
        pieces: list[Buffer] = []
        lba = first
        while lba < stop:
            page = self.maps.logical.get(lba >> PAGE_SHIFT)
            if page is None:
                return None
            index = lba & PAGE_MASK
            count = min(stop - lba, PAGE_BLOCKS - index)
            if not self._read_in_page(page[index : index + count], pieces):
                return None
            lba += count
        self.blocks_read += stop - first
        before = offset & 4095
        after = (stop << 12) - offset - length
        if before or after:
            whole = b"".join(pieces)
            return (whole[before : len(whole) - after],)
        return pieces

    def _read_in_page(self, mbas: array[int], pieces: list[Buffer]) -> bool:
        """Append the content of these MBAs (0: zeros) to `pieces`; False if any of it cannot be had inline."""
        at, total = 0, len(mbas)
        while at < total:
            if not mbas[at]:
                zeros = same_length(mbas, at)
                pieces.append(_ZEROS[: zeros * BLOCK_BYTES])
                at += zeros
                continue
            run = run_length(mbas, at, 1)
            while run:
                mba = mbas[at]
                index = mba & PAGE_MASK
                count = min(run, PAGE_BLOCKS - index)
                middle = self.maps.middle.get(mba >> PAGE_SHIFT)
                if middle is None:
                    return False
                count = contiguous_blocks(middle, index, count)
                data = self._read_cached(self._handles[middle[index]], count * BLOCK_BYTES, middle[OFFSET + index])
                if data is None:
                    return False
                expected = middle[CHECKSUM + index : CHECKSUM + index + count]
                if array("I", map(crc32c, block_splitter(count).unpack(data))) != expected:
                    return False
                pieces.append(data)
                at += count
                run -= count
        return True

    def write(self, offset: int, data: memoryview) -> bool:
        """See BlockDevice."""
        if self._blocked:
            return False
        length = len(data)
        lba = offset >> 12
        if length == BLOCK_BYTES and not offset & 4095:
            page = self._logical_pages.get(lba >> PAGE_SHIFT)
            if page is None:
                return self._write_run(lba, data, 1)
            mba = page[lba & PAGE_MASK]
            if mba and mba >> PAGE_SHIFT not in self._middle_pages:
                return self._write_run(lba, data, 1)
            block = bytes(data)
            self._checksums.append(crc32c(block))
            self._data.append(block)
            self._lbas.append(lba)
            self._counts.append(1)
            return True
        if (offset | length) & 4095:
            return self._write_partial(offset, data)
        return self._write_run(lba, data, length >> 12)

    def _write_run(self, lba: int, data: Buffer, count: int) -> bool:
        if self.maps.needed(lba, count, 1):
            return False
        for first in range(0, count, _SPLIT_BLOCKS):
            blocks = block_splitter(min(_SPLIT_BLOCKS, count - first)).unpack_from(data, first * BLOCK_BYTES)
            self._checksums.extend(map(crc32c, blocks))
        self._data.append(data)
        self._lbas.append(lba)
        self._counts.append(count)
        return True

    def _write_partial(self, offset: int, data: Buffer) -> bool:
        """Merge with what the edge blocks hold; the batch so far goes first, because it may hold them."""
        if self._lbas:
            self._batch_errno = self.commit() or self._batch_errno
        first = offset & ~4095
        end = offset + len(data)
        stop = (end + 4095) & ~4095
        head = self.read(first, BLOCK_BYTES) if offset != first else ()
        tail = self.read(stop - BLOCK_BYTES, BLOCK_BYTES) if end != stop else ()
        if head is None or tail is None:
            return False
        before = bytes(b"".join(head)[: offset - first])
        after = bytes(b"".join(tail)[BLOCK_BYTES - (stop - end) :]) if tail else b""
        return self._write_run(first >> 12, b"".join((before, data, after)), (stop - first) >> 12)

    def discard(self, offset: int, length: int) -> bool:
        """See BlockDevice. The whole blocks become a record of their own; partial edges are written with zeros."""
        if self._blocked or self._closing:
            return False
        if self._lbas:
            self._batch_errno = self.commit() or self._batch_errno
        first = (offset + 4095) >> 12
        stop = (offset + length) >> 12
        if stop < first:  # inside one block
            return self._zero_partial(offset, length)
        count = stop - first
        if count > SMALL_HOLE_BLOCKS:
            if len(self.maps.holes) >= MAX_PENDING_HOLES:
                return False
        elif count and self.maps.needed(first, count, 1):
            return False
        if not self._zero_partial(offset, (first << 12) - offset):
            return False
        if not self._zero_partial(stop << 12, offset + length - (stop << 12)):
            return False
        if count:
            self._batch_errno = self._append_hole(first, count) or self._batch_errno
        return True

    def _zero_partial(self, offset: int, length: int) -> bool:
        if not length:
            return True
        held = self.read(offset & ~4095, BLOCK_BYTES)
        if held is None:
            return False
        if not any(held[0]):
            return True
        return self._write_partial(offset, bytes(length))

    def _append_hole(self, lba: int, count: int) -> int:
        if self._lbas:
            errno = self.commit()
            if errno:
                return errno
        maps, log = self.maps, self.log
        extents = array("Q")
        for first in range(lba, lba + count, _MOST_EXTENT_BLOCKS):
            extents.extend((first, min(_MOST_EXTENT_BLOCKS, lba + count - first) | EXTENT_HOLE << 32))
        try:
            if not self._make_room(len(extents) >> 1, reserved=True):
                return errnos.ENOSPC
            log.append_write(LAYER, extents, array("Q"), array("I"), ())
        except OSError as error:
            return self._append_failed(error)
        maps.regions.mark(lba, count, log.txid)
        if count > SMALL_HOLE_BLOCKS:
            maps.add_hole(lba, count)
            self.background.hole_added()
        else:
            maps.clear(lba, count)
        self.discards += 1
        self._after_append()
        return 0

    def extents(self, offset: int, length: int, limit: int) -> Extents | None:
        """See BlockDevice."""
        if self.failure:
            return None
        found: Extents = []
        lba = offset >> 12
        stop = (offset + length + 4095) >> 12
        end = offset + length
        at = offset
        while lba < stop:
            page = self.maps.logical.get(lba >> PAGE_SHIFT)
            if page is None:
                return found[:-1] if len(found) > 1 else None
            index = lba & PAGE_MASK
            count = min(stop - lba, PAGE_BLOCKS - index)
            for blocks, flags in page_extents(page, index, count):
                lba += blocks
                upto = min(lba << 12, end)
                if found and found[-1][1] == flags:
                    found[-1] = (found[-1][0] + upto - at, flags)
                elif len(found) == limit:
                    return found
                else:
                    found.append((upto - at, flags))
                at = upto
        return found

    # -- BlockDevice: the batch

    def commit(self) -> int:
        """See BlockDevice."""
        if not self._lbas:
            errno, self._batch_errno = self._batch_errno, 0
            return errno
        lbas, counts, data, checksums = self._lbas, self._counts, self._data, self._checksums
        self._lbas, self._counts, self._data, self._checksums = [], [], [], array("I")
        try:
            errno = self._append_batch(lbas, counts, data, checksums)
        except OSError as error:
            errno = self._append_failed(error)
        self._after_append()
        errno, self._batch_errno = errno or self._batch_errno, 0
        return errno

    def _append_batch(self, lbas: list[int], counts: list[int], data: list[Buffer], checksums: array[int]) -> int:
        log = self.log
        if log.room_blocks(WRITE, len(lbas)) < len(checksums) or len(lbas) > 0xFFFF or not log.offset:
            return self._append_in_parts(lbas, counts, data, checksums)
        maps = self.maps
        logical_pages = self._logical_pages
        mbas = array("Q")
        fresh: dict[int, int] = {}
        extents = array("Q")
        next_mba = maps.next_mba
        for lba, count in zip(lbas, counts, strict=True):
            extents.append(lba)
            extents.append(count)
            if count == 1:
                page = logical_pages.get(lba >> PAGE_SHIFT) or maps.logical.get(lba >> PAGE_SHIFT)
                assert page is not None
                mba = page[lba & PAGE_MASK]
                if not mba:
                    mba = fresh.get(lba, 0)
                    if not mba:
                        mba = fresh[lba] = next_mba
                        next_mba += 1
                mbas.append(mba)
            else:
                next_mba = self._mbas_of_run(lba, count, mbas, fresh, next_mba)
        offset = log.append_write(LAYER, extents, mbas, checksums, data)
        while maps.next_mba < next_mba:
            maps.allocate_mba()
        recent = maps.regions.recent
        for lba, mba in fresh.items():
            maps.set_logical(lba, mba)
        at = 0
        txid = log.txid
        for lba, count in zip(lbas, counts, strict=True):
            recent[lba >> 10] = txid
            if count > 1024:
                maps.regions.mark(lba, count, txid)
            else:
                recent[(lba + count - 1) >> 10] = txid
            at += count
        self._point(mbas, checksums, offset)
        self.writes += len(lbas)
        self.batches += 1
        self.batch_blocks += len(mbas)
        self.client_blocks_written += len(mbas)
        return 0

    def _point(self, mbas: array[int], checksums: array[int], offset: int) -> None:
        """Move the middle map: these MBAs now lie one after the other from `offset` of the open segment."""
        maps = self.maps
        pages = self._middle_pages
        middle = maps.middle
        changed = middle.changed
        live = self._live
        segment = self.log.segment
        total = len(mbas)
        at = gained = 0
        while at < total:
            mba = mbas[at]
            number = mba >> PAGE_SHIFT
            index = mba & PAGE_MASK
            page = pages.get(number) or middle.get(number)
            assert page is not None
            if total - at >= 8:
                count = min(run_length(mbas, at, 1), PAGE_BLOCKS - index)
                if count >= 8:
                    gained += self._point_run(page, number, index, count, offset, checksums[at : at + count])
                    at += count
                    offset += count * BLOCK_BYTES
                    continue
            old = page[index]
            (changed.get(number) or middle.first_change(number)).append(index)
            if old:
                live[old] -= 1
            else:
                gained += 1
            page[index] = segment
            page[OFFSET + index] = offset
            page[CHECKSUM + index] = checksums[at]
            offset += BLOCK_BYTES
            at += 1
        live[segment] += total
        maps.live_blocks += gained
        maps.middle_updates += total

    def _point_run(self, page: Page, number: int, index: int, count: int, offset: int, checksums: array[int]) -> int:
        """The same for a run within one page; returns how many were not mapped before."""
        middle = self.maps.middle
        live = self._live
        stop = index + count
        old = page[index:stop]
        (middle.changed.get(number) or middle.first_change(number)).extend(range(index, stop))
        same = old.count(old[0])
        gained = 0
        if same == count:
            if old[0]:
                live[old[0]] -= count
            else:
                gained = count
        else:
            for segment in old:
                if segment:
                    live[segment] -= 1
                else:
                    gained += 1
        page[index:stop] = array("I", [self.log.segment]) * count
        page[OFFSET + index : OFFSET + stop] = array("I", range(offset, offset + count * BLOCK_BYTES, BLOCK_BYTES))
        page[CHECKSUM + index : CHECKSUM + stop] = checksums
        return gained

    def _mbas_of_run(self, lba: int, count: int, mbas: array[int], fresh: dict[int, int], next_mba: int) -> int:
        stop = lba + count
        while lba < stop:
            page = self.maps.logical.get(lba >> PAGE_SHIFT)
            assert page is not None
            index = lba & PAGE_MASK
            blocks = min(stop - lba, PAGE_BLOCKS - index)
            held = page[index : index + blocks]
            if 0 not in held:
                mbas.extend(held)
            else:
                for number, mba in enumerate(held, lba):
                    if not mba:
                        mba = fresh.get(number, 0)
                        if not mba:
                            mba = fresh[number] = next_mba
                            next_mba += 1
                    mbas.append(mba)
            lba += blocks
        return next_mba

    def _append_in_parts(self, lbas: list[int], counts: list[int], data: list[Buffer], checksums: array[int]) -> int:
        """Cut a batch that does not fit into the open segment, and go on in the next one."""
        pieces = [(lba, count, memoryview(buffer)) for lba, count, buffer in zip(lbas, counts, data, strict=True)]
        at = 0
        while pieces:
            if not self._make_room(len(pieces[:0xFFFF]), reserved=True, blocks=1):
                return errnos.ENOSPC
            room = self.log.room_blocks(WRITE, min(len(pieces), 0xFFFF))
            part: list[tuple[int, int, memoryview]] = []
            blocks = 0
            while pieces and blocks < room and len(part) < 0xFFFF:
                lba, count, buffer = pieces.pop(0)
                if blocks + count > room:
                    fits = room - blocks
                    pieces.insert(0, (lba + fits, count - fits, buffer[fits * BLOCK_BYTES :]))
                    count, buffer = fits, buffer[: fits * BLOCK_BYTES]
                part.append((lba, count, buffer))
                blocks += count
            self._append_batch(
                [lba for lba, _, _ in part],
                [count for _, count, _ in part],
                [buffer for _, _, buffer in part],
                checksums[at : at + blocks],
            )
            at += blocks
        return 0

    def _make_room(self, extents: int, *, reserved: bool, blocks: int = 0) -> bool:
        log = self.log
        if not log.begin_if_needed():
            return False
        while log.room_blocks(WRITE, extents) < blocks:
            if not self._next_segment(reserved):
                return False
        return True

    def _next_segment(self, reserved: bool) -> bool:
        if not self.log.next_segment(reserved):
            return False
        self.background.segment_begun()
        return True

    def _append_failed(self, error: OSError) -> int:
        """An append that failed changed nothing here, but what the file holds is unknown until it is written again."""
        errno = error.errno or errnos.EIO
        self.report("append-failed", {"errno": errno, "error": str(error)})
        if errno != errnos.ENOSPC:
            self.fail(f"appending to segment {self.log.segment} failed: {error}")
            return errnos.EIO
        return errno

    def _after_append(self) -> None:
        if self.log.records & 63 == 0 or self._blocked:
            self.background.check()

    # -- BlockDevice: waiting

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        """See BlockDevice."""
        self.slow_path.submit(operation, offset, length, data, done, limit)

    def flush(self, done: Done) -> None:
        """See BlockDevice."""
        if self.failure:
            self._clock.call_soon(lambda: done(errnos.EIO))
        else:
            self.log.sync(done)

    # -- for the slow path and the background work

    small_hole_blocks = SMALL_HOLE_BLOCKS

    def write_now(self, lba: int, data: memoryview) -> int:
        """Append whole blocks whose pages are resident, without touching the reserve; 0 or an errno."""
        count = len(data) >> 12
        if self.log.room_blocks(WRITE, 1) < count and not self.pool.can_take():
            return errnos.ENOSPC
        if not self._write_run(lba, data, count):
            return errnos.EAGAIN
        return self.commit()

    def discard_now(self, lba: int, count: int) -> int:
        """Append a hole over whole blocks, whose pages are resident if it is a small one; 0 or an errno."""
        return self._append_hole(lba, count)

    def read_store(
        self, ranges: Sequence[tuple[bytes, bytes]], done: Callable[[list[list[tuple[bytes, bytes]]]], None], limit: int
    ) -> None:
        """Items of LevelDB, read off the loop; the family fails if they cannot be had."""

        def arrived(errno: int, items: list[list[tuple[bytes, bytes]]]) -> None:
            if errno:
                self.fail(f"LevelDB could not be read (errno {errno})")
            done(items if not errno else [[] for _ in ranges])

        self._store.range_later(ranges, arrived, limit)

    def damaged(self, lba: int, segment: int, offset: int, errno: int) -> None:
        """A block could not be read or has the wrong checksum."""
        if len(self.damaged_lbas) < _MOST_DAMAGED_LBAS:
            self.damaged_lbas.add(lba)
        self.report("checksum-error", {"lba": lba, "segment": segment, "offset": offset, "errno": errno})

    # -- life

    def set_blocked(self, blocked: bool) -> None:
        """Let writes go on inline, or send them all to the slow path."""
        self._blocked = blocked or bool(self.failure)

    def fail(self, reason: str) -> None:
        """Nothing is promised or read any more: every operation is answered with EIO until the family is opened
        anew."""
        if self.failure:
            return
        self.failure = reason
        self._blocked = True
        self._logical_pages = self._middle_pages = {}
        self.report("family-failed", {"reason": reason})
        if hasattr(self, "log"):
            self.log.fail(reason)
        if hasattr(self, "slow_path"):
            self.slow_path.wake()

    def close(self, done: Callable[[], None]) -> None:
        """Make everything durable, note that the log was closed cleanly, then `done`. No operation may be under way."""
        self._closing = True
        self.background.stop()
        self.cleaner.stop()

        def wait() -> None:
            if self.failure:
                self.pool.close()
                done()
            elif self.cleaner.running or self.background.busy:
                self._clock.call_later(0.01, wait)
            else:
                self.checkpointer.when_done(closed)
                self.checkpointer.hurry()

        def closed() -> None:
            batch = self._store.batch()
            put_open_state(batch, OpenState(self.opened.generation, self.opened.epoch, True, self.opened.boot_id))
            self._store.write(batch)
            self.pool.close()
            done()

        wait()

    # -- looking at it

    def status(self) -> dict[str, object]:
        """What an operator wants to know, in plain values."""
        maps, pool = self.maps, self.pool
        in_use = len(maps.segments.in_use)
        return {
            "size_bytes": self.family.size_bytes,
            "state": "failed" if self.failure else "full" if pool.full else "open",
            "failure": self.failure,
            "generation": self.opened.generation,
            "epoch": self.opened.epoch,
            "txid": self.log.txid,
            "live_bytes": maps.live_blocks * BLOCK_BYTES,
            "allocated_bytes": (in_use + len(pool.spare)) * pool.segment_bytes,
            "segments": in_use,
            "spare_segments": len(pool.spare),
            "segment_bytes": pool.segment_bytes,
            "pending_holes": len(maps.holes),
            "unsynced_records": self.log.lsn - self.log.durable_lsn,
            "damaged_lbas": sorted(self.damaged_lbas),
        }

    def counters(self) -> dict[str, int]:
        """Numbers that only rise, but for those that end in `_now`."""
        maps, log, pool = self.maps, self.log, self.pool
        return {
            "logical_map_updates": maps.logical_updates,
            "middle_map_updates": maps.middle_updates,
            "map_page_loads": maps.logical.loads + maps.middle.loads,
            "map_page_evictions": maps.logical.evictions + maps.middle.evictions,
            "map_pages_now": maps.logical.resident_pages + maps.middle.resident_pages,
            "map_values_written": self.checkpointer.values_written,
            "checkpoints": self.checkpointer.count,
            "batches": self.batches,
            "batch_blocks": self.batch_blocks,
            "discards": self.discards,
            "blocks_read": self.blocks_read,
            "client_blocks_written": self.client_blocks_written,
            "log_bytes_appended": log.appended_bytes,
            "log_records": log.records,
            "syncs": log.syncs,
            "sync_requests": log.sync_requests,
            "cold_reads": self.slow_path.cold_reads,
            "slow_operations_now": self.slow_path.under_way,
            "cleaner_blocks_moved": self.cleaner.blocks_moved,
            "cleaner_blocks_skipped": self.cleaner.blocks_skipped,
            "cleaner_segments": self.cleaner.segments_cleaned,
            "segments_created": pool.created,
            "segments_recycled": pool.recycled,
            "segments_unlinked": pool.unlinked,
            "live_blocks_now": maps.live_blocks,
            "damaged_blocks": len(self.damaged_lbas),
        }


def run_length(values: array[int], at: int, step: int) -> int:
    """How many values from `at` on rise by `step` each."""
    total = len(values)
    first = values[at]
    count = total - at
    if count > 1 and values[total - 1] == first + (count - 1) * step and values[at + 1] == first + step:
        # Usually the whole rest is one run: one comparison in C.
        if not at and values == array(values.typecode, range(first, first + count * step, step)):
            return count
        if at and values[at:] == array(values.typecode, range(first, first + count * step, step)):
            return count
    expected = first
    for index in range(at, total):
        if values[index] != expected:
            return index - at
        expected += step
    return count


def same_length(values: array[int], at: int) -> int:
    """How many values from `at` on are equal."""
    first = values[at]
    if not at and values.count(first) == len(values):
        return len(values)
    stop = at + 1
    while stop < len(values) and values[stop] == first:
        stop += 1
    return stop - at


def contiguous_blocks(middle: Page, index: int, count: int) -> int:
    """How many of `count` entries from `index` on lie one after the other in one segment."""
    if count == 1:
        return 1
    same = same_length(middle[index : index + count], 0)
    return run_length(middle[OFFSET + index : OFFSET + index + same], 0, BLOCK_BYTES)


def page_extents(page: Page, index: int, count: int) -> Extents:
    """(blocks, flags) of `count` entries of a logical page."""
    values = page[index : index + count]
    if not any(values):
        return [(count, HOLE | ZERO)]
    if 0 not in values:
        return [(count, 0)]
    found: Extents = []
    for mba in values:
        flags = 0 if mba else HOLE | ZERO
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + 1, flags)
        else:
            found.append((1, flags))
    return found
