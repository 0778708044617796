"""The logical maps in the offline check: a block that takes room belongs to one layer; what a layer shows is there.

Theory. A layer owns the MBAs from its first one on, and names each of them in one entry of its own; so the entries of
all layers claim the live blocks one to one. There are two exceptions, both in a nameless layer that is being taken
apart. Its blocks may be free already, if its child does not show them. And a child that has taken them over may name
them too, in a base: then they are the child's.

Rules
- A base of a layer that has a parent is complete, so what it shows of the layers below is held against what the parent
  shows.
- Only what the store has is looked at; resolving a page reads the layers below it as the disk does (lookup.py).

Known weakness: what could be so is believed. A row with another, older parent, or a missing cut, is a tree as a
rollback or a write makes it; only the checksum of the value speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from metadata.layers import Layer, check_name
from metadata.logical_map import LAYER_SHIFT, PAGE_OF_LAYER
from metadata.pages import PAGE_MASK, PAGE_SHIFT, Page
from nbdserver.logdisk.lookup import Lookup
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.tree_changes import MOST_BYTES
from protocol.disk import BLOCK_BYTES, HEAD, NAMELESS, SNAPSHOT, DamagedValueError

Find = Callable[[str, str, str], None]


class LayerCheck:
    """Checks the tree of layers, then page after page in the order of the keys."""

    def __init__(
        self,
        maps: Maps,
        masks: dict[int, int],
        find: Find,
        why_not: Callable[[int], str],
        items: Callable[[bytes, bytes], Iterator[tuple[bytes, bytes]]],
    ) -> None:
        self._maps = maps
        self._masks = masks  # middle page → bit set of the entries that no LBA claimed yet
        self._find = find
        self._why_not = why_not
        self._items = items
        self._last_stored: tuple[int, Page] = (0, maps.logical.zeros())
        self._last_shown = self._last_stored

    def check_tree(self, next_mba: int) -> None:
        """Every layer stands where it can stand; `next_mba` is the first one that was not given out."""
        tree = self._maps.tree
        kinds = [layer.row.kind for layer in tree.layers.values()]
        roots = [number for number, layer in tree.layers.items() if not layer.row.parent]
        named = sum(len(names) for names in tree.names.values())
        if kinds.count(HEAD) != len(tree.heads) or kinds.count(SNAPSHOT) != named or len(roots) > 1:
            self._find("layers", "layers", "two layers are the same volume's head, the same snapshot or the root")
        for number, layer in tree.layers.items():
            row = layer.row
            parent = tree.layers.get(row.parent)
            if row.kind not in (NAMELESS, HEAD, SNAPSHOT) or number >= tree.next_layer:
                self._find("layers", f"layer {number}", f"layer {number} is of no known kind, or was never made")
            self._check_row(number, layer, next_mba)
            if row.kind == HEAD and layer.children:
                self._find("layers", f"layer {number}", f"layer {number} is written, and others stand on it")
            if parent is not None and (row.first_mba < parent.row.first_mba or row.layer < row.parent):
                self._find("layers", f"layer {number}", f"layer {number} is older than layer {row.parent} below it")

    def _check_row(self, number: int, layer: Layer, next_mba: int) -> None:
        """What the row says can be so."""
        row, where = layer.row, f"layer {number}"
        if row.first_mba > next_mba:
            self._find("layers", where, f"layer {number} begins with MBA {row.first_mba:#x}, which was never given out")
        if not 0 < row.size_bytes <= MOST_BYTES or not row.volume:
            self._find("layers", where, f"layer {number} has {row.size_bytes} bytes, of volume {row.volume}")
        if (row.kind == SNAPSHOT) != bool(row.name) or check_name(row.name or "-"):
            self._find("layers", where, f"layer {number} has the name {row.name!r:.40}, which one of its kind has not")
        edges = [edge for cut in layer.cut for edge in cut]
        rising = all(one < other for one, other in pairwise(edges))
        if edges and (not row.parent or not rising or edges[-1] > MOST_BYTES // BLOCK_BYTES):
            self._find("layers", where, f"layer {number} is cut out of its parent where it cannot be")

    def check_page(self, number: int, page: Page, is_complete: bool) -> int:
        """Look at what one layer holds of one page; returns how many blocks it claims."""
        layer = self._maps.tree.layers.get(number >> LAYER_SHIFT)
        if layer is None:
            self._find("logical-map", f"page {number:#x}", f"page {number & PAGE_OF_LAYER} is of a layer that is none")
            return 0
        first_mba = layer.row.first_mba or 1
        size_blocks = -(-layer.row.size_bytes // BLOCK_BYTES)
        heirs = self._heirs(layer)
        inherited: list[tuple[int, int]] = []
        claimed = 0
        for index, mba in enumerate(page):
            if not mba:
                continue
            if mba < first_mba:
                inherited.append((index, mba))
                continue
            lba = (number & PAGE_OF_LAYER) << PAGE_SHIFT | index
            if lba >= size_blocks and not layer.holes:
                sentence = f"LBA {lba} is mapped and lies behind the end of the volume"
                self._find("logical-map", f"LBA {lba}", sentence)
            claimed += self._claim(layer, heirs, number, index, mba, is_complete)
        if inherited and is_complete:
            self._check_inherited(layer, number, inherited)
        return claimed

    def _claim(self, layer: Layer, heirs: list[int], number: int, index: int, mba: int, is_complete: bool) -> int:
        for heir in heirs:
            if self._stored(heir << LAYER_SHIFT | number & PAGE_OF_LAYER)[index] == mba:
                return 0  # the heir's by now
        mask, bit = self._masks.get(mba >> PAGE_SHIFT, 0), 1 << (mba & PAGE_MASK)
        if mask & bit:
            self._masks[mba >> PAGE_SHIFT] = mask ^ bit
        elif is_complete and not self._may_be_free(layer, number, index, mba):
            lba = (number & PAGE_OF_LAYER) << PAGE_SHIFT | index
            self._find("logical-map", f"LBA {lba}", f"LBA {lba} points to MBA {mba:#x}, {self._why_not(mba)}")
        return 1

    def _heirs(self, layer: Layer) -> list[int]:
        """The layers that have taken over the blocks of a nameless one."""
        layers = self._maps.tree.layers
        heirs: list[int] = []
        while layer.row.kind == NAMELESS and len(layer.children) == 1:
            (child,) = layer.children
            if layers[child].row.first_mba != layer.row.first_mba:
                break
            heirs.append(child)
            layer = layers[child]
        return heirs

    def _may_be_free(self, layer: Layer, number: int, index: int, mba: int) -> bool:
        """Whether a block of a layer that is being taken apart is freed, and rightly."""
        if layer.row.kind != NAMELESS or len(layer.children) > 1:
            return False
        return all(self._shown(child << LAYER_SHIFT | number & PAGE_OF_LAYER)[index] != mba for child in layer.children)

    def _check_inherited(self, layer: Layer, number: int, inherited: list[tuple[int, int]]) -> None:
        parent = layer.row.parent
        shown = self._shown(parent << LAYER_SHIFT | number & PAGE_OF_LAYER) if parent else self._maps.logical.zeros()
        for index, mba in inherited:
            if shown[index] != mba:
                lba = (number & PAGE_OF_LAYER) << PAGE_SHIFT | index
                sentence = f"LBA {lba} points to MBA {mba:#x}, which no layer below layer {layer.row.layer} shows there"
                self._find("logical-map", f"LBA {lba}", sentence)

    def _stored(self, number: int) -> Page:
        """What the layer itself holds of a page."""
        if self._last_stored[0] != number:
            self._last_stored = (number, self._read_stored(number))
        return self._last_stored[1]

    def _read_stored(self, number: int) -> Page:
        page = self._maps.logical.zeros()
        try:
            found = self._maps.logical.parse(list(self._items(*self._maps.logical.key_range(number))))
        except DamagedValueError:
            return page  # a finding elsewhere
        if found.base is not None:
            page = found.base
        found.lay_over(page)
        return page

    def _shown(self, number: int) -> Page:
        """What the layer shows of a page."""
        if self._last_shown[0] != number:
            self._last_shown = (number, self._look_up(number))
        return self._last_shown[1]

    def _look_up(self, number: int) -> Page:
        lookup = Lookup(self._maps, number)
        try:
            while lookup.take([list(self._items(*each)) for each in lookup.ranges()]):
                pass
        except DamagedValueError:
            return self._maps.logical.zeros()
        return lookup.page()
