"""What this replica has of a region that it is to fetch, so that the owner leaves that out of the copy.

Theory. Whatever any layer shows in the region here, out of date or not, is named by its MBA with a digest of its
content. The owner compares; an MBA that it has too, with the same content, need not travel.

Rules
- Only blocks with the right checksum are named: what has rotted here travels.
- Nothing is relied on: a layer that shows what is nowhere is no error here. At most COMPARED_LIMIT blocks are named.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from metadata.logical_map import LAYER_SHIFT, pages_of_region
from metadata.seams import Files
from nbdserver.logdisk.blocks_reading import BlocksReading
from nbdserver.logdisk.maps import Need
from nbdserver.logdisk.pacing import Job, guarded
from protocol.packing import digest
from protocol.peer import BLOCKS_LIMIT, COMPARED_LIMIT

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

DIGESTS_A_STEP = 64  # some 0.25 ms
_PAGES_AT_ONCE = 16
_NO_PAGE: array[int] = array("Q")


class RegionDigests:
    """One answer on its way: `done` with the digest of each block, by MBA."""

    def __init__(self, disk: LogDisk, files: Files, region: int, done: Callable[[Mapping[int, bytes]], None]) -> None:
        self._disk = disk
        self._files = files
        self._done = done
        self._pages = [number for layer in sorted(disk.maps.tree.layers) for number in pages_of_region(layer, region)]
        self._mbas: set[int] = set()
        self._digests: dict[int, bytes] = {}
        disk.call_soon(self._go_on)

    def _go_on(self) -> None:
        guarded(self._disk.fail, self._look)()

    def _look(self) -> None:
        """Gather what the layers show, as far as the pages are there; those that are not are loaded together."""
        maps = self._disk.maps
        need: Need = []
        for number in self._pages[-_PAGES_AT_ONCE:]:
            page = maps.page(number) if number >> LAYER_SHIFT in maps.tree.layers else _NO_PAGE
            if page is None:
                need.append((maps.logical, number))
            else:
                self._mbas.update(page)
                self._pages.remove(number)
        if len(self._mbas) < COMPARED_LIMIT and self._pages:
            if need:
                maps.load(need, self._go_on)
            else:
                self._disk.call_soon(self._go_on)
            return
        self._mbas.discard(0)
        self._read(sorted(self._mbas)[:COMPARED_LIMIT])

    def _read(self, mbas: Sequence[int]) -> None:
        if not mbas or self._disk.failure:
            self._done(self._digests)
            return
        go_on = guarded(self._disk.fail, partial(self._read, mbas[BLOCKS_LIMIT:]))

        def arrived(found: Mapping[int, bytes]) -> None:
            Job(self._disk.clock, self._steps(found), go_on, self._disk.parted, share=1.0)

        BlocksReading(self._disk, self._files, mbas[:BLOCKS_LIMIT], is_patient=False, done=arrived)

    def _steps(self, found: Mapping[int, bytes]) -> Iterator[None]:
        for count, (mba, block) in enumerate(found.items(), 1):
            self._digests[mba] = digest(block)
            if count % DIGESTS_A_STEP == 0:
                yield
