"""Blocks that have rotted here, brought back from another replica.

Theory. The middle map says where a block lies and what its checksum is; what lies there may be something else by now.
Another replica has the same content under the same MBA. So a repair is a move: (MBA, bad place, new place), a MOVE
record of the local log, which takes no txid and obeys the rule of moves. Who has found a bad block (a read, the scrub,
the cleaner, a copy on its way) asks here and is told when it is right, or that nobody has it.

Where blocks come from is replication's affair: a `BlockSource` (replica_log.py there). Without one nothing can be
repaired.

Rules
- A block is written anew only where the map still has the bad place, and only with the checksum that the map has for
  it (Rule.REPAIR_IS_WHAT_WAS_THERE): what comes may be of another moment.
- At most BLOCKS_LIMIT blocks are asked for at once, and MOST_WANTED are wanted; who comes then is told that it cannot
  be repaired.
- It may use the reserve of segments, as moves do.
- What rots in the part of the log that a replay would read is followed by a checkpoint: the bad block stays in its
  record, and a replay would not get past it.

Known weakness: one question at a time, so a client that reads a wholly rotten segment waits for a round trip a
megabyte.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from metadata.pages import PAGE_MASK, PAGE_SHIFT
from metadata.seams import Buffer
from nbdserver.logdisk.maps import CHECKSUM, OFFSET
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.pacing import guarded
from nbdserver.logdisk.segments import CLEANER_KEEPS
from nbdserver.replication.replica_log import BlockSource, Found
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, MOVE_BLOCK_BYTES
from protocol.peer import BLOCKS_LIMIT

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

MOST_WANTED = 8192

Told = Callable[[bool], None]
"""Called from the loop with whether the block is right now, or lies elsewhere by now."""


class BadBlock(NamedTuple):
    """A block whose content at a place is not what its checksum says."""

    mba: int
    segment: int
    offset: int


class Repairs:
    """Of one open family."""

    def __init__(self, disk: LogDisk) -> None:
        self.repaired_blocks = 0
        self.source: BlockSource | None = None
        self._disk = disk
        self._maps = disk.maps
        self._wanted: dict[int, tuple[BadBlock, list[Told]]] = {}
        self._is_asking = False
        self._is_stopped = False

    def want(self, bad: BadBlock, told: Told) -> None:
        """Have a block repaired that was just found to be bad."""
        wanted = self._wanted.get(bad.mba)
        if wanted is not None:
            wanted[1].append(told)
        elif self.source is None or self._is_stopped or self._disk.failure or len(self._wanted) >= MOST_WANTED:
            self._disk.call_soon(partial(told, False))
        else:
            self._wanted[bad.mba] = bad, [told]
            if not self._is_asking:
                self._is_asking = True
                self._disk.call_soon(self._ask)

    def want_all(self, blocks: Iterable[BadBlock], told: Callable[[set[int]], None]) -> None:
        """The same for several; `told` gets the MBAs of those that nobody has."""
        left = list(blocks)
        waiting = len(left)
        lost: set[int] = set()

        def one_told(mba: int, is_right: bool) -> None:
            nonlocal waiting
            waiting -= 1
            if not is_right:
                lost.add(mba)
            if not waiting:
                told(lost)

        for bad in left:
            self.want(bad, partial(one_told, bad.mba))

    def stop(self) -> None:
        """Repair nothing more; whoever waits is told so."""
        self._is_stopped = True
        wanted, self._wanted = self._wanted, {}
        for _, waiting in wanted.values():
            for told in waiting:
                self._disk.call_soon(partial(told, False))

    def _ask(self) -> None:
        mbas = sorted(self._wanted)[:BLOCKS_LIMIT]
        if not mbas or self.source is None:
            self._is_asking = False
            return
        self.source(mbas, guarded(self._disk.fail, partial(self._arrived, mbas)))

    def _arrived(self, mbas: Sequence[int], found: Found) -> None:
        """Settle one after the other, each when its page of the middle map is there."""
        middle = self._maps.middle
        for at, mba in enumerate(mbas):
            if self._is_stopped:
                return
            number = mba >> PAGE_SHIFT
            if not self._disk.failure and middle.get(number) is None:
                again = guarded(self._disk.fail, partial(self._arrived, mbas[at:], found))
                self._maps.load([(middle, number)], again)
                return
            wanted = self._wanted.pop(mba, None)
            if wanted is None:
                continue
            bad, waiting = wanted
            node, data = found.get(mba, ("", b""))
            is_right = self.repair_block(bad, data, node)
            for told in waiting:
                self._disk.call_soon(partial(told, is_right))
        self._ask()

    def repair_block(self, bad: BadBlock, data: Buffer, node: str) -> bool:
        """Write a block anew with what `node` has for its MBA, if the map still has the bad place; whether what the map
        names is another place now. Its page of the middle map is in memory."""
        disk = self._disk
        page = self._maps.middle.get(bad.mba >> PAGE_SHIFT)
        if disk.failure or page is None:
            return False
        index = bad.mba & PAGE_MASK
        if (page[index], page[OFFSET + index]) != (bad.segment, bad.offset):
            return True
        checksum = page[CHECKSUM + index]
        is_it = len(data) == BLOCK_BYTES and (
            crc32c(bytes(data)) == checksum or not holds(Rule.REPAIR_IS_WHAT_WAS_THERE)
        )
        if not is_it or not self._append(bad, checksum, data):
            return False
        self.repaired_blocks += 1
        if self._maps.segments.lsn[bad.segment] > disk.checkpointer.last_lsn and not disk.checkpointer.running:
            disk.checkpointer.start()
        disk.damage.repaired(bad.mba)
        disk.report("block-repaired", {**bad._asdict(), "from": node})
        return True

    def _append(self, bad: BadBlock, checksum: int, data: Buffer) -> bool:
        disk, maps = self._disk, self._maps
        try:
            if not disk.appending.make_room_for_bytes(MOVE_BLOCK_BYTES + BLOCK_BYTES, CLEANER_KEEPS):
                return False
            crash_point("repair-before-append")
            offset = disk.log.append_move(
                array("Q", (bad.mba,)), array("I", (bad.segment, bad.offset)), array("I", (checksum,)), (data,)
            )
            crash_point("repair-after-append")
            maps.set_middle(bad.mba, disk.log.segment, offset, checksum)
        except OSError as error:
            disk.append_failed(error)
            return False
        except Exception as error:
            disk.parted(error)
            raise
        disk.appending.appended(None)
        return True
