"""A map of pages: the shape that the logical map and the middle map share.

Theory. A map from 64-bit numbers to small fixed-size entries is cut into pages of 256 entries. A page in memory is one
`array`; the hot path reads `pages[number >> 8][number & 255]` itself, without a call. In LevelDB a page is a *base*
value (all entries) and *entry* values (one entry each) that override it. A checkpoint writes a page's base when many
of its entries changed, single entries otherwise: a sequential gigabyte costs 12 bytes a block, and a random 4 KiB
write over a terabyte one small key, which its next version replaces, so that LevelDB's compaction cost stays that of
plain keys.

A checkpoint is the state at one instant, written over many slices of the loop. `freeze()` is constant time: the set of
changed pages moves aside. The first change of a page after that finds no record in `changed` and comes to
`first_change`, which copies the page if the checkpoint has not written it yet. So copy-on-write costs the hot path
nothing.

Eviction is by two generations: a page that is asked for moves to the young one; when the young one has filled half of
the limit it becomes the old one, whose clean pages are dropped a few at each load. A hit in the young generation
costs no bookkeeping.

Rules
- Whoever changes an entry calls `changed[page].append(index)`, or `first_change(page)` if there is none, before the
  change.
- A changed page is not evicted before the checkpoint that contains the change has been synced (`thaw`).
- Only `install` and `evict` drop pages: what was seen resident stays so while a batch is put together.
- Only the loop's thread touches this.

Known weakness: entries are never moved together, so a map whose keys were freed at random holds pages with few entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from metadata.seams import Batch
from protocol.disk import pack_value, unpack_value
from protocol.invariant import invariant

PAGE_BLOCKS = 256
PAGE_SHIFT = 8
PAGE_MASK = 255
MIN_PAGES = 64  # so that what one step needs fits

Page: TypeAlias = "array[int]"
"""`array("Q")` of 256 or `array("I")` of 768."""
KeyRange = tuple[bytes, bytes]

_BASE = b"\x00"
_ENTRY = b"\x01"
_STAMP = b"\x02"
_BASE_THRESHOLD = (
    64  # changed entries from which one base (2 or 3 KiB) is cheaper than single entries of some 35 bytes each
)
_BESIDE_BYTES = 400  # of a page: its object, its places in dictionaries and the numbers in them; measured
_HEAP_PERCENT = 125  # of what is in use: pages come and go among other things and leave holes in the heap; measured
_EVICTIONS_A_LOAD = 2  # so that dropping pages keeps up with loading them, and no load pays for many


class Items(NamedTuple):
    """What LevelDB holds of one page."""

    base: Page | None
    entries: list[tuple[int, Page]]  # (index, items)
    stored: int  # bit set of the entries' indexes
    stamp: int

    def lay_over(self, page: Page) -> None:
        """Put the single entries into a page."""
        for index, items in self.entries:
            page[index::PAGE_BLOCKS] = items


class PageMap:
    """Pages of entries of `fields` items of typecode `typecode`, kept under `prefix` in LevelDB.

    An entry's items lie `PAGE_BLOCKS` apart in the array: item k of entry i is `page[k * 256 + i]`. An entry of zeros
    is absence.
    """

    def __init__(self, prefix: bytes, typecode: str, fields: int, limit_pages: int) -> None:
        self.prefix = prefix
        self.limit_pages = max(MIN_PAGES, limit_pages)
        self.pages: dict[int, Page] = {}
        self.changed: dict[int, bytearray] = {}
        self.loads = 0
        self.evictions = 0
        self.pinned = -1  # a page that is never evicted
        self.kind_at = len(prefix) + 7  # in a key
        self._typecode = typecode
        self._zeros = array(typecode, [0]) * (PAGE_BLOCKS * fields)
        self._old: dict[int, Page] = {}
        self._old_order: Iterator[int] = iter(())
        self._stored_entries: dict[int, int] = {}  # page → bit set of the entry values that LevelDB holds
        self._stamps: dict[int, int] = {}  # page → stamp that LevelDB holds
        self._frozen: dict[int, bytearray] = {}
        self._copies: dict[int, Page] = {}

    @property
    def page_bytes(self) -> int:
        """Memory that one page takes, with what is noted beside it and what lies free between pages."""
        return (len(self._zeros) * self._zeros.itemsize + _BESIDE_BYTES) * _HEAP_PERCENT // 100

    @property
    def resident_pages(self) -> int:
        return len(self.pages) + len(self._old)

    @property
    def pinned_pages(self) -> int:
        """Pages that only a checkpoint makes evictable."""
        return len(self.changed) + len(self._frozen)

    # -- residence

    def get(self, number: int) -> Page | None:
        """The page if it is in memory, made young; None if it has to be loaded."""
        page = self.pages.get(number)
        if page is None and self._old:
            page = self._old.pop(number, None)
            if page is not None:
                self.pages[number] = page
        return page

    def zeros(self) -> Page:
        """A page without entries, of nobody."""
        return self._zeros[:]

    def create(self, number: int) -> Page:
        """A page that is known to have no entries in LevelDB."""
        page = self.pages[number] = self._zeros[:]
        return page

    def key_range(self, number: int) -> KeyRange:
        """The keys that `install` needs the items of."""
        return self._key(number), self._key(number + 1)

    def parse(self, items: list[tuple[bytes, bytes]]) -> Items:
        """The values of one page's keys; raises DamagedValueError."""
        base: Page | None = None
        entries: list[tuple[int, Page]] = []
        stored = stamp = 0
        for key, value in items:
            payload = unpack_value(key, value)
            kind = key[self.kind_at : self.kind_at + 1]
            if kind == _BASE:
                base = array(self._typecode, payload)
                invariant(len(base) == len(self._zeros), "a base value holds one page")
            elif kind == _ENTRY:
                entries.append((key[-1], array(self._typecode, payload)))
                stored |= 1 << key[-1]
            else:
                stamp = int.from_bytes(payload, "little")
        return Items(base, entries, stored, stamp)

    def install(self, number: int, items: list[tuple[bytes, bytes]]) -> Page:
        """Make a page from its items in LevelDB; raises DamagedValueError. A page already in memory wins."""
        found = self.parse(items)
        page = self._zeros[:] if found.base is None else found.base
        found.lay_over(page)
        return self.admit(number, page, found.stored, found.stamp)

    def admit(self, number: int, page: Page, stored: int, stamp: int) -> Page:
        """Take a page that was made from its items; one already in memory wins."""
        present = self.get(number)
        if present is not None:
            return present
        if stored:
            self._stored_entries[number] = stored
        if stamp:
            self._stamps[number] = stamp
        self.evict(_EVICTIONS_A_LOAD)
        self.pages[number] = page
        self.loads += 1
        return page

    def admit_inline(self, number: int, page: Page) -> bool:
        """Take a page that LevelDB has nothing of, while a batch is put together: what was seen resident stays so.

        False if the map is full and has nothing to let go of.
        """
        if self._old:
            self._drop(_EVICTIONS_A_LOAD)
        elif len(self.pages) >= self.limit_pages:
            return False
        self.pages[number] = page
        return True

    def evict(self, most: int) -> None:
        """Drop up to `most` clean pages of the old generation if the map is over its limit."""
        if not self._old and len(self.pages) * 2 > self.limit_pages:
            self._old.update(self.pages)
            self._old_order = iter(list(self._old))
            self.pages.clear()
        self._drop(most)

    def _drop(self, most: int) -> None:
        while most and self._old and len(self.pages) + len(self._old) > self.limit_pages:
            number = next(self._old_order)
            page = self._old.pop(number, None)
            if page is None:
                continue  # asked for meanwhile
            if number in self.changed or number in self._frozen or number == self.pinned:
                self.pages[number] = page
            else:
                self._stored_entries.pop(number, None)
                self._stamps.pop(number, None)
                self.evictions += 1
            most -= 1

    def take_out(self, first: int, stop: int) -> list[tuple[int, Page]]:
        """Remove the resident pages first <= number < stop from `pages`, for a caller that keeps them."""
        taken: list[tuple[int, Page]] = []
        for generation in (self.pages, self._old):
            if stop - first < len(generation):
                numbers = [number for number in range(first, stop) if number in generation]
            else:
                numbers = [number for number in generation if first <= number < stop]
            taken += [(number, generation.pop(number)) for number in numbers]
        return taken

    def put_back(self, number: int, page: Page) -> None:
        """Return a page that was taken out."""
        self.pages[number] = page

    def stamp(self, number: int) -> int:
        """The stamp that the last checkpoint wrote for a page (0: none)."""
        return self._stamps.get(number, 0)

    # -- changes and checkpoints

    def first_change(self, number: int) -> bytearray:
        """The page's list of changed indexes, made now; call it before the page is changed."""
        if self._frozen.get(number) and number not in self._copies:
            page = self.get(number)
            invariant(page is not None, "a changed page is resident")
            assert page is not None
            self._copies[number] = page[:]
        indexes = self.changed[number] = bytearray()
        return indexes

    def freeze(self) -> None:
        """Fix what the next `encode` writes; constant time."""
        invariant(not self._frozen, "one checkpoint at a time")
        self._frozen, self.changed = self.changed, {}

    def encode(
        self, batch: Batch, stamps: Mapping[int, int], taken_out: dict[int, Page], lower: Mapping[int, int]
    ) -> Iterator[int]:
        """Put the frozen pages into `batch`, one page a step, yielding the number of values put.

        `stamps` says for some `group_of` pages what is written beside each (logical map: the last hole applied to
        it), but for those in `lower`, which have the one there; `taken_out` holds pages that are resident but not in
        `pages`.
        """
        for number, changes in list(self._frozen.items()):
            page = self._copies.pop(number, None)
            if page is None:
                page = self.get(number) or taken_out.get(number)
            invariant(page is not None, "a frozen page is resident")
            assert page is not None
            group = self.group_of(number)  # for each page: it notes that LevelDB has it
            stamp = lower.get(number, stamps.get(group, 0))
            yield self._encode_page(batch, number, page, sorted(set(changes)), stamp)
            # Written: later changes of it need no copy.
            self._frozen[number] = _WRITTEN
            self._copies.pop(number, None)

    def thaw(self) -> None:
        """The checkpoint's batch is synced: its pages may be evicted."""
        self._frozen = {}
        self._copies = {}

    def _encode_page(self, batch: Batch, number: int, page: Page, indexes: list[int], stamp: int) -> int:
        key = self._key(number)
        stored = self._stored_entries.get(number, 0)
        values = 0
        if page == self._zeros and self.is_absence(number):
            batch.delete(key + _BASE)
            batch.delete(key + _STAMP)
            values += self._delete_entries(batch, key, stored)
            self._stored_entries.pop(number, None)
            return values + 2
        if len(indexes) >= _BASE_THRESHOLD:
            batch.put(key + _BASE, pack_value(key + _BASE, page.tobytes()))
            values += 1 + self._delete_entries(batch, key, stored)
            self._stored_entries.pop(number, None)
        else:
            for index in indexes:
                entry_key = key + _ENTRY + bytes((index,))
                batch.put(entry_key, pack_value(entry_key, page[index::PAGE_BLOCKS].tobytes()))
                stored |= 1 << index
            self._stored_entries[number] = stored
            values += len(indexes)
        if stamp:
            batch.put(key + _STAMP, pack_value(key + _STAMP, stamp.to_bytes(8, "little")))
            self._stamps[number] = stamp
        return values

    @staticmethod
    def _delete_entries(batch: Batch, key: bytes, stored: int) -> int:
        deleted = 0
        while stored:
            lowest = stored & -stored
            batch.delete(key + _ENTRY + bytes((lowest.bit_length() - 1,)))
            stored ^= lowest
            deleted += 1
        return deleted

    def group_of(self, number: int) -> int:
        """Which pages share a stamp: all. Asked once for each page that a checkpoint writes."""
        return 0

    def is_absence(self, number: int) -> bool:
        """Whether a page of zeros needs no keys in the checkpoint that is being written."""
        return True

    def _key(self, number: int) -> bytes:
        return self.prefix + number.to_bytes(7, "big")

    def page_of_key(self, key: bytes) -> int:
        """The page number in one of this map's keys."""
        return int.from_bytes(key[len(self.prefix) : len(self.prefix) + 7], "big")


_WRITTEN = bytearray()
