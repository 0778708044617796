"""The next page that any of some layers has, in memory or in LevelDB: what lies before it is the same in all of them.

LevelDB is asked for the first key of each layer behind a page; of what is in memory only pages that LevelDB does not
have as they are can matter besides.

Known weakness: each layer of a long chain is one look-up in LevelDB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from metadata.logical_map import LAYER_SHIFT, PAGE_OF_LAYER

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk


class NextPage:
    """`found(page)` with the first page of `layers` in first <= page <= last, or a page that is at most it (where
    something changed meanwhile: `first`), or last + 1."""

    def __init__(
        self, disk: LogDisk, layers: Sequence[int], first: int, last: int, found: Callable[[int], None]
    ) -> None:
        self._disk = disk
        self._layers = set(layers)
        self._first = first
        self._last = last
        self._found = found
        self._seen = self._moment()
        key_range = disk.maps.logical.key_range
        ranges = [
            (key_range(layer << LAYER_SHIFT | first)[0], key_range(layer << LAYER_SHIFT | last)[1]) for layer in layers
        ]
        disk.read_store(ranges, self._read, 1)

    def _moment(self) -> tuple[int, int, bool]:
        maps = self._disk.maps
        return self._disk.checkpointer.count, maps.tree.version, maps.tree.moving

    def _read(self, items: list[list[tuple[bytes, bytes]]]) -> None:
        maps = self._disk.maps
        if self._moment() != self._seen or (maps.tree.moving and len(self._layers) > 1):
            # A page may have been written, or moved, since LevelDB was read: it was seen nowhere.
            self._found(self._first)
            return
        following = self._last + 1
        for of_layer in items:
            if of_layer:
                following = min(following, maps.logical.page_of_key(of_layer[0][0]) & PAGE_OF_LAYER)
        for pages in (maps.logical.dirty_pages(), maps.stale):
            for number in pages:
                page = number & PAGE_OF_LAYER
                if self._first <= page < following and number >> LAYER_SHIFT in self._layers:
                    following = page
        self._found(following)
