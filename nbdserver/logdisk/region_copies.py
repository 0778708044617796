"""Regions as another replica has them: read at one, applied at another.

Theory. A copy holds, for each layer, which MBA every LBA of the region shows, and the blocks of all of them. It is
exact for the moment at which it is handed over: what changed while it was read is looked at again, in that moment. So
it can be put into the stream of modifications there, and needs no txid for each block.

Applying one makes all layers show what the copy says, and frees what no layer shows any more. It is a REGION record of
the local log, or several, each of a part of the region; it has no txid. What the source has merged away and this
replica has not is a nameless layer that is not in the copy: it shows what its child shares with it, so that a later
merge finds its blocks as usual. What this replica has merged away is left out of the copy.

Rules
- A copy is applied only where it was read: at its txid (ESTALE otherwise). No block can have a later one then.
- Every layer gets entries of its own for each block that changes in any layer: what it inherits may have changed below.
- Replay applies a record in the same way; layers are not taken apart while regions are to be fetched, so that it finds
  the same layers.

Known weakness: a region with very many layers takes as many maps; all blocks travel, also those that are alike; a copy
is applied in one go (some milliseconds).
"""

from __future__ import annotations

import errno as errnos
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from metadata.layers import Tree
from metadata.logical_map import ADDRESS_SHIFT
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page
from metadata.region_table import REGION_SHIFT
from metadata.seams import Files
from nbdserver.logdisk.maps import CHECKSUM, OFFSET, Maps, Need
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.pacing import guarded
from nbdserver.logdisk.repair import BadBlock
from nbdserver.logdisk.replica_append import are_right, needed_of_mbas
from nbdserver.logdisk.segments import CLIENTS_KEEP
from protocol.checksum import crc32c
from protocol.disk import (
    BLOCK_BYTES,
    COPY_RUN,
    HEAD,
    MAX_RECORD_EXTENTS,
    NAMELESS,
    REGION_HEAD,
    body_bytes,
)
from protocol.disk import REGION as REGION_KIND
from protocol.invariant import invariant
from protocol.peer import Copy

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk
    from nbdserver.logdisk.replica_append import Ordered

REGION_BLOCKS = 1 << REGION_SHIFT
_INLINE_BLOCKS = 64  # that were written meanwhile and are read again from the page cache
_MOST_REPAIRS = 3  # of one region: a device that loses what was just written to it is given up

Views = dict[int, "array[int]"]
"""By layer: the MBA of each LBA of a range, 0 for none."""
Place = tuple[int, int, int, int]
"""Segment, its sequence, offset, checksum."""


# -- their form


def pack_views(views: Mapping[int, array[int]]) -> bytes:
    """As COPY_RUNs, which cover the range for each layer."""
    packed: list[bytes] = []
    for layer, mbas in sorted(views.items()):
        at = 0
        while at < len(mbas):
            first = mbas[at]
            step = 1 if first else 0
            stop = at + 1
            while stop < len(mbas) and mbas[stop] == first + (stop - at) * step:
                stop += 1
            packed.append(COPY_RUN.pack(layer, at, stop - at, 0, first))
            at = stop
    return b"".join(packed)


def unpack_views(data: bytes, count: int) -> Views:
    """ValueError if they are none of a range of `count` LBAs."""
    views: Views = {}
    if len(data) % COPY_RUN.size:
        raise ValueError("half a run")
    for layer, first, blocks, _, mba in COPY_RUN.iter_unpack(data):
        mbas = views.setdefault(layer, array("Q"))
        if first != len(mbas) or not blocks or first + blocks > count:
            raise ValueError("runs that do not follow each other")
        mbas.extend(range(mba, mba + blocks) if mba else [0] * blocks)
    if any(len(mbas) != count for mbas in views.values()):
        raise ValueError("a layer that is not covered")
    return views


def distinct(views: Mapping[int, array[int]]) -> list[int]:
    """The MBAs in them, rising: the order of a copy's blocks."""
    found: set[int] = set()
    for mbas in views.values():
        found.update(mbas)
    found.discard(0)
    return sorted(found)


# -- reading


class RegionReading:
    """One region on its way into a copy."""

    def __init__(self, disk: LogDisk, files: Files, region: int, done: Callable[[int, Copy | None], None]) -> None:
        self._disk = disk
        self._maps = disk.maps
        self._files = files
        self._region = region
        self._done = done
        self._settled: Views = {}  # of layers that do not change any more
        self._have: dict[int, tuple[Place, bytes]] = {}
        self._reading = 0
        self._bad: list[BadBlock] = []
        self._repairs = 0
        self._errno = 0
        self._loads = 0
        self._go_on = guarded(disk.fail, self._try)
        disk.call_soon(self._go_on)

    def _try(self) -> None:
        disk = self._disk
        if disk.failure or self._errno:
            self._finish(self._errno or errnos.EIO, None)
            return
        views = self._views()
        if views is None:
            return
        mbas = distinct(views)
        maps = self._maps
        missing = {mba >> PAGE_SHIFT for mba in mbas if maps.middle.get(mba >> PAGE_SHIFT) is None}
        if missing:
            self._load([(maps.middle, number) for number in sorted(missing)])
            return
        nowhere = {mba for mba in mbas if not self._place(mba)[0]}
        if nowhere:
            views = self._without(views, nowhere)
            mbas = distinct(views)
        lacking = {mba: place for mba in mbas if (place := self._place(mba)) != self._have.get(mba, (None,))[0]}
        if len(lacking) <= _INLINE_BLOCKS:
            lacking = {mba: place for mba, place in lacking.items() if not self._read_cached(mba, place)}
        if lacking:
            self._read(lacking)
            return
        self._finish(0, self._copy(views, mbas))

    def _finish(self, errno: int, copy: Copy | None) -> None:
        if self._loads:
            self._maps.set_cache_bytes(self._disk.settings.cache_bytes)
        self._done(errno, copy)

    def _copy(self, views: Views, mbas: list[int]) -> Copy:
        have = [self._have[mba] for mba in mbas]
        checksums = array("I", [place[3] for place, _ in have]).tobytes()
        region_txid = self._maps.regions.txid_of(self._region)
        txid = self._disk.log.txid
        return Copy(self._region, txid, region_txid, pack_views(views), checksums, [block for _, block in have])

    def _views(self) -> Views | None:
        """What every layer shows now; None: pages are being loaded."""
        views: Views = {}
        maps = self._maps
        need: Need = []
        first_lba = self._region << REGION_SHIFT
        for layer, found in sorted(maps.tree.layers.items()):
            settled = self._settled.get(layer)
            if settled is not None:
                views[layer] = settled
                continue
            first = (layer << ADDRESS_SHIFT) + first_lba >> PAGE_SHIFT
            numbers = range(first, first + (REGION_BLOCKS >> PAGE_SHIFT))
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

    def _place(self, mba: int) -> Place:
        maps = self._maps
        page = maps.middle.get(mba >> PAGE_SHIFT)
        assert page is not None
        index = mba & PAGE_MASK
        segment = page[index]
        return segment, maps.segments.sequence[segment], page[OFFSET + index], page[CHECKSUM + index]

    def _read_cached(self, mba: int, place: Place) -> bool:
        found = self._files.read_cached(self._disk.pool.handles[place[0]], BLOCK_BYTES, place[2])
        if found is None or crc32c(found) != place[3]:
            return False
        self._have[mba] = place, found
        return True

    def _read(self, lacking: Mapping[int, Place]) -> None:
        by_segment: dict[int, list[int]] = {}
        for mba, place in lacking.items():
            by_segment.setdefault(place[0], []).append(mba)
        self._reading = len(by_segment)
        for segment, mbas in by_segment.items():
            self._disk.pool.begin_read(segment)
            extents = [(BLOCK_BYTES, lacking[mba][2]) for mba in mbas]

            def arrived(errno: int, blocks: list[bytes], segment: int = segment, mbas: list[int] = mbas) -> None:
                self._disk.pool.end_read(segment)
                for position, mba in enumerate(mbas):
                    block = blocks[position] if not errno else b""
                    if len(block) == BLOCK_BYTES and crc32c(block) == lacking[mba][3]:
                        self._have[mba] = lacking[mba], block
                    else:
                        self._bad.append(BadBlock(mba, segment, lacking[mba][2]))
                self._reading -= 1
                if not self._reading:
                    self._repair()

            self._files.read_later(self._disk.pool.handles[segment], extents, arrived)

    def _repair(self) -> None:
        """What has rotted is repaired before it is copied."""
        bad, self._bad = self._bad, []
        if not bad:
            self._go_on()
            return
        self._repairs += 1

        def repaired(lost: set[int]) -> None:
            if lost or self._repairs > _MOST_REPAIRS:
                self._errno = errnos.EIO
            self._go_on()

        self._disk.repairs.want_all(bad, repaired)


# -- applying


def show(
    maps: Maps, first_lba: int, views: Views, logical: Callable[[int], Page], middle: Callable[[int], Page]
) -> None:
    """Make every layer show what the copy says; `logical(address)` and `middle(mba)` have pages in memory."""
    layers = sorted(maps.tree.layers, reverse=True)
    for at in range(len(next(iter(views.values()), ()))):
        lba = first_lba + at
        old = {layer: logical((layer << ADDRESS_SHIFT) + lba)[lba & PAGE_MASK] for layer in layers}
        new = _shown(maps.tree, layers, views, at)
        if old == new:
            continue
        for layer in layers:
            address = (layer << ADDRESS_SHIFT) + lba
            logical(address)
            maps.set_logical(address, 1, new[layer])
            maps.tree.layers[layer].dirty_since = maps.tree.next_checkpoint
        for mba in set(old.values()).difference(new.values(), (0,)):
            middle(mba)
            maps.free(mba)


def _shown(tree: Tree, layers: Sequence[int], views: Views, at: int) -> dict[int, int]:
    """What each layer shows at one place; `layers` are all, children before their parents."""
    new: dict[int, int] = {}
    for layer in layers:
        view = views.get(layer)
        if view is not None:
            new[layer] = view[at]
        else:
            shared = (new[child] for child in tree.layers[layer].children if new[child] < tree.first_mba(child))
            new[layer] = next(filter(None, shared), 0)
    return new


class CopyApplying:
    """Applies copies to one replica."""

    def __init__(self, disk: LogDisk, ordered: Ordered) -> None:
        self._disk = disk
        self._maps = disk.maps
        self._ordered = ordered

    def submit(self, copy: Copy, done: Callable[[int], None]) -> None:
        """See ReplicaLog.apply_copy; EBADMSG for what does not hold together."""
        loads = 0
        parsed: tuple[Views, list[int], array[int]] | None = None

        def step() -> int | None:
            nonlocal loads, parsed
            disk, maps = self._disk, self._maps
            if copy.txid != disk.log.txid and holds(Rule.REPLACED_WHERE_IT_WAS_READ):
                return errnos.ESTALE
            if disk.background.must_wait_for_checkpoint():
                disk.checkpointer.when_done(self._ordered.go_on)
                return None
            parsed = parsed or _parsed(copy)
            if parsed is None:
                return errnos.EBADMSG
            views, mbas, checksums = parsed
            need = self._needed(copy.region, mbas)
            if need:
                loads += 1
                maps.hold(loads * (len(need) + REGION_BLOCKS))
                maps.load(need, self._ordered.go_on)
                return None
            try:
                errno = self._apply(copy, views, mbas, checksums)
            except OSError as error:
                errno = disk.append_failed(error)
            except Exception as error:
                disk.parted(error)
                raise
            if loads:
                maps.set_cache_bytes(disk.settings.cache_bytes)
            return errno

        self._ordered.submit(step, done)

    def _needed(self, region: int, mbas: list[int]) -> Need:
        maps = self._maps
        first_lba = region << REGION_SHIFT
        need: Need = []
        for layer in maps.tree.layers:
            need += maps.needed((layer << ADDRESS_SHIFT) + first_lba, REGION_BLOCKS, 2 * REGION_BLOCKS)
        return list(dict.fromkeys(need + needed_of_mbas(maps, mbas)))

    def _apply(self, copy: Copy, views: Views, mbas: list[int], checksums: array[int]) -> int:
        disk, maps = self._disk, self._maps
        blocks = [block for buffer in copy.data for block in _blocks_of(buffer)]
        content = {mba: (checksums[at], blocks[at]) for at, mba in enumerate(mbas)}
        known = {layer: view for layer, view in views.items() if layer in maps.tree.layers}
        first_lba = copy.region << REGION_SHIFT
        for first, part, runs, wanted in self._parts(known):
            count = len(next(iter(part.values())))
            head = REGION_HEAD.pack(first_lba + first, count, 0, copy.region_txid)
            of_part = array("I", [content[mba][0] for mba in wanted])
            body = b"".join((head, runs, array("Q", wanted).tobytes(), of_part.tobytes()))
            if not disk.appending.make_room_for_bytes(len(body) + len(wanted) * BLOCK_BYTES, CLIENTS_KEEP):
                return errnos.ENOSPC
            crash_point("region-before-append")
            data = [content[mba][1] for mba in wanted]
            offset = disk.log.append_region(len(runs) // COPY_RUN.size, len(wanted), body, data)
            crash_point("region-after-append")
            for at, mba in enumerate(wanted):
                maps.set_middle(mba, disk.log.segment, offset + at * BLOCK_BYTES, of_part[at])
            show(maps, first_lba + first, part, self._logical, self._middle)
            if wanted:
                maps.next_mba = max(maps.next_mba, wanted[-1] + 1)
            maps.regions.raise_to(first_lba + first, copy.region_txid)
            disk.appending.appended(None)
        return 0

    def _parts(self, views: Views) -> Iterator[tuple[int, Views, bytes, list[int]]]:
        """The range in pieces that fit into a segment each: (offset in the region, views, as runs, their MBAs)."""
        room = self._disk.pool.record_bytes
        first, step = 0, REGION_BLOCKS
        while first < REGION_BLOCKS and views:
            part = {layer: view[first : first + step] for layer, view in views.items()}
            runs, wanted = pack_views(part), distinct(part)
            extents = len(runs) // COPY_RUN.size
            size_bytes = body_bytes(REGION_KIND, extents, len(wanted)) + len(wanted) * BLOCK_BYTES
            if step > 1 and (size_bytes > room or extents > MAX_RECORD_EXTENTS):
                step //= 2
                continue
            yield first, part, runs, wanted
            first += step

    def _logical(self, address: int) -> Page:
        page = self._maps.page(address >> PAGE_SHIFT)
        assert page is not None  # `_needed` has looked
        return page

    def _middle(self, mba: int) -> Page:
        page = self._maps.middle.get(mba >> PAGE_SHIFT)
        assert page is not None
        return page


def _parsed(copy: Copy) -> tuple[Views, list[int], array[int]] | None:
    """Views, MBAs and checksums, if they and the blocks hold together."""
    try:
        views, checksums = unpack_views(copy.entries, REGION_BLOCKS), array("I", copy.checksums)
    except ValueError:
        return None
    mbas = distinct(views)
    if len(checksums) != len(mbas) or not are_right(copy.data, checksums):
        return None
    return views, mbas, checksums


def _blocks_of(buffer: bytes | memoryview) -> list[bytes | memoryview]:
    return [buffer[at : at + BLOCK_BYTES] for at in range(0, len(buffer), BLOCK_BYTES)]
