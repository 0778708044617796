"""Taking layers apart that nothing needs any more: their blocks become free, in the background.

Theory. A nameless layer without children and views is *dropped*: the blocks that it owns are freed, its keys deleted.
One with exactly one child, and no view, is *merged* into it: of its own blocks those that the child does not show are
freed, its entries become the child's, its keys are deleted. Both walk along the layer's keys in LevelDB, which hold all
of it, because work begins only when a checkpoint is synced that was begun after the last change of the layer.

A merge begins by giving the layer's blocks to the child (`Tree.take_over`): from then on the child overwrites and frees
them as its own, wherever the walk is. That is right at once, because nobody but the child sees the layer. What it freed
in this way is met by the walk as free already.

Nothing is logged. A crash brings back what the last checkpoint has of the layer, and the work goes on with that:
freeing a free block does nothing. Replay may find a layer that was gone when a record was written: it
still shows what its child showed, so that it makes no difference to the records (metadata/layers.py: why they carry no
parent).

Rules
- A block is freed by a merge only if the child does not show it (Rule.MERGE_FREES_WHAT_IS_HIDDEN).
- The keys of a page go in the batch in which the child has its entries (Rule.MERGED_ENTRIES_STAY): both are noted in
  one step.
- One layer at a time, the youngest first: so a chain of nameless layers costs each entry one move.
- In slices, a share of the loop; it waits while too many pages or keys wait for a checkpoint.

Known weakness: a merge of a layer that has a base of a page writes a base for the child.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from metadata.logical_map import LAYER_SHIFT, PAGE_OF_LAYER
from metadata.pages import MIN_PAGES, PAGE_BLOCKS, PAGE_SHIFT
from metadata.ranges import joined
from metadata.seams import Clock
from nbdserver.logdisk.maps import Need
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.pacing import DEFAULT_SHARE, SLICE_S, guarded

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_KEYS = 600  # read at a time; a page has at most 258
_FREED_A_STEP = 32  # some 0.05 ms
_MOST_MOVED_KEYS = 65_536  # that wait for a checkpoint
_PAUSE_S = SLICE_S * (1 / DEFAULT_SHARE - 1)

StoredItems = list[tuple[bytes, bytes]]


class TreeWork:
    """Drops and merges the layers of one family."""

    def __init__(self, disk: LogDisk, clock: Clock) -> None:
        self.layer = 0  # that is being taken apart
        self.layers_dropped = self.layers_merged = self.blocks_freed = 0
        self._disk = disk
        self._maps = disk.maps
        self._tree = disk.maps.tree
        self._clock = clock
        self._stopped = False
        self._child = 0
        self._cursor = 0
        self._pages: list[tuple[int, StoredItems]] = []
        self._page: Iterator[Need] | None = None  # the steps of the page that is worked on
        self._go_on = guarded(disk.fail, self._slice)
        self._found = guarded(disk.fail, self._read)

    def stop(self) -> None:
        """Begin nothing more; the present layer is left as it is at the next step."""
        self._stopped = True

    def check(self) -> None:
        """Begin with the next layer, if one is due and none is under way."""
        disk, tree = self._disk, self._tree
        if self.layer or self._stopped or disk.failure or not tree.removable or disk.resync:
            return
        waiting = False
        for layer in sorted(tree.removable, reverse=True):
            found = tree.layers[layer]
            if not found.holes and found.dirty_since <= tree.synced_checkpoint:
                self._begin(layer)
                return
            waiting = waiting or not found.holes
        if waiting and not disk.checkpointer.running:
            disk.checkpointer.start()

    def _begin(self, layer: int) -> None:
        tree = self._tree
        self.layer = layer
        self._cursor = 0
        self._child = next(iter(tree.layers[layer].children), 0)
        if self._child:
            tree.take_over(layer)
            row = tree.layers[self._child].row
            if tree.heads.get(row.volume) == self._child:
                self._disk.head_moved(row.volume, self._child)
        self._clock.call_soon(self._go_on)

    # -- a slice

    def _slice(self) -> None:
        disk, now = self._disk, self._clock.now
        until = now() + SLICE_S
        while True:
            if self._stopped or disk.failure:
                self.layer = 0
                return
            if self._page is None:
                if disk.background.must_wait_for_checkpoint() or len(self._maps.moved_keys) > _MOST_MOVED_KEYS:
                    disk.checkpointer.when_done(self._go_on)
                    return
                if not self._pages:
                    self._ask()
                    return
                page_of_layer, items = self._pages.pop()
                self._page = self._take_apart(page_of_layer, items)
            need = next(self._page, None)
            if need is None:
                self._page = None
            elif need:
                self._maps.load(need[: MIN_PAGES // 2], self._go_on)
                return
            if now() >= until:
                self._clock.call_later(_PAUSE_S, self._go_on)
                return

    def _ask(self) -> None:
        first = self.layer << LAYER_SHIFT
        key_range = self._maps.logical.key_range
        keys = (key_range(first | self._cursor)[0], key_range(first | PAGE_OF_LAYER)[0])
        self._disk.read_store([keys], self._found, _KEYS)

    def _read(self, items: list[StoredItems]) -> None:
        """The next keys of the layer: whole pages of them, the last one first."""
        if self._stopped or self._disk.failure:
            self.layer = 0
            return
        by_page = groupby(items[0], lambda item: self._maps.logical.page_of_key(item[0]) & PAGE_OF_LAYER)
        pages = [(page, list(of_page)) for page, of_page in by_page]
        if not pages:
            self._finish()
            return
        if len(items[0]) >= _KEYS:
            pages.pop()  # may be cut off
        self._cursor = pages[-1][0] + 1
        self._pages = pages[::-1]
        self._clock.call_soon(self._go_on)

    # -- a page

    def _take_apart(self, page_of_layer: int, items: StoredItems) -> Iterator[Need]:
        """The steps of one page; each yields what has to be in memory for the next one."""
        maps, logical = self._maps, self._maps.logical
        stored = logical.parse(items)
        own = logical.zeros() if stored.base is None else stored.base
        stored.lay_over(own)
        yield []
        first_mba = self._tree.first_mba(self.layer)
        target = self._child << LAYER_SHIFT | page_of_layer
        hidden: list[int] = []
        if self._child:
            while (shown := maps.page(target)) is None:
                yield [(logical, target)]
            for mba, seen in zip(own, shown, strict=True):
                if mba >= first_mba and (mba != seen or not holds(Rule.MERGE_FREES_WHAT_IS_HIDDEN)):
                    hidden.append(mba)
        else:
            hidden = [mba for mba in own if mba >= first_mba]
        yield from self._free(hidden)
        if self._child:
            while maps.page(target) is None:
                yield [(logical, target)]
            crash_point("merge-before-move")
            if holds(Rule.MERGED_ENTRIES_STAY):
                whole = stored.base is not None
                changed = logical.changed.get(target)
                if changed is None:
                    changed = logical.first_change(target)
                changed.extend(range(PAGE_BLOCKS) if whole else [index for index, _ in stored.entries])
        maps.moved_keys += [key for key, _ in items]

    def _free(self, mbas: list[int]) -> Iterator[Need]:
        maps = self._maps
        while mbas:
            missing: list[int] = []
            for at, mba in enumerate(mbas):
                if maps.middle.get(mba >> PAGE_SHIFT) is None:
                    missing.append(mba)
                else:
                    self.blocks_freed += maps.free(mba)
                if at % _FREED_A_STEP == _FREED_A_STEP - 1:
                    yield []
            mbas = missing
            if missing:
                yield [(maps.middle, number) for number in sorted({mba >> PAGE_SHIFT for mba in missing})]

    # -- the end

    def _finish(self) -> None:
        """Nothing is left of the layer but its row."""
        tree, layer = self._tree, self.layer
        found = tree.layers[layer]
        if self._child:
            child = tree.layers[self._child]
            child.dirty_since = tree.next_checkpoint
            if found.row.parent and found.cut:
                tree.set_cut(self._child, joined((*child.cut, *found.cut)))
            elif not found.row.parent and child.cut:
                tree.set_cut(self._child, ())
            self.layers_merged += 1
        else:
            self.layers_dropped += 1
        tree.remove(layer)
        crash_point("merge-after-remove")
        self.layer = 0
        self._clock.call_soon(self._disk.background.check)
