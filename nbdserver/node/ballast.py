"""Room for the registry on a full file system.

Theory: the log disks leave room to their neighbours, but somebody else may fill the file system to the last block.
LevelDB turns read-only when a write meets that end, and then not even deleting a volume, which gives room back,
could be registered. So a file of allocated blocks lies in the data directory; it is unlinked before a write that
might need its room, and made again when there is plenty.

Known weakness: whoever filled the disk may take the room that was given back before the registry does.
"""

import os
from pathlib import Path

BALLAST_BYTES = 8 << 20
"""Several times what LevelDB needs to be opened and to register some thousand changes."""

PLENTY_BYTES = 128 << 20


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
