"""Checkpoints: the state at exactly one txid goes from memory to LevelDB in one atomic, synced batch.

    freeze ──► encode in slices of the loop ──┐
       ├─────► fdatasync of the log, off the loop ┼─► synced batch ──► segments without live blocks are free
       └─────► (replicas: committed) ─────────────┘

Theory. `freeze` notes the position of the log and moves the sets of changes aside, in constant time; copy-on-write
(metadata/pages) keeps the values. Meanwhile clients go on. The batch is written when it is built *and* the log is
synced up to the frozen position, so the maps never name a block that a power cut can take back.

Rules
- The batch is written only behind an fdatasync that covers the frozen lsn (Rule.CHECKPOINT_BEHIND_SYNC), and when
  every replica has what it holds (Rule.CHECKPOINT_BEHIND_COMMIT).
- A segment becomes free only here: its last live block was gone in the frozen state and it holds no newer record
  (Rule.FREE_ONLY_IN_CHECKPOINT), and it is handed out only when the batch is synced (Rule.REUSE_AFTER_BATCH_SYNCED).
- One checkpoint at a time. A batch that cannot be written is fatal for the family: memory and LevelDB have parted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from metadata.epochs import put_epochs
from metadata.family_state import Checkpoint, PendingHole, put_checkpoint, put_pending_holes
from metadata.replica_state import delete_splices
from metadata.seams import Batch, Clock, Store
from metadata.segment_table import FrozenRows
from nbdserver.logdisk.log import Log
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.pacing import Job, guarded
from nbdserver.logdisk.segments import SegmentPool
from nbdserver.logdisk.store_writes import StoreWrites
from protocol.invariant import invariant

_KEYS_A_STEP = 256


@dataclass
class _Frozen:
    position: Checkpoint
    rows: FrozenRows
    holes: list[PendingHole]
    holes_gone: list[int]
    stamps: dict[int, int]
    stale_stamps: dict[int, int]
    moved: list[bytes]
    number: int
    epochs: list[tuple[int, int]]
    splices: list[int]


class Checkpointer:
    """Makes checkpoints of one family; `start` when one is wanted."""

    def __init__(
        self,
        clock: Clock,
        store: Store,
        writes: StoreWrites,
        log: Log,
        maps: Maps,
        pool: SegmentPool,
        finished: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        self.running = False
        self.count = 0
        self.values_written = 0
        self.last_position_bytes = log.appended_bytes
        self.last_lsn = log.lsn
        self.synced_txid = log.committed.txid  # where LevelDB stands: at an opening nothing later is committed
        self.started_at = clock.now()
        self._clock = clock
        self._store = store
        self._writes = writes
        self._log = log
        self._maps = maps
        self._pool = pool
        self._finished = finished
        self._failed = failed
        self._written_holes: set[int] = {hole.hole for hole in maps.holes}
        self._written_epochs: list[tuple[int, int]] = []
        self._waiting: list[Callable[[], None]] = []
        self._waiting_for_running: list[Callable[[], None]] = []
        self._again = False
        self._job: Job | None = None
        self._stopped = False
        self.also: Callable[[Batch], None] | None = None  # puts more into the next batch

    @property
    def bytes_since(self) -> int:
        """Bytes of log that a recovery would have to replay, since the last one started."""
        return self._log.appended_bytes - self.last_position_bytes

    def when_done(self, callback: Callable[[], None]) -> None:
        """Start one, or another one if one is running, and call back after it."""
        self._waiting.append(callback)
        if self.running:
            self._again = True
        else:
            self.start()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call back after the one that is running."""
        invariant(self.running, "a checkpoint is running")
        self._waiting_for_running.append(callback)

    def start(self) -> None:
        """Begin a checkpoint unless one is running."""
        if self.running or self._log.is_failed or self._stopped:
            return
        self.running = True
        if not holds(Rule.FREE_ONLY_IN_CHECKPOINT):
            live = self._maps.segments.live
            self._free([each for each in self._maps.segments.in_use if not live[each] and each != self._log.segment])
        frozen = self._freeze()
        batch = self._store.batch()
        if self.also is not None:
            self.also(batch)
            self.also = None
        self._waiting_for_running, self._waiting = self._waiting, []
        parts = 3

        def part_done() -> None:
            nonlocal parts
            parts -= 1
            if not parts and not self._log.is_failed and not self._stopped:
                self._write(batch, frozen)

        crash_point("checkpoint-frozen")
        self._job = Job(self._clock, self._encode(batch, frozen), part_done, self._broken)
        if holds(Rule.CHECKPOINT_BEHIND_SYNC):
            self._log.sync(lambda errno: None if errno else part_done())
        else:
            part_done()
        if self._log.committed.txid < frozen.position.txid:
            crash_point("checkpoint-before-commit")
        if holds(Rule.CHECKPOINT_BEHIND_COMMIT):
            self._log.committed.when_reached(frozen.position.txid, guarded(self._failed, part_done))
        else:
            part_done()

    def make_now(self) -> None:
        """Make one at once, of a log that is synced; waits for the disk: starting only. OSError if it cannot."""
        batch = self._store.batch()
        frozen = self._freeze()
        for _ in self._encode(batch, frozen):
            pass
        crash_point("checkpoint-before-batch")
        self._store.write(batch)
        self._finish(frozen)

    def abandon(self) -> None:
        """The family failed: nothing is written any more; those who wait are told so that they can see it."""
        if self._job is not None:
            self._job.stop()
        self.look_again()

    def look_again(self) -> None:
        """Whoever waits looks anew whether it has to: it may be over for another reason, and a replica's checkpoint may
        wait for ever for what is never committed."""
        waiting, self._waiting = self._waiting + self._waiting_for_running, []
        self._waiting_for_running = []
        for callback in waiting:
            self._clock.call_soon(callback)

    def stop(self) -> None:
        """The one that is running ends without an outcome, and no further one begins. None is being written."""
        invariant(not self._writes.busy, "a batch is not stopped while it is written")
        self.end()
        if self._job is not None:
            self._job.stop()

    def end(self) -> None:
        """No further one begins: the store may be another disk's by now."""
        self._stopped = True

    def hurry(self) -> None:
        """Finish encoding at once."""
        if self._job is not None:
            self._job.hurry()

    def _freeze(self) -> _Frozen:
        maps, log = self._maps, self._log
        maps.logical.freeze()
        maps.middle.freeze()
        maps.regions.freeze()
        maps.tree.freeze()
        self.last_position_bytes = log.appended_bytes
        self.last_lsn = log.lsn
        self.started_at = self._clock.now()
        pending = {hole.hole for hole in maps.holes}
        frozen = _Frozen(
            log.position(maps.next_mba, maps.next_hole, maps.live_blocks),
            maps.segments.freeze(log.segment if log.offset else 0, log.sequence, log.lsn),
            [replace(hole) for hole in maps.holes],
            sorted(self._written_holes - pending),
            maps.stamps(),
            maps.stale_stamps(),
            maps.moved_keys,
            maps.tree.next_checkpoint - 1,
            log.history.up_to(log.txid),
            [lsn for lsn in log.splices if lsn <= log.lsn],
        )
        maps.moved_keys = []
        self._written_holes = pending
        return frozen

    def _encode(self, batch: Batch, frozen: _Frozen) -> Iterator[int]:
        maps = self._maps
        put_checkpoint(batch, frozen.position)
        put_pending_holes(batch, frozen.holes, frozen.holes_gone)
        delete_splices(batch, frozen.splices)
        if frozen.epochs != self._written_epochs:
            put_epochs(batch, frozen.epochs)
        for steps in (
            maps.tree.encode(batch),
            _delete(batch, frozen.moved),
            maps.segments.encode(batch, frozen.rows),
            maps.logical.encode(batch, frozen.stamps, maps.stale, frozen.stale_stamps),
            maps.middle.encode(batch, {}, {}, {}),
            maps.regions.encode(batch),
        ):
            for values in steps:
                self.values_written += values
                yield values

    def _write(self, batch: Batch, frozen: _Frozen) -> None:
        crash_point("checkpoint-before-batch")
        if not holds(Rule.REUSE_AFTER_BATCH_SYNCED):
            self._free(frozen.rows.dead)
            frozen.rows.dead.clear()
        self._pool.ballast.guard_metadata()
        if frozen.moved:
            # Whoever reads two layers while entries move between them may miss them in both.
            self._maps.tree.moving = True
            self._maps.tree.version += 1
        self._writes.write_later(batch, guarded(self._failed, lambda errno: self._written(errno, frozen)))

    def _written(self, errno: int, frozen: _Frozen) -> None:
        if errno:
            self._failed(f"LevelDB refused a checkpoint (errno {errno})")
            return
        self._finish(frozen)
        self.running = False
        self._job = None
        waiting, self._waiting_for_running = self._waiting_for_running, []
        for callback in waiting:
            callback()
        self._finished()
        if self._again:
            self._again = False
            self.start()

    def _finish(self, frozen: _Frozen) -> None:
        crash_point("checkpoint-after-batch")
        self._maps.tree.synced_checkpoint = frozen.number
        self.synced_txid = frozen.position.txid
        self._written_epochs = frozen.epochs
        self._log.splices.difference_update(frozen.splices)
        if frozen.moved:
            self._maps.tree.moving = False
            self._maps.tree.version += 1
        self._maps.logical.thaw()
        self._maps.middle.thaw()
        self._free(frozen.rows.dead)
        self.count += 1

    def _free(self, dead: list[int]) -> None:
        for segment in dead:
            self._maps.segments.free(segment)
            self._pool.freed(segment)

    def _broken(self, error: Exception) -> None:
        self._failed(f"a checkpoint could not be built: {error!r}")


def _delete(batch: Batch, keys: list[bytes]) -> Iterator[int]:
    for first in range(0, len(keys), _KEYS_A_STEP):
        for key in keys[first : first + _KEYS_A_STEP]:
            batch.delete(key)
        yield min(_KEYS_A_STEP, len(keys) - first)
