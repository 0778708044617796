"""The tree of layers of one family: which there are, what they stand on, and whose they are.

Theory. A layer is the logical map between two snapshots. What a volume writes goes into its *head*, a leaf; a snapshot
is a layer with a name, which never changes again; a layer without either is *nameless* and goes as soon as it can. A
child's MBAs are all higher than its parents' (`first_mba` is the next MBA at the moment it was made), so "is this
block shared with another layer?" is one comparison.

A row says what a layer is. Changes of rows are decided here and packed; the log makes them durable, `apply` makes them
so, when they happen and at replay alike. Of a layer that is there already, `apply` leaves `parent` and `first_mba`
alone: only the background changes them (it merges a layer into its child), it logs nothing, and at replay it may not
have done yet what it had done when the record was written.

Rules
- Numbers of layers rise and are never used twice; a child's is above its parent's.
- Rows are immutable, and a checkpoint takes those that changed by moving a dictionary aside: constant time.
- There is one root; zeros in it are absence, and a checkpoint takes the root of its own moment for it.
- A layer's `cut` are ranges of LBAs in which it does not show its parent: what was discarded there and is not worth an
  entry for each block. They lie under everything that the layer holds itself.

Known weakness: a parent's children are a set, so a tree takes some 500 bytes of memory a layer.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from metadata.pages import KeyRange
from metadata.ranges import Ranges
from metadata.seams import Batch, Store
from protocol.disk import (
    HEAD,
    LAYER_ROW,
    NAME_BYTES,
    NAMELESS,
    SNAPSHOT,
    TREE_STATE,
    DamagedValueError,
    pack_value,
    unpack_value,
)

MOST_LAYERS = 65_536
MOST_VOLUMES = 4_096
MOST_CUTS = 1024  # ranges of one layer
_STORED_PAGES = 1 << 20  # remembered for all young layers together
STATE_KEY = b"T"
_ROW = b"Y"
_CUT = b"G"
ROW_KEYS: KeyRange = (_ROW, b"Z")
CUT_KEYS: KeyRange = (_CUT, b"H")


class Row(NamedTuple):
    """What a layer is, as it is on disk."""

    layer: int
    parent: int
    first_mba: int
    size_bytes: int
    volume: int
    kind: int
    created_s: int = 0
    name: str = ""

    def pack(self) -> bytes:
        return LAYER_ROW.pack(*self[:-1], self.name.encode())

    @classmethod
    def unpack(cls, data: bytes) -> "Row":
        layer, parent, first_mba, size_bytes, volume, kind, created_s, name = LAYER_ROW.unpack(data)
        text = name.rstrip(b"\x00").decode("utf-8", "replace")
        return cls(layer, parent, first_mba, size_bytes, volume, kind, created_s, text)


def unpack_rows(data: bytes) -> list[Row]:
    """The rows in a TREE record's body."""
    size = LAYER_ROW.size
    return [Row.unpack(data[at : at + size]) for at in range(0, len(data), size)]


class Layer:
    """A layer in memory."""

    __slots__ = ("children", "cut", "dirty_since", "holes", "row", "stored", "views")

    def __init__(self, row: Row) -> None:
        self.row = row
        self.children: set[int] = set()
        self.views = 0  # that are open
        self.holes = 0  # that are pending
        self.cut: Ranges = ()
        self.dirty_since = 0  # number of the checkpoint that is the first to hold all of what it has
        self.stored: set[int] | None = None  # pages that LevelDB may have; None: not known


class Tree:
    """All layers of a family."""

    def __init__(self) -> None:
        self.layers: dict[int, Layer] = {}
        self.heads: dict[int, int] = {}  # volume → layer
        self.names: dict[int, dict[str, int]] = {}  # volume → name → layer
        self.next_layer = 1
        self.root = 0  # the layer without a parent
        self.frozen_root = 0
        self.version = 0  # raised when entries moved from one layer to another
        self.moving = False  # a batch that moves some is being written
        self.next_checkpoint = 1  # number of the next one to be frozen
        self.synced_checkpoint = 0  # of the last one that LevelDB has
        self.removable: set[int] = set()  # nameless ones with at most one child and no view
        self._stored_pages = 0
        self._rows: dict[int, Row | None] = {}
        self._cuts: dict[int, Ranges] = {}
        self._frozen: tuple[int, dict[int, Row | None], dict[int, Ranges]] = (1, {}, {})

    # -- asking

    def first_mba(self, layer: int) -> int:
        """The lowest MBA that the layer does not share with those below; never 0."""
        return self.layers[layer].row.first_mba or 1

    def snapshot(self, volume: int, name: str) -> Row | None:
        """The row of one snapshot."""
        layer = self.names.get(volume, {}).get(name)
        return None if layer is None else self.layers[layer].row

    def snapshots(self) -> Iterator[Row]:
        """The rows of all snapshots."""
        return (self.layers[layer].row for names in self.names.values() for layer in names.values())

    def chain(self, layer: int) -> Iterator[Layer]:
        """The layer and those below it, down to the root."""
        while layer:
            found = self.layers[layer]
            yield found
            layer = found.row.parent

    def difference(self, one: int, other: int) -> set[int]:
        """The layers below either of the two, themselves included, that are not below both."""
        found: set[int] = set()
        while one != other:
            # A layer's number is above its parent's.
            younger = max(one, other)
            found.add(younger)
            one, other = min(one, other), self.layers[younger].row.parent
        return found

    def base(self, volume: int) -> Row | None:
        """The newest snapshot of another volume that the volume stands on; None if it stands on none."""
        for layer in self.chain(self.heads[volume]):
            if layer.row.volume != volume and layer.row.kind == SNAPSHOT:
                return layer.row
        return None

    def clones(self, layer: int) -> set[int]:
        """Volumes that stand on the layer and are not its own."""
        own = self.layers[layer].row.volume
        found: set[int] = set()
        work = list(self.layers[layer].children)
        while work:
            row = self.layers[work[-1]].row
            below = self.layers[work.pop()].children
            if row.kind == NAMELESS:
                work += below
            elif row.volume != own:
                found.add(row.volume)
        return found

    # -- changing

    def apply(self, row: Row) -> None:
        """A layer is made, or one that is there becomes something else."""
        known = self.layers.get(row.layer)
        if known is None:
            known = self.layers[row.layer] = Layer(row)
            self.next_layer = max(self.next_layer, row.layer + 1)
            if row.parent:
                self.layers[row.parent].children.add(row.layer)
                self._look(row.parent)
            else:
                self.root = row.layer
        else:
            self._forget_names(known.row)
            row = row._replace(parent=known.row.parent, first_mba=known.row.first_mba)
            known.row = row
        if row.kind == HEAD:
            self.heads[row.volume] = row.layer
        elif row.kind == SNAPSHOT:
            self.names.setdefault(row.volume, {})[row.name] = row.layer
        self._rows[row.layer] = row
        self._look(row.layer)

    def _forget_names(self, row: Row) -> None:
        if row.kind == HEAD and self.heads.get(row.volume) == row.layer:
            del self.heads[row.volume]
        if row.kind == SNAPSHOT and self.names.get(row.volume, {}).get(row.name) == row.layer:
            del self.names[row.volume][row.name]
            if not self.names[row.volume]:
                del self.names[row.volume]

    def take_over(self, layer: int) -> None:
        """From now on the only child of a nameless layer owns its blocks."""
        found = self.layers[layer]
        (number,) = found.children
        child = self.layers[number]
        child.row = self._rows[number] = child.row._replace(first_mba=found.row.first_mba)

    def remove(self, layer: int) -> None:
        """Nothing is left of a nameless layer; its child, if it has one, stands where it stood."""
        found = self.layers.pop(layer)
        parent = found.row.parent
        if parent:
            self.layers[parent].children.discard(layer)
        else:
            self.root = next(iter(found.children), 0)
        for number in found.children:
            child = self.layers[number]
            child.row = self._rows[number] = child.row._replace(parent=parent)
            if parent:
                self.layers[parent].children.add(number)
        if found.stored is not None:
            self._stored_pages -= len(found.stored)
        if found.cut:
            self._cuts[layer] = ()
        self._rows[layer] = None
        self.removable.discard(layer)
        self.version += 1
        if parent:
            self._look(parent)

    def set_cut(self, layer: int, ranges: Ranges) -> None:
        """The ranges in which the layer does not show its parent."""
        self.layers[layer].cut = self._cuts[layer] = ranges

    def open_view(self, layer: int, change: int) -> None:
        """Someone begins (1) or ends (-1) to look at a layer."""
        self.layers[layer].views += change
        self._look(layer)

    def _look(self, layer: int) -> None:
        found = self.layers[layer]
        if found.row.kind == NAMELESS and len(found.children) <= 1 and not found.views:
            self.removable.add(layer)
        else:
            self.removable.discard(layer)

    def note_stored(self, layer: int, page: int) -> None:
        """A checkpoint writes a page of the layer."""
        found = self.layers.get(layer)
        if found is None or found.stored is None or page in found.stored:
            return
        if self._stored_pages >= _STORED_PAGES:
            self._stored_pages -= len(found.stored)
            found.stored = None
            return
        found.stored.add(page)
        self._stored_pages += 1

    # -- checkpoints

    def freeze(self) -> None:
        """Fix what the next `encode` writes; constant time."""
        self.frozen_root = self.root
        self.next_checkpoint += 1
        self._frozen = (self.next_layer, self._rows, self._cuts)
        self._rows, self._cuts = {}, {}

    def encode(self, batch: Batch) -> Iterator[int]:
        """Put the rows that changed into `batch`."""
        next_layer, rows, cuts = self._frozen
        if rows or cuts:
            batch.put(STATE_KEY, pack_value(STATE_KEY, TREE_STATE.pack(next_layer, 0)))
        for layer, row in rows.items():
            key = _ROW + layer.to_bytes(4, "big")
            if row is None:
                batch.delete(key)
            else:
                batch.put(key, pack_value(key, row.pack()))
            yield 1
        for layer, ranges in cuts.items():
            key = _CUT + layer.to_bytes(4, "big")
            if ranges:
                batch.put(key, pack_value(key, array("Q", [each for pair in ranges for each in pair]).tobytes()))
            else:
                batch.delete(key)
            yield 1

    def load(self, store: Store, size_bytes: int) -> None:
        """Take the rows of the last checkpoint; raises DamagedValueError. A family from before layers has none."""
        self.load_items(store.get(STATE_KEY), store.range(*ROW_KEYS), store.range(*CUT_KEYS), size_bytes)

    def load_items(
        self,
        state: bytes | None,
        rows: Iterable[tuple[bytes, bytes]],
        cuts: Iterable[tuple[bytes, bytes]],
        size_bytes: int,
    ) -> None:
        """The same from what was read."""
        for key, value in rows:
            row = Row.unpack(unpack_value(key, value))
            if row.layer != int.from_bytes(key[1:], "big") or (row.parent and row.parent not in self.layers):
                raise DamagedValueError(key, "the layer does not stand where it should")
            self.apply(row)
        for key, value in cuts:
            layer = int.from_bytes(key[1:], "big")
            numbers = array("Q", unpack_value(key, value))
            if layer not in self.layers:
                raise DamagedValueError(key, "there is no such layer")
            self.layers[layer].cut = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        if state is not None:
            self.next_layer = TREE_STATE.unpack(unpack_value(STATE_KEY, state))[0]
        if not self.layers:
            if state is not None:
                raise DamagedValueError(STATE_KEY, "the family has layers, and their rows are missing")
            self.apply(Row(1, 0, 0, size_bytes, 1, HEAD))
        else:
            self._rows = {}


def check_name(name: str) -> str:
    """Why a snapshot cannot have this name, or ""."""
    if not name:
        return "a snapshot needs a name"
    if len(name.encode()) > NAME_BYTES:
        return f"a snapshot's name has at most {NAME_BYTES} bytes"
    return "a snapshot's name has no zero byte" if "\x00" in name else ""
