"""The next page that any of some layers has, in memory or in LevelDB: what lies before it is the same in all of them.

LevelDB is asked for the first key of each layer behind a page; of what is in memory only pages that LevelDB does not
have as they are can matter besides. An operation that goes on from page to page keeps what LevelDB said of each layer:
of a thousand layers mostly one has to be asked again.

Known weakness: each layer of a long chain is one look-up in LevelDB for every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from metadata.logical_map import LAYER_SHIFT, PAGE_OF_LAYER

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk


class NextPage:
    """Looks ahead for one operation that ends at page `last`; one question at a time."""

    def __init__(self, disk: LogDisk, last: int) -> None:
        self._disk = disk
        self._last = last
        self._stored: dict[int, int] = {}  # layer → first page that LevelDB has of it, as of `_seen`
        self._seen = self._moment()
        self._first = 0
        self._layers: set[int] = set()
        self._asked: list[int] = []

    def find(self, layers: Iterable[int], first: int, found: Callable[[int], None]) -> None:
        """`found(page)`, later, with the first page of `layers` in first <= page <= last, or a page that is at most it
        (where something changed meanwhile: `first`), or last + 1. Pages that are asked for rise."""
        moment = self._moment()
        if moment != self._seen:
            self._seen = moment
            self._stored.clear()
        self._layers = set(layers)
        self._first = first
        self._found = found
        known = self._stored.get
        self._asked = [layer for layer in self._layers if known(layer, -1) < first]
        if not self._asked:
            self._disk.call_soon(self._answer)
            return
        key_range = self._disk.maps.logical.key_range
        ranges = [
            (key_range(layer << LAYER_SHIFT | first)[0], key_range(layer << LAYER_SHIFT | self._last)[1])
            for layer in self._asked
        ]
        self._disk.read_store(ranges, self._read, 1)

    def _moment(self) -> tuple[int, int, bool]:
        maps = self._disk.maps
        return self._disk.checkpointer.count, maps.tree.version, maps.tree.moving

    def _read(self, items: list[list[tuple[bytes, bytes]]]) -> None:
        page_of_key = self._disk.maps.logical.page_of_key
        for layer, of_layer in zip(self._asked, items, strict=True):
            self._stored[layer] = page_of_key(of_layer[0][0]) & PAGE_OF_LAYER if of_layer else self._last + 1
        self._answer()

    def _answer(self) -> None:
        maps = self._disk.maps
        if self._moment() != self._seen or (maps.tree.moving and len(self._layers) > 1):
            # A page may have been written, or moved, since LevelDB was read: it was seen nowhere.
            self._stored.clear()
            self._found(self._first)
            return
        stored = self._stored
        following = min((stored[layer] for layer in self._layers), default=self._last + 1)
        for pages in (maps.logical.dirty_pages(), maps.stale):
            for number in pages:
                page = number & PAGE_OF_LAYER
                if self._first <= page < following and number >> LAYER_SHIFT in self._layers:
                    following = page
        self._found(following)
