"""What the writers of one family share: room in the log, whether a write may go on inline, and what an append is
followed by.

Rules
- `blocked` is one flag for all reasons why a write may not go on inline. Each writer has a copy of it, because it looks
  at it for every request; the copies change when the flag does.
- A writer reckons with the room that it found; when another one appended, it has to look again.
- Who can wait for a segment that is not made yet waits (`has_to_wait`), so that it is not made on the loop.
- An append that failed changed nothing here; anything unexpected between an append and the end of the map changes
  condemns the family: log and maps have parted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdserver.logdisk.log import Log
from nbdserver.logdisk.segments import CLIENTS_KEEP, LAST_ROOM_BYTES, SegmentPool
from protocol.disk import BLOCK_BYTES, LAYER_ROW, WRITE, body_bytes

if TYPE_CHECKING:
    from nbdserver.logdisk.writer import Writer

_RECORDS_A_CHECK = 64  # after so many the background work looks whether something is due


class Appending:
    """The log of one family as its writers see it."""

    def __init__(
        self,
        log: Log,
        pool: SegmentPool,
        check_background: Callable[[], None],
        append_failed: Callable[[OSError], int],
        parted: Callable[[Exception], None],
    ) -> None:
        self.log = log
        self.pool = pool
        self.check_background = check_background
        self.append_failed = append_failed
        self.parted = parted
        self.blocked = False
        self.batches = self.batch_blocks = self.discards = 0
        self.writers: list[Writer] = []
        self._last: Writer | None = None

    def block(self, blocked: bool) -> None:
        """Send writes to the slow path, or let them go on inline again."""
        if blocked != self.blocked:
            self.blocked = blocked
            for writer in self.writers:
                writer.blocked = blocked

    def make_room(self, extents: int, keep: int, blocks: int = 0) -> bool:
        """Make the open segment have room for a WRITE record; False if there is no further one."""
        return self.make_room_for_bytes(body_bytes(WRITE, extents, blocks) + blocks * BLOCK_BYTES, keep)

    def make_room_for_rows(self, rows: int, keep: int) -> bool:
        """The same for a change of the tree of layers."""
        return self.make_room_for_bytes(rows * LAYER_ROW.size, keep)

    def make_room_for_bytes(self, size_bytes: int, keep: int) -> bool:
        """The same for a record with so much body and data."""
        log = self.log
        if not log.begin_if_needed():
            return False
        if log.has_room_for_bytes(size_bytes + LAST_ROOM_BYTES) or (
            log.has_room_for_bytes(size_bytes) and not self.pool.kept_of_open_bytes(keep)
        ):
            return True
        return self.next_segment(keep) and log.has_room_for_bytes(size_bytes)

    def has_to_wait(self, size_bytes: int, keep: int) -> bool:
        """Whether a record with so much body and data needs a segment that is being made, which now is begun if it was
        not; the slow path is woken when it is there."""
        log, pool = self.log, self.pool
        if not log.offset:
            return not pool.is_there(log.segment) and pool.can_take(CLIENTS_KEEP) and pool.make_ahead(log.segment)
        if log.has_room_for_bytes(size_bytes):
            return False
        return not pool.is_at_hand(keep) and pool.can_take(keep) and pool.make_ahead()

    def next_segment_at_hand(self, keep: int) -> bool:
        """Go on in another segment, if that needs no waiting."""
        return not self.has_to_wait(self.pool.record_bytes, keep) and self.next_segment(keep)

    def next_segment(self, keep: int) -> bool:
        """Go on in another segment, if one is to be had."""
        if not self.log.next_segment(keep):
            return False
        # What is accepted from now on may find no further segment: it takes the way that can wait for one.
        if not self.pool.can_take():
            self.block(True)
        self.check_background()
        return True

    def appended(self, writer: Writer | None) -> None:
        """Somebody appended to the log: None if it was no writer."""
        last = self._last
        if last is not writer:
            if last is not None:
                last.forget_room()
            self._last = writer
        if self.log.records % _RECORDS_A_CHECK == 0:
            self.check_background()
