"""The offline check of a data directory: takes its lock, then checks each volume's family.

Theory. LevelDB writes when it is opened (it replays its own log, begins a new MANIFEST and deletes what is obsolete),
so a store is not opened where it lies: a temporary directory gets links to its table files, which LevelDB never
changes, and copies of the few others. What is opened there is what the next start would open here.

Rules
- The lock is held from beginning to end: a node cannot start meanwhile, and a running one is a clear refusal.
- Nothing below the data directory is written but the pid in its lock file.
"""

import asyncio
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from metadata.leveldb import LevelSettings, LevelStore
from metadata.registry import EmbeddedRegistry, Families, Family, RegistryError
from nbdserver.host.completions import Completions
from nbdserver.host.data_directory import DataDirectoryError, DataDirectoryLock
from nbdserver.host.files import HostFiles
from nbdserver.logdisk.check import CheckResult, Finding, check_family
from nbdserver.node.control import NO_THREADS
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError, NotFoundError, WrongInputError

_TABLE_SUFFIXES = (".ldb", ".sst")
_SETTINGS = LevelSettings(block_cache_bytes=8 << 20)

Progress = Callable[[str, str, int, int], None]
"""Called with (volume, what is being looked at, units done, units in all)."""


def check_directory(path: Path, volume: str, quick: bool, progress: Progress) -> Iterator[tuple[str, CheckResult]]:
    """(volume, result) of each volume, or of the one named. Raises WrongInputError, or NodeError if a node runs."""
    directory = DataDirectory(path)
    directory.require()
    if not os.access(path, os.W_OK | os.X_OK):
        raise WrongInputError(f"{path} may not be locked by this user; run the check as the user of the server")
    try:
        lock = DataDirectoryLock(str(directory.path))
    except DataDirectoryError as error:
        holder, _, _ = str(error).partition(":")
        raise NodeError(f"a check needs a stopped node: {holder}; stop it first") from None
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the tail's walk opens every segment
        for family in _families(directory, volume):
            name = family.volume
            yield name, _check(directory, family, quick, lambda *what, name=name: progress(name, *what))
    finally:
        lock.release()


def _families(directory: DataDirectory, volume: str) -> list[Family]:
    try:
        with opened_copy(directory.registry) as store:
            families = Families(EmbeddedRegistry(store), owner="").all()
    except (OSError, RegistryError) as error:
        raise NodeError(f"the registry in {directory.registry} is damaged: {error}") from None
    if volume:
        families = [family for family in families if family.volume == volume]
        if not families:
            raise NotFoundError(f"there is no volume {volume!r:.60} in {directory.path}")
    return families


def _check(directory: DataDirectory, family: Family, quick: bool, progress: Callable[..., None]) -> CheckResult:
    place = directory.family(family.id)
    loop = asyncio.new_event_loop()  # never run: the check waits for every read
    try:
        files = HostFiles(str(place), Completions(loop))
        try:
            with opened_copy(place / "maps") as store:
                return check_family(files, store, quick, progress)
        finally:
            files.shut_down()
    except OSError as error:
        return CheckResult([Finding("store", f"{place} cannot be read: {error}", str(place))], is_complete=False)
    finally:
        loop.close()


@contextmanager
def opened_copy(path: Path) -> Iterator[LevelStore]:
    """Open a LevelDB without changing a byte of it. OSError if it is damaged or not there."""
    if not (path / "CURRENT").exists():
        raise FileNotFoundError(f"{path} holds no LevelDB (its file CURRENT is missing)")
    with tempfile.TemporaryDirectory(prefix="nbdserver-check-") as scratch:
        for entry in path.iterdir():
            if entry.suffix in _TABLE_SUFFIXES:
                os.symlink(entry.absolute(), os.path.join(scratch, entry.name))
            elif entry.name != "LOCK":
                shutil.copyfile(entry, os.path.join(scratch, entry.name))
        store = LevelStore(scratch, NO_THREADS, NO_THREADS, _SETTINGS)
        try:
            yield store
        finally:
            store.close()
