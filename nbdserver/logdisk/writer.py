"""The write path: what arrives in one wake becomes one record.

Theory. `write` checks that the pages it needs are in memory and puts the data into the open batch; `commit` looks up or
gives out the MBAs, appends one record with one `pwritev`, then moves the maps. A block of the layer's own keeps its
MBA; one that is shared with another layer, or was never written, gets a new one.

Rules
- Maps are changed only after the append returned: a failed append changed nothing.
- A batch is applied in its order; a discard or a partial block commits what came before it first.
- `blocked` and the room are shared with the other writers of the family (appending.py).
"""

from __future__ import annotations

import errno as errnos
from array import array

from metadata.logical_map import LAYER_SHIFT
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page
from metadata.region_table import REGION_SHIFT
from metadata.seams import Buffer
from nbdserver.logdisk.appending import Appending
from nbdserver.logdisk.log import MAX_BYTES_A_BLOCK
from nbdserver.logdisk.maps import CHECKSUM, OFFSET, SMALL_HOLE_BLOCKS, Maps
from nbdserver.logdisk.reader import Reader
from nbdserver.logdisk.runs import run_length
from nbdserver.logdisk.segments import CLIENTS_KEEP, DISCARDS_KEEP
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, EXTENT_HOLE, MAX_RECORD_EXTENTS, WRITE, block_splitter

_MOST_EXTENT_BLOCKS = 1 << 31
_SPLIT_BLOCKS = 256


class Writer:
    """The open batch of one volume and how it gets into log and maps."""

    def __init__(self, maps: Maps, appending: Appending, reader: Reader, layer: int) -> None:
        self.blocked = appending.blocked
        self._maps = maps
        self._appending = appending
        self._log = appending.log
        self._pool = appending.pool
        self._read = reader.read
        self._logical_pages = maps.logical.pages
        self._middle_pages = maps.middle.pages
        self._live = maps.segments.live
        self._lbas: list[int] = []
        self._counts: list[int] = []
        self._data: list[Buffer] = []
        self._checksums = array("I")
        self._batch_errno = 0
        self._room_blocks = 0  # that may still be accepted before `_find_room` has to look again
        self.move_to(layer)
        appending.writers.append(self)

    def move_to(self, layer: int) -> None:
        """Write into another layer from now on; the open batch is empty."""
        self._layer = layer
        self._first_page = layer << LAYER_SHIFT
        self._first_mba = self._maps.tree.first_mba(layer)

    def stop(self) -> None:
        """Take nothing inline any more."""
        if self in self._appending.writers:
            self._appending.writers.remove(self)
        self.blocked = True

    def write(self, offset: int, data: memoryview) -> bool:
        """See BlockDevice."""
        if self.blocked:
            return False
        length = len(data)
        lba = offset >> 12
        if length == BLOCK_BYTES and not offset & 4095:
            page = self._logical_pages.get((lba >> PAGE_SHIFT) + self._first_page)
            if page is None:
                return self._write_run(lba, data, 1)
            mba = page[lba & PAGE_MASK]
            if mba >= self._first_mba and mba >> PAGE_SHIFT not in self._middle_pages:
                return self._write_run(lba, data, 1)
            if not self._room_blocks and not self._find_room(1):
                return False
            self._room_blocks -= 1
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
        if self._maps.needed(self._address(lba), count, 1, self._first_mba):
            return False
        if count > self._room_blocks and not self._find_room(count):
            return False
        self._accept(lba, data, count)
        return True

    def _address(self, lba: int) -> int:
        return (self._first_page << PAGE_SHIFT) + lba

    def _accept(self, lba: int, data: Buffer, count: int) -> None:
        self._room_blocks -= count
        for first in range(0, count, _SPLIT_BLOCKS):
            blocks = block_splitter(min(_SPLIT_BLOCKS, count - first)).unpack_from(data, first * BLOCK_BYTES)
            self._checksums.extend(map(crc32c, blocks))
        self._data.append(data)
        self._lbas.append(lba)
        self._counts.append(count)

    def forget_room(self) -> None:
        """Somebody else appended to the log."""
        self._room_blocks = 0

    def _find_room(self, count: int) -> bool:
        """Whether the open batch and `count` more blocks fit into the open segment and one more that is at hand.

        What does not is for the slow path, which can wait for a segment that is being made, and for the cleaner:
        nothing accepted here meets a full disk.
        """
        log, pool = self._log, self._pool
        if not log.offset and not pool.is_there(log.segment):
            return False
        room = log.room_blocks_of_single_blocks
        if pool.is_at_hand():
            room += pool.segment_bytes // MAX_BYTES_A_BLOCK - 1
        else:
            room -= pool.kept_of_open_bytes(CLIENTS_KEEP) // BLOCK_BYTES
        self._room_blocks = max(0, room - len(self._checksums))
        return count <= self._room_blocks

    def _write_partial(self, offset: int, data: Buffer) -> bool:
        """Merge with what the edge blocks hold; the batch so far goes first, because it may hold them."""
        if self._lbas:
            self._batch_errno = self.commit() or self._batch_errno
        first = offset & ~4095
        end = offset + len(data)
        stop = (end + 4095) & ~4095
        head = self._read(first, BLOCK_BYTES) if offset != first else ()
        tail = self._read(stop - BLOCK_BYTES, BLOCK_BYTES) if end != stop else ()
        if head is None or tail is None:
            return False
        before = bytes(b"".join(head)[: offset - first])
        after = bytes(b"".join(tail)[BLOCK_BYTES - (stop - end) :]) if tail else b""
        return self._write_run(first >> 12, b"".join((before, data, after)), (stop - first) >> 12)

    def discard(self, offset: int, length: int) -> bool:
        """See BlockDevice. The whole blocks become a record of their own; partial edges are written with zeros."""
        if self.blocked:
            return False
        if self._lbas:
            self._batch_errno = self.commit() or self._batch_errno
        first = (offset + 4095) >> 12
        stop = (offset + length) >> 12
        if stop < first:  # inside one block
            return self._zero_partial(offset, length)
        count = stop - first
        if count > SMALL_HOLE_BLOCKS:
            if not self._maps.can_take_hole(self._layer):
                return False
        elif count and self._maps.needed(self._address(first), count, 1, self._first_mba):
            return False
        head, tail = (first << 12) - offset, offset + length - (stop << 12)
        if (head and self._read(offset & ~4095, BLOCK_BYTES) is None) or (
            tail and self._read(stop << 12, BLOCK_BYTES) is None
        ):
            return False
        pool = self._pool
        if self._appending.has_to_wait(BLOCK_BYTES, DISCARDS_KEEP):
            return False
        # Without a spare file the end of the open segment may be kept: the slow path looks.
        if (self._log.room_blocks(WRITE, 3) < 2 or not pool.spare) and not pool.can_take(DISCARDS_KEEP):
            return False
        if not self._zero_partial(offset, head) or not self._zero_partial(stop << 12, tail):
            return False
        if count:
            self._batch_errno = self._append_hole(first, count) or self._batch_errno
        return True

    def _zero_partial(self, offset: int, length: int) -> bool:
        if not length:
            return True
        held = self._read(offset & ~4095, BLOCK_BYTES)
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
        maps, log = self._maps, self._log
        extents = array("Q")
        for first in range(lba, lba + count, _MOST_EXTENT_BLOCKS):
            extents.extend((first, min(_MOST_EXTENT_BLOCKS, lba + count - first) | EXTENT_HOLE << 32))
        try:
            if not self._appending.make_room(len(extents) >> 1, self._pool.keep_of_discard(count << 12)):
                return errnos.ENOSPC
            log.append_write(self._layer, extents, array("Q"), array("I"), ())
            maps.regions.mark(lba, count, log.txid)
            if count > SMALL_HOLE_BLOCKS:
                maps.add_hole(self._address(lba), count)
                self._appending.check_background()
            else:
                maps.clear(self._address(lba), count)
        except OSError as error:
            return self._appending.append_failed(error)
        except Exception as error:
            self._appending.parted(error)
            raise
        self._appending.discards += 1
        self._appending.appended(self)
        return 0

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
            errno = self._appending.append_failed(error)
        except Exception as error:
            self._appending.parted(error)
            raise
        self._appending.appended(self)
        errno, self._batch_errno = errno or self._batch_errno, 0
        return errno

    def _append_batch(self, lbas: list[int], counts: list[int], data: list[Buffer], checksums: array[int]) -> int:
        log = self._log
        if log.room_blocks(WRITE, len(lbas)) < len(checksums) or len(lbas) > MAX_RECORD_EXTENTS or not log.offset:
            return self._append_in_parts(lbas, counts, data, checksums)
        maps = self._maps
        logical_pages = self._logical_pages
        first_page, first_mba = self._first_page, self._first_mba
        mbas = array("Q")
        fresh: dict[int, int] = {}  # LBA → MBA given out in this batch
        runs: list[tuple[int, int, int]] = []  # the same as (LBA, blocks, MBA), each within one page
        extents = array("Q")
        next_mba = maps.next_mba
        # Regions may be marked before the append: one that then fails marked too much, which costs but does not harm.
        recent = maps.regions.recent
        txid = log.txid + 1
        for lba, count in zip(lbas, counts, strict=True):
            extents.append(lba)
            extents.append(count)
            if count == 1:
                number = (lba >> PAGE_SHIFT) + first_page
                page = logical_pages.get(number) or maps.logical.get(number)
                assert page is not None
                mba = page[lba & PAGE_MASK]
                if mba < first_mba:
                    mba, next_mba = self._fresh_mba(lba, mba, fresh, runs, next_mba)
                mbas.append(mba)
                recent[lba >> REGION_SHIFT] = txid
            else:
                maps.regions.mark(lba, count, txid)
                next_mba = self._mbas_of_run(lba, count, mbas, fresh, runs, next_mba)
        try:
            offset = log.append_write(self._layer, extents, mbas, checksums, data)
        except OSError:
            maps.neighbours.forget()
            raise
        maps.take_mbas(next_mba)
        maps.neighbours.keep()
        for lba, count, mba in runs:
            maps.set_logical(self._address(lba), count, mba)
        self.point(mbas, checksums, offset)
        self._appending.batches += 1
        self._appending.batch_blocks += len(mbas)
        return 0

    def point(self, mbas: array[int], checksums: array[int], offset: int) -> None:
        """Move the middle map: these MBAs now lie one after the other from `offset` of the open segment."""
        maps = self._maps
        pages = self._middle_pages
        middle = maps.middle
        changed = middle.changed
        live = self._live
        segment = self._log.segment
        total = len(mbas)
        at = gained = 0
        while at < total:
            mba = mbas[at]
            number = mba >> PAGE_SHIFT
            index = mba & PAGE_MASK
            page = pages.get(number) or middle.get(number)
            assert page is not None
            if at + 7 < total and mbas[at + 7] == mba + 7:
                count = run_length(mbas[at : at + PAGE_BLOCKS - index], 0, 1)
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
        middle = self._maps.middle
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
        page[index:stop] = array("I", [self._log.segment]) * count
        page[OFFSET + index : OFFSET + stop] = array("I", range(offset, offset + count * BLOCK_BYTES, BLOCK_BYTES))
        page[CHECKSUM + index : CHECKSUM + stop] = checksums
        return gained

    def _mbas_of_run(
        self,
        lba: int,
        count: int,
        mbas: array[int],
        fresh: dict[int, int],
        runs: list[tuple[int, int, int]],
        next_mba: int,
    ) -> int:
        stop = lba + count
        first_mba = self._first_mba
        while lba < stop:
            page = self._maps.logical.get((lba >> PAGE_SHIFT) + self._first_page)
            assert page is not None
            index = lba & PAGE_MASK
            blocks = min(stop - lba, PAGE_BLOCKS - index)
            held = page[index : index + blocks]
            if min(held) >= first_mba:
                mbas.extend(held)
            elif (
                max(held) < first_mba
                and fresh.keys().isdisjoint(range(lba, lba + blocks))
                and not self._maps.neighbours.has_any(self._address(lba), blocks)
            ):
                # All new: one run of MBAs, noted as one.
                runs.append((lba, blocks, next_mba))
                given = range(next_mba, next_mba + blocks)
                fresh.update(zip(range(lba, lba + blocks), given, strict=True))
                mbas.extend(given)
                next_mba += blocks
            else:
                for number, mba in enumerate(held, lba):
                    if mba < first_mba:
                        mba, next_mba = self._fresh_mba(number, mba, fresh, runs, next_mba)
                    mbas.append(mba)
            lba += blocks
        return next_mba

    def _fresh_mba(
        self, lba: int, shared: int, fresh: dict[int, int], runs: list[tuple[int, int, int]], next_mba: int
    ) -> tuple[int, int]:
        """(MBA of a block that the layer does not have yet, the next free one); `shared`: what a layer below shows."""
        mba = fresh.get(lba, 0)
        if not mba:
            if shared:
                mba, next_mba = self._maps.neighbours.take(self._address(lba), next_mba)
            else:
                mba, next_mba = next_mba, next_mba + 1
            fresh[lba] = mba
            runs.append((lba, 1, mba))
        return mba, next_mba

    def _append_in_parts(self, lbas: list[int], counts: list[int], data: list[Buffer], checksums: array[int]) -> int:
        """Cut a batch that does not fit into the open segment, and go on in the next one."""
        pieces = [(lba, count, memoryview(buffer)) for lba, count, buffer in zip(lbas, counts, data, strict=True)]
        at = 0
        while pieces:
            if not self._appending.make_room(min(len(pieces), MAX_RECORD_EXTENTS), CLIENTS_KEEP, blocks=1):
                return errnos.ENOSPC
            room = self._log.room_blocks(WRITE, min(len(pieces), MAX_RECORD_EXTENTS))
            part: list[tuple[int, int, memoryview]] = []
            blocks = 0
            while pieces and blocks < room and len(part) < MAX_RECORD_EXTENTS:
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

    def write_now(self, lba: int, data: memoryview) -> int:
        """Append whole blocks whose pages are resident, without touching the reserve; 0 or an errno."""
        count = len(data) >> 12
        kept_bytes = self._pool.kept_of_open_bytes(CLIENTS_KEEP)
        if self._log.room_blocks(WRITE, 1) < count + kept_bytes // BLOCK_BYTES and not self._pool.can_take():
            return errnos.ENOSPC
        self._accept(lba, data, count)
        return self.commit()

    def discard_now(self, lba: int, count: int) -> int:
        """Append a hole over whole blocks, whose pages are resident if it is a small one; 0 or an errno."""
        return self._append_hole(lba, count)
