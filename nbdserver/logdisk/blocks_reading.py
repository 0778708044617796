"""Blocks read by their MBAs, for another replica whose own copy has rotted.

Rules
- Only what has the checksum that the map has for it is handed over; what is nowhere here is left out.
- One that is bad here too is wanted for this replica (repair.py). The owner waits for that, because whoever asks has
  nobody else; a replica answers at once: the owner may be asking it for the very block.
- It does not refer to itself: no collector would free what it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from metadata.pages import PAGE_SHIFT
from metadata.seams import Files
from nbdserver.logdisk.cold_read import Bad, BlockPlace, Found, place_of, read_places
from nbdserver.logdisk.pacing import guarded
from nbdserver.logdisk.repair import BadBlock

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
        disk.call_soon(self._go_on)

    def _go_on(self) -> None:
        guarded(self._disk.fail, self._read)()

    def _read(self) -> None:
        """Find the places of those that are left, as far as the map's pages are there, and read them."""
        disk, middle = self._disk, self._disk.maps.middle
        places: list[BlockPlace] = []
        while self._left and not disk.failure:
            mba = self._left[-1]
            page = middle.get(mba >> PAGE_SHIFT)
            if page is None:
                if places:
                    break
                if not 0 < mba < disk.maps.next_mba:
                    self._left.pop()  # nothing has ever been there
                    continue
                disk.maps.load([(middle, mba >> PAGE_SHIFT)], self._go_on)
                return
            self._left.pop()
            place = place_of(mba, page)
            if place.segment:
                places.append(place)
        if places:
            read_places(disk, self._files, places, self._arrived)
        else:
            self._settle()

    def _arrived(self, found: Found, bad: Bad) -> None:
        self._found.update(found)
        self._bad += bad
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
