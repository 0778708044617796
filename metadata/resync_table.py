"""Which regions a replica still has to fetch: a durable bitmap.

A page is a bit set of 4,096 regions (16 GiB of LBA); a page without a bit has no key. All of it is in memory: an eighth
of a byte for each 4 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from metadata.pages import KeyRange
from metadata.seams import Batch
from protocol.disk import DamagedValueError, pack_value, unpack_value

_PREFIX = b"B"
_PAGE_SHIFT = 12
_PAGE_REGIONS = 1 << _PAGE_SHIFT
_PAGE_BYTES = _PAGE_REGIONS // 8


class ResyncTable:
    """A set of regions, in order."""

    def __init__(self) -> None:
        self._pages: dict[int, int] = {}
        self._changed: set[int] = set()

    def __len__(self) -> int:
        return sum(page.bit_count() for page in self._pages.values())

    def __bool__(self) -> bool:
        return bool(self._pages)

    def __iter__(self) -> Iterator[int]:
        for number in sorted(self._pages):
            left = self._pages[number]
            while left:
                lowest = left & -left
                yield (number << _PAGE_SHIFT) + lowest.bit_length() - 1
                left ^= lowest

    def add(self, runs: Iterable[tuple[int, int]]) -> None:
        """(first, count) of regions that are to be fetched."""
        for number, mask in _masks(runs):
            self._pages[number] = self._pages.get(number, 0) | mask
            self._changed.add(number)

    def remove(self, runs: Iterable[tuple[int, int]]) -> None:
        """Regions that are fetched."""
        for number, mask in _masks(runs):
            left = self._pages.get(number, 0) & ~mask
            if left:
                self._pages[number] = left
            else:
                self._pages.pop(number, None)
            self._changed.add(number)

    def put_changes(self, batch: Batch) -> None:
        """What changed since the last call."""
        for number in sorted(self._changed):
            key = _PREFIX + number.to_bytes(4, "big")
            page = self._pages.get(number)
            if page is None:
                batch.delete(key)
            else:
                batch.put(key, pack_value(key, page.to_bytes(_PAGE_BYTES, "little")))
        self._changed.clear()

    @staticmethod
    def key_range() -> KeyRange:
        """Where the pages are in LevelDB."""
        return _PREFIX, bytes((_PREFIX[0] + 1,))

    def load(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Take what is there; raises DamagedValueError."""
        for key, value in items:
            payload = unpack_value(key, value)
            page = int.from_bytes(payload, "little")
            if len(payload) != _PAGE_BYTES or not page:
                raise DamagedValueError(key, "no page of regions")
            self._pages[int.from_bytes(key[1:], "big")] = page


def _masks(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(page, bit set) of the regions in runs."""
    for first, count in runs:
        stop = first + count
        while first < stop:
            number = first >> _PAGE_SHIFT
            end = min(stop, (number + 1) << _PAGE_SHIFT)
            yield number, ((1 << (end - first)) - 1) << (first & _PAGE_REGIONS - 1)
            first = end
