"""The read path: two lookups and one `preadv` from the page cache for each contiguous run, every block's CRC checked.

Rules
- Nothing here waits. What is not in memory (pages of the maps) or not in the page cache (data), and what is damaged, is
  None; the slow path asks again and finds out why.
- A wrong checksum is never answered, and not reported here: the slow path reads the block again and reports it.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from metadata.logical_map import LAYER_SHIFT
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page
from metadata.seams import Buffer, Files
from nbdserver.block import HOLE, SPARSE_READ_BYTES, ZERO, BlockRoom, Extents, RunRoom
from nbdserver.logdisk.maps import CHECKSUM, OFFSET, Maps
from nbdserver.logdisk.runs import run_length, same_length
from nbdserver.logdisk.segments import SegmentPool
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, block_splitter

_ZEROS = memoryview(bytes(PAGE_BLOCKS * BLOCK_BYTES))
_NOWAIT = os.RWF_NOWAIT


class Place(NamedTuple):
    """A piece of a segment."""

    segment: int
    length: int
    offset: int


class Reader:
    """Answers reads and extents of one layer inline."""

    def __init__(self, files: Files, maps: Maps, pool: SegmentPool, layer: int) -> None:
        self.blocks_read = 0
        self._first_page = layer << LAYER_SHIFT
        self._maps = maps
        self._logical_pages = maps.logical.pages
        self._middle_pages = maps.middle.pages
        self._handles = pool.handles
        self._read_cached = files.read_cached
        self._read_into = files.read_into
        self._stopped = False

    def move_to(self, layer: int) -> None:
        """Read another layer from now on."""
        self._first_page = layer << LAYER_SHIFT

    def stop(self) -> None:
        """Answer nothing any more."""
        self._stopped = True
        self._logical_pages = {}

    def read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """See BlockDevice."""
        if self._stopped:
            return None
        runs = self._runs(offset, length)
        if runs is None:
            return None
        pieces: list[Buffer] = []
        for middle, index, count in runs:
            if middle is None:
                pieces.append(_ZEROS[: count * BLOCK_BYTES])
                continue
            data = self._read_cached(self._handles[middle[index]], count * BLOCK_BYTES, middle[OFFSET + index])
            if data is None:
                return None
            expected = middle[CHECKSUM + index : CHECKSUM + index + count]
            if array("I", map(crc32c, block_splitter(count).unpack(data))) != expected:
                return None
            pieces.append(data)
        before, after = offset & 4095, -(offset + length) & 4095
        self.blocks_read += (before + length + after) >> 12
        if before or after:
            whole = b"".join(pieces)
            return (whole[before : len(whole) - after],)
        return pieces

    def read_blocks(self, offsets: Sequence[int], rooms: Sequence[BlockRoom], first: int) -> Sequence[int]:
        """See BlockDevice. The shortest way there is: everything unusual is missing."""
        logical, first_page, middles = self._logical_pages, self._first_page, self._middle_pages
        handles, read_into = self._handles, self._read_into
        missing: list[int] = []
        number = first
        for offset in offsets:
            try:
                lba = offset >> 12
                mba = logical[(lba >> PAGE_SHIFT) + first_page][lba & PAGE_MASK]
                middle = middles[mba >> PAGE_SHIFT]  # of a hole there is none
                index = mba & PAGE_MASK
                views, data = rooms[number]
                if (
                    read_into(handles[middle[index]], views, middle[OFFSET + index], _NOWAIT) == BLOCK_BYTES
                    and crc32c(data) == middle[CHECKSUM + index]
                ):
                    number += 1
                    continue
            except KeyError:
                page = logical.get((lba >> PAGE_SHIFT) + first_page)
                if page is not None and not page[lba & PAGE_MASK]:
                    rooms[number][0][0][:] = _ZEROS[:BLOCK_BYTES]
                    number += 1
                    continue
            except OSError:
                pass  # not in the page cache, or worse
            missing.append(number - first + len(missing))
        self.blocks_read += number - first
        return missing

    def read_run(self, offset: int, blocks: int, room: RunRoom, first: int) -> bool:
        """See BlockDevice. As `read`, without a copy."""
        lba = offset >> 12
        stop = first + blocks
        at = first
        tells_holes = blocks >= SPARSE_READ_BYTES // BLOCK_BYTES
        try:
            while at < stop:
                page = self._logical_pages[(lba >> PAGE_SHIFT) + self._first_page]
                index = lba & PAGE_MASK
                mbas = page[index : index + min(stop - at, PAGE_BLOCKS - index)]
                if tells_holes and 0 in mbas:
                    return False
                self._read_run_in_page(mbas, room, at)
                lba += len(mbas)
                at += len(mbas)
        except (KeyError, OSError):
            return False
        self.blocks_read += blocks
        return True

    def _read_run_in_page(self, mbas: Page, room: RunRoom, at: int) -> None:
        """Put the content of these MBAs (0: zeros) from block `at` on; KeyError or OSError if it cannot be had."""
        done, total = 0, len(mbas)
        while done < total:
            mba = mbas[done]
            if not mba:
                count = same_length(mbas, done)
                room.view[at * BLOCK_BYTES : (at + count) * BLOCK_BYTES] = _ZEROS[: count * BLOCK_BYTES]
            else:
                index = mba & PAGE_MASK
                middle = self._middle_pages[mba >> PAGE_SHIFT]
                offset = middle[OFFSET + index]
                if index == PAGE_MASK or middle[OFFSET + index + 1] != offset + BLOCK_BYTES:
                    # What was overwritten at random is read block by block, in the shortest way there is.
                    views, data = room.blocks[at]
                    if self._read_into(self._handles[middle[index]], views, offset, _NOWAIT) != BLOCK_BYTES:
                        raise BlockingIOError
                    if crc32c(data) != middle[CHECKSUM + index]:
                        raise OSError(errno.EIO, "a checksum is wrong")
                    done += 1
                    at += 1
                    continue
                count = contiguous_blocks(middle, index, min(run_length(mbas, done, 1), PAGE_BLOCKS - index))
                views = [room.view[at * BLOCK_BYTES : (at + count) * BLOCK_BYTES]]
                if self._read_into(self._handles[middle[index]], views, offset, _NOWAIT) != count * BLOCK_BYTES:
                    raise BlockingIOError
                expected = middle[CHECKSUM + index : CHECKSUM + index + count]
                if array("I", map(crc32c, room.sums[at : at + count])) != expected:
                    raise OSError(errno.EIO, "a checksum is wrong")
            done += count
            at += count

    def places(self, offset: int, length: int) -> list[Place] | None:
        """What a range is read from; None: pages of the maps are not in memory."""
        runs = self._runs(offset, length)
        if runs is None:
            return None
        return [
            Place(middle[index], count * BLOCK_BYTES, middle[OFFSET + index])
            for middle, index, count in runs
            if middle is not None
        ]

    def _runs(self, offset: int, length: int) -> list[tuple[Page | None, int, int]] | None:
        """The blocks of a range, as far as they lie one after the other: middle page (None: zeros), index in it, how
        many. None: pages of the maps are not in memory."""
        runs: list[tuple[Page | None, int, int]] = []
        lba = offset >> 12
        stop = (offset + length + BLOCK_BYTES - 1) >> 12
        while lba < stop:
            page = self._maps.page((lba >> PAGE_SHIFT) + self._first_page)
            if page is None:
                return None
            first = lba & PAGE_MASK
            mbas = page[first : first + stop - lba]
            at, total = 0, len(mbas)
            while at < total:
                mba = mbas[at]
                if mba:
                    index = mba & PAGE_MASK
                    middle = self._maps.middle.get(mba >> PAGE_SHIFT)
                    if middle is None:
                        return None
                    count = contiguous_blocks(middle, index, min(run_length(mbas, at, 1), PAGE_BLOCKS - index))
                    runs.append((middle, index, count))
                else:
                    count = same_length(mbas, at)
                    runs.append((None, 0, count))
                at += count
            lba += total
        return runs

    def extents(self, offset: int, length: int, limit: int) -> Extents | None:
        """See BlockDevice."""
        if self._stopped:
            return None
        found: Extents = []
        lba = offset >> 12
        stop = (offset + length + 4095) >> 12
        end = offset + length
        at = offset
        while lba < stop:
            page = self._maps.page((lba >> PAGE_SHIFT) + self._first_page)
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
