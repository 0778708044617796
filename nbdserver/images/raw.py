"""Raw images as files, pipes and block devices: written with holes where they can have some, read without their zeros.

Rules
- A sink is written from where its descriptor stands. In a regular file what is left out becomes a hole; everything else
  gets zeros.
- A source's data is told in order, in pieces; what is left out reads as zeros. Grains of zeros inside of data are left
  out too.
"""

import errno as errnos
import fcntl
import os
import stat
from collections.abc import Iterator

from nbdserver.images.client import PIECE_BYTES
from nbdserver.images.errors import ImageError

GRAIN_BYTES = 64 << 10  # zeros of this size, at this alignment, are not sent
SECTOR_BYTES = 512

_ZEROS = bytes(PIECE_BYTES)


class Sink:
    """Where an image of `size_bytes` goes. OSError if it cannot be written."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._position = 0
        is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._is_sparse = is_regular and not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
        if self._is_sparse:
            self._start = os.lseek(descriptor, 0, os.SEEK_CUR)
            os.ftruncate(descriptor, self._start)

    def put(self, offset: int, data: bytes) -> None:
        """The next data; offsets rise."""
        self._skip_to(offset)
        self._write(data)

    def finish(self) -> None:
        """What is left reads as zeros."""
        self._skip_to(self._size_bytes)
        if self._is_sparse:
            os.ftruncate(self._descriptor, self._start + self._size_bytes)

    def _skip_to(self, offset: int) -> None:
        if self._is_sparse:
            os.lseek(self._descriptor, self._start + offset, os.SEEK_SET)
            self._position = offset
        while self._position < offset:
            self._write(_ZEROS[: offset - self._position])

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._position += len(data)


class Source:
    """What an image comes from. OSError if it cannot be read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ahead = b""
        self.read_bytes = 0  # of the image, holes included
        mode = os.fstat(descriptor).st_mode
        self._is_regular = stat.S_ISREG(mode)
        self._start = os.lseek(descriptor, 0, os.SEEK_CUR) if self._is_regular else 0
        self.size_bytes: int | None = None  # not known of a pipe
        if self._is_regular or stat.S_ISBLK(mode):
            self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END) - self._start
            os.lseek(descriptor, self._start, os.SEEK_SET)

    def beginning(self) -> bytes:
        """The first bytes, which stay to be read; b"" of an empty image."""
        if self.size_bytes is not None:
            return os.pread(self._descriptor, SECTOR_BYTES, self._start)
        self._ahead = self._ahead or self._fill()
        return self._ahead[:SECTOR_BYTES]

    def data(self) -> Iterator[tuple[int, memoryview]]:
        """(offset, data) of what is not zeros."""
        for offset, piece in self._pieces():
            self.read_bytes = offset + len(piece)
            yield from filled(offset, piece)
        if self.size_bytes is not None:
            self.read_bytes = self.size_bytes

    def _pieces(self) -> Iterator[tuple[int, bytes]]:
        if not self._is_regular:
            offset = 0
            while piece := self._ahead or self._fill():
                self._ahead = b""
                yield offset, piece
                offset += len(piece)
            return
        end = self._start
        while True:
            try:
                start = os.lseek(self._descriptor, end, os.SEEK_DATA)
                end = os.lseek(self._descriptor, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errnos.ENXIO:
                    return  # a hole to the end
                raise
            for at in range(start, end, PIECE_BYTES):
                piece = os.pread(self._descriptor, min(PIECE_BYTES, end - at), at)
                if len(piece) < min(PIECE_BYTES, end - at):
                    raise ImageError("the image became shorter while it was read")
                yield at - self._start, piece

    def _fill(self) -> bytes:
        """A whole piece, or what is left."""
        parts = []
        missing = PIECE_BYTES
        while missing and (part := os.read(self._descriptor, missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


def filled(offset: int, piece: bytes) -> Iterator[tuple[int, memoryview]]:
    """The parts of a piece that are not grains of zeros."""
    start = None
    for at in range(0, len(piece), GRAIN_BYTES):
        grain = piece[at : at + GRAIN_BYTES]
        if grain != _ZEROS[: len(grain)]:
            start = at if start is None else start
        elif start is not None:
            yield offset + start, memoryview(piece)[start:at]
            start = None
    if start is not None:
        yield offset + start, memoryview(piece)[start:]
