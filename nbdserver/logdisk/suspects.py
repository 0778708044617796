"""What a scrub suspects to have rotted: whether it is damage, whether it can be repaired, and what shows it.

Theory. A block with a wrong checksum is damage only if it still is the present block of its MBA. Then it is repaired if
another replica has it (repair.py). What nobody has is reported for each volume and snapshot that shows it; a block that
was moved has no LBA in its record, so its MBA is looked for in the logical maps, once, in the end.

Known weakness: of the layers that may show a damaged block _MOST_LAYERS are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from metadata.logical_map import LAYER_SHIFT, PAGE_OF_LAYER
from metadata.pages import PAGE_MASK, PAGE_SHIFT, Page, PageMap
from nbdserver.logdisk.maps import OFFSET
from nbdserver.logdisk.repair import BadBlock

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_MOST_LAYERS = 256
_MOST_KNOWN = 1024  # damaged blocks that are remembered, to find the LBAs of those that the cleaner moved

Safe = Callable[[Callable[..., None]], Callable[..., None]]
Walk = Callable[[PageMap, Callable[[int, Page], None], Callable[[], None]], None]


class Suspect(NamedTuple):
    bad: BadBlock
    lba: int  # -1: not known
    errno: int  # 0: the checksum is wrong


class Suspects:
    """Of one scrub. `safe` wraps what is called later, `walk` goes through a whole map, `note_damaged` counts."""

    def __init__(self, disk: LogDisk, safe: Safe, walk: Walk, note_damaged: Callable[[], None]) -> None:
        self.found: dict[tuple[int, int], int] = {}  # damage that is shown: (layer, LBA) → MBA
        self._disk = disk
        self._maps = disk.maps
        self._safe = safe
        self._begin_walk = walk
        self._note_damaged = note_damaged
        self._suspects: list[Suspect] = []
        self._known: set[int] = set()  # MBAs that were reported
        self._unnamed: dict[int, Suspect] = {}

    def add(self, suspect: Suspect) -> None:
        """To be looked at with the next `look`."""
        self._suspects.append(suspect)

    def look(self, then: Callable[[], None]) -> None:
        """Report those that are the present block of their MBA."""
        again = partial(self.look, then)
        middle = self._maps.middle
        while self._suspects:
            suspect = self._suspects[-1]
            bad = suspect.bad
            page = middle.get(bad.mba >> PAGE_SHIFT)
            if page is None:
                self._maps.load([(middle, bad.mba >> PAGE_SHIFT)], self._safe(again))
                return
            self._suspects.pop()
            index = bad.mba & PAGE_MASK
            if (page[index], page[OFFSET + index]) != (bad.segment, bad.offset) or bad.mba in self._known:
                continue  # overwritten or freed meanwhile; or met again, block by block
            if len(self._known) < _MOST_KNOWN:
                self._known.add(bad.mba)
            self._disk.repairs.want(bad, self._safe(partial(self._judge, suspect, again)))
            return
        then()

    def _judge(self, suspect: Suspect, then: Callable[[], None], is_repaired: bool) -> None:
        """Report what nobody else has."""
        bad = suspect.bad
        if is_repaired:
            self._known.discard(bad.mba)
            then()
            return
        self._note_damaged()
        self._disk.report("checksum-error", {**bad._asdict(), "by": "scrub"})
        if suspect.lba >= 0:
            self._name(suspect, then)
            return
        if bad.mba in self._known:
            self._unnamed[bad.mba] = suspect
        then()

    def _name(self, suspect: Suspect, then: Callable[[], None]) -> None:
        """Report the block for each volume and snapshot that shows it."""
        tree, lba, bad = self._maps.tree, suspect.lba, suspect.bad
        shown_by = [*tree.heads.values(), *sorted((row.layer for row in tree.snapshots()), reverse=True)][:_MOST_LAYERS]
        numbers = [layer << LAYER_SHIFT | lba >> PAGE_SHIFT for layer in shown_by]

        def look(at: int) -> None:
            for position in range(at, len(numbers)):
                number = numbers[position]
                if number >> LAYER_SHIFT not in tree.layers:
                    continue
                page = self._maps.page(number)
                if page is None:
                    self._maps.load([(self._maps.logical, number)], self._safe(partial(look, position)))
                    return
                if page[lba & PAGE_MASK] == bad.mba:
                    layer = number >> LAYER_SHIFT
                    self.found[layer, lba] = bad.mba
                    self._disk.damage.found(layer, lba, bad, suspect.errno)
            self._disk.call_soon(self._safe(then))

        look(0)

    def find_unnamed(self, done: Callable[[], None]) -> None:
        """Find the LBAs of damaged blocks that were moved: a move does not know them."""
        unnamed, self._unnamed = self._unnamed, {}
        if not unnamed:
            done()
            return
        named: list[Suspect] = []

        def look(number: int, page: Page) -> None:
            for mba in unnamed.keys() & set(page):
                lba = (number & PAGE_OF_LAYER) << PAGE_SHIFT | page.index(mba)
                named.append(unnamed.pop(mba)._replace(lba=lba))

        def name_next() -> None:
            if named:
                self._name(named.pop(), name_next)
            else:
                done()

        self._begin_walk(self._maps.logical, look, name_next)
