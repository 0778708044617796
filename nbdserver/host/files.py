"""The Files seam over Linux: segment files below one directory, handles are file descriptors.

Theory: an append is one `pwritev` into a file whose blocks are allocated and whose pages are cached, so it is a copy
and is done on the loop. A read is tried inline with RWF_NOWAIT, which answers from the page cache or not at all; what
is cold, what syncs and what writes zeros ahead goes to threads.

The kernel takes memory for a file's pages in pieces as long as what brings them in first, and keeps them: a segment
that was first written in short records costs twice as much to write and to sync for the rest of its lives as one whose
pages came in long pieces. So a new file is brought in by a thread, ahead of those who append to it.

Rules of this file
- Paths are relative to the directory given, and are opened relative to its descriptor: renaming the directory above a
  running server changes nothing.
- A handle is closed by the caller only when nothing it asked for with it is in flight: descriptors are reused.
- Syncs are made in the order they were asked for (syncing.py).

Known weakness: os.preadv has no form that returns bytes, so a short `read_cached` copies out of a reusable buffer and a
long one clears its memory first; some 0.4 µs for 4 KiB, a sixth of the time for 128 KiB. A file system without
RWF_NOWAIT sends every read through the threads.
"""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import NoReturn

from metadata.seams import Buffer, Done
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.syncing import Syncer

IOVECS_PER_CALL = 1024  # IOV_MAX of Linux
ZERO_PIECE_BYTES = 256 * 1024  # one piece of writing ahead: longer ones make an append of 4 KiB half as dear again
REUSED_BUFFER_BYTES = 16 * 1024  # up to here copying out of a kept buffer is cheaper than making a BytesIO
DIRECT_BYTES = 4096  # alignment that every device takes
REUSED_BUFFERS = 64  # lengths kept: runs of blocks have few different ones

Pieces = list[bytes]

_ZEROS = bytes(ZERO_PIECE_BYTES)
_DISCARDED = memoryview(bytearray(1 << 20))  # where threads read what only has to pass through the page cache


class HostFiles:
    """Segment files below `directory`, which must exist. Raises OSError if it cannot be opened."""

    def __init__(self, directory: str, completions: Completions, read_threads: int = 4) -> None:
        self._directory = directory
        self.read_into = os.preadv
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        self._nowait = True
        self._scratch: dict[int, list[bytearray]] = {}
        self._readers = Workers(completions, read_threads, "nbdserver-read")
        self._syncer = Syncer(completions)
        self._preparer = Workers(completions, 1, "nbdserver-prepare")

    def shut_down(self) -> None:
        """Wait for everything under way and end the threads. Handles stay open: they are their openers'."""
        self._readers.close()
        self._syncer.close()
        self._preparer.close()
        os.close(self._root)

    @property
    def answers_from_cache(self) -> bool:
        """False once the file system has said that it does not know RWF_NOWAIT."""
        return self._nowait

    # Files that come and go.

    def create(self, path: str, size_bytes: int) -> int:
        """Make a file of allocated zeros and return its handle. OSError (ENOSPC...) leaves nothing behind."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOATIME, 0o600, dir_fd=self._root)
        try:
            if size_bytes:
                os.posix_fallocate(handle, 0, size_bytes)
        except OSError as error:
            self._discard(path, handle)
            _fail(error, f"allocating {size_bytes} bytes for {path}")
        return handle

    def create_later(self, path: str, size_bytes: int, done: Callable[[int, int], None]) -> None:
        """As the seam says."""
        self._preparer.run(done, self._create, path, size_bytes)

    def open(self, path: str) -> int:
        """Return a handle for reading and writing. OSError if there is no such file."""
        try:
            return os.open(path, os.O_RDWR | os.O_NOATIME, dir_fd=self._root)
        except PermissionError:  # the file is another user's
            return os.open(path, os.O_RDWR, dir_fd=self._root)

    def close(self, handle: int) -> None:
        os.close(handle)

    def size_bytes(self, handle: int) -> int:
        return os.fstat(handle).st_size

    def list(self, directory: str) -> list[str]:
        """Names in `directory` ("" or "." is the root), sorted."""
        descriptor = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def make_directory(self, path: str) -> None:
        os.mkdir(path, 0o700, dir_fd=self._root)

    def rename(self, path: str, new_path: str) -> None:
        os.rename(path, new_path, src_dir_fd=self._root, dst_dir_fd=self._root)

    def unlink(self, path: str) -> None:
        os.unlink(path, dir_fd=self._root)

    def unlink_later(self, path: str, done: Done) -> None:
        """Unlink in a thread: giving back a large file's blocks takes milliseconds."""
        self._preparer.run(done, _errno_of, self.unlink, path)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._root)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_directory_later(self, path: str, done: Done) -> None:
        """As the seam says."""
        self._preparer.run(done, _errno_of, self.sync_directory, path)

    def free_bytes(self) -> int:
        """Room left as an unprivileged process sees it."""
        status = os.fstatvfs(self._root)
        return status.f_bavail * status.f_frsize

    # Bytes.

    def append(self, handle: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write byte buffers one after the other at `offset`. OSError means that an unknown part arrived."""
        if len(buffers) <= IOVECS_PER_CALL and os.pwritev(handle, buffers, offset) == sum(map(len, buffers)):
            return
        # More buffers than one call takes, or the kernel took only a part: the whole again, piece by piece.
        for first in range(0, len(buffers), IOVECS_PER_CALL):
            offset = _write_all(handle, buffers[first : first + IOVECS_PER_CALL], offset)

    def read_cached(self, handle: int, length: int, offset: int) -> bytes | None:
        """Exactly `length` bytes from the page cache, or None: not all there, past the end, or a failed read."""
        try:
            scratch = self._scratch[length]
        except KeyError:
            return self._read_cached_unusual(handle, length, offset)
        try:
            if os.preadv(handle, scratch, offset, os.RWF_NOWAIT) == length:
                return bytes(scratch[0])
        except OSError as error:
            self._refused(error)
        return None

    def _read_cached_unusual(self, handle: int, length: int, offset: int) -> bytes | None:
        """A length without a buffer: large, or the first of its kind; every length without RWF_NOWAIT."""
        if not self._nowait or length <= 0:
            return None
        if length <= REUSED_BUFFER_BYTES:
            if len(self._scratch) >= REUSED_BUFFERS:
                del self._scratch[next(iter(self._scratch))]
            self._scratch[length] = [bytearray(length)]
            return self.read_cached(handle, length, offset)
        # BytesIO hands its bytes object out as writable while it owns it alone, and gives it away without a copy.
        room = BytesIO(bytes(length))
        try:
            if os.preadv(handle, [room.getbuffer()], offset, os.RWF_NOWAIT) == length:
                return room.getvalue()
        except OSError as error:
            self._refused(error)
        return None

    def _refused(self, error: OSError) -> None:
        if error.errno == errno.EOPNOTSUPP:
            self._nowait = False
            self._scratch.clear()

    def read(self, handle: int, length: int, offset: int) -> bytes:
        """Up to `length` bytes, fewer only at the end of the file; waits for the device."""
        return _read_all(handle, length, offset)

    def fetch_later(self, extents: Sequence[tuple[int, int, int]], done: Callable[[], None]) -> None:
        """As the seam says. Asking does not wait for the device; one that is alone is only read, because then the
        kernel reads ahead. Devices answer in about the order they were asked, so only the last one is waited for."""
        for handle, length, offset in extents[:-1]:
            os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)
        self._readers.run(done, _read_past, *extents[-1])

    def read_later(self, handle: int, extents: Sequence[tuple[int, int]], done: Callable[[int, Pieces], None]) -> None:
        """Read (length, offset) extents in a thread; an extent that ends past the file is EIO."""
        self._readers.run(done, _read_extents, handle, extents)

    def read_device_later(self, handle: int, length: int, offset: int, done: Callable[[int, Buffer], None]) -> None:
        """Read in a thread what the device has, by O_DIRECT; through the page cache where a file system has none."""
        self._readers.run(done, _read_device, handle, length, offset)

    def fdatasync(self, handles: Sequence[int]) -> None:
        """fdatasync in the order given, waiting for the device; OSError at the first failure."""
        for handle in handles:
            os.fdatasync(handle)

    def fdatasync_later(self, handles: Sequence[int], done: Done) -> None:
        """As the seam says; syncing.py chooses where."""
        self._syncer.run(handles, done)

    def prepare_later(self, path: str, size_bytes: int, done: Callable[[int, int], None]) -> None:
        """Write a file of zeros ahead and sync it and its directory; `done(errno, handle)`, handle -1 on failure."""
        self._preparer.run(done, self._prepare, path, size_bytes)

    # What the threads do.

    def _create(self, path: str, size_bytes: int) -> tuple[int, int]:
        try:
            handle = self.create(path, size_bytes)
        except OSError as error:
            return (error.errno or errno.EIO, -1)
        _bring_in(handle, size_bytes)
        return (0, handle)

    def _prepare(self, path: str, size_bytes: int) -> tuple[int, int]:
        try:
            handle = self.create(path, size_bytes)  # as one piece; the zeros below make its blocks *written*
        except OSError as error:
            return (error.errno or errno.EIO, -1)
        try:
            for offset in range(0, size_bytes, ZERO_PIECE_BYTES):
                _write_all(handle, [memoryview(_ZEROS)[: size_bytes - offset]], offset)
            os.fsync(handle)
            self.sync_directory(os.path.dirname(path))
        except OSError as error:
            self._discard(path, handle)
            return (error.errno or errno.EIO, -1)
        return (0, handle)

    def _discard(self, path: str, handle: int) -> None:
        os.close(handle)
        os.unlink(path, dir_fd=self._root)


def _errno_of(call: Callable[[str], None], path: str) -> tuple[int]:
    try:
        call(path)
    except OSError as error:
        return (error.errno or errno.EIO,)
    return (0,)


def _bring_in(handle: int, size_bytes: int) -> None:
    """Read a file into the page cache, by one call that copies nothing. Nothing depends on it."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            offset = 0
            while offset < size_bytes and (sent := os.sendfile(nowhere, handle, offset, size_bytes - offset)):
                offset += sent
        finally:
            os.close(nowhere)
    except OSError:
        pass


def _write_all(handle: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Write all of at most IOVECS_PER_CALL buffers, however often the kernel stops short; return the end offset."""
    left = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while left:
        written = os.pwritev(handle, left, offset)
        if not written:
            raise OSError(errno.EIO, "the file system wrote nothing and gave no reason")
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
    return offset


def _read_all(handle: int, length: int, offset: int) -> bytes:
    data = os.pread(handle, length, offset)
    while len(data) < length:
        more = os.pread(handle, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _read_past(handle: int, length: int, offset: int) -> tuple[()]:
    try:
        os.preadv(handle, [_DISCARDED[:length]], offset)
    except OSError:
        pass  # whoever reads it will meet it
    return ()


def _read_extents(handle: int, extents: Sequence[tuple[int, int]]) -> tuple[int, list[bytes]]:
    pieces = []
    try:
        for length, offset in extents:
            data = _read_all(handle, length, offset)
            if len(data) != length:
                return (errno.EIO, [])
            pieces.append(data)
    except OSError as error:
        return (error.errno or errno.EIO, [])
    return (0, pieces)


def _read_device(handle: int, length: int, offset: int) -> tuple[int, Buffer]:
    """The bytes are a view of memory that goes with it: a copy would hold the interpreter's lock."""
    start = offset & -DIRECT_BYTES
    try:
        # A description of its own: the flags of the handle are everybody's.
        direct = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        errno_, pieces = _read_extents(handle, [(length, offset)])
        return errno_, pieces[0] if pieces else b""
    try:
        # A map of its own begins at a page: what is read past the page cache has to lie aligned.
        room = mmap.mmap(-1, (offset - start + length + DIRECT_BYTES - 1) & -DIRECT_BYTES)
        read = os.preadv(direct, [room], start)
        if read < offset - start + length:
            return (errno.EIO, b"")
        return (0, memoryview(room)[offset - start : offset - start + length])
    except OSError as error:
        return (error.errno or errno.EIO, b"")
    finally:
        os.close(direct)


def _fail(error: OSError, doing: str) -> NoReturn:
    raise OSError(error.errno, f"{doing}: {error.strerror}") from error
