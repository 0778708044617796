"""One replica of a family as replication sees it: a ReplicaLog (nbdserver/replication/replica_log.py) over a log disk.

Theory. A replica is a log disk that appends what another node has ordered, or orders itself once it has begun an
epoch. What the two have in common is the log disk's; what a replica has besides is here: who it is (incarnation,
promised epoch), the order of what is done to it (`Ordered`), its log read back, and that it can be cut and skip.

A log is *cut* by opening it anew (opening.py); where that is not possible it *starts over* (starting_over.py). It
*skips* by a checkpoint: the maps as they are, but at another's position and with its history, the layers made the
other's, and the regions that differ noted as to be fetched, all in one batch (Rule.SKIP_NOTES_WHAT_IS_LACKING).

Rules
- While the disk is closed and opened again, whatever changes the replica waits until it is open.
- A log is not cut below what was committed when a region was fetched last: the copy may be what would go.
- Nothing is appended between the moment when a skip is frozen and the one when it is durable.
- What is persisted here goes through `disk.store_writes`, in the order of the calls.
- While regions are to be fetched no layer is taken apart: what a layer shows is not known.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from metadata.layers import Row, unpack_rows
from metadata.ranges import runs_of
from metadata.region_table import REGION_BLOCKS, REGION_BYTES
from metadata.replica_state import ReplicaState, put_replica_state
from metadata.seams import Batch, Done, Files
from nbdserver.logdisk.blocks_reading import BlocksReading
from nbdserver.logdisk.disk import DiskError, LogDisk
from nbdserver.logdisk.log_reading import LogReading
from nbdserver.logdisk.opening import Replicated
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.region_copies import CopyApplying
from nbdserver.logdisk.region_digests import RegionDigests
from nbdserver.logdisk.region_reading import RegionReading
from nbdserver.logdisk.region_states import region_state
from nbdserver.logdisk.replica_append import Ordered, ReplicaAppend
from nbdserver.logdisk.segments import CLIENTS_KEEP
from nbdserver.replication.replica_log import BlockSource
from protocol.disk import LAYER_ROW, NAMELESS
from protocol.invariant import invariant
from protocol.peer import BEGINNING, RUNS_LIMIT, Copy, Epochs, Modification, Position, RegionState, Runs

ROOM_S = 0.25
"""For so long it is believed how many segments can be had, while none is begun: others use the same file system."""

Opener = Callable[[Replicated, Callable[["LogDisk | DiskError"], None]], None]
"""Opens the family's disk again, which is closed, without an epoch; hands it over on the loop, or why there is none."""


class Replica:
    """One replica's log and maps, open. All methods are for the loop's thread; see ReplicaLog."""

    def __init__(self, disk: LogDisk, open_again: Opener, files: Files) -> None:
        """`disk` was opened as a replica's, without an epoch."""
        self._open_again = open_again
        self._waiting: list[Callable[[], None]] = []  # for the end of a cut
        self.is_being_cut = False
        self._files = files
        self._source: BlockSource | None = None
        self._room_bytes = 0  # of segments that can be had
        self._room_segment = -1  # that was the open one then
        self._room_until_s = 0.0
        self._take(disk)

    def _take(self, disk: LogDisk) -> None:
        invariant(disk.replica_state is not None, "a replica is opened as one")
        assert disk.replica_state is not None
        self.disk = disk
        self._state: ReplicaState = disk.replica_state
        self._ordered = Ordered(disk)
        self._appending = ReplicaAppend(disk, self._ordered)
        self._copies = CopyApplying(disk, self._ordered)
        self._reading = LogReading(disk, self._files)
        disk.repairs.source = self._source

    # -- who and where

    @property
    def incarnation(self) -> int:
        return self._state.incarnation

    @property
    def incarnations(self) -> Sequence[int]:
        return self._state.incarnations

    @property
    def promised_epoch(self) -> int:
        return self._state.promised_epoch

    @property
    def last(self) -> Position:
        return self.disk.log.last

    @property
    def durable(self) -> Position:
        return self.disk.log.durable

    @property
    def committed_txid(self) -> int:
        return self.disk.log.committed.txid

    @property
    def room_bytes(self) -> int:
        """What the open segment, the spare ones and those that can be made have room for, but for the reserve; at most
        a few segments are looked at, and those not at each call."""
        disk = self.disk
        log, pool = disk.log, disk.pool
        now_s = disk.clock.now()
        if now_s >= self._room_until_s or log.segment != self._room_segment:
            self._room_bytes = pool.segments_to_be_had(CLIENTS_KEEP) * pool.segment_bytes
            self._room_segment, self._room_until_s = log.segment, now_s + ROOM_S
        return self._room_bytes + (max(0, pool.segment_bytes - log.offset) if log.offset else 0)

    @property
    def epochs(self) -> Epochs:
        log = self.disk.log
        return log.history.ends(log.txid)

    @property
    def tree(self) -> bytes:
        """Of an owner: the rows of all layers, as they are at `last`."""
        layers = self.disk.maps.tree.layers
        return b"".join(layers[layer].row.pack() for layer in sorted(layers))

    # -- an owner's

    def begin_epoch(self, epoch: int) -> None:
        """InvariantError if it is not later than every other, or was not promised."""
        disk = self.disk
        invariant(epoch <= self._state.promised_epoch, "an epoch is promised before it begins")
        disk.log.begin_epoch(epoch)
        disk.maps.begin_epoch(epoch)
        disk.opened = replace(disk.opened, epoch=epoch)

    def tap(self, tap: Callable[[Modification], None] | None) -> None:
        self.disk.log.tap = tap
        if tap is None:
            self.disk.stop_ordering()

    # -- a replica's

    def promise(self, epoch: int, done: Done) -> None:
        """EINVAL for one that is lower than what was promised."""
        if self._waits(partial(self.promise, epoch, done)):
            return
        if epoch < self._state.promised_epoch:
            self.disk.call_soon(lambda: done(errnos.EINVAL))
            return
        self._state = replace(self._state, promised_epoch=epoch)
        self._persist(lambda batch: put_replica_state(batch, self._state), done)

    def append(self, modifications: Sequence[Modification], done: Done) -> None:
        if not self._waits(partial(self.append, modifications, done)):
            self._appending.submit(modifications, done)

    def append_now(self, modifications: Sequence[Modification]) -> int | None:
        return None if self.is_being_cut else self._appending.at_once(modifications)

    def settle(self, done: Done) -> None:
        if self._waits(partial(self.settle, done)):
            return
        self._appending.give_up()
        self._ordered.submit(lambda: 0, done)

    def set_committed(self, txid: int) -> None:
        self.disk.log.committed.reach(txid)

    def sync(self, done: Done) -> None:
        if not self._waits(partial(self.sync, done)):
            self.disk.flush(done)

    # -- logs that differ

    def modifications(
        self, after: Position, limit_bytes: int, done: Callable[[int, Sequence[Modification] | None], None]
    ) -> None:
        self._reading.read(after, limit_bytes, done)

    def log_bytes_after(self, txid: int) -> int:
        """See LogReading.bytes_after."""
        return self._reading.bytes_after(txid)

    def cut(self, at: Position, done: Done) -> None:
        if self._waits(partial(self.cut, at, done)):
            return
        disk = self.disk
        call_soon = disk.call_soon
        if at == disk.log.last:
            call_soon(lambda: done(0))
        elif at > disk.log.last or disk.log.history.position(at.txid) != at:
            call_soon(lambda: done(errnos.EINVAL))
        elif at.txid >= max(disk.checkpointer.synced_txid, self._state.fetched_txid):
            self._cut(Replicated(cut_at=at), done)
        elif at == BEGINNING:
            self._cut(Replicated(starts_over=True), done)
        else:
            call_soon(lambda: done(errnos.ENOENT))

    def _cut(self, replicated: Replicated, done: Done) -> None:
        self.is_being_cut = True

        def opened(disk: LogDisk | DiskError) -> None:
            failed = bool(self.disk.failure)
            if isinstance(disk, DiskError):
                self.disk.report("not-cut", {"reason": str(disk)})
                failed = True
            else:
                self._take(disk)
            self.is_being_cut = False
            done(errnos.EIO if failed else 0)
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                each()

        self.disk.close(lambda: self._open_again(replicated, opened))

    def _waits(self, again: Callable[[], None]) -> bool:
        """Whether the disk is being opened again: then `again` is called when that is over."""
        if self.is_being_cut:
            self._waiting.append(again)
        return self.is_being_cut

    def skip(self, to: Position, epochs: Epochs, regions: Runs, tree: bytes, done: Done) -> None:
        """EINVAL if it would not go forward, or what it says does not hold together."""
        if self._waits(partial(self.skip, to, epochs, regions, tree, done)):
            return
        is_frozen = is_done = False

        def step() -> int | None:
            nonlocal is_frozen
            disk = self.disk
            if is_frozen:
                return 0 if is_done else None
            # What `to` follows is committed with it: a checkpoint that waits for that can end.
            disk.log.committed.reach(min(to.txid, disk.log.txid))
            if disk.checkpointer.running:
                disk.checkpointer.when_idle(self._ordered.go_on)
                return None
            if disk.tree_work.layer:
                disk.slow_path.park(self._ordered.go_on)
                return None
            rows = unpack_rows(tree) if len(tree) % LAYER_ROW.size == 0 else []
            if to.txid < disk.log.txid or (BEGINNING, *epochs)[-1] != to or not _is_tree(rows):
                return errnos.EINVAL
            self._skip(to, epochs, regions, rows, skipped)
            is_frozen = True
            return None

        def skipped() -> None:
            nonlocal is_done
            crash_point("skip-after-batch")
            is_done = True
            self._ordered.go_on()

        self._ordered.submit(step, done, must_end=True)

    def _skip(self, to: Position, epochs: Epochs, regions: Runs, rows: list[Row], skipped: Callable[[], None]) -> None:
        disk = self.disk
        is_empty = disk.log.last == BEGINNING and not disk.resync
        disk.log.skip(to, epochs)
        disk.log.committed.reach(to.txid)
        tree = disk.maps.tree
        kept = {row.layer for row in rows}
        # What is not here any more was merged here already; it has no name and gets no further child.
        rows = [row for row in rows if row.layer in tree.layers or row.layer >= tree.next_layer]
        added = [row for row in rows if row.layer not in tree.layers]
        unsure = {layer.row.first_mba for number, layer in tree.layers.items() if number not in kept}
        if not is_empty and any(row.first_mba < disk.maps.next_mba or row.first_mba in unsure for row in added):
            # A layer that is not known here has absorbed one that is: what it shows is told by copies alone, also where
            # it is shorter than what is here.
            sizes = [row.size_bytes for row in (*rows, *(layer.row for layer in tree.layers.values()))]
            regions = (*regions, (0, max(sizes) // REGION_BYTES + 1))
        if added and not added[0].parent:
            rows = [row._replace(parent=tree.root) if row is added[0] else row for row in rows]
        gone = [
            layer.row._replace(kind=NAMELESS, name="", created_s=0)
            for number, layer in tree.layers.items()
            if number not in kept and layer.row.kind != NAMELESS
        ]
        # Those that are gone first: their names and volumes may be used again.
        disk.tree_changes.apply(gone + rows)
        resync = disk.resync
        resync.add(regions)
        if holds(Rule.SKIP_NOTES_WHAT_IS_LACKING):
            disk.checkpointer.also = resync.put_changes
        disk.checkpointer.when_done(skipped)

    # -- regions

    def regions_after(self, txid: int) -> Runs:
        return runs_of(self.disk.maps.regions.later_than(txid), RUNS_LIMIT)

    @property
    def resync(self) -> Runs:
        return runs_of(self.disk.resync, RUNS_LIMIT)

    @property
    def resync_count(self) -> int:
        return len(self.disk.resync)

    def resync_done(self, regions: Runs, done: Done) -> None:
        if self._waits(partial(self.resync_done, regions, done)):
            return
        self.disk.resync.remove(regions)
        self._state = replace(self._state, fetched_txid=self.committed_txid)

        def put(batch: Batch) -> None:
            self.disk.resync.put_changes(batch)
            put_replica_state(batch, self._state)

        self._persist(put, done)

    def read_region(
        self, region: int, known: Mapping[int, bytes] | None, done: Callable[[int, Copy | None], None]
    ) -> None:
        RegionReading(self.disk, self._files, region, known, done)

    def digest_region(self, region: int, done: Callable[[Mapping[int, bytes]], None]) -> None:
        RegionDigests(self.disk, self._files, region, done)

    def apply_copy(self, copy: Copy, done: Done) -> None:
        if not self._waits(partial(self.apply_copy, copy, done)):
            self._copies.submit(copy, done)

    def check_region(self, region: int, done: Callable[[RegionState], None]) -> None:
        loads = 0

        def step() -> int | None:
            nonlocal loads
            maps = self.disk.maps
            found = region_state(maps, region)
            if isinstance(found, RegionState):
                done(found)
                if loads:
                    maps.let_go()
                return 0
            loads += 1
            maps.hold(loads * (len(found) + REGION_BLOCKS))
            maps.load(found, self._ordered.go_on)
            return None

        self._ordered.submit(step, lambda errno: None)

    # -- single blocks

    def repair_from(self, source: BlockSource | None) -> None:
        self._source = self.disk.repairs.source = source

    def read_blocks(self, mbas: Sequence[int], is_patient: bool, done: Callable[[Mapping[int, bytes]], None]) -> None:
        BlocksReading(self.disk, self._files, mbas, is_patient, done)

    # -- LevelDB

    def _persist(self, put: Callable[[Batch], None], done: Done) -> None:
        disk = self.disk
        if disk.failure:
            disk.call_soon(lambda: done(errnos.EIO))
            return
        batch = disk.store_batch()
        put(batch)

        def written(errno: int) -> None:
            if errno:
                disk.fail(f"LevelDB could not be written (errno {errno})")
            done(errnos.EIO if errno else 0)

        disk.store_writes.write_later(batch, written)


def _is_tree(rows: Sequence[Row]) -> bool:
    """Whether they are layers of one family: in order, and each stands on one before it, but for the root."""
    known: set[int] = set()
    last = 0
    for row in rows:
        if row.layer <= last or (row.parent not in known if known else row.parent):
            return False
        known.add(row.layer)
        last = row.layer
    return bool(known)
