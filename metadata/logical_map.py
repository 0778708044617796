"""The logical maps of all layers of a family, as one map of pages.

Theory. A layer's page has the number `layer << 32 | page`, a layer's block the address `layer << 40 | LBA`; so all
layers share one cache, one set of changes, one freeze. A page *in memory* is resolved: it holds what a reader of the
layer sees, the blocks of the layers below included, and 0 for zeros. A page *in LevelDB* lies over that of the parent:
an entry, also one of 0, is the layer's own; a base is complete and needs no parent. The root has no parent, so there
zeros are absence.

A young layer, one that was made since the family was opened, knows which of its pages LevelDB may have. A page that it
does not have is the parent's: if that is in memory, a copy of it is made at once. So a snapshot costs a hot working
set one copy of each page, once.

Known weakness: pages that parent and child show alike are in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from metadata.layers import Tree
from metadata.pages import PAGE_SHIFT, Page, PageMap
from metadata.region_table import REGION_BLOCKS, REGION_SHIFT

LAYER_SHIFT = 32  # of a page's number
ADDRESS_SHIFT = 40  # of a block's address
PAGE_OF_LAYER = (1 << LAYER_SHIFT) - 1
LBA_OF_ADDRESS = (1 << ADDRESS_SHIFT) - 1
_DERIVED_THROUGH = 64  # layers


def pages_of_region(layer: int, region: int) -> range:
    """The numbers of the pages that a layer has of a region."""
    first = (layer << ADDRESS_SHIFT) + (region << REGION_SHIFT) >> PAGE_SHIFT
    return range(first, first + (REGION_BLOCKS >> PAGE_SHIFT))


class LogicalMap(PageMap):
    """Pages of 256 MBAs, by layer and page."""

    def __init__(self, tree: Tree, limit_pages: int) -> None:
        super().__init__(b"L", "Q", 1, limit_pages)
        self._tree = tree
        self.kind_at = 12
        self.derived = 0

    def derive(self, number: int) -> Page | None:
        """A page that its layer never changed, as a copy of the parent's, if that needs no LevelDB."""
        layers = self._tree.layers
        layer = layers[number >> LAYER_SHIFT]
        page_of_layer = number & PAGE_OF_LAYER
        steps = _DERIVED_THROUGH
        while layer.stored is not None and page_of_layer not in layer.stored and not layer.holes and not layer.cut:
            parent = layer.row.parent
            found = self.get(parent << LAYER_SHIFT | page_of_layer) if parent else self._zeros
            if found is not None:
                page = found[:]
                if not self.admit_inline(number, page):
                    return None
                self.derived += 1
                return page
            layer = layers[parent]
            steps -= 1
            if not steps:
                return None  # a long way for the hot path: it is looked up
        return None

    def dirty_pages(self) -> Iterator[int]:
        """Pages that LevelDB does not have as they are."""
        yield from self.changed
        yield from self._frozen

    def group_of(self, number: int) -> int:
        layer = number >> LAYER_SHIFT
        self._tree.note_stored(layer, number & PAGE_OF_LAYER)
        return layer

    def is_absence(self, number: int) -> bool:
        return number >> LAYER_SHIFT == self._tree.frozen_root

    def _key(self, number: int) -> bytes:
        return b"L" + (number >> LAYER_SHIFT).to_bytes(4, "big") + (number & PAGE_OF_LAYER).to_bytes(7, "big")

    def page_of_key(self, key: bytes) -> int:
        return int.from_bytes(key[1:5], "big") << LAYER_SHIFT | int.from_bytes(key[5:12], "big")
