"""What one logical page is made of: the layer's own entries over those of the layers below.

    base of some layer, a page in memory, or zeros  ◄─ overlaid, from the bottom up, by each layer's entries and holes

Theory. The walk goes from the layer towards the root and ends at the first page in memory, at the first base, or at
the root. What is not in memory is read in one go for a few layers (most pages end there), then for many. The layers
below never change what they show, so that what was read at different moments fits together, but for one thing: a
merge moves entries from a layer to its child. `is_torn` says that this happened meanwhile; then it is done again.

Of a layer, in the order of time: what its parent shows, without the layer's cuts; its entries; its holes that are
still pending and newer than the page's stamp. The pending holes of the layer itself are left to `Maps`, which has to
free blocks with them.

Rules
- Nothing here waits: `ranges` says what to read, `take` gets it; replay and the loop read in their own ways.
- Only the page that was asked for is made: the ones between would push out what is used.

Known weakness: a deep chain of layers is read once for each cold page of a snapshot; only a head's pages are made
shorter.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metadata.layers import Layer
from metadata.logical_map import LAYER_SHIFT, PAGE_OF_LAYER
from metadata.pages import PAGE_BLOCKS, PAGE_SHIFT, Items, KeyRange, Page
from metadata.ranges import within
from protocol.disk import HEAD

if TYPE_CHECKING:
    from nbdserver.logdisk.maps import Maps

_FIRST_LAYERS = 8
_MORE_LAYERS = 64
_LAYERS_A_STEP = 512  # walked past at a time, read or not
_NOTHING = Items(None, [], 0, 0)

StoredItems = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class _Part:
    """What one layer gives."""

    layer: Layer
    holes: list[tuple[int, int, int]]
    items: Items = _NOTHING


class Lookup:
    """One logical page on its way into memory."""

    def __init__(self, maps: Maps, number: int) -> None:
        self.number = number
        self.asked = 0  # ranges that `take` expects
        self._maps = maps
        self._page_of_layer = number & PAGE_OF_LAYER
        self._next = number >> LAYER_SHIFT  # 0: what there is, is known
        self._ground: Page | None = None
        self._ground_holes: list[tuple[int, int, int]] = []
        self._parts: list[_Part] = []  # the layer itself first
        self._read: list[_Part] = []
        self._layers_read = 0
        self._version = maps.tree.version
        self._torn = maps.tree.moving

    def ranges(self) -> list[KeyRange]:
        """What to read next, for `take`; may be nothing, also when `take` asks for more."""
        maps = self._maps
        most = _MORE_LAYERS if self._parts else _FIRST_LAYERS
        self._read = []
        ranges: list[KeyRange] = []
        walked = 0
        while self._next and len(ranges) < most and walked < _LAYERS_A_STEP:
            walked += 1
            layer = maps.tree.layers.get(self._next)
            if layer is None:
                self._next = 0  # gone meanwhile: the lookup is torn
                break
            number = self._next << LAYER_SHIFT | self._page_of_layer
            if number != self.number and self._take_ground(number):
                break
            part = _Part(layer, maps.holes_over(number) if layer.holes and number != self.number else [])
            self._parts.append(part)
            if layer.stored is None or self._page_of_layer in layer.stored:
                self._read.append(part)
                ranges.append(maps.logical.key_range(number))
            self._next = layer.row.parent
        self.asked = len(ranges)
        self._layers_read += self.asked
        return ranges

    def _take_ground(self, number: int) -> bool:
        """End at a page in memory, if there is one."""
        maps = self._maps
        page = maps.logical.get(number)
        if page is None:
            page = maps.stale.get(number)
            if page is None:
                return False
            self._ground_holes = maps.holes_over(number)
        self._ground = page
        self._next = 0
        return True

    def take(self, items: list[StoredItems]) -> bool:
        """What was read of `ranges`; whether there is more to read. Raises DamagedValueError."""
        for part, of_layer in zip(self._read, items, strict=True):
            part.items = self._maps.logical.parse(of_layer)
            if part.items.base is not None:
                del self._parts[self._parts.index(part) + 1 :]
                self._ground = None
                self._next = 0
                break
        return bool(self._next)

    @property
    def is_torn(self) -> bool:
        """Whether entries may have been read from neither of two layers between which they moved."""
        tree = self._maps.tree
        return tree.version != self._version or (self._layers_read > 1 and (self._torn or tree.moving))

    @property
    def should_be_shorter(self) -> bool:
        """Whether so many layers were read for it that it is worth a base."""
        return self._layers_read > _FIRST_LAYERS and self._parts[0].layer.row.kind == HEAD

    @property
    def stored(self) -> int:
        return self._parts[0].items.stored

    @property
    def stamp(self) -> int:
        return self._parts[0].items.stamp

    def page(self) -> Page:
        """The page as the layer shows it, but for the layer's own pending holes."""
        page = self._maps.logical.zeros() if self._ground is None else self._ground[:]
        for _, start, stop in self._ground_holes:
            _clear(page, start, stop)
        first = self._page_of_layer << PAGE_SHIFT
        for part in reversed(self._parts):
            if part.items.base is not None:
                page = part.items.base
            elif part.layer.cut:
                for start, stop in within(part.layer.cut, first, first + PAGE_BLOCKS):
                    _clear(page, start - first, stop - first)
            part.items.lay_over(page)
            for hole, start, stop in part.holes:
                if hole > part.items.stamp:
                    _clear(page, start, stop)
        return page


def _clear(page: Page, start: int, stop: int) -> None:
    page[start:stop] = array("Q", [0]) * (stop - start)
