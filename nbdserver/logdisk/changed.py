"""What changed between two layers of a family: where their MBAs differ.

Theory. An MBA stands for one content in every layer that shares it: an overwrite in place happens only to what one
layer alone shows. So two layers hold the same at an LBA if their MBAs are the same, whatever lies between them:
overwrites, rollbacks, merges. (A block that was written again with the same bytes counts as changed.)

The layers that the two do not have in common are the only ones that can make a difference. LevelDB is asked for the
next page that one of them has; what lies between is the same. Where such a layer hides a range of its parent, by a cut
or a pending hole, all layers below are asked too: a page that nobody has is zeros in both.

Rules
- The answer covers at least one byte, and at most what was asked for; it ends early after `limit` extents or
  _MOST_PAGES compared pages. Neighbours differ in what they say.
- It holds for one moment during the call for each page; a caller who wants one moment for all compares snapshots.
- What is compared with is a snapshot to the end, else the answer is ESTALE: a layer that has lost its name may be
  merged, and then its MBAs are overwritten in place.
- On the loop it works in slices.
"""

from __future__ import annotations

import errno as errnos
from array import array
from typing import TYPE_CHECKING

from metadata.logical_map import LAYER_SHIFT
from metadata.pages import PAGE_BLOCKS, PAGE_SHIFT
from metadata.seams import Clock
from nbdserver.block import DIRTY, Extents, Later
from nbdserver.logdisk.next_page import NextPage
from nbdserver.logdisk.pacing import SLICE_S
from protocol.disk import BLOCK_BYTES, SNAPSHOT

if TYPE_CHECKING:
    from nbdserver.logdisk.devices import Device
    from nbdserver.logdisk.disk import LogDisk

_MOST_PAGES = 256
_CLEAN = 0


class Changed:
    """One comparison; `done(errno, [(length, DIRTY or 0)])`."""

    def __init__(
        self,
        disk: LogDisk,
        clock: Clock,
        device: Device,
        since: int,
        offset: int,
        length: int,
        limit: int,
        done: Later,
    ) -> None:
        self._disk = disk
        self._clock = clock
        self._device = device
        self._since = since
        self._at = offset
        self._end = offset + length
        self._limit = limit
        self._done = done
        self._extents: Extents = []
        self._compared = 0
        self._ahead = NextPage(disk, (self._end - 1) >> PAGE_SHIFT + 12)
        disk.slow_path.under_way += 1
        disk.call_soon(self._go_on)

    def _go_on(self) -> None:
        try:
            self._run()
        except Exception as error:
            self._disk.parted(error)
            self._finish(errnos.EIO)

    def _run(self) -> None:
        disk, maps, now = self._disk, self._disk.maps, self._clock.now
        until = now() + SLICE_S
        while True:
            if disk.failure or self._device.gone:
                self._finish(errnos.EIO)
                return
            since = maps.tree.layers.get(self._since)
            if since is None or since.row.kind != SNAPSHOT:
                self._finish(errnos.ESTALE)
                return
            if self._at >= self._end or len(self._extents) > self._limit or self._compared >= _MOST_PAGES:
                self._finish(0)
                return
            if now() >= until:
                disk.call_soon(self._go_on)
                return
            page = self._at >> PAGE_SHIFT + 12
            numbers = [layer << LAYER_SHIFT | page for layer in (self._device.layer, self._since)]
            one, other = (maps.page(number) for number in numbers)
            if one is None or other is None:
                self._ask(page)
                return
            self._compare(page, one, other)

    def _compare(self, page: int, one: array[int], other: array[int]) -> None:
        self._compared += 1
        page_end = min(self._end, (page + 1) << PAGE_SHIFT + 12)
        if one == other:
            self._add(page_end, _CLEAN)
            return
        first = self._at >> 12
        index = first - (page << PAGE_SHIFT)
        while self._at < page_end:
            is_dirty = one[index] != other[index]
            index += 1
            while index < PAGE_BLOCKS and (one[index] != other[index]) == is_dirty:
                index += 1
            self._add(min(page_end, ((page << PAGE_SHIFT) + index) * BLOCK_BYTES), DIRTY if is_dirty else _CLEAN)

    def _add(self, end: int, state: int) -> None:
        length, self._at = end - self._at, end
        if self._extents and self._extents[-1][1] == state:
            self._extents[-1] = (self._extents[-1][0] + length, state)
        else:
            self._extents.append((length, state))

    def _ask(self, page: int) -> None:
        tree = self._disk.maps.tree
        layers = tree.difference(self._device.layer, self._since)
        if any(tree.layers[layer].cut or tree.layers[layer].holes for layer in layers):
            chains = (*tree.chain(self._device.layer), *tree.chain(self._since))
            layers = {layer.row.layer for layer in chains}
        self._ahead.find(layers, page, self._next_page)

    def _next_page(self, following: int) -> None:
        page = self._at >> PAGE_SHIFT + 12
        if following > page:
            self._add(min(self._end, following << PAGE_SHIFT + 12), _CLEAN)
            self._go_on()
            return
        maps = self._disk.maps
        numbers = {layer << LAYER_SHIFT | page for layer in (self._device.layer, self._since)}
        need = [(maps.logical, number) for number in sorted(numbers) if maps.page(number) is None]
        if need and not self._disk.failure:
            self._disk.background.stir()
            maps.load(list(need), self._go_on)
        else:
            self._go_on()

    def _finish(self, errno: int) -> None:
        def hand_over() -> None:
            self._disk.slow_path.under_way -= 1
            self._done(errno, None if errno else self._extents[: self._limit])

        self._disk.call_soon(hand_over)
