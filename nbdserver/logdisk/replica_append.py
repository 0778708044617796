"""What another node has ordered, appended here: the same records, the same logical maps, the same MBAs.

Theory. A modification is appended as it was ordered, body and all, and then does to the maps what it did at the owner.
Replicas differ in the middle map alone, and in how far the background has taken their layers apart: a nameless layer
that one has merged into its child, the other may still have. It shows what its child shows, so that makes no
difference, but for one thing. Where the owner still shares a block with such a layer, an overwrite gets a new MBA;
where the layer is merged already the old one has no other user, and is freed here.

Rules
- A modification is appended only if it follows the last one (Rule.APPEND_FOLLOWS_LAST); ESTALE otherwise.
- What does not hold together is refused with EBADMSG and changes nothing. That its blocks have their checksums was seen
  where it came in (protocol/peer_decoding.py).
- Everything is done in the order of the calls: what has to wait for a map page, a checkpoint or room holds up what
  comes after it. What waits for nothing, and for nobody before it, is done at once.
- The map pages come first, then the record, then the maps: a checkpoint never sees half of it.
- Pages for what waits behind it come along with those for the first, as far as the cache has room for them: a replica
  that catches up with scattered writes does not go to LevelDB for each of them.
- It may use the reserve of segments but for the last: whoever orders stops before (Replica.room_bytes).

Known weakness: blocks are looked at one by one where their MBAs are not those that the page has already.
"""

from __future__ import annotations

import errno as errnos
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from metadata.layers import Row, unpack_rows
from metadata.logical_map import ADDRESS_SHIFT, LAYER_SHIFT
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT
from metadata.seams import Done
from nbdserver.logdisk.maps import MAX_PENDING_HOLES, SMALL_HOLE_BLOCKS, Maps, Need
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.pacing import guarded
from nbdserver.logdisk.records import parse_write_body
from nbdserver.logdisk.segments import CLEANER_KEEPS, DELETIONS_KEEP
from protocol.disk import (
    BLOCK_BYTES,
    EXTENT_HOLE,
    HEAD,
    TREE,
    WRITE,
    body_bytes,
    extents_of_array,
)
from protocol.peer import Modification

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_AHEAD = 64  # modifications behind the one that waits for pages, for which pages are loaded too
_PAGES_AHEAD = 256
_TRIES = 3  # to have all pages of a record in memory together, before the cache may grow for it

Step = Callable[[], int | None]
"""Does something and returns 0 or an errno; None: it has to wait, and `Ordered.go_on` will be called."""


class Ordered:
    """Steps that happen one after the other, whatever they wait for.

    What one waits for may depend on who waits for it: an append for a checkpoint, the checkpoint for what the owner
    says is committed, and the owner, on a new stream, for the end of the append. So what waits can be given up.
    """

    def __init__(self, disk: LogDisk) -> None:
        self._disk = disk
        self._waiting: deque[tuple[Step, Done, bool]] = deque()
        self._busy = False
        self.go_on = guarded(disk.fail, self._go_on)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def submit(self, step: Step, done: Done, must_end: bool = False) -> None:
        """Take the step behind all that were submitted before; `done` with what it returned, from the loop. `must_end`:
        it is not given up, because it is not as if it had never begun while it waits."""
        self._waiting.append((step, done, must_end))
        if len(self._waiting) == 1:
            self.go_on()

    def give_up(self) -> None:
        """Steps that wait, or have not begun, are answered with ECANCELED."""
        kept = deque(each for each in self._waiting if each[2])
        for _, done, must_end in self._waiting:
            if not must_end:
                self._disk.call_soon(partial(done, errnos.ECANCELED))
        self._waiting = kept

    def _go_on(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                step, done, _ = self._waiting[0]
                errno = errnos.EIO if self._disk.failure else step()
                if errno is None:
                    return
                self._waiting.popleft()
                self._disk.call_soon(lambda done=done, errno=errno: done(errno))  # type: ignore[misc]
        finally:
            self._busy = False


class ReplicaAppend:
    """Appends modifications to the log of one replica."""

    def __init__(self, disk: LogDisk, ordered: Ordered) -> None:
        self._disk = disk
        self._maps = disk.maps
        self._ordered = ordered
        self._tries = 0
        self._left: deque[Modification] = deque()  # that are being appended, the first one and those behind it

    def submit(self, modifications: Sequence[Modification], done: Done) -> None:
        """Append them one after the other; none: `done` when all that came before is appended."""
        left = deque(modifications)

        def step() -> int | None:
            self._left = left
            while left:
                errno = self._try(left[0])
                if errno is None:
                    return None
                if self._tries:
                    self._tries = 0
                    self._maps.let_go()
                if errno:
                    return errno
                left.popleft()
            return 0

        self._ordered.submit(step, done)

    def at_once(self, modifications: Sequence[Modification]) -> int | None:
        """How many of them are appended, up to the first that has to wait or is refused; None: the disk has failed, or
        something waits already."""
        disk = self._disk
        if disk.failure or not self._ordered.is_idle:
            return None
        count = 0
        try:
            for modification in modifications:
                if self._try(modification) != 0:
                    break
                count += 1
        except Exception as error:
            disk.parted(error)
        return count

    def give_up(self) -> None:
        """See Ordered.give_up."""
        self._tries = 0
        self._maps.let_go()
        self._ordered.give_up()

    def _try(self, modification: Modification) -> int | None:
        disk = self._disk
        last = disk.log.last
        follows = modification.txid == last.txid + 1 and modification.epoch >= last.epoch
        if not follows and holds(Rule.APPEND_FOLLOWS_LAST):
            return errnos.ESTALE
        if disk.appending.blocked and disk.background.must_wait_for_checkpoint():
            disk.checkpointer.when_done(self._ordered.go_on)
            return None
        if len(modification.body) != body_bytes(modification.kind, modification.extents, modification.blocks):
            return errnos.EBADMSG
        if modification.kind == WRITE:
            return self._try_write(modification)
        return self._try_tree(modification) if modification.kind == TREE else errnos.EBADMSG

    # -- changes of the tree

    def _try_tree(self, modification: Modification) -> int | None:
        disk = self._disk
        rows = unpack_rows(modification.body)
        if modification.blocks or not rows or not self._hold_together(rows):
            return errnos.EBADMSG
        return self._append(modification, lambda _: disk.tree_changes.apply(rows))

    def _hold_together(self, rows: Sequence[Row]) -> bool:
        known = set(self._maps.tree.layers)
        for row in rows:
            if row.layer not in known and (row.parent not in known or row.parent >= row.layer):
                return False
            known.add(row.layer)
        return True

    # -- writes

    def _try_write(self, modification: Modification) -> int | None:
        maps, layer = self._maps, modification.layer
        found = maps.tree.layers.get(layer)
        extents, mbas, checksums = parse_write_body(modification.body, modification.extents, modification.blocks)
        if found is None or found.row.kind != HEAD:
            return errnos.EBADMSG
        if self._is_overwriting(layer, extents, mbas):
            if not self._fits(modification):
                return errnos.EBADMSG
            return self._append(
                modification, lambda offset: self._point(modification, extents, mbas, checksums, offset)
            )
        if not self._is_sound(modification, extents):
            return errnos.EBADMSG
        long_holes = sum(
            kind == EXTENT_HOLE and count > SMALL_HOLE_BLOCKS for _, count, kind in extents_of_array(extents)
        )
        if long_holes and len(maps.holes) >= MAX_PENDING_HOLES:
            self._disk.slow_path.park(self._ordered.go_on)
            return None
        need = self._needed(layer, extents, mbas)
        if need:
            self._load(need, len(mbas))
            return None
        return self._append(modification, lambda offset: self._apply(modification, extents, mbas, checksums, offset))

    def _is_overwriting(self, layer: int, extents: array[int], mbas: array[int]) -> bool:
        """Whether these blocks have these MBAs already, with all pages in memory: the middle map alone changes. That is
        most writes, and found in less time than what else may be."""
        logical, middle = self._maps.logical.pages, self._maps.middle.pages
        first_page = layer << LAYER_SHIFT
        at = 0
        values = iter(extents)
        for lba, blocks in zip(values, values, strict=True):
            page = logical.get(first_page + (lba >> PAGE_SHIFT))
            if page is None or lba >> ADDRESS_SHIFT:
                return False
            index = lba & PAGE_MASK
            if blocks == 1:
                mba = page[index]
                if not mba or mba != mbas[at] or mba >> PAGE_SHIFT not in middle:
                    return False
            else:
                held = page[index : index + blocks]
                if not 0 < blocks <= PAGE_BLOCKS - index or 0 in held or held != mbas[at : at + blocks]:
                    return False
                if not middle.keys() >= {mba >> PAGE_SHIFT for mba in held}:
                    return False
            at += blocks
        return at == len(mbas)

    def _point(
        self, modification: Modification, extents: array[int], mbas: array[int], checksums: array[int], offset: int
    ) -> None:
        """What `_apply` does where only the middle map changes."""
        maps = self._maps
        values = iter(extents)
        for lba, count in zip(values, values, strict=True):
            maps.regions.mark(lba, count, modification.txid)
        self._disk.head(maps.tree.layers[modification.layer].row.volume).writer.point(mbas, checksums, offset)

    def _fits(self, modification: Modification) -> bool:
        """Whether it has the data that it says, and a segment can take it."""
        return (
            sum(map(len, modification.data)) == modification.blocks * BLOCK_BYTES
            and _log_bytes(modification) <= self._disk.pool.record_bytes
        )

    def _is_sound(self, modification: Modification, extents: array[int]) -> bool:
        blocks = 0
        for lba, count, kind in extents_of_array(extents):
            if not count or lba + count > 1 << ADDRESS_SHIFT or kind > EXTENT_HOLE:
                return False
            blocks += count if kind != EXTENT_HOLE else 0
        return blocks == modification.blocks and self._fits(modification)

    def _needed(self, layer: int, extents: array[int], mbas: array[int]) -> Need:
        maps = self._maps
        first_mba = maps.tree.first_mba(layer)
        need: Need = []
        for lba, count, kind in extents_of_array(extents):
            if kind != EXTENT_HOLE or count <= SMALL_HOLE_BLOCKS:
                need += maps.needed((layer << ADDRESS_SHIFT) + lba, count, count + PAGE_BLOCKS, first_mba)
        return list(dict.fromkeys(need + needed_of_mbas(maps, mbas)))

    def _load(self, need: Need, blocks: int) -> None:
        maps = self._maps
        self._tries += 1
        if self._tries < _TRIES:
            need = list(dict.fromkeys(need + self._needed_soon()))
        elif self._tries > _TRIES:
            maps.hold(self._tries * (len(need) + blocks))
        maps.load(need, self._ordered.go_on)

    def _needed_soon(self) -> Need:
        """By those that wait behind the first one."""
        need: Need = []
        most = min(_PAGES_AHEAD, self._maps.logical.limit_pages // 8)
        for modification in islice(self._left, 1, 1 + _AHEAD):
            layers, layer = self._maps.tree.layers, modification.layer
            size_bytes = body_bytes(modification.kind, modification.extents, modification.blocks)
            if modification.kind != WRITE or layer not in layers or len(modification.body) != size_bytes:
                break
            extents, mbas, _ = parse_write_body(modification.body, modification.extents, modification.blocks)
            if not self._is_sound(modification, extents):
                break
            need += self._needed(layer, extents, mbas)
            if len(need) > most:
                return need[:most]
        return need

    def _apply(
        self, modification: Modification, extents: array[int], mbas: array[int], checksums: array[int], offset: int
    ) -> None:
        maps = self._maps
        first_address = modification.layer << ADDRESS_SHIFT
        first_mba = maps.tree.first_mba(modification.layer)
        block = 0
        unused: list[int] = []
        for lba, count, kind in extents_of_array(extents):
            maps.regions.mark(lba, count, modification.txid)
            if kind != EXTENT_HOLE:
                self._set_logical(first_address + lba, mbas[block : block + count], first_mba, unused)
                block += count
            elif count > SMALL_HOLE_BLOCKS:
                maps.add_hole(first_address + lba, count)
                self._disk.appending.check_background()
            else:
                maps.clear(first_address + lba, count)
        if mbas:
            self._disk.head(maps.tree.layers[modification.layer].row.volume).writer.point(mbas, checksums, offset)
            maps.next_mba = max(maps.next_mba, max(mbas) + 1)
        for mba in unused:
            maps.free(mba)

    def _set_logical(self, address: int, mbas: array[int], first_mba: int, unused: list[int]) -> None:
        """Point blocks at their MBAs; those that no layer shows any more become `unused`."""
        maps = self._maps
        at = 0
        while at < len(mbas):
            page = maps.page((address + at) >> PAGE_SHIFT)
            assert page is not None  # `_needed` has looked
            index = (address + at) & PAGE_MASK
            count = min(len(mbas) - at, PAGE_BLOCKS - index)
            wanted = mbas[at : at + count]
            held = page[index : index + count]
            if held != wanted:
                for step, (old, mba) in enumerate(zip(held, wanted, strict=True)):
                    if old != mba:
                        maps.set_logical(address + at + step, 1, mba)
                        if old >= first_mba:
                            unused.append(old)
            at += count

    # -- the log

    def _append(self, modification: Modification, apply: Callable[[int], None]) -> int | None:
        disk = self._disk
        try:
            keep = CLEANER_KEEPS if modification.blocks else DELETIONS_KEEP
            if disk.appending.has_to_wait(_log_bytes(modification), keep):
                disk.slow_path.park(self._ordered.go_on)
                return None
            if not disk.appending.make_room_for_bytes(_log_bytes(modification), keep):
                if disk.background.can_gain_room():
                    disk.slow_path.park(self._ordered.go_on)
                    return None
                return errnos.ENOSPC
            crash_point("replica-before-append")
            offset = disk.log.append_replicated(modification)
            crash_point("replica-after-append")
            apply(offset)
        except OSError as error:
            return disk.append_failed(error)
        except Exception as error:
            disk.parted(error)
            raise
        disk.appending.appended(None)
        return 0


def _log_bytes(modification: Modification) -> int:
    """Of body and data."""
    return len(modification.body) + modification.blocks * BLOCK_BYTES


def needed_of_mbas(maps: Maps, mbas: Iterable[int]) -> Need:
    """Middle pages that are missing before the MBAs can be pointed anywhere, new ones too. Of pages behind the last MBA
    LevelDB has nothing: they are made."""
    need: Need = []
    last_page = (maps.next_mba - 1) >> PAGE_SHIFT
    for number in sorted({mba >> PAGE_SHIFT for mba in mbas}):
        if maps.middle.get(number) is None:
            if number > last_page:
                maps.middle.create(number)
            else:
                need.append((maps.middle, number))
    return need
