"""A disk kept in a log: one family, open for writing.

A family is a volume, its snapshots and its clones. `head(volume)` is a volume as a block device, `view(layer)` a
snapshot; what makes and removes them is in tree_changes.py.

Theory. The parts know each other only through what is passed to them: maps (LBA → MBA → PBA), the log that appends
and syncs, the pool of segment files, the read path and the write path that answer inline, the slow path for
everything that has to wait, and the background work. This module puts the parts together when a family is opened
(opening.py), and ends it.

Rules
- A failure (an fsync, a LevelDB write, damaged metadata) is for good: every operation is answered with EIO until the
  family is opened anew, and `failure` says why.
- A head is the same object for as long as the family is open, and for as long as this node orders, whatever happens to
  its layers.
"""

from __future__ import annotations

import errno as errnos
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from metadata.family_state import (
    Family,
    OpenState,
    put_checkpoint,
    put_family,
    put_open_state,
    read_family,
    read_open_state,
)
from metadata.layers import Row
from metadata.replica_state import first_state, put_replica_state
from metadata.resync_table import ResyncTable
from metadata.seams import Batch, Clock, Done, Files, Store
from nbdserver.block import Later
from nbdserver.logdisk import figures
from nbdserver.logdisk.appending import Appending
from nbdserver.logdisk.background import Background
from nbdserver.logdisk.changed import Changed
from nbdserver.logdisk.checkpoint import Checkpointer
from nbdserver.logdisk.cleaner import Cleaner
from nbdserver.logdisk.damage import Damage
from nbdserver.logdisk.devices import Device, Head, View
from nbdserver.logdisk.fetching import Fetching
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.opening import Opening, Replicated, Report
from nbdserver.logdisk.ordering import Rule, holds
from nbdserver.logdisk.recovery import RecoveryError
from nbdserver.logdisk.repair import Repairs
from nbdserver.logdisk.scrub import Progress, Scrub
from nbdserver.logdisk.segments import CLEANER_KEEPS, CLIENTS_KEEP, DIRECTORY, SegmentPool
from nbdserver.logdisk.slow_path import SlowPath
from nbdserver.logdisk.starting_over import empty_checkpoint, start_over
from nbdserver.logdisk.store_writes import StoreWrites
from nbdserver.logdisk.tree_changes import TreeChanges
from nbdserver.logdisk.tree_work import TreeWork
from protocol.disk import BLOCK_BYTES, SNAPSHOT, DamagedValueError
from protocol.invariant import InvariantError, invariant


class DiskError(Exception):
    """The family cannot be opened; the text says why and what to do."""


@dataclass(frozen=True)
class DiskSettings:
    """What can be chosen for a family while it is open."""

    cache_bytes: int = 512 << 20  # for pages of both maps
    checkpoint_bytes: int = 512 << 20  # of log, after which a checkpoint starts: what a recovery replays
    checkpoint_interval_s: float = 30.0


class LogDisk:
    """An open family. Make one with `open`, or with `prepare` and `begin`; all methods but `prepare` are for the loop's
    thread."""

    # -- making and opening

    @classmethod
    def format(
        cls, files: Files, store: Store, family: bytes, size_bytes: int, segment_bytes: int, rng: random.Random
    ) -> None:
        """Make an empty family in an empty directory and store."""
        files.make_directory(DIRECTORY)
        files.sync_directory(".")
        batch = store.batch()
        put_family(batch, Family(family, size_bytes, segment_bytes))
        put_open_state(batch, OpenState(1, 0, True, ""))
        put_replica_state(batch, first_state(rng))
        put_checkpoint(batch, empty_checkpoint(1, rng))
        store.write(batch)

    @classmethod
    def open(
        cls,
        files: Files,
        store: Store,
        clock: Clock,
        rng: random.Random,
        settings: DiskSettings,
        epoch: int | None,
        boot_id: str,
        report: Report,
        progress: Callable[[int], None] = lambda _: None,
        replicated: Replicated | None = None,
    ) -> LogDisk:
        """Open for writing: replay the log, make the tail durable, begin `epoch`. Raises DiskError.

        Only a replicated family may be opened without an epoch: nothing is ordered here then (opening.py).
        """
        opened = cls.prepare(files, store, clock, rng, settings, epoch, boot_id, report, progress, replicated)
        opened.begin()
        return opened

    @classmethod
    def prepare(
        cls,
        files: Files,
        store: Store,
        clock: Clock,
        rng: random.Random,
        settings: DiskSettings,
        epoch: int | None,
        boot_id: str,
        report: Report,
        progress: Callable[[int], None] = lambda _: None,
        replicated: Replicated | None = None,
    ) -> LogDisk:
        """What `open` does for as long as it waits for the disk, in any thread; `report` and `progress` are called
        there. Raises DiskError."""
        try:
            return cls(files, store, clock, rng, settings, epoch, boot_id, report, progress, replicated)
        except (DamagedValueError, RecoveryError) as error:
            raise DiskError(str(error)) from error
        except InvariantError as error:
            raise DiskError(f"the family's metadata contradicts itself ({error}): it is damaged") from error
        except OSError as error:
            raise DiskError(f"the family's files cannot be read: {error}") from error

    def __init__(
        self,
        files: Files,
        store: Store,
        clock: Clock,
        rng: random.Random,
        settings: DiskSettings,
        epoch: int | None,
        boot_id: str,
        report: Report,
        progress: Callable[[int], None],
        replicated: Replicated | None,
    ) -> None:
        invariant(epoch is not None or replicated is not None, "on one node a family is opened under an epoch")
        self.settings = settings
        self.family = read_family(store)
        self.failure = ""
        self.is_closed = False
        """It may be opened again, as another one."""
        self.report = report
        self.scrub: Scrub | None = None  # the last one
        self._files = files
        self._store = store
        self.clock = clock
        self.store_writes = StoreWrites(store)
        self.resync = ResyncTable()
        self.maps = maps = Maps(store, settings.cache_bytes, self.fail)
        self.damage = Damage(maps.tree, report)
        self.pool = pool = SegmentPool(files, self.family.segment_bytes, report)
        try:
            if replicated is not None and replicated.starts_over:
                start_over(files, store, self.family, rng, report)
            opening = Opening(files, store, pool, maps, self.family, report, progress, self.fail)
            opened = opening.run(rng, read_open_state(store), epoch, boot_id, replicated)
            self.resync.load(store.range(*self.resync.key_range()))
            self.log = log = opened.log
            self.opened = opened.state
            self.replica_state = opened.replica
            self.checkpointer = Checkpointer(
                clock, store, self.store_writes, log, maps, pool, self._work_finished, self.fail
            )
            if log.is_committed:
                self.checkpointer.make_now()
        except BaseException:
            pool.close()
            raise
        self._heads: dict[int, Head] = {}
        self._views: set[View] = set()
        self._blocks_read_before = 0  # by heads and views that are gone
        self.appending = Appending(log, pool, self._check_background, self.append_failed, self.parted)
        self.repairs = Repairs(self)
        make_room = partial(self.appending.next_segment_at_hand, CLEANER_KEEPS)
        appended = partial(self.appending.appended, None)
        self.cleaner = Cleaner(
            files,
            clock,
            log,
            maps,
            pool,
            make_room,
            appended,
            self._work_finished,
            self.parted,
            report,
            self.repairs.want,
        )
        self.slow_path = SlowPath(self, files, clock)
        self.fetching = Fetching(self, files, clock)
        self.tree_changes = changes = TreeChanges(self)
        self.tree_work = TreeWork(self, clock)
        self.background = Background(self, clock)
        pool.settled = self._file_settled
        self.snapshot = changes.snapshot
        self.clone = changes.clone
        self.rollback = changes.rollback
        self.resize = changes.resize
        self.delete_snapshot = changes.delete_snapshot
        self.delete_volume = changes.delete_volume

    def begin(self) -> None:
        """Let what goes on beside the clients begin."""
        self.background.begin()
        if not self.log.is_committed:
            self.checkpointer.start()  # it waits for the others

    # -- volumes and snapshots

    def head(self, volume: int) -> Head:
        """The volume as a block device; LookupError if there is none of that number."""
        head = self._heads.get(volume)
        if head is None:
            if volume not in self.maps.tree.heads:
                raise LookupError(f"there is no volume {volume} in the family")
            head = self._heads[volume] = Head(self, self._files, volume)
        return head

    def view(self, layer: int) -> View:
        """A snapshot's layer as a block device, to be closed; LookupError if it is no snapshot's."""
        found = self.maps.tree.layers.get(layer)
        if found is None or found.row.kind != SNAPSHOT:
            raise LookupError(f"layer {layer} is no snapshot's")
        view = View(self, self._files, layer)
        self._views.add(view)
        return view

    def volumes(self) -> list[Row]:
        """The row of each volume's head, by number."""
        tree = self.maps.tree
        return [tree.layers[layer].row for _, layer in sorted(tree.heads.items())]

    def snapshots(self) -> list[Row]:
        """The row of each snapshot, the oldest first."""
        return sorted(self.maps.tree.snapshots())

    def snapshots_of(self, volume: int) -> list[Row]:
        """The row of each snapshot of one volume, the oldest first."""
        tree = self.maps.tree
        return [tree.layers[layer].row for layer in sorted(tree.names.get(volume, {}).values())]

    def snapshot_row(self, volume: int, name: str) -> Row | None:
        """The row of one snapshot, or None."""
        return self.maps.tree.snapshot(volume, name)

    def clones(self, layer: int) -> set[int]:
        """Numbers of the volumes that were made from a snapshot and are there, or have snapshots."""
        return self.maps.tree.clones(layer)

    def base(self, volume: int) -> Row | None:
        """The newest snapshot of another volume that the volume stands on; None if it stands on none."""
        return self.maps.tree.base(volume)

    def changed(self, device: Device, since: int, offset: int, length: int, limit: int, done: Later) -> None:
        """See BlockDevice, for a head or view of this family and a snapshot's layer: changed.py."""
        Changed(self, self.clock, device, since, offset, length, limit, done)

    def head_moved(self, volume: int, layer: int) -> None:
        """The volume's head is another layer, or the same with another row."""
        head = self._heads.get(volume)
        if head is not None:
            head.move_to(layer)

    def volume_deleted(self, volume: int) -> None:
        """There is no such volume any more."""
        head = self._heads.pop(volume, None)
        if head is not None:
            self._retire(head)

    def stop_ordering(self) -> None:
        """Another node orders from now on: what is still wanted of the heads that there are is answered with EIO."""
        heads = list(self._heads.values())
        self._heads.clear()
        for head in heads:
            self._retire(head)
        self.slow_path.wake()
        self.checkpointer.look_again()

    def _retire(self, head: Head) -> None:
        head.gone = True
        head.stop()
        self._blocks_read_before += head.reader.blocks_read

    def view_closed(self, view: View) -> None:
        """Nobody looks at it any more."""
        self._views.discard(view)
        self._blocks_read_before += view.reader.blocks_read
        self.maps.tree.open_view(view.layer, -1)
        self._check_background()

    def flush(self, done: Done) -> None:
        """See BlockDevice."""
        if self.failure:
            self.clock.call_soon(lambda: done(errnos.EIO))
        else:
            self.log.sync(done)

    # -- for the parts

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Answer from the loop."""
        self.clock.call_soon(callback)

    def read_store(
        self, ranges: Sequence[tuple[bytes, bytes]], done: Callable[[list[list[tuple[bytes, bytes]]]], None], limit: int
    ) -> None:
        """Items of LevelDB, read off the loop; the family fails if they cannot be had."""

        def arrived(errno: int, items: list[list[tuple[bytes, bytes]]]) -> None:
            if errno:
                self.fail(f"LevelDB could not be read (errno {errno})")
            done(items if not errno else [[] for _ in ranges])

        self.background.stir()
        self._store.range_later(ranges, arrived, limit)

    def store_batch(self) -> Batch:
        """An empty batch for `store_writes`."""
        return self._store.batch()

    def start_scrub(
        self, begin: Progress, bytes_per_s: int, moved_bytes: Callable[[], int], finished: Callable[[str], None]
    ) -> None:
        """Begin a scrub, or go on with one: `scrub` has its progress. One that is running is stopped."""
        if self.scrub is not None:
            self.scrub.stop()
        self.scrub = Scrub(self, self._files, self.clock, begin, bytes_per_s, moved_bytes, finished)

    @property
    def moved_bytes(self) -> int:
        """What was written to the log and read cold: the work that clients (and the cleaner) give the device."""
        return self.log.appended_bytes + self.slow_path.cold_bytes

    def _check_background(self) -> None:
        self.clock.call_soon(self.background.check)

    def _work_finished(self) -> None:
        self.background.work_finished()

    def _file_settled(self) -> None:
        """Somebody may have waited for a segment that is there now, or that could not be made."""
        self.tree_changes.go_on()
        self.slow_path.wake()
        self._check_background()

    def append_failed(self, error: OSError) -> int:
        """An append that failed changed nothing here, but what the file holds is unknown until it is written again."""
        errno = error.errno or errnos.EIO
        self.report("append-failed", {"errno": errno, "error": str(error)})
        if errno != errnos.ENOSPC:
            self.fail(f"appending to segment {self.log.segment} failed: {error}")
            return errnos.EIO if holds(Rule.ACK_AFTER_APPEND) else 0
        return errno

    def parted(self, error: Exception) -> None:
        """Something that nobody foresaw came between log and maps: neither can be believed any more."""
        self.fail(f"an internal error: {error!r}")

    # -- life

    def fail(self, reason: str) -> None:
        """Nothing is promised or read any more: every operation is answered with EIO until the family is opened
        anew."""
        if self.failure:
            return
        self.failure = reason
        self.report("family-failed", {"reason": reason})
        self.appending.block(True)
        for device in (*self._heads.values(), *self._views):
            device.stop()
        for done in self.log.fail():
            self.clock.call_soon(partial(done, errnos.EIO))
        self.maps.abandon()
        self.checkpointer.abandon()
        self.slow_path.wake()
        self.tree_changes.go_on()
        self._remember_failure()

    def _remember_failure(self) -> None:
        """What was acknowledged may be gone although the host did not reboot: the next opening raises the
        generation."""
        if self.is_closed:
            return
        batch = self._store.batch()
        put_open_state(batch, OpenState(self.opened.generation, self.opened.epoch, False, ""))
        self.store_writes.write_later(
            batch, lambda errno: self.report("failure-not-noted", {"errno": errno}) if errno else None
        )

    def close(self, done: Callable[[], None]) -> None:
        """Make everything durable, note that the log was closed cleanly, then `done`. No operation may be under way."""
        self.appending.block(True)
        self.background.stop()
        self.cleaner.stop()
        self.tree_work.stop()
        self.repairs.stop()
        if self.scrub is not None:
            self.scrub.stop()
        self.checkpointer.look_again()

        def wait() -> None:
            if (self.scrub is not None and self.scrub.busy) or self.pool.is_busy:
                self.clock.call_later(0.01, wait)
            elif self.failure:
                self.is_closed = True
                self.checkpointer.end()
                self.pool.close()
                done()
            elif (
                self.store_writes.busy
                or self.cleaner.running
                or self.background.busy
                or self.tree_work.layer
                or self.slow_path.under_way
            ):
                self.clock.call_later(0.01, wait)
            elif not self.log.is_committed:
                self.checkpointer.stop()
                self.log.sync(lambda _: closed())  # a checkpoint may not be made; replay is part of the next opening
            else:
                self.checkpointer.when_done(closed)
                self.checkpointer.hurry()

        def closed() -> None:
            if self.pool.is_busy:
                self.clock.call_later(0.01, closed)
                return
            if not self.failure:
                batch = self._store.batch()
                put_open_state(batch, OpenState(self.opened.generation, self.opened.epoch, True, self.opened.boot_id))
                try:
                    self._store.write(batch)
                except OSError as error:
                    self.fail(f"the clean end could not be noted: {error}")
            self.is_closed = True
            self.checkpointer.end()
            self.pool.close()
            done()

        wait()

    # -- looking at it

    def status(self) -> dict[str, object]:
        """What an operator wants to know, in plain values."""
        return figures.status(self)

    def counters(self) -> dict[str, int]:
        """Numbers that only rise, but for those that end in `_now`."""
        return figures.counters(self)

    @property
    def filled_bytes(self) -> int:
        """What cannot be cleaned away: the live data, and the reserve once anything was written."""
        reserve_bytes = CLIENTS_KEEP * self.pool.segment_bytes if self.log.offset else 0
        return self.maps.live_blocks * BLOCK_BYTES + reserve_bytes

    @property
    def blocks_read(self) -> int:
        """By all heads and views, those that are gone too."""
        readers = [device.reader for device in (*self._heads.values(), *self._views)]
        return self._blocks_read_before + sum(reader.blocks_read for reader in readers)
