"""MBAs kept free for the neighbours of a block that was written, so that blocks that lie side by side in a volume have
MBAs side by side.

Theory. After a snapshot every block gets a new MBA when it is written. Were they given out in the order of the writes,
a volume that is written at random would have a middle map in random order for ever: a run of blocks, though it lie in
one piece, would be looked up and changed block by block. So the first write into a group of 32 blocks takes 32 MBAs,
one for each, and a later write into the group takes the one that was kept for it.

Rules
- An MBA is given out once. One is kept for a block that its layer does not have; when the layer has it, or had it and
  it was discarded, nobody asks for the one that was kept.
- What is kept is memory and can be forgotten at any time: the next write takes another group. Recovery must not take
  an MBA lower than the checkpoint's for an overwrite (recovery.py).
- Only for blocks that a layer below shows: a volume that is written at random for the first time has dense pages.

Known weakness: at most MOST_GROUPS are kept, 8 GiB of addresses; beyond, the oldest go.
"""

from __future__ import annotations

from metadata.pages import PAGE_MASK, PAGE_SHIFT, PageMap

GROUP_SHIFT = 5
GROUP_BLOCKS = 1 << GROUP_SHIFT
MOST_GROUPS = 1 << 16


class Neighbours:
    """The groups of one family; addresses are those of metadata/logical_map. `keep` or `forget` ends each batch."""

    def __init__(self, middle: PageMap) -> None:
        self._middle = middle
        self._groups: dict[int, int] = {}  # group → its first MBA
        self._of_batch: dict[int, int] = {}  # taken in a batch that may fail

    def take(self, address: int, next_mba: int) -> tuple[int, int]:
        """(MBA for this block, the next one that is free); each block once."""
        group, index = address >> GROUP_SHIFT, address & (GROUP_BLOCKS - 1)
        first = self._of_batch.get(group)
        if first is not None:
            return first + index, next_mba
        first = self._groups.get(group)
        if first is not None:
            mba = first + index
            # A page that is not in memory any more is not waited for.
            page = self._middle.get(mba >> PAGE_SHIFT)
            if page is not None and not page[mba & PAGE_MASK]:
                return mba, next_mba
        first = self._of_batch[group] = (next_mba + GROUP_BLOCKS - 1) & -GROUP_BLOCKS
        return first + index, first + GROUP_BLOCKS

    def has_any(self, address: int, count: int) -> bool:
        """Whether MBAs are kept for any of these blocks."""
        groups = range(address >> GROUP_SHIFT, ((address + count - 1) >> GROUP_SHIFT) + 1)
        return any(group in self._groups or group in self._of_batch for group in groups)

    def keep(self) -> None:
        """The batch is in the log, and its MBAs are given out."""
        if self._of_batch:
            groups = self._groups
            groups.update(self._of_batch)
            self._of_batch = {}
            while len(groups) > MOST_GROUPS:
                del groups[next(iter(groups))]

    def forget(self) -> None:
        """The batch failed: what it took is not given out."""
        self._of_batch = {}
