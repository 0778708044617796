"""A log disk on a directory of this machine, without a server around it: what a data process opens for one family."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from metadata.family_state import read_open_state
from metadata.leveldb import LevelStore
from nbdserver.host.clock import HostClock
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.files import HostFiles
from nbdserver.logdisk.disk import DiskSettings, LogDisk
from nbdserver.logdisk.opening import Replicated, Report


@dataclass
class Host:
    """The real Files, Store and Clock on one directory."""

    files: HostFiles
    store: LevelStore
    clock: HostClock
    completions: Completions


@contextmanager
def host(
    directory: Path, loop: asyncio.AbstractEventLoop, kind_of_files: type[HostFiles] = HostFiles
) -> Iterator[Host]:
    completions = Completions(loop)
    readers, writer = Workers(completions, 4, "benchmark-read"), Workers(completions, 1, "benchmark-write")
    store = LevelStore(str(directory / "maps"), readers, writer)
    files = kind_of_files(str(directory), completions)
    try:
        yield Host(files, store, HostClock(loop), completions)
    finally:
        store.close()
        files.shut_down()
        readers.close()
        writer.close()


def open_disk(
    parts: Host,
    settings: DiskSettings,
    report: Report = lambda kind, fields: None,
    replicated: Replicated | None = None,
) -> LogDisk:
    """Under the next epoch, as after any start; a replica under none."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    epoch = read_open_state(parts.store).epoch + 1 if replicated is None else None
    return LogDisk.open(
        parts.files, parts.store, parts.clock, random.Random(), settings, epoch, boot_id, report, replicated=replicated
    )


async def close_disk(disk: LogDisk) -> None:
    closed = asyncio.Event()
    disk.close(closed.set)
    await closed.wait()
