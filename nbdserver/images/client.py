"""A small NBD client for one connection to our own node: reads and writes in a window of requests, sizes, extents.

Theory: blocking, because a command does nothing else meanwhile. Speed comes from the window: WINDOW requests of
PIECE_BYTES are under way, so that the node never waits for us. Requests are small and replies of writes too, so that
neither side can block the other for good.

Rules
- Structured replies and `base:allocation` are needed; every node of ours has them.
- Reads ask for one chunk (DF): who wants to know of holes asks for extents.
- One thing at a time: while `read` or `write` goes on nothing else is asked; a second connection is for that.
- What goes wrong is an ImageError in one line.
"""

import errno as errnos
import itertools
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator

from nbdserver.images.errors import ImageError
from protocol import nbd
from protocol.contexts import BASE_ALLOCATION
from protocol.nbd import Chunk, Command, CommandFlag, HandshakeFlag, Info, Option, OptionReply, ReplyFlag

PIECE_BYTES = 1 << 20
WINDOW = 16
MOST_ZEROED_BYTES = 1 << 30  # of one request
TIMEOUT_S = 600.0  # for a reply; a disk that is full or being cleaned lets a write wait

Range = tuple[int, int]
"""(offset, length)"""


class Client:
    """One connection to one export."""

    def __init__(self, path: str, export: str) -> None:
        """Connect to a unix socket. Raises ImageError."""
        self.export = export
        self._received = bytearray()
        self._cookies = itertools.count(1)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(path)
            self.size_bytes, flags = self._handshake()
        except OSError as error:
            self._socket.close()
            raise ImageError(f"the node does not answer at {path}: {error.strerror or error}") from None
        except BaseException:
            self._socket.close()
            raise
        self.read_only = bool(flags & nbd.TransmissionFlag.READ_ONLY)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    # --- what an export can do ---

    def data(self) -> Iterator[Range]:
        """The ranges that may hold something else than zeros, in order."""
        position = 0
        while position < self.size_bytes:
            length = min(MOST_ZEROED_BYTES, self.size_bytes - position)
            for extent_bytes, flags in self._extents(position, length):
                if not flags & nbd.ExtentFlag.ZERO:
                    yield position, extent_bytes
                position += extent_bytes

    def read(self, ranges: Iterable[Range]) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of pieces of the ranges, in order."""
        waiting: deque[tuple[int, int, int]] = deque()  # cookie, offset, length
        arrived: dict[int, bytes] = {}
        for offset, length in pieces(ranges):
            waiting.append((self._send(Command.READ, offset, length, flags=CommandFlag.DF), offset, length))
            if len(waiting) >= WINDOW:
                yield self._take_read(waiting, arrived)
        while waiting:
            yield self._take_read(waiting, arrived)

    def write(self, changes: Iterable[tuple[int, bytes | memoryview]]) -> Iterator[int]:
        """Write (offset, data), each at most PIECE_BYTES; yields how many bytes are written, as it goes on."""
        waiting: dict[int, int] = {}
        for offset, data in changes:
            waiting[self._send(Command.WRITE, offset, len(data), data)] = len(data)
            if len(waiting) >= WINDOW:
                yield waiting.pop(self._reply()[0])
        while waiting:
            yield waiting.pop(self._reply()[0])

    def zero(self) -> None:
        """Let all of it read as zeros and take no room."""
        for offset in range(0, self.size_bytes, MOST_ZEROED_BYTES):
            self._send(Command.WRITE_ZEROES, offset, min(MOST_ZEROED_BYTES, self.size_bytes - offset))
            self._reply()

    def flush(self) -> None:
        """What was written, over any connection, is durable when this returns."""
        self._send(Command.FLUSH, 0, 0)
        self._reply()

    # --- requests and replies ---

    def _send(self, command: int, offset: int, length: int, data: bytes | memoryview = b"", flags: int = 0) -> int:
        cookie = next(self._cookies)
        header = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length)
        try:
            sent = self._socket.sendmsg([header, data])
            rest = memoryview(header + bytes(data))[sent:] if sent < len(header) + len(data) else b""
            if rest:
                self._socket.sendall(rest)
        except OSError as error:
            raise self._broken(error) from None
        return cookie

    def _take_read(self, waiting: deque[tuple[int, int, int]], arrived: dict[int, bytes]) -> tuple[int, bytes]:
        cookie, offset, length = waiting.popleft()
        while cookie not in arrived:
            came, kind, payload = self._reply()
            if kind != Chunk.OFFSET_DATA:
                raise ImageError(f"{self.export}: the node answered a read with a chunk of type {kind}")
            arrived[came] = nbd.OffsetData.parse(payload).data
        data = arrived.pop(cookie)
        if len(data) != length:
            raise ImageError(f"{self.export}: the node answered {len(data)} bytes at {offset} instead of {length}")
        return offset, data

    def _extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        self._send(Command.BLOCK_STATUS, offset, length)
        _, kind, payload = self._reply()
        if kind != Chunk.BLOCK_STATUS:
            raise ImageError(f"{self.export}: the node does not tell where it has holes")
        return [(extent.length, extent.flags) for extent in nbd.BlockStatus.parse(payload).extents]

    def _reply(self) -> tuple[int, int, bytes]:
        """(cookie, type of its chunk, payload) of the next reply. ImageError if it is an error."""
        if int.from_bytes(self._peek(4), "big") == nbd.SIMPLE_REPLY_MAGIC:
            _, error, cookie = nbd.SIMPLE_REPLY.unpack(self._take(nbd.SIMPLE_REPLY.size))
            self._raise(error, "")
            return cookie, Chunk.NONE, b""
        magic, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack(self._take(nbd.STRUCTURED_REPLY.size))
        if magic != nbd.STRUCTURED_REPLY_MAGIC or not flags & ReplyFlag.DONE or length > 2 * PIECE_BYTES:
            raise ImageError(f"{self.export}: the node does not speak NBD as it should")
        payload = self._take(length)
        if kind & 1 << 15:
            told = nbd.Error.parse(payload)
            self._raise(told.error, told.message.decode(errors="replace"))
        return cookie, kind, payload

    def _raise(self, error: int, message: str) -> None:
        if error == errnos.ENOSPC:
            raise ImageError(f"{self.export}: the disk of the node is full")
        if error:
            raise ImageError(f"{self.export}: {message or os.strerror(error)}; `nbdserver events` may say more")

    # --- bytes ---

    def _peek(self, length: int) -> bytes:
        while len(self._received) < length:
            try:
                data = self._socket.recv(1 << 20)
            except OSError as error:
                raise self._broken(error) from None
            if not data:
                raise ImageError(f"{self.export}: the node closed the connection; `nbdserver events` says why")
            self._received += data
        return bytes(self._received[:length])

    def _take(self, length: int) -> bytes:
        taken = self._peek(length)
        del self._received[:length]
        return taken

    def _broken(self, error: OSError) -> ImageError:
        return ImageError(f"{self.export}: the connection to the node broke: {error.strerror or error}")

    # --- handshake ---

    def _handshake(self) -> Range:
        """(size, transmission flags)."""
        nbd.Greeting.parse(self._take(nbd.Greeting.sizeof()))
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._socket.sendall(nbd.CLIENT_FLAGS.pack(int(flags)))
        name = self.export.encode()
        self._option(Option.STRUCTURED_REPLY, b"")
        queries = [BASE_ALLOCATION.encode()]
        self._option(Option.SET_META_CONTEXT, nbd.MetaContextRequest.build({"name": name, "queries": queries}))
        for payload in self._option(Option.GO, nbd.InfoRequest.build({"name": name, "wanted": []})):
            if int.from_bytes(payload[:2], "big") == Info.EXPORT:
                told = nbd.InfoExport.parse(payload)
                return told.size_bytes, told.flags
        raise ImageError(f"{self.export}: the node does not tell its size")

    def _option(self, option: Option, data: bytes) -> list[bytes]:
        """The payloads of the replies to an option. ImageError if it is refused."""
        self._socket.sendall(nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, option, len(data)) + data)
        payloads: list[bytes] = []
        while True:
            _, _, kind, length = nbd.OPTION_REPLY_HEADER.unpack(self._take(nbd.OPTION_REPLY_HEADER.size))
            payload = self._take(length)
            if kind == OptionReply.ACK:
                return payloads
            if kind & nbd.OPTION_REPLY_IS_ERROR:
                raise ImageError(f"{self.export}: {payload.decode(errors='replace') or OptionReply(kind).name}")
            payloads.append(payload)


def pieces(ranges: Iterable[Range]) -> Iterator[Range]:
    """The ranges in pieces of at most PIECE_BYTES."""
    for offset, length in ranges:
        for start in range(offset, offset + length, PIECE_BYTES):
            yield start, min(PIECE_BYTES, offset + length - start)
