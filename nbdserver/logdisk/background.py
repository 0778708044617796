"""What goes on beside the clients: when a checkpoint, the cleaner, the hole worker and the pool of files get their
turn.

Theory. One place decides, from a few numbers, on each new segment, every some records, and four times a second while
something happens:
- files made ahead, where clients stream;
- a checkpoint when the log since the last one is long, when too many map pages wait for one, when segments wait to be
  freed, or after `checkpoint_interval_s` with any change;
- the taking apart of layers that nothing needs (tree_work.py);
- the cleaner when there is more garbage than may lie about (more may under load than at rest or when room gets short),
  or when the disk is full;
- writes are *blocked* (sent to the slow path, where they wait or get ENOSPC) while no further segment can be had for
  clients or the pages that wait for a checkpoint fill the cache.

A family at rest is looked at less and less often, down to once in _LONGEST_TICK_S: a node may have a thousand of them.
What may bring work ends that (`stir`): a new segment, 64 records, a request that had to wait, a page read from LevelDB,
another limit. A few records alone do not: what they bring is at most _LONGEST_TICK_S late.

The hole worker settles what lies under pending holes (maps.py), the pages in memory first, then those that LevelDB has.
"""

from itertools import islice
from typing import TYPE_CHECKING

from metadata.family_state import PendingHole
from metadata.pages import PAGE_SHIFT
from metadata.seams import Clock, Timer
from nbdserver.logdisk.pacing import guarded
from protocol.disk import BLOCK_BYTES

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_TICK_S = 0.25
_LONGEST_TICK_S = 8.0  # at rest
_CALM_SHARE = 0.125  # of a segment appended in a tick: below it there is time to write files ahead
_TRIM_SPARE_S = 20.0  # what lay unused for two looks is gone within a minute
_PINNED_SHARE = 0.5  # of the cache's pages that may wait for a checkpoint before one starts
_BLOCKING_SHARE = 0.9
_WORTHWHILE_GAIN = 0.02  # of the live data: less garbage than that is not cleaned up even on a full disk
_WAITING_SEGMENTS = 4  # empty segments that are worth a checkpoint
_EVICTIONS_A_CHECK = 256  # some 0.1 ms
_HOLE_PAGES = 16  # settled at a time
_HOLE_KEYS = 256  # looked at in LevelDB at a time


class Background:
    """Schedules the background work of one LogDisk."""

    def __init__(self, disk: "LogDisk", clock: Clock) -> None:
        self.busy = False  # a hole is being worked in
        self._disk = disk
        self._clock = clock
        self._overrun = False
        self._stopped = False
        self._last_txid = disk.log.txid
        self._last_appended = disk.log.appended_bytes
        self._last_trim_s = clock.now()
        self._seen = self._numbers()
        self._tick_s = _TICK_S
        self._tick = guarded(disk.fail, self._tick_once)
        self.check = guarded(disk.fail, self._check_when_asked)
        self._timer: Timer | None = None

    def begin(self) -> None:
        """From now on, on the loop."""
        self._timer = self._clock.call_later(_TICK_S, self._tick)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped = True
        self._stop_timer()

    def stir(self) -> None:
        """Something happens: look often again."""
        if self._tick_s > _TICK_S and not self._stopped:
            self._stop_timer()
            self._tick_s = _TICK_S
            self._timer = self._clock.call_later(_TICK_S, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # -- deciding

    def _check_when_asked(self) -> None:
        self.stir()
        self._check()

    def _check(self) -> None:
        """Start what is due."""
        disk = self._disk
        if self._stopped or disk.failure:
            return
        if self._checkpoint_due():
            disk.checkpointer.start()
        room = disk.pool.can_take()
        disk.pool.note_full(not room)
        disk.cleaner.urgent = not room
        if not disk.cleaner.running:
            idle = disk.log.txid == self._last_txid
            if disk.cleaner.wanted(thorough=idle or disk.pool.is_short()):
                disk.cleaner.start()
        self._overrun = disk.cleaner.is_overrun()
        disk.appending.block(not room or self._overrun or self.must_wait_for_checkpoint())
        disk.maps.logical.evict(_EVICTIONS_A_CHECK)
        disk.maps.middle.evict(_EVICTIONS_A_CHECK)
        if not self._is_calm():
            disk.pool.make_ahead()
        self._work_holes()
        disk.tree_work.check()
        disk.slow_path.wake()

    def work_finished(self) -> None:
        """A checkpoint or the cleaner of one segment came to its end: someone may wait for what that brought."""
        if self._disk.cleaner.urgent or self._disk.appending.blocked:
            self._clock.call_soon(self.check)

    def can_gain_room(self) -> bool:
        """Whether waiting may bring room: something is being freed or cleaned, or could be."""
        disk = self._disk
        disk.pool.trim_to_budget()
        if disk.checkpointer.running or disk.cleaner.running or disk.pool.is_busy:
            return True
        if self._empty_segments():
            disk.checkpointer.start()
            return True
        disk.cleaner.urgent = True
        gain = max(disk.pool.segment_bytes, int(disk.maps.live_blocks * BLOCK_BYTES * _WORTHWHILE_GAIN))
        return disk.cleaner.garbage_bytes > gain and disk.cleaner.start()

    def must_wait_for_cleaner(self) -> bool:
        """Whether garbage grows faster than it is cleaned up."""
        return self._overrun

    def must_wait_for_checkpoint(self) -> bool:
        """Whether so many pages wait for a checkpoint that no further one may be changed."""
        return self._pinned_share() > _BLOCKING_SHARE

    def _checkpoint_due(self) -> bool:
        disk = self._disk
        if disk.checkpointer.running:
            return False
        if self._pinned_share() > _PINNED_SHARE:
            return True
        if disk.log.lsn == disk.checkpointer.last_lsn and not disk.maps.moved_keys:
            return False
        empty = self._empty_segments()
        return (
            disk.checkpointer.bytes_since >= disk.settings.checkpoint_bytes
            or empty >= _WAITING_SEGMENTS
            or (empty > 0 and not disk.pool.can_take())
            or self._clock.now() - disk.checkpointer.started_at > disk.settings.checkpoint_interval_s
        )

    def _empty_segments(self) -> int:
        table = self._disk.maps.segments
        open_is_empty = not table.live[self._disk.log.segment] if self._disk.log.offset else False
        return len(table.in_use) - table.segments_with_live_blocks - open_is_empty

    def _pinned_share(self) -> float:
        maps = self._disk.maps
        return max(each.pinned_pages / each.limit_pages for each in (maps.logical, maps.middle))

    def _tick_once(self) -> None:
        disk = self._disk
        if self._stopped or disk.failure:
            return
        self._check()
        disk.pool.ballast.guard_metadata()
        disk.pool.trim_to_budget()
        if disk.log.offset:  # a volume that was never written takes no room
            disk.pool.keep_ready(self._is_calm())
        now_s = self._clock.now()
        if now_s - self._last_trim_s >= _TRIM_SPARE_S:
            self._last_trim_s = now_s
            disk.pool.trim_spare(disk.maps.live_blocks * BLOCK_BYTES)
            if self._empty_segments() > 0:
                disk.checkpointer.start()
        self._last_txid = disk.log.txid
        self._last_appended = disk.log.appended_bytes
        numbers = self._numbers()
        at_rest = numbers == self._seen and not self._is_at_work()
        self._seen = numbers
        self._tick_s = min(2 * self._tick_s, _LONGEST_TICK_S) if at_rest else _TICK_S
        self._timer = self._clock.call_later(self._tick_s, self._tick)

    def _is_calm(self) -> bool:
        """Whether little was appended since the last tick."""
        appended_bytes = self._disk.log.appended_bytes - self._last_appended
        return appended_bytes < _CALM_SHARE * self._disk.pool.segment_bytes

    def _numbers(self) -> tuple[int, ...]:
        """They change when anything happens."""
        disk = self._disk
        maps, pool = disk.maps, disk.pool
        return (
            disk.log.lsn,
            disk.checkpointer.count,
            len(pool.spare),
            pool.unlinked,
            maps.logical.resident_pages,
            maps.middle.resident_pages,
            maps.logical.loads + maps.middle.loads,
        )

    def _is_at_work(self) -> bool:
        """Whether something is under way, or waits for its turn."""
        disk = self._disk
        return bool(
            disk.checkpointer.running
            or disk.cleaner.running
            or disk.pool.is_busy
            or self.busy
            or disk.tree_work.layer
            or disk.slow_path.under_way
            or disk.appending.blocked
            or self._empty_segments() > 0
            or disk.pool.has_surplus(disk.maps.live_blocks * BLOCK_BYTES)
        )

    # -- holes

    def _work_holes(self) -> None:
        """Work pending holes in, oldest first."""
        if not self.busy and not self._stopped and self._disk.maps.holes:
            self.busy = True
            self._work_hole(self._disk.maps.holes[0])

    def _work_hole(self, hole: PendingHole) -> None:
        maps = self._disk.maps
        if self._stopped or self._disk.failure:
            self.busy = False
            return
        if self.must_wait_for_checkpoint():
            disk = self._disk
            disk.checkpointer.when_done(guarded(disk.fail, lambda: self._work_hole(hole)))
            return
        stale = sorted(islice(maps.stale, _HOLE_PAGES))
        if stale:
            maps.load(
                [(maps.logical, number) for number in stale], guarded(self._disk.fail, lambda: self._work_hole(hole))
            )
            return
        last = (hole.first_lba + hole.count - 1) >> PAGE_SHIFT
        if hole.cursor > last:
            maps.hole_done(hole)
            self.busy = False
            self._work_holes()
            self._disk.slow_path.wake()
            return
        start = maps.logical.key_range(hole.cursor)[0]
        stop = maps.logical.key_range(last)[1]
        self._disk.read_store(
            [(start, stop)], guarded(self._disk.fail, lambda items: self._found(hole, last, items[0])), _HOLE_KEYS
        )

    def _found(self, hole: PendingHole, last: int, items: list[tuple[bytes, bytes]]) -> None:
        maps = self._disk.maps
        numbers = sorted({maps.logical.page_of_key(key) for key, _ in items})
        if not numbers:
            hole.cursor = last + 1
            self._work_hole(hole)
            return
        here = numbers[:_HOLE_PAGES]

        def settled() -> None:
            if not any(number <= here[-1] for number in maps.stale):
                hole.cursor = max(hole.cursor, here[-1] + 1)
            self._clock.call_soon(guarded(self._disk.fail, lambda: self._work_hole(hole)))

        missing = [number for number in here if maps.logical.get(number) is None]
        if missing:
            maps.load([(maps.logical, number) for number in missing], guarded(self._disk.fail, settled))
        else:
            settled()
