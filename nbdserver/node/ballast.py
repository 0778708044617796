"""Room for the node's own stores (its registry, its copy of the directory) on a full file system.

Theory: the log disks leave room to their neighbours, but somebody else may fill the file system to the last block.
LevelDB turns read-only when a write meets that end. Then not even deleting a volume, which gives room back, could be
registered, and the node would leave its cluster. So a file of allocated blocks lies in the data directory; it is
unlinked before a write that might need its room, and made again when there is plenty.

Known weakness: whoever filled the disk may take the room that was given back before a store does.
"""

import os
from pathlib import Path

from metadata.leveldb import LevelSettings, LevelStore, Offload
from metadata.seams import Batch, Done

BALLAST_BYTES = 8 << 20
"""Several times what LevelDB needs to be opened and to register some thousand changes."""

PLENTY_BYTES = 128 << 20
SMALL = LevelSettings(block_cache_bytes=1 << 20, write_buffer_bytes=4 << 20)


class Ballast:
    """The file that keeps room, beside what needs it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self) -> None:
        """Make the file if it is not there and there is plenty of room."""
        if self._path.exists() or self._free_bytes() < PLENTY_BYTES:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return  # the next time; nothing depends on it while there is plenty
        try:
            os.posix_fallocate(descriptor, 0, BALLAST_BYTES)
        except OSError:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def give_way(self) -> None:
        """Unlink the file if room has become short."""
        if self._free_bytes() < BALLAST_BYTES:
            self._path.unlink(missing_ok=True)

    def _free_bytes(self) -> int:
        statistics = os.statvfs(self._path.parent)
        return statistics.f_bavail * statistics.f_frsize


class BallastedStore(LevelStore):
    """A small LevelDB of the node's own, with ballast against a full file system."""

    def __init__(self, path: Path, workers: Offload, ballast: Path) -> None:
        """OSError if it cannot be opened."""
        self._ballast = Ballast(ballast)
        self._ballast.give_way()
        super().__init__(str(path), workers, workers, SMALL)
        self._ballast.keep()

    def write(self, batch: Batch) -> None:
        """See Store."""
        self._ballast.give_way()
        super().write(batch)
        self._ballast.keep()

    def write_later(self, batch: Batch, done: Done) -> None:
        """See Store."""
        self._ballast.give_way()
        super().write_later(batch, done)
        self._ballast.keep()
