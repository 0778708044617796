"""A region of this replica, read for another one.

Theory. A copy is exact for the moment at which it is handed over: what changed while it was read is looked at again, in
that moment. So it can be put into the stream of modifications there, and needs no txid for each block.

What the other replica has already need not travel: it has said which MBAs it has, with a digest of each, and a block
with the same digest is left out. That stays right until the copy arrives, because the stream in between changes both in
the same way. The rest is packed in parts of neighbours. Both are prepared in small steps when the region has been read;
what changes after that travels, as it is.

Rules
- A block with a wrong checksum is repaired first (repair.py), and never copied.
- What is prepared is used only for the very place that it was made from.
- A reading does not refer to itself: no collector would free the 4 MiB that it has read.
"""

from __future__ import annotations

import errno as errnos
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from metadata.logical_map import pages_of_region
from metadata.pages import PAGE_BLOCKS, PAGE_SHIFT
from metadata.region_table import REGION_BLOCKS
from metadata.seams import Files
from nbdserver.logdisk.cold_read import Bad, BlockPlace, Found, place_of, read_places
from nbdserver.logdisk.maps import Need
from nbdserver.logdisk.pacing import Job, guarded
from nbdserver.logdisk.region_copies import Views, distinct, pack_views
from nbdserver.logdisk.region_digests import DIGESTS_A_STEP
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, HEAD, NAMELESS
from protocol.invariant import invariant
from protocol.packing import Packer, digest
from protocol.peer import PART_BLOCKS, Copy, Part

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_INLINE_BLOCKS = 64  # that were written meanwhile and are read again from the page cache
_MOST_REPAIRS = 3  # of one region: a device that loses what was just written to it is given up

Place = tuple[BlockPlace, int]
"""Where a block lies, and the sequence number of that segment's life."""


class RegionReading:
    """One region on its way into a copy."""

    def __init__(
        self,
        disk: LogDisk,
        files: Files,
        region: int,
        known: Mapping[int, bytes] | None,
        done: Callable[[int, Copy | None], None],
    ) -> None:
        """`known`: by MBA, the digest of what the other replica has; None: everything travels, as it is."""
        self._disk = disk
        self._maps = disk.maps
        self._files = files
        self._region = region
        self._known = known
        self._done = done
        self._is_prepared = known is None
        self._packer = Packer()
        self._same: dict[int, Place] = {}  # by MBA: where the content lies that the other has too
        self._packed: dict[int, tuple[Sequence[tuple[int, Place]], Part]] = {}  # by group: of which blocks
        self._settled: Views = {}  # of layers that do not change any more
        self._have: dict[int, tuple[Place, bytes]] = {}
        self._repairs = 0
        self._errno = 0
        self._loads = 0
        disk.call_soon(self._go_on)

    def _go_on(self) -> None:
        guarded(self._disk.fail, self._try)()

    def _try(self) -> None:
        disk = self._disk
        if disk.failure or self._errno:
            self._finish(self._errno or errnos.EIO, None)
            return
        views = self._views()
        if views is None:
            return
        mbas = distinct(views)
        places = self._places(mbas)
        if places is None:
            return
        nowhere = {mba for mba, (place, _) in places.items() if not place.segment}
        if nowhere:
            views = self._without(views, nowhere)
            mbas = distinct(views)
        lacking = {mba: places[mba] for mba in mbas if places[mba] != self._have.get(mba, (None,))[0]}
        if len(lacking) <= _INLINE_BLOCKS:
            lacking = {mba: place for mba, place in lacking.items() if not self._read_cached(mba, place)}
        if lacking:
            self._read(lacking)
        elif self._is_prepared:
            self._finish(0, self._copy(views, mbas))
        else:
            self._is_prepared = True
            # Then it is looked at again, because the region goes on changing.
            Job(disk.clock, self._steps(mbas), self._go_on, disk.parted, share=1.0)

    def _finish(self, errno: int, copy: Copy | None) -> None:
        if self._loads:
            self._maps.let_go()
        self._done(errno, copy)

    def _copy(self, views: Views, mbas: list[int]) -> Copy:
        have = self._have
        checksums = array("I", [have[mba][0][0].checksum for mba in mbas]).tobytes()
        region_txid = self._maps.regions.txid_of(self._region)
        txid = self._disk.log.txid
        stays = {mba for mba in mbas if self._same.get(mba) == have[mba][0]}
        travels = [mba for mba in mbas if mba not in stays]
        data = [have[mba][1] for mba in travels]
        kept, parts = b"", []
        if self._known is not None:
            bits = sum(1 << at for at, mba in enumerate(mbas) if mba in stays)
            kept = bits.to_bytes((len(mbas) + 7) // 8, "little") if bits else b""
            parts = [self._part(group, list(members)) for group, members in groupby(travels, _group_of)]
        return Copy(self._region, txid, region_txid, pack_views(views), checksums, data, kept, parts)

    # -- what need not travel, and what travels as less

    def _steps(self, mbas: Sequence[int]) -> Iterator[None]:
        """Find the blocks that the other has too, and pack the others: what is still so in the end is used."""
        known = self._known or {}
        for count, mba in enumerate(mbas):
            place, block = self._have[mba]
            if mba in known and known[mba] == digest(block):
                self._same[mba] = place
            if count % DIGESTS_A_STEP == DIGESTS_A_STEP - 1:
                yield
        travels = [mba for mba in mbas if mba not in self._same]
        for group, members in groupby(travels, _group_of):
            blocks = [(mba, *self._have[mba]) for mba in members]
            part = self._packer.pack([block for _, _, block in blocks])
            self._packed[group] = [(mba, place) for mba, place, _ in blocks], part
            yield

    def _part(self, group: int, mbas: list[int]) -> Part:
        """The blocks as they were packed, if they are the same ones still; else as they are."""
        of, part = self._packed.get(group, ((), None))
        if part is not None and of == [(mba, self._have[mba][0]) for mba in mbas]:
            return part
        return Part(len(mbas), b"".join(self._have[mba][1] for mba in mbas))

    def _views(self) -> Views | None:
        """What every layer shows now; None: pages are being loaded."""
        views: Views = {}
        maps = self._maps
        need: Need = []
        for layer, found in sorted(maps.tree.layers.items()):
            settled = self._settled.get(layer)
            if settled is not None:
                views[layer] = settled
                continue
            numbers = pages_of_region(layer, self._region)
            pages = [maps.page(number) for number in numbers]
            need += [(maps.logical, number) for number, page in zip(numbers, pages, strict=True) if page is None]
            if None not in pages:
                mbas = views[layer] = array("Q")
                for page in pages:
                    mbas.extend(page or ())
                if found.row.kind != HEAD:
                    self._settled[layer] = mbas
            elif len(need) >= PAGE_BLOCKS:
                break
        if need:
            self._load(need)
            return None
        return views

    def _without(self, views: Views, nowhere: set[int]) -> Views:
        """A layer that is being merged still shows blocks that were freed because its child hides them."""
        layers = self._maps.tree.layers
        found: Views = {}
        for layer, view in views.items():
            found[layer] = array("Q", (0 if mba in nowhere else mba for mba in view))
            invariant(layers[layer].row.kind == NAMELESS or found[layer] == view, "what can be seen lies somewhere")
        return found

    def _load(self, need: Need) -> None:
        self._loads += 1
        self._maps.hold(len(need) + self._loads * REGION_BLOCKS)
        self._maps.load(need, self._go_on)

    def _places(self, mbas: Sequence[int]) -> dict[int, Place] | None:
        """Where the blocks lie now; None: pages are being loaded."""
        middle, sequence = self._maps.middle, self._maps.segments.sequence
        missing = [number for number in sorted({mba >> PAGE_SHIFT for mba in mbas}) if middle.get(number) is None]
        if missing:
            self._load([(middle, number) for number in missing])
            return None
        places: dict[int, Place] = {}
        for mba in mbas:
            page = middle.get(mba >> PAGE_SHIFT)
            assert page is not None
            place = place_of(mba, page)
            places[mba] = place, sequence[place.segment]
        return places

    def _read_cached(self, mba: int, place: Place) -> bool:
        _, segment, offset, checksum = place[0]
        found = self._files.read_cached(self._disk.pool.handles[segment], BLOCK_BYTES, offset)
        if found is None or crc32c(found) != checksum:
            return False
        self._have[mba] = place, found
        return True

    def _read(self, lacking: Mapping[int, Place]) -> None:
        def arrived(found: Found, bad: Bad) -> None:
            for mba, block in found.items():
                self._have[mba] = lacking[mba], block
            if bad:
                self._repair(bad)
            else:
                self._go_on()

        read_places(self._disk, self._files, [place for place, _ in lacking.values()], arrived)

    def _repair(self, bad: Bad) -> None:
        """What has rotted is repaired before it is copied."""
        self._repairs += 1

        def repaired(lost: set[int]) -> None:
            if lost or self._repairs > _MOST_REPAIRS:
                self._errno = errnos.EIO
            self._go_on()

        self._disk.repairs.want_all(bad, repaired)


def _group_of(mba: int) -> int:
    """Blocks of one group, neighbours as a rule, are packed together."""
    return mba // PART_BLOCKS
