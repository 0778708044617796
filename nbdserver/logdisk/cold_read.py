"""Blocks that are not in the page cache, read off the loop and checked.

Rules
- A read holds its segment (`begin_read`), so that the segment is not reused under it.
- A block whose checksum is wrong is never handed over. It is repaired if another replica has it, and whoever reads
  begins again: the maps may have changed meanwhile. Otherwise its LBA is noted and reported.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from metadata.seams import Files
from nbdserver.logdisk.repair import BadBlock
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk


class BlockPlace(NamedTuple):
    """Where the middle map says that a block lies."""

    mba: int
    segment: int
    offset: int
    checksum: int


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
        self._done = done
        self._blocks: list[bytes] = [bytes(BLOCK_BYTES)] * len(places)
        self._bad: dict[int, tuple[BlockPlace, int]] = {}  # index → (place, errno)
        by_segment: dict[int, list[tuple[int, BlockPlace]]] = {}
        for index, place in enumerate(places):
            if place is not None:
                by_segment.setdefault(place.segment, []).append((index, place))
        self._waiting = len(by_segment)
        if not by_segment:
            disk.call_soon(self._finish)
        for segment, wanted in by_segment.items():
            disk.pool.begin_read(segment)
            extents = [(BLOCK_BYTES, place.offset) for _, place in wanted]
            files.read_later(disk.pool.handles[segment], extents, partial(self._arrived, segment, wanted))

    def _arrived(self, segment: int, wanted: list[tuple[int, BlockPlace]], errno: int, data: list[bytes]) -> None:
        self._disk.pool.end_read(segment)
        for position, (index, place) in enumerate(wanted):
            content = data[position] if not errno else b""
            if len(content) != BLOCK_BYTES or crc32c(content) != place.checksum:
                self._bad[index] = place, errno
            else:
                self._blocks[index] = content
        self._waiting -= 1
        if not self._waiting:
            self._finish()

    def _finish(self) -> None:
        if self._bad:
            bad = {place.mba: BadBlock(*place[:3]) for place, _ in self._bad.values()}
            self._disk.repairs.want_all(bad.values(), self._repaired)
        else:
            self._done(0, self._blocks)

    def _repaired(self, lost: set[int]) -> None:
        for index, (place, errno) in self._bad.items():
            if place.mba in lost and self._layer in self._disk.maps.tree.layers:
                self._disk.damage.found(self._layer, self._lba + index, *place[:3], errno)
        self._done(errnos.EIO if lost else errnos.EAGAIN, [])
