"""How the files of one family come into being: a thread makes them, one at a time, ahead of need.

Theory. To make a file is to allocate its blocks, to bring its pages into the page cache and to make its name durable.
The last of these waits for the journal of the file system: less than a millisecond mostly, more than a hundred while
it is busy. So a thread does it, and the loop takes a file when it is all there. While little is written a file is
*written* ahead instead: an fdatasync of what was only allocated costs half as much again. While clients stream, writing
zeros would take the disk from them.

Rules
- A file is given out only when its name is durable (Rule.NAME_DURABLE_FIRST): behind a flush that was answered nothing
  of the log may be in a file that a power cut takes away.
- What could not be made leaves nothing behind.
- Whoever closes the files waits until nothing is under way here (`busy`): what a thread does to a path would be done to
  the next file of that name.
"""

import os
import posixpath
from collections.abc import Callable
from errno import EIO
from functools import partial

from metadata.seams import Files
from nbdserver.logdisk.ordering import Rule, crash_point, holds

BALLAST = "ballast"
BALLAST_BYTES = 16 << 20

Report = Callable[[str, dict[str, object]], None]
Made = Callable[[int], None]
"""Gets the handle of the file, or -1."""


class Making:
    """Makes files of one size in one directory."""

    def __init__(self, files: Files, size_bytes: int, report: Report) -> None:
        self.busy = False
        """Whether a file is being made in a thread."""
        self.has_failed = False
        """Whether the last one could not be made."""
        self._files = files
        self._size_bytes = size_bytes
        self._report = report
        self._told_errno = 0  # of the last one

    def now(self, path: str) -> int:
        """Allocate a file while everyone waits; its handle, or -1."""
        try:
            handle = self._files.create(path, self._size_bytes)
        except OSError as error:
            self._failed(path, error.errno)
            return -1
        crash_point("segment-before-name")
        try:
            self._files.sync_directory(posixpath.dirname(path))
        except OSError as error:
            self._failed(path, error.errno)
            self._files.close(handle)
            self._files.unlink(path)
            return -1
        crash_point("segment-after-name")
        return handle

    def allocate(self, path: str, made: Made) -> None:
        """Allocate a file in a thread."""
        self.busy = True
        self._files.create_later(path, self._size_bytes, partial(self._allocated, path, made))

    def write(self, path: str, made: Made) -> None:
        """Write a file of zeros in a thread, and sync it."""
        self.busy = True
        self._files.prepare_later(path, self._size_bytes, partial(self._over, path, made))

    def _allocated(self, path: str, made: Made, errno: int, handle: int) -> None:
        if errno:
            self._over(path, made, errno, -1)
            return
        crash_point("segment-before-name")
        if holds(Rule.NAME_DURABLE_FIRST):
            self._files.sync_directory_later(posixpath.dirname(path), partial(self._named, path, made, handle))
        else:
            self._over(path, made, 0, handle)

    def _named(self, path: str, made: Made, handle: int, errno: int) -> None:
        if errno:
            self._files.close(handle)
            self._files.unlink_later(path, lambda _: self._over(path, made, errno, -1))
            return
        crash_point("segment-after-name")
        self._over(path, made, 0, handle)

    def _over(self, path: str, made: Made, errno: int, handle: int) -> None:
        self.busy = False
        self.has_failed = bool(errno)
        if errno:
            self._failed(path, errno)
        else:
            self._told_errno = 0
        made(handle)

    def _failed(self, path: str, errno: int | None) -> None:
        """Say why, once, and not at every try."""
        errno = errno or EIO
        if errno != self._told_errno:
            self._told_errno = errno
            self._report("segment-not-made", {"path": path, "errno": errno, "error": os.strerror(errno)})


class Ballast:
    """A file that stands in for the room that LevelDB needs: it is unlinked when the file system runs full, because
    LevelDB turns read-only when it meets the end itself."""

    def __init__(self, files: Files, report: Report) -> None:
        self.is_there = False
        """Or is being made."""
        self.busy = False
        self._files = files
        self._report = report

    def adopt(self) -> None:
        """See whether there is one. OSError."""
        self.is_there = BALLAST in self._files.list(".")

    @property
    def missing_bytes(self) -> int:
        """That it will take yet."""
        return 0 if self.is_there and not self.busy else BALLAST_BYTES

    def make(self, done: Callable[[], None]) -> None:
        """Write it in a thread."""

        def made(errno: int, handle: int) -> None:
            self.busy = False
            self.is_there = not errno
            if not errno:
                self._files.close(handle)
            done()

        self.busy = self.is_there = True
        self._files.prepare_later(BALLAST, BALLAST_BYTES, made)

    def guard_metadata(self) -> None:
        """Give its room to LevelDB if others have filled the file system."""
        if self.is_there and not self.busy and self._files.free_bytes() < BALLAST_BYTES:
            self.is_there = False
            self._files.unlink(BALLAST)
            self._report("ballast-released", {})
