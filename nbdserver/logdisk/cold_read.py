"""Blocks that are not in the page cache, read off the loop and checked.

Rules
- A read holds its segment (`begin_read`), so that the segment is not reused under it.
- A block whose checksum is wrong is never handed over. What a layer shows (`ColdRead`) is repaired if another replica
  has it, and whoever reads begins again: the maps may have changed meanwhile. Otherwise its LBA is noted and reported.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from metadata.pages import PAGE_MASK, Page
from metadata.seams import Files
from nbdserver.logdisk.maps import CHECKSUM, OFFSET
from nbdserver.logdisk.pacing import guarded
from nbdserver.logdisk.repair import BadBlock
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES
from protocol.invariant import invariant

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk


class BlockPlace(NamedTuple):
    """Where the middle map says that a block lies."""

    mba: int
    segment: int
    offset: int
    checksum: int


Found = dict[int, bytes]
"""By MBA: content that has the checksum."""
Bad = dict[BadBlock, int]
"""Blocks that could not be read, with the errno, or have the wrong checksum (0)."""


def place_of(mba: int, middle: Page) -> BlockPlace:
    """As its page of the middle map says; in segment 0 there is nothing."""
    index = mba & PAGE_MASK
    return BlockPlace(mba, middle[index], middle[OFFSET + index], middle[CHECKSUM + index])


def read_places(disk: LogDisk, files: Files, places: Iterable[BlockPlace], done: Callable[[Found, Bad], None]) -> None:
    """Read the blocks at some places, one at least; `done` when all are read."""
    by_segment: dict[int, list[BlockPlace]] = {}
    for place in places:
        by_segment.setdefault(place.segment, []).append(place)
    waiting = len(by_segment)
    invariant(waiting > 0, "there is something to read")
    found: Found = {}
    bad: Bad = {}

    def arrived(segment: int, wanted: Sequence[BlockPlace], errno: int, data: Sequence[bytes]) -> None:
        nonlocal waiting
        disk.pool.end_read(segment)
        for position, place in enumerate(wanted):
            content = data[position] if not errno else b""
            if len(content) == BLOCK_BYTES and crc32c(content) == place.checksum:
                found[place.mba] = content
            else:
                bad[BadBlock(*place[:3])] = errno
        waiting -= 1
        if not waiting:
            done(found, bad)

    for segment, wanted in by_segment.items():
        disk.pool.begin_read(segment)
        extents = [(BLOCK_BYTES, place.offset) for place in wanted]
        files.read_later(disk.pool.handles[segment], extents, guarded(disk.fail, partial(arrived, segment, wanted)))


class ColdRead:
    """One of them: `done(0, blocks)`, zeros for what is nowhere; `done(EAGAIN, [])`: read again, from other places;
    `done(EIO, [])`: a block is lost."""

    def __init__(
        self,
        disk: LogDisk,
        files: Files,
        layer: int,
        lba: int,
        places: Sequence[BlockPlace | None],
        done: Callable[[int, list[bytes]], None],
    ) -> None:
        self._disk = disk
        self._layer = layer
        self._lba = lba
        self._places = places
        self._done = done
        wanted = [place for place in places if place is not None]
        if wanted:
            read_places(disk, files, wanted, self._read)
        else:
            disk.call_soon(partial(self._read, {}, {}))

    def _read(self, found: Found, bad: Bad) -> None:
        if bad:
            self._disk.repairs.want_all(bad, partial(self._repaired, bad))
        else:
            nothing = bytes(BLOCK_BYTES)
            self._done(0, [nothing if place is None else found[place.mba] for place in self._places])

    def _repaired(self, bad: Bad, lost: set[int]) -> None:
        for index, place in enumerate(self._places):
            if place is not None and place.mba in lost and self._layer in self._disk.maps.tree.layers:
                block = BadBlock(*place[:3])
                self._disk.damage.found(self._layer, self._lba + index, block, bad[block])
        self._done(errnos.EIO if lost else errnos.EAGAIN, [])
