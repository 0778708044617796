"""Opening a family: what a crash left is replayed and made durable, and how it was opened is noted.

Theory. A family on one node is opened to order modifications at once, under a new epoch, and a checkpoint at the
recovered lsn is its first act. A *replicated* one is opened as a replica that orders nothing, unless an epoch is given
for it, and may be cut at its last modification in common with the others. Its checkpoint has to wait for the committed
txid; what it notes instead is a splice.

Rules
- Before anything is served: the replayed tail is durable, and that the log goes on elsewhere
  (Rule.TAIL_SYNCED_BEFORE_SERVING, Rule.CUT_IS_DURABLE_FIRST).
- An epoch is begun only if it is later than every one that was seen.
- Whether acknowledged writes may be gone is known here alone. A family on one node raises its generation then; a
  replica forgets its former incarnations then.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from metadata.epochs import read_epochs
from metadata.family_state import Checkpoint, Family, OpenState, put_open_state, read_checkpoint, read_pending_holes
from metadata.replica_state import (
    ReplicaState,
    Splice,
    delete_splices,
    put_replica_state,
    put_splice,
    read_replica_state,
    read_splices,
)
from metadata.seams import Batch, Files, Store
from nbdserver.logdisk.committed import Committed
from nbdserver.logdisk.log import Log
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.recovery import Recovered, RecoveryError, Replay
from nbdserver.logdisk.segments import SegmentPool
from protocol.peer import Position

Report = Callable[[str, dict[str, object]], None]


@dataclass(frozen=True)
class Replicated:
    """How a replica is opened."""

    cut_at: Position | None = None  # what follows it does not count
    starts_over: bool = False  # as an empty one


@dataclass(frozen=True)
class Opened:
    """What an opening came to."""

    log: Log
    state: OpenState
    replica: ReplicaState | None  # None: of a family on one node


def load_maps(maps: Maps, store: Store, family: Family, start: Checkpoint) -> None:
    """The maps as of the last checkpoint, but for their pages. DamagedValueError, InvariantError."""
    maps.segments.load(store.range(*maps.segments.key_range()))
    maps.regions.load(store.range(*maps.regions.key_range()))
    maps.tree.load(store, family.size_bytes)
    maps.take_holes(read_pending_holes(store))
    maps.next_mba, maps.next_hole, maps.live_blocks = start.next_mba, start.next_hole, start.live_blocks


class Opening:
    """Opens one family's log into `maps` and `pool`."""

    def __init__(
        self, files: Files, store: Store, pool: SegmentPool, maps: Maps, family: Family, report: Report,
        progress: Callable[[int], None], failed: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._files = files
        self._store = store
        self._pool = pool
        self._maps = maps
        self._family = family
        self._report = report
        self._progress = progress
        self._failed = failed
        self._start = read_checkpoint(store)
        self._history = read_epochs(store, self._start.epoch, self._start.txid)
        self._splices = read_splices(store)
        self._replica = read_replica_state(store)

    def run(
        self, rng: random.Random, before: OpenState, epoch: int | None, boot_id: str, replicated: Replicated | None
    ) -> Opened:
        """Waits for the disk. Raises RecoveryError, DamagedValueError, InvariantError or OSError."""
        maps, store, start = self._maps, self._store, self._start
        if epoch is not None:
            self._refuse_old_epoch(epoch, max(before.epoch, self._replica.promised_epoch))
        load_maps(maps, store, self._family, start)
        self._pool.adopt(maps.segments.in_use)
        replay = Replay(
            self._files, store, self._pool, maps, self._family.family, self._history, self._splices, self._progress
        )
        recovered = replay.run(start, replicated.cut_at if replicated is not None else None)
        self._pool.drop_short()
        # A clean end of a family on one node has no record behind its checkpoint.
        clean = before.clean and not recovered.is_cut and (replicated is not None or not recovered.records)
        if not clean:
            if holds(Rule.TAIL_SYNCED_BEFORE_SERVING):
                self._files.fdatasync(replay.rewrite_tail(recovered.tail))
            crash_point("replay-after-tail")
            self._report("recovered", {"records": recovered.records, "blocks": recovered.blocks})
        log = self._log(rng, before, recovered, replicated)
        state, replica = self._states(rng, before, clean, boot_id, replicated)
        if epoch is not None:
            state, replica = replace(state, epoch=epoch), replace(replica, promised_epoch=epoch)
            log.begin_epoch(epoch)
            maps.begin_epoch(epoch)
        batch = store.batch()
        if not clean:
            fresh = replay.begin_fresh_segment(log, splice=replicated is not None)
            if replicated is not None and fresh:
                self._splice(batch, log, recovered)
        put_open_state(batch, state)
        if replicated is not None:
            put_replica_state(batch, replica)
        crash_point("splice-before-store")
        store.write(batch)
        crash_point("splice-after-store")
        return Opened(log, state, replica if replicated is not None else None)

    def _refuse_old_epoch(self, epoch: int, last: int) -> None:
        if epoch <= last:
            raise RecoveryError(f"epoch {epoch} is not later than {last}, under which it was last opened")

    def _log(self, rng: random.Random, before: OpenState, recovered: Recovered, replicated: Replicated | None) -> Log:
        committed = Committed() if replicated is None else Committed(self._start.txid)
        log = Log(
            self._files, self._pool, self._maps.segments, rng, self._family.family, recovered.position, before.epoch,
            self._history, committed, self._failed,
        )  # fmt: skip
        log.splices.update(self._splices)
        return log

    def _splice(self, batch: Batch, log: Log, recovered: Recovered) -> None:
        """The log goes on in the open segment, which no seal names; what is noted of later records is void."""
        lsn = recovered.position.lsn
        void = [each for each in self._splices if each > lsn]
        delete_splices(batch, void)
        log.splices.difference_update(void)
        if holds(Rule.CUT_IS_DURABLE_FIRST):
            put_splice(batch, Splice(lsn, log.segment, log.sequence, log.salt))
            log.splices.add(lsn)

    def _states(
        self, rng: random.Random, before: OpenState, clean: bool, boot_id: str, replicated: Replicated | None
    ) -> tuple[OpenState, ReplicaState]:
        generation = before.generation
        may_have_lost = not (before.clean if replicated is not None else clean) and before.boot_id != boot_id
        if may_have_lost and replicated is None:
            generation += 1
            reason = "power loss or reboot while open"
            self._report("generation-raised", {"generation": generation, "reason": reason})
        return OpenState(generation, before.epoch, False, boot_id), self._replica.opened(rng, may_have_lost)
