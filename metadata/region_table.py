"""The region table: region (4 MiB of LBA) → txid of its last modification.

A tracking bitmap for an absent replica is a view of it: the regions whose txid is later than what that replica has.
The hot path does `recent[lba >> REGION_SHIFT] = txid`; a checkpoint swaps `recent` away in constant time and merges
it into pages of 512 regions (2 GiB) in slices. The pages stay in memory: 8 bytes for each 4 MiB of volume that was
ever written, 32 MiB for 16 TiB.

Writes all over a terabyte change nearly every page between two checkpoints, so the size of a stored page matters: it is
the highest txid and, for each region, how far below it lies, half of what plain txids take. A page whose txids lie too
far apart for that is stored as plain txids; so are all pages of older directories.

Known weakness: a region is marked by any write in it, so scattered small writes mark much.
"""

from array import array
from collections.abc import Iterator

from metadata.pages import KeyRange
from metadata.seams import Batch
from protocol.disk import BLOCK_BYTES, pack_value, unpack_value
from protocol.invariant import invariant

REGION_SHIFT = 10  # of an LBA
REGION_BLOCKS = 1 << REGION_SHIFT
REGION_BYTES = REGION_BLOCKS * BLOCK_BYTES
_PAGE_SHIFT = 9
_PAGE_REGIONS = 1 << _PAGE_SHIFT
_PREFIX = b"R"
_NEVER = 0xFFFFFFFF  # instead of a distance: the region was never modified
_MOST_RUNS = 16  # each costs the next checkpoint a walk over the pages that it covers
_MOST_SINGLE_REGIONS = 64  # a longer run is kept as a run: a terabyte discarded is one entry

Run = tuple[int, int, int]  # first region, last region, txid


class RegionTable:
    """Txids by region of one volume."""

    def __init__(self) -> None:
        self.recent: dict[int, int] = {}
        self._recent_runs: list[Run] = []
        self._frozen: dict[int, int] = {}
        self._frozen_runs: list[Run] = []
        self._pages: dict[int, array[int]] = {}

    def mark(self, lba: int, count: int, txid: int) -> None:
        """Blocks lba <= b < lba + count were modified by `txid`, the highest so far."""
        first = lba >> REGION_SHIFT
        last = (lba + count - 1) >> REGION_SHIFT
        if last - first < _MOST_SINGLE_REGIONS:
            for region in range(first, last + 1):
                self.recent[region] = txid
        else:
            # A run hides earlier ones that it covers; many are joined, which marks what lies between them too.
            runs = [run for run in self._recent_runs if run[0] < first or run[1] > last]
            runs.append((first, last, txid))
            if len(runs) > _MOST_RUNS:
                runs = [(min(run[0] for run in runs), max(run[1] for run in runs), txid)]
            self._recent_runs = runs

    def raise_to(self, lba: int, txid: int) -> None:
        """The region of a block was copied from where its last modification was `txid`."""
        region = lba >> REGION_SHIFT
        self.recent[region] = max(txid, self.txid_of(region))

    def txid_of(self, region: int) -> int:
        """Txid of the region's last modification, 0 if it was never modified."""
        page = self._pages.get(region >> _PAGE_SHIFT)
        stored = page[region & _PAGE_REGIONS - 1] if page else 0
        runs = self._frozen_runs + self._recent_runs
        in_runs = max((txid for first, last, txid in runs if first <= region <= last), default=0)
        return max(stored, in_runs, self._frozen.get(region, 0), self.recent.get(region, 0))

    def later_than(self, txid: int) -> list[int]:
        """Regions modified after `txid`, in order."""
        later = {region for marks in (self._frozen, self.recent) for region, known in marks.items() if known > txid}
        for first, last, known in self._frozen_runs + self._recent_runs:
            if known > txid:
                later.update(range(first, last + 1))
        for number, page in self._pages.items():
            if max(page) > txid:
                later.update((number << _PAGE_SHIFT) + index for index, known in enumerate(page) if known > txid)
        return sorted(later)

    def freeze(self) -> None:
        """Fix what the next `encode` writes; constant time."""
        self._frozen, self.recent = self.recent, {}
        self._frozen_runs, self._recent_runs = self._recent_runs, []

    def encode(self, batch: Batch) -> Iterator[int]:
        """Merge the frozen marks and put the pages that they changed into `batch`, a page a step."""
        changed: set[int] = set()
        for first, last, txid in self._frozen_runs:
            while first <= last:
                number = first >> _PAGE_SHIFT
                stop = min(last + 1, (number + 1) << _PAGE_SHIFT)
                start = first & _PAGE_REGIONS - 1
                self._page(number)[start : start + stop - first] = array("Q", [txid]) * (stop - first)
                changed.add(number)
                first = stop
                yield 0
        for region, txid in self._frozen.items():
            number = region >> _PAGE_SHIFT
            page = self._page(number)
            page[region & _PAGE_REGIONS - 1] = max(txid, page[region & _PAGE_REGIONS - 1])
            if number not in changed:
                changed.add(number)
                yield 0
        self._frozen, self._frozen_runs = {}, []
        for number in sorted(changed):
            key = _PREFIX + number.to_bytes(4, "big")
            batch.put(key, pack_value(key, _pack_page(self._pages[number])))
            yield 1

    @staticmethod
    def key_range() -> KeyRange:
        """Where the pages are in LevelDB."""
        return _PREFIX, bytes((_PREFIX[0] + 1,))

    def load(self, items: Iterator[tuple[bytes, bytes]]) -> None:
        """Take the pages of the last checkpoint; raises DamagedValueError or InvariantError."""
        for key, value in items:
            self._pages[int.from_bytes(key[1:], "big")] = _unpack_page(unpack_value(key, value))

    def _page(self, number: int) -> "array[int]":
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = array("Q", [0]) * _PAGE_REGIONS
        return page


def _pack_page(page: "array[int]") -> bytes:
    highest = max(page)
    lowest = min((txid for txid in page if txid), default=highest)
    if highest - lowest >= _NEVER:
        return page.tobytes()
    return array("Q", [highest]).tobytes() + array("I", [highest - txid if txid else _NEVER for txid in page]).tobytes()


def _unpack_page(payload: bytes) -> "array[int]":
    """Raises InvariantError for a payload of another length."""
    if len(payload) == 8 * _PAGE_REGIONS:
        return array("Q", payload)
    invariant(len(payload) == 8 + 4 * _PAGE_REGIONS, "a page of regions has one of two lengths")
    (highest,) = array("Q", payload[:8])
    return array("Q", [0 if distance == _NEVER else highest - distance for distance in array("I", payload[8:])])
