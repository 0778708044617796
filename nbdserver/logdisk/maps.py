"""The two maps of a family and what keeps them in step: which pages are resident, which discarded ranges are still
pending.

    LBA ──logical map──► MBA ──middle map──► PBA = (segment, offset), CRC-32C

A logical entry is one u64: 0 is nothing, otherwise an MBA. A middle entry is three u32: segment, offset, checksum;
segment 0 is nothing. Overwriting a block that the head layer owns changes the middle map alone; a shared one, with an
MBA lower than the layer's first, gets a new MBA. Blocks are named by their address: layer and LBA.

Discards. A small one is worked into both maps at once. One of a terabyte cannot be: it becomes a *pending hole*, a
range and a number. Resident logical pages under it are set aside (`stale`), so that the hot path, which looks into
`pages` only, cannot meet them. A page comes back through `settle`, which clears what the hole covers and frees its
MBAs first; a worker settles the rest in the background. In LevelDB a page carries the number of the last hole that
was applied to it (its stamp), written only while holes are pending; a page loaded with a lower stamp is settled first.
When every page that the layer has is settled, the hole is done; over a parent it then stays as a *cut*, a range in
which the parent is not seen.

Loading a page of a layer that is not the root takes the layers below it too (lookup.py).

Rules
- A logical page in `logical.pages` has every pending hole applied.
- `live` of a segment counts the middle entries that point into it, always.
- At most MAX_PENDING_HOLES are pending; the caller makes others wait.
- Only what the layer owns is freed with a discard; a shared block is taken out of the logical map alone.
- Every load ends. In a family that failed it ends with what was read: what is torn stays so when the batch that moves
  entries was refused, and a page that is damaged is never there. Who waited sees the failure.

Known weakness: reading `extents` under a pending hole settles page by page.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from metadata.family_state import PendingHole
from metadata.layers import MOST_CUTS, Tree
from metadata.logical_map import ADDRESS_SHIFT, LAYER_SHIFT, LBA_OF_ADDRESS, LogicalMap
from metadata.pages import MIN_PAGES, PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page, PageMap
from metadata.ranges import joined
from metadata.region_table import RegionTable
from metadata.seams import Store
from metadata.segment_table import SegmentTable
from nbdserver.logdisk.lookup import Lookup
from nbdserver.logdisk.neighbours import Neighbours
from nbdserver.logdisk.runs import run_length
from protocol.disk import DamagedValueError
from protocol.invariant import InvariantError, invariant

MAX_PENDING_HOLES = 256
SMALL_HOLE_BLOCKS = 4096  # up to here a discard is worked into the maps at once, made or replayed
OFFSET = PAGE_BLOCKS  # of these items in a middle page; the segment is the first one
CHECKSUM = 2 * PAGE_BLOCKS
EPOCH_SHIFT = 40  # MBA = epoch ‖ counter

Need = list[tuple[PageMap, int]]
"""Pages that have to be resident first."""


class Maps:
    """Logical and middle map, segment usage and regions of one family."""

    def __init__(self, store: Store, cache_bytes: int, failed: Callable[[str], None]) -> None:
        self.tree = Tree()
        self.logical = LogicalMap(self.tree, 0)
        self.middle = PageMap(b"M", "I", 3, 0)
        # 2 KiB of logical and 3 KiB of middle page for the same 256 blocks, when they were written in order.
        self._pair_bytes = self.logical.page_bytes + self.middle.page_bytes
        self._held_pages = 0
        self.set_cache_bytes(cache_bytes)
        self.segments = SegmentTable()
        self.regions = RegionTable()
        self.next_mba = 0
        self.neighbours = Neighbours(self.middle)
        self.next_hole = 1
        self.holes: list[PendingHole] = []  # oldest first
        self.moved_keys: list[bytes] = []  # that the next checkpoint deletes: what they held is elsewhere or freed
        self.stale: dict[int, Page] = {}
        self.logical_updates = 0
        self.middle_updates = 0
        self.live_blocks = 0
        self._stale_since: dict[int, int] = {}  # page → lowest hole number that may not be applied
        self._store = store
        self._failed = failed
        self._abandoned = False
        self._loading: dict[tuple[bytes, int], list[Callable[[], None]]] = {}

    # -- residence

    def set_cache_bytes(self, cache_bytes: int) -> None:
        """Change what both maps may keep in memory; pages over it go with the next loads."""
        self._cache_pages = max(MIN_PAGES, cache_bytes // self._pair_bytes)
        self._limit()

    @property
    def cache_bytes(self) -> int:
        """What both maps may keep in memory."""
        return self._cache_pages * self._pair_bytes

    @property
    def held_bytes(self) -> int:
        """What of that is taken by the map that has more pages in memory."""
        return max(self.logical.resident_pages, self.middle.resident_pages) * self._pair_bytes

    def hold(self, pages: int) -> None:
        """Let so many pages of each map be in memory together, whatever the cache may keep, until `let_go`."""
        self._held_pages = max(self._held_pages, 2 * pages)
        self._limit()

    def let_go(self) -> None:
        """Keep no more in memory than the cache may."""
        self._held_pages = 0
        self._limit()

    def _limit(self) -> None:
        self.logical.limit_pages = self.middle.limit_pages = max(self._cache_pages, self._held_pages)

    def needed(self, address: int, count: int, most: int = PAGE_BLOCKS, first_mba: int = 1) -> Need:
        """Pages that are missing before the maps of these blocks can be read or changed, at most about `most`.

        Of MBAs lower than `first_mba` the middle map is not needed: a change leaves them alone.
        """
        need: Need = []
        stop = address + count
        while address < stop and len(need) < most:
            number = address >> PAGE_SHIFT
            index = address & PAGE_MASK
            blocks = min(stop - address, PAGE_BLOCKS - index)
            page = self.page(number)
            if page is None:
                need.append((self.logical, number))
            else:
                need += [(self.middle, missing) for missing in self._missing_middle(page, index, blocks, first_mba)]
            address += blocks
        return need

    def page(self, number: int) -> Page | None:
        """A logical page if that needs no LevelDB."""
        page = self.logical.get(number)
        if page is None and (self.logical.prefix, number) not in self._loading:
            page = self.logical.derive(number)
        return page

    def load(self, need: Need, done: Callable[[], None]) -> None:
        """Bring the pages in; `done` when they were there (they may be gone again: ask `needed` once more)."""
        waiting = len(need)
        invariant(waiting > 0, "there is something to load")

        def one_loaded() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                done()

        to_load: Need = []
        for page_map, number in need:
            key = (page_map.prefix, number)
            waiters = self._loading.get(key)
            if waiters is not None:
                waiters.append(one_loaded)
                continue
            self._loading[key] = [one_loaded]
            to_load.append((page_map, number))
        if to_load:
            self._read(to_load)

    def abandon(self) -> None:
        """The family failed: nothing is read again for a page that is being loaded."""
        self._abandoned = True

    def _read(self, need: Need) -> None:
        """Read what LevelDB has of the pages; never answered from inside this call."""
        plain = [each for each in need if each[0] is not self.logical]
        # Stale pages need nothing from LevelDB, but are settled behind the same door.
        stale = [number for page_map, number in need if page_map is self.logical and number in self.stale]
        lookups = [
            Lookup(self, number) for page_map, number in need if page_map is self.logical and number not in self.stale
        ]
        ranges = [page_map.key_range(number) for page_map, number in plain]
        for lookup in lookups:
            ranges += lookup.ranges()
        self._store.range_later(ranges, lambda errno, items: self._loaded(errno, plain, lookups, stale, items))

    def _loaded(
        self,
        errno: int,
        plain: Need,
        lookups: list[Lookup],
        stale: list[int],
        items: list[list[tuple[bytes, bytes]]],
    ) -> None:
        for number in stale:
            self._settle_then_tell(number)
        if errno:
            self._failed(f"LevelDB could not read map pages (errno {errno})")
            for page_map, number in plain + [(self.logical, lookup.number) for lookup in lookups]:
                self._tell(page_map, number)
            return
        for (page_map, number), page_items in zip(plain, items, strict=False):
            try:
                page_map.install(number, page_items)
            except (DamagedValueError, InvariantError) as error:
                self._failed(str(error))
            self._tell(page_map, number)
        at = len(plain)
        for lookup in lookups:
            asked = lookup.asked
            try:
                again = lookup.take(items[at : at + asked])
            except (DamagedValueError, InvariantError) as error:
                self._failed(str(error))
                self._tell(self.logical, lookup.number)
                again = False
            else:
                if not again:
                    self._looked_up(lookup)
            at += asked
            if again:
                self._look_on(lookup)

    def _look_on(self, lookup: Lookup) -> None:
        self._store.range_later(lookup.ranges(), lambda errno, items: self._loaded(errno, [], [lookup], [], items))

    def _looked_up(self, lookup: Lookup) -> None:
        if not lookup.is_torn:
            self.admit(lookup)
        elif not self._abandoned and lookup.number not in self.stale and self.logical.get(lookup.number) is None:
            self._look_on(Lookup(self, lookup.number))
            return
        if lookup.number in self.stale:
            self._settle_then_tell(lookup.number)
        else:
            self._tell(self.logical, lookup.number)

    def admit(self, lookup: Lookup) -> None:
        """Take a logical page that was looked up; under pending holes it is stale."""
        number = lookup.number
        if number in self.stale or number >> LAYER_SHIFT not in self.tree.layers:
            return  # set aside while it was being loaded, by a hole that came meanwhile
        logical = self.logical
        if logical.get(number) is None:
            logical.admit(number, lookup.page(), lookup.stored, lookup.stamp)
            if lookup.should_be_shorter and logical.pinned_pages * 2 < logical.limit_pages:
                first_change = logical.changed.get(number) or logical.first_change(number)
                first_change.extend(range(PAGE_BLOCKS))
        if self._pending_over(number, logical.stamp(number)):
            self._set_aside(number, logical.stamp(number) + 1)

    def _tell(self, page_map: PageMap, number: int) -> None:
        for waiter in self._loading.pop((page_map.prefix, number), ()):
            waiter()

    def _missing_middle(self, page: Page, index: int, blocks: int, first_mba: int) -> list[int]:
        mbas = page[index : index + blocks]
        if mbas[0] >= first_mba and run_length(mbas, 0, 1) == blocks:
            pages = {mbas[0] >> PAGE_SHIFT, mbas[-1] >> PAGE_SHIFT}  # a run is no longer than a page
        else:
            pages = {mba >> PAGE_SHIFT for mba in mbas if mba >= first_mba}
        return [number for number in pages if self.middle.get(number) is None]

    # -- changes

    def take_mbas(self, stop: int) -> None:
        """The MBAs from `next_mba` up to `stop` are given out: make their pages."""
        first_new = (self.next_mba + PAGE_MASK) >> PAGE_SHIFT
        for number in range(first_new, (stop + PAGE_MASK) >> PAGE_SHIFT):
            self.middle.pinned = number
            self.middle.create(number)
        self.next_mba = stop

    def begin_epoch(self, epoch: int) -> None:
        """MBAs of a new epoch begin in a page of their own."""
        self.next_mba = epoch << EPOCH_SHIFT
        self.neighbours = Neighbours(self.middle)  # others may have ordered since

    def set_logical(self, address: int, count: int, mba: int) -> None:
        """Point blocks of one resident page at MBAs that rise by one."""
        number = address >> PAGE_SHIFT
        index = address & PAGE_MASK
        logical = self.logical
        changed = logical.changed.get(number) or logical.first_change(number)
        page = logical.pages[number]
        if count == 1:
            changed.append(index)
            page[index] = mba
        else:
            changed.extend(range(index, index + count))
            page[index : index + count] = array("Q", range(mba, mba + count))
        self.logical_updates += count

    def set_middle(self, mba: int, segment: int, offset: int, checksum: int) -> None:
        """Point an MBA of a resident page at a PBA, counting live blocks."""
        middle = self.middle
        number = mba >> PAGE_SHIFT
        index = mba & PAGE_MASK
        page = middle.get(number)
        assert page is not None
        (middle.changed.get(number) or middle.first_change(number)).append(index)
        live = self.segments.live
        old = page[index]
        if old:
            live[old] -= 1
            self.live_blocks -= 1
        if segment:
            live[segment] += 1
            self.live_blocks += 1
        page[index] = segment
        page[OFFSET + index] = offset
        page[CHECKSUM + index] = checksum
        self.middle_updates += 1

    # -- holes

    def clear(self, address: int, count: int) -> None:
        """Take the blocks out of the maps; what `needed` names must be resident."""
        stop = address + count
        while address < stop:
            number = address >> PAGE_SHIFT
            index = address & PAGE_MASK
            blocks = min(stop - address, PAGE_BLOCKS - index)
            page = self.logical.pages[number]
            if any(page[index : index + blocks]):
                self._clear_in_page(number, page, index, index + blocks)
            address += blocks

    def _clear_in_page(self, number: int, page: Page, start: int, stop: int) -> bool:
        """Clear the entries that are shared or whose middle page is resident; whether all were."""
        changed = self.logical.changed.get(number) or self.logical.first_change(number)
        first_mba = self.tree.first_mba(number >> LAYER_SHIFT)
        complete = True
        for index in range(start, stop):
            mba = page[index]
            if not mba:
                continue
            if mba >= first_mba:
                if self.middle.get(mba >> PAGE_SHIFT) is None:
                    complete = False
                    continue
                self.set_middle(mba, 0, 0, 0)
            changed.append(index)
            page[index] = 0
            self.logical_updates += 1
        if not changed:
            changed.append(start)
        return complete

    def free(self, mba: int) -> bool:
        """Take a block that nothing shows any more out of the middle map; whether it took room. Its page is
        resident."""
        page = self.middle.get(mba >> PAGE_SHIFT)
        assert page is not None
        if not page[mba & PAGE_MASK]:
            return False
        self.set_middle(mba, 0, 0, 0)
        return True

    def can_take_hole(self, layer: int) -> bool:
        """Whether a long discard may become one more hole of the layer."""
        return len(self.holes) < MAX_PENDING_HOLES and not self.has_many_cuts(layer)

    def has_many_cuts(self, layer: int) -> bool:
        """Whether so many ranges of the layer are cut out of its parent that no further one may be: what is discarded
        then is written as entries."""
        found = self.tree.layers[layer]
        return len(found.cut) + found.holes >= MOST_CUTS

    def add_hole(self, address: int, count: int) -> PendingHole:
        """Make a range read as zeros in time that does not depend on its length."""
        hole = PendingHole(self.next_hole, address, count, address >> PAGE_SHIFT)
        self.next_hole += 1
        self.holes.append(hole)
        self.tree.layers[address >> ADDRESS_SHIFT].holes += 1
        first, last = address >> PAGE_SHIFT, (address + count - 1) >> PAGE_SHIFT
        for number, page in self.logical.take_out(first, last + 1):
            self.stale[number] = page
            self._stale_since[number] = hole.hole
        return hole

    def take_holes(self, holes: list[PendingHole]) -> None:
        """Those of the last checkpoint."""
        self.holes = holes
        for hole in holes:
            invariant(hole.first_lba >> ADDRESS_SHIFT in self.tree.layers, "a pending hole is one of a layer")
            self.tree.layers[hole.first_lba >> ADDRESS_SHIFT].holes += 1

    def stamps(self) -> dict[int, int]:
        """What a page that is written now is stamped with, for the layers that have pending holes."""
        return {hole.first_lba >> ADDRESS_SHIFT: self.next_hole - 1 for hole in self.holes}

    def stale_stamps(self) -> dict[int, int]:
        """The same of each page that is set aside: the holes before the first that it may lack are applied, and what
        was written since stays."""
        return {number: since - 1 for number, since in self._stale_since.items()}

    def holes_over(self, number: int) -> list[tuple[int, int, int]]:
        """(number, first index, stop index) of the pending holes over a page, for one that is only looked at."""
        since = self._stale_since.get(number, 1)
        return [(hole.hole, *self._part(hole, number)) for hole in self._pending_over(number, since - 1)]

    @staticmethod
    def _part(hole: PendingHole, number: int) -> tuple[int, int]:
        first = number << PAGE_SHIFT
        return max(hole.first_lba - first, 0), min(hole.first_lba + hole.count - first, PAGE_BLOCKS)

    def _set_aside(self, number: int, since: int) -> None:
        for taken, page in self.logical.take_out(number, number + 1):
            self.stale[taken] = page
            self._stale_since[taken] = since

    def _pending_over(self, number: int, stamp: int) -> list[PendingHole]:
        first, stop = number << PAGE_SHIFT, (number + 1) << PAGE_SHIFT
        layer = self.tree.layers.get(number >> LAYER_SHIFT)
        if layer is None or not layer.holes:
            return []
        # Over a parent a page that the layer does not have needs the hole until it is done.
        over_parent = layer.row.parent != 0
        return [
            hole
            for hole in self.holes
            if hole.hole > stamp
            and (over_parent or hole.cursor <= number)
            and hole.first_lba < stop
            and hole.first_lba + hole.count > first
        ]

    def settle(self, number: int) -> Need:
        """Apply the pending holes to a stale page and put it back; or the middle pages that are needed first."""
        page = self.stale[number]
        complete = True
        remaining: list[tuple[int, int]] = []
        for hole in self._pending_over(number, self._stale_since[number] - 1):
            start, stop = self._part(hole, number)
            if any(page[start:stop]) and not self._clear_stale(number, page, start, stop):
                complete = False
                remaining.append((start, stop))
        if complete:
            del self.stale[number], self._stale_since[number]
            self.logical.put_back(number, page)
            return []
        first_mba = self.tree.first_mba(number >> LAYER_SHIFT)
        missing = {
            needed for start, stop in remaining for needed in self._missing_middle(page, start, stop - start, first_mba)
        }
        return [(self.middle, needed) for needed in missing]

    def _clear_stale(self, number: int, page: Page, start: int, stop: int) -> bool:
        if number not in self.logical.changed:
            # `first_change` copies a frozen page; it has to find it.
            self.logical.pages[number] = page
            self.logical.first_change(number).append(start)
            del self.logical.pages[number]
        return self._clear_in_page(number, page, start, stop)

    def _settle_then_tell(self, number: int) -> None:
        if number in self.stale and not self._abandoned:
            need = self.settle(number)
            if need:
                self.load(need, lambda: self._settle_then_tell(number))
                return
        self._tell(self.logical, number)

    def hole_done(self, hole: PendingHole) -> None:
        """Every page that the layer has under the hole has it applied."""
        self.holes.remove(hole)
        number = hole.first_lba >> ADDRESS_SHIFT
        layer = self.tree.layers[number]
        layer.holes -= 1
        layer.dirty_since = self.tree.next_checkpoint
        if layer.row.parent:
            first = hole.first_lba & LBA_OF_ADDRESS
            self.tree.set_cut(number, joined((*layer.cut, (first, first + hole.count))))
