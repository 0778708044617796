"""Blocks read by their MBAs, for another replica whose own copy has rotted.

Rules
- Only what has the checksum that the map has for it is handed over; what is nowhere here is left out.
- One that is bad here too is wanted for this replica (repair.py). The owner waits for that, because whoever asks has
  nobody else; a replica answers at once: the owner may be asking it for the very block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from metadata.pages import PAGE_MASK, PAGE_SHIFT
from metadata.seams import Files
from nbdserver.logdisk.cold_read import BlockPlace
from nbdserver.logdisk.maps import CHECKSUM, OFFSET
from nbdserver.logdisk.pacing import guarded
from nbdserver.logdisk.repair import BadBlock
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk


class BlocksReading:
    """One answer on its way."""

    def __init__(
        self,
        disk: LogDisk,
        files: Files,
        mbas: Sequence[int],
        is_patient: bool,
        done: Callable[[Mapping[int, bytes]], None],
    ) -> None:
        self._disk = disk
        self._files = files
        self._left = list(mbas)
        self._is_patient = is_patient
        self._done = done
        self._found: dict[int, bytes] = {}
        self._bad: list[BadBlock] = []
        self._waiting = 0
        self._go_on = guarded(disk.fail, self._read)
        disk.call_soon(self._go_on)

    def _read(self) -> None:
        """Find the places of those that are left, as far as the map's pages are there, and read them."""
        disk, middle = self._disk, self._disk.maps.middle
        by_segment: dict[int, list[BlockPlace]] = {}
        while self._left and not disk.failure:
            mba = self._left[-1]
            page = middle.get(mba >> PAGE_SHIFT)
            if page is None:
                if by_segment:
                    break
                if not 0 < mba < disk.maps.next_mba:
                    self._left.pop()  # nothing has ever been there
                    continue
                disk.maps.load([(middle, mba >> PAGE_SHIFT)], self._go_on)
                return
            self._left.pop()
            index = mba & PAGE_MASK
            if page[index]:
                place = BlockPlace(mba, page[index], page[OFFSET + index], page[CHECKSUM + index])
                by_segment.setdefault(place.segment, []).append(place)
        if not by_segment:
            self._settle()
            return
        self._waiting = len(by_segment)
        for segment, places in by_segment.items():
            disk.pool.begin_read(segment)
            self._files.read_later(
                disk.pool.handles[segment],
                [(BLOCK_BYTES, place.offset) for place in places],
                guarded(disk.fail, partial(self._arrived, segment, places)),
            )

    def _arrived(self, segment: int, places: list[BlockPlace], errno: int, blocks: list[bytes]) -> None:
        self._disk.pool.end_read(segment)
        for position, place in enumerate(places):
            content = blocks[position] if not errno else b""
            if len(content) == BLOCK_BYTES and crc32c(content) == place.checksum:
                self._found[place.mba] = content
            else:
                self._bad.append(BadBlock(*place[:3]))
        self._waiting -= 1
        if not self._waiting:
            self._go_on()

    def _settle(self) -> None:
        bad, self._bad = self._bad, []
        if not bad:
            self._done(self._found)
        elif self._is_patient:
            self._is_patient = False
            self._left = [each.mba for each in bad]
            self._disk.repairs.want_all(bad, lambda lost: self._go_on())
        else:
            self._disk.repairs.want_all(bad, lambda lost: None)
            self._done(self._found)
