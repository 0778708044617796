"""One open family in the data process: its files, its store, and its log disk. A replica is in open_replica.py.

Theory. To open a log disk is to wait for the device (each opening syncs, and a log of half a GiB is read and written
again) and to compute (its records are done again, map pages packed for LevelDB). On the loop that would keep the
clients of all families waiting, for seconds; so a thread does it (`open_disk`). Where it computes, the loop has to get
the interpreter's lock from it: SWITCH_S at a time, instead of Python's 5 ms.

Rules
- A family on one node is opened under an epoch that the registry was given before. It is closed in the order disk,
  store, files.
- One disk is opened at a time: what computes beside the loop is one thread.
- What opening finds wrong is one sentence (FamilyError) and leaves nothing open.
"""

import asyncio
import os
import random
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from metadata.leveldb import LevelStore
from nbdserver.host.clock import HostClock
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.files import HostFiles
from nbdserver.logdisk.disk import DiskError, DiskSettings, LogDisk
from nbdserver.logdisk.making import BALLAST
from nbdserver.logdisk.opening import Replicated

FULL_BYTES = 16 << 20
"""Below so much room a family's ballast goes: as much as it gives."""

OPERATIONS_TIMEOUT_S = 10.0
"""How long a close waits for operations that clients left behind: for a slow read, not for room that never comes."""

SWITCH_S = 0.0005
"""How long a thread that opens a disk may keep the interpreter's lock from the loop."""

Report = Callable[[str, dict[str, Any]], None]


class FamilyError(Exception):
    """A family cannot be made or opened; one line."""


NOT_OWNED = "this node does not own the volume"


class NotOwnedError(FamilyError):
    """Another node orders what happens in this family."""


class StoreThreads:
    """The threads in which every family's LevelDB works: two that read, one that writes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.completions = Completions(loop)
        self.readers = Workers(self.completions, 2, "nbdserver-store-read")
        self.writer = Workers(self.completions, 1, "nbdserver-store-write")
        self.opening = asyncio.Lock()

    def close(self) -> None:
        self.readers.close()
        self.writer.close()


class Room:
    """Files and store of one family's directory."""

    def __init__(self, directory: str, threads: StoreThreads) -> None:
        self.opening = threads.opening
        """Held while a disk is opened."""
        self.files = HostFiles(directory, threads.completions)
        if self.files.free_bytes() < FULL_BYTES and BALLAST in self.files.list("."):
            self.files.unlink(BALLAST)  # LevelDB needs some room to be opened
        try:
            self.store = LevelStore(os.path.join(directory, "maps"), threads.readers, threads.writer)
        except BaseException:
            self.files.shut_down()
            raise

    def close(self) -> None:
        self.store.close()
        self.files.shut_down()


def open_room(directory: str, threads: StoreThreads) -> Room:
    """Open a family's files and store. Waits for the disk, and may do so in any thread. Raises FamilyError."""
    if not os.path.exists(os.path.join(directory, "maps", "CURRENT")):
        raise FamilyError(f"its maps are missing: {directory}/maps is no LevelDB")
    try:
        return Room(directory, threads)
    except OSError as error:
        raise FamilyError(f"{directory} cannot be opened: {error}") from error


def format_family(directory: str, threads: StoreThreads, family_id: str, size_bytes: int, segment_bytes: int) -> None:
    """Make a family's directory with an empty log and empty maps. Waits for the disk, and may do so in any thread.
    Raises FamilyError."""
    try:
        os.mkdir(directory, 0o700)
        room = Room(directory, threads)
        try:
            LogDisk.format(
                room.files, room.store, bytes.fromhex(family_id), size_bytes, segment_bytes, random.SystemRandom()
            )
        finally:
            room.close()
        _sync_directory(directory)
        _sync_directory(os.path.dirname(directory))
    except (OSError, DiskError) as error:
        raise FamilyError(f"the volume cannot be made: {error}") from error


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def open_disk(
    room: Room,
    clock: HostClock,
    settings: DiskSettings,
    epoch: int | None,
    boot_id: str,
    report: Report,
    replicated: Replicated | None = None,
) -> LogDisk:
    """Open a family's log disk. `report` is called on the loop. Raises DiskError."""
    loop, thread = asyncio.get_running_loop(), threading.get_ident()

    def report_from_anywhere(kind: str, fields: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            report(kind, fields)
        else:
            loop.call_soon_threadsafe(report, kind, fields)

    def prepare() -> LogDisk:
        before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            return LogDisk.prepare(
                room.files, room.store, clock, random.SystemRandom(), settings, epoch, boot_id, report_from_anywhere,
                progress(clock, report_from_anywhere), replicated,
            )  # fmt: skip
        finally:
            sys.setswitchinterval(before_s)

    async with room.opening:
        disk = await asyncio.to_thread(prepare)
    disk.begin()
    return disk


def progress(clock: HostClock, report: Report) -> Callable[[int], None]:
    """Return what reports the bytes that replay has done, at most once a second."""
    reported_s = clock.now()

    def replayed(done_bytes: int) -> None:
        nonlocal reported_s
        if clock.now() - reported_s >= 1:
            reported_s = clock.now()
            report("recovering", {"bytes": done_bytes})

    return replayed


class OpenFamily(ABC):
    """A family that is open."""

    def __init__(self, family_id: str, room: Room, clock: HostClock) -> None:
        """It closes the room, whatever comes of it."""
        self.id = family_id
        self._clock = clock
        self._room = room

    def counters(self) -> dict[str, int]:
        """What is counted of it beside its disk's figures."""
        return {"disk_metadata_bytes_written": self.metadata_bytes_written}

    def compare_replicas(self, bytes_per_s: int, done: Callable[[str], None]) -> None:
        """Compare this family with its replicas, then `done` with why that failed, if it did. A node's own has none."""
        done("")

    def stop_comparing(self) -> None:  # noqa: B027 - it has none, so nothing is to be done
        """End that; idempotent."""

    @property
    @abstractmethod
    def disk(self) -> LogDisk:
        """Its log disk as it is open now."""

    @property
    def metadata_bytes_written(self) -> int:
        """Size of the batches given to LevelDB since opening."""
        return self._room.store.bytes_written

    async def close(self) -> None:
        """Close the disk, cleanly unless it has failed, then store and files. Its clients must be gone."""
        deadline_s = self._clock.now() + OPERATIONS_TIMEOUT_S
        while self.disk.slow_path.under_way:
            if self._clock.now() > deadline_s:
                self.disk.fail("closed while operations were waiting")
            await asyncio.sleep(0.01)
        closed = asyncio.Event()
        self.disk.close(closed.set)
        await closed.wait()
        # Waits for threads: these are short by now, and nobody is served from this family any more.
        self._room.close()


class LocalFamily(OpenFamily):
    """A family that is on this node alone, open for writing."""

    def __init__(self, family_id: str, room: Room, clock: HostClock, disk: LogDisk) -> None:
        """`disk` was opened in the room."""
        super().__init__(family_id, room, clock)
        self._disk = disk

    @property
    def disk(self) -> LogDisk:
        return self._disk
