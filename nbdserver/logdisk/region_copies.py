"""Regions as another replica has them, applied here; region_reading.py reads them.

Theory. A copy holds, for each layer, which MBA every LBA of the region shows, and the blocks of all of them, but for
those that are here already: the owner leaves out what has the same content under the same MBA (region_digests.py).

Applying one makes all layers show what the copy says, and frees what no layer shows any more. It is a REGION record of
the local log for each part of the region that changes, and for its last one; it has no txid. Of a scattered change most
parts are as they were: a turn of the loop goes on over them. What the source has
merged away and this replica has not is a nameless layer that is not in the copy: it shows what its child shares with
it, so that a later merge finds its blocks as usual. What this replica has merged away is left out of the copy.

Rules
- A copy is applied only where it was read: at its txid (ESTALE otherwise). No block can have a later one then.
- Nothing is appended between the turns of one copy: what comes meanwhile waits (`Ordered`). A crash between them leaves
  the region to be fetched again, as its bit says.
- A block that was left out must be here, with the checksum that the copy says (ENOENT otherwise).
- Every layer gets entries of its own for each block that changes in any layer: what it inherits may have changed below.
- Replay applies a record in the same way; layers are not taken apart while regions are to be fetched, so that it finds
  the same layers.

Known weakness: a region with very many layers takes as many maps, and longer turns.
"""

from __future__ import annotations

import errno as errnos
from array import array
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from metadata.layers import Tree
from metadata.logical_map import ADDRESS_SHIFT
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page
from metadata.region_table import REGION_BLOCKS, REGION_SHIFT
from nbdserver.logdisk.maps import CHECKSUM, Maps, Need
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.replica_append import needed_of_mbas
from nbdserver.logdisk.segments import CLIENTS_KEEP
from protocol.disk import (
    BLOCK_BYTES,
    COPY_RUN,
    MAX_RECORD_EXTENTS,
    REGION_HEAD,
    WRITE_BLOCK_BYTES,
    body_bytes,
    wrong_blocks,
)
from protocol.disk import REGION as REGION_KIND
from protocol.packing import blocks_of, travelling
from protocol.peer import Copy

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk
    from nbdserver.logdisk.replica_append import Ordered

_PART_BLOCKS = 128  # LBAs that one record is of: a turn of the loop, some 2 ms for one layer, unless it changes little
_LITTLE_BLOCKS = 16  # that change in a part, or travel for it, so that the turn goes on with the next one

_NOTHING = array("Q", [0]) * PAGE_BLOCKS

Views = dict[int, "array[int]"]
"""By layer: the MBA of each LBA of a range, 0 for none."""


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
            while not first and mbas[stop : stop + PAGE_BLOCKS] == _NOTHING:
                stop += PAGE_BLOCKS
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


# -- applying


def show(
    maps: Maps, first_lba: int, views: Views, logical: Callable[[int], Page], middle: Callable[[int], Page]
) -> None:
    """Make every layer show what the copy says; `logical(address)` and `middle(mba)` have pages in memory."""
    layers = sorted(maps.tree.layers, reverse=True)
    for at in differing(maps, first_lba, views, logical):
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


def differing(maps: Maps, first_lba: int, views: Views, logical: Callable[[int], Page]) -> Sequence[int]:
    """Where, counted from the first LBA, a layer may show something else than the copy says."""
    if len(views) < len(maps.tree.layers):
        return range(len(next(iter(views.values()), ())))  # what a layer shows that is not in it is told one by one
    found: set[int] = set()
    for layer, view in views.items():
        at = 0
        while at < len(view):
            address = (layer << ADDRESS_SHIFT) + first_lba + at
            index = address & PAGE_MASK
            stop = min(len(view), at + PAGE_BLOCKS - index)
            held, wanted = logical(address)[index : index + stop - at], view[at:stop]
            if held != wanted:
                found.update(at + step for step, (old, new) in enumerate(zip(held, wanted, strict=True)) if old != new)
            at = stop
    return sorted(found)


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
        first = 0  # what is before it in the region is applied
        parsed: _Parsed | None = None

        def step() -> int | None:
            nonlocal loads, first, parsed
            disk, maps = self._disk, self._maps
            if copy.txid != disk.log.txid and holds(Rule.REPLACED_WHERE_IT_WAS_READ):
                return errnos.ESTALE
            if disk.background.must_wait_for_checkpoint():
                disk.checkpointer.when_done(self._ordered.go_on)
                return None
            parsed = parsed or _parsed(copy)
            if parsed is None:
                return errnos.EBADMSG
            errno = changed = 0
            while first < REGION_BLOCKS and not errno:
                if changed > _LITTLE_BLOCKS:
                    disk.call_soon(self._ordered.go_on)
                    return None
                lba = (copy.region << REGION_SHIFT) + first
                views = {layer: view[first : first + _PART_BLOCKS] for layer, view in parsed.views.items()}
                mbas = distinct(views)
                need = self._needed(lba, mbas)
                if need:
                    loads += 1
                    maps.hold(loads * (len(need) + REGION_BLOCKS))
                    maps.load(need, self._ordered.go_on)
                    return None
                if disk.appending.has_to_wait(len(mbas) * (WRITE_BLOCK_BYTES + BLOCK_BYTES), CLIENTS_KEEP):
                    disk.slow_path.park(self._ordered.go_on)
                    return None
                first += _PART_BLOCKS
                changes = self._changes(lba, views, parsed, mbas)
                changed += changes
                if not self._are_here(mbas, parsed.kept):
                    errno = errnos.ENOENT
                elif changes or first == REGION_BLOCKS:
                    errno = self._apply_part(lba, copy.region_txid, views, parsed)
            if loads:
                maps.let_go()
            return errno

        self._ordered.submit(step, done)

    def _needed(self, lba: int, mbas: list[int]) -> Need:
        maps = self._maps
        need: Need = []
        for layer in maps.tree.layers:
            need += maps.needed((layer << ADDRESS_SHIFT) + lba, _PART_BLOCKS, 2 * _PART_BLOCKS)
        return list(dict.fromkeys(need + needed_of_mbas(maps, mbas)))

    def _known(self, views: Views) -> Views:
        """Those of layers that are here."""
        return {layer: view for layer, view in views.items() if layer in self._maps.tree.layers}

    def _changes(self, lba: int, views: Views, parsed: _Parsed, mbas: list[int]) -> int:
        """How many blocks have travelled, or change."""
        travelled = sum(mba in parsed.content for mba in mbas)
        return max(travelled, len(differing(self._maps, lba, self._known(views), self._logical)))

    def _apply_part(self, lba: int, region_txid: int, views: Views, parsed: _Parsed) -> int:
        """Make the layers show what the copy says from an LBA on."""
        disk = self._disk
        try:
            for first, part, runs, wanted in self._parts(self._known(views), parsed.kept):
                if not self._append(lba + first, region_txid, part, runs, wanted, parsed):
                    return errnos.ENOSPC
        except OSError as error:
            return disk.append_failed(error)
        except Exception as error:
            disk.parted(error)
            raise
        return 0

    def _are_here(self, mbas: list[int], kept: Mapping[int, int]) -> bool:
        """Whether those that were left out of the copy are."""
        for mba in mbas:
            if mba in kept:
                page, index = self._middle(mba), mba & PAGE_MASK
                if not page[index] or page[CHECKSUM + index] != kept[mba]:
                    return False
        return True

    def _append(self, lba: int, region_txid: int, part: Views, runs: bytes, wanted: list[int], parsed: _Parsed) -> bool:
        """Append one REGION record and do what it says; False if there is no room."""
        disk, maps, content = self._disk, self._maps, parsed.content
        head = REGION_HEAD.pack(lba, len(next(iter(part.values()))), 0, region_txid)
        checksums = array("I", [content[mba][0] for mba in wanted])
        body = b"".join((head, runs, array("Q", wanted).tobytes(), checksums.tobytes()))
        if not disk.appending.make_room_for_bytes(len(body) + len(wanted) * BLOCK_BYTES, CLIENTS_KEEP):
            return False
        crash_point("region-before-append")
        data = [content[mba][1] for mba in wanted]
        offset = disk.log.append_region(len(runs) // COPY_RUN.size, len(wanted), body, data)
        crash_point("region-after-append")
        for at, mba in enumerate(wanted):
            maps.set_middle(mba, disk.log.segment, offset + at * BLOCK_BYTES, checksums[at])
        show(maps, lba, part, self._logical, self._middle)
        if wanted:
            maps.next_mba = max(maps.next_mba, wanted[-1] + 1)
        maps.regions.raise_to(lba, region_txid)
        disk.appending.appended(None)
        return True

    def _parts(self, views: Views, kept: Container[int]) -> Iterator[tuple[int, Views, bytes, list[int]]]:
        """The range in pieces that fit into a segment each: (offset in the region, views, as runs, their MBAs but for
        those that are kept)."""
        room = self._disk.pool.record_bytes
        total = step = len(next(iter(views.values()), ()))
        first = 0
        while first < total:
            part = {layer: view[first : first + step] for layer, view in views.items()}
            runs, wanted = pack_views(part), [mba for mba in distinct(part) if mba not in kept]
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


class _Parsed(NamedTuple):
    """A copy taken apart."""

    views: Views
    content: dict[int, tuple[int, bytes | memoryview]]
    """By MBA: checksum and block, of what has travelled."""
    kept: dict[int, int]
    """By MBA: the checksum of what has not."""


def _parsed(copy: Copy) -> _Parsed | None:
    """The copy, if it and its blocks hold together."""
    try:
        views, checksums = unpack_views(copy.entries, REGION_BLOCKS), array("I", copy.checksums)
    except ValueError:
        return None
    mbas = distinct(views)
    if len(checksums) != len(mbas) or (copy.kept and len(copy.kept) != (len(mbas) + 7) // 8):
        return None
    kept: dict[int, int] = {}
    if copy.kept:
        travel = list(travelling(copy.kept, range(len(mbas))))
        kept = dict(zip(mbas, checksums, strict=True))
        for at in travel:
            del kept[mbas[at]]
        wanted, of_wanted = [mbas[at] for at in travel], array("I", (checksums[at] for at in travel))
    else:
        wanted, of_wanted = mbas, checksums
    if not _are_right(copy.data, of_wanted):
        return None
    travelled = zip(wanted, of_wanted, blocks_of(copy.data), strict=True)
    content = {mba: (checksum, block) for mba, checksum, block in travelled}
    return _Parsed(views, content, kept)


def _are_right(data: Sequence[bytes | memoryview], checksums: array[int]) -> bool:
    """Whether these are as many blocks, in buffers of whole ones, and have these checksums."""
    if sum(map(len, data)) != len(checksums) * BLOCK_BYTES:
        return False
    block = 0
    for buffer in data:
        count = len(buffer) // BLOCK_BYTES
        if len(buffer) % BLOCK_BYTES or wrong_blocks(buffer, checksums[block : block + count]):
            return False
        block += count
    return True
