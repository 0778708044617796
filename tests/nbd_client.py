"""A small NBD client for tests that must know what was acknowledged, and when.

Simple replies unless another style is asked for; requests pipelined by the caller: `send` returns a cookie, `receive`
the next reply in the order in which the server answers. ConnectionError when the server is gone.
"""

import itertools
import socket
import ssl
from dataclasses import dataclass

from protocol.agreement import ReplyStyle
from protocol.nbd import (
    CLIENT_FLAGS,
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    OPTION_HEADER,
    OPTION_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    Greeting,
    HandshakeFlag,
    Info,
    InfoExport,
    InfoRequest,
    Option,
    OptionReply,
    OptionReplyHeader,
    ReplyFlag,
)

STYLE_OPTIONS = {ReplyStyle.STRUCTURED: Option.STRUCTURED_REPLY, ReplyStyle.EXTENDED: Option.EXTENDED_HEADERS}


class RefusedError(Exception):
    """The server refused the export; the message is the server's."""


@dataclass(frozen=True)
class Reply:
    """One answer: `error` is 0 or an errno of the protocol, `data` what a READ returned."""

    cookie: int
    error: int
    data: bytes


class Client:
    """One connection to one export."""

    def __init__(
        self,
        address: tuple[str, int] | str,
        name: str,
        timeout_s: float = 10.0,
        style: ReplyStyle = ReplyStyle.SIMPLE,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Connect to (host, port) or the path of a unix socket. RefusedError, OSError."""
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(timeout_s)
            self.socket.connect(address)
        else:
            self.socket = socket.create_connection(address, timeout_s)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.style = style
        self._received = bytearray()
        self._cookies = itertools.count(1)
        self._read_lengths: dict[int, int] = {}
        self._tls = tls
        self.size_bytes, self.flags = self._go(name)

    def close(self) -> None:
        self.socket.close()

    def send(self, command: Command, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """Send a request and return its cookie; a WRITE's length is its data's."""
        cookie = next(self._cookies)
        if command == Command.READ:
            self._read_lengths[cookie] = length
        self.socket.sendall(self.pack(cookie, command, offset, length, data, flags))
        return cookie

    def send_reads(self, count: int, length: int) -> list[int]:
        """Send so many READs of the export's begin in one piece, so that the server has all as soon as it has one."""
        cookies = [next(self._cookies) for _ in range(count)]
        self._read_lengths.update(dict.fromkeys(cookies, length))
        self.socket.sendall(b"".join(self.pack(cookie, Command.READ, 0, length, b"", 0) for cookie in cookies))
        return cookies

    def pack(self, cookie: int, command: Command, offset: int, length: int, data: bytes, flags: int = 0) -> bytes:
        """A request's bytes."""
        if self.style is not ReplyStyle.EXTENDED:
            return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, len(data) or length) + data
        flags |= CommandFlag.PAYLOAD_LEN if data else 0
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, len(data) or length) + data

    def receive(self) -> Reply:
        """Wait for the next reply."""
        start = self._take(4)
        self._received[:0] = start
        if int.from_bytes(start, "big") != SIMPLE_REPLY_MAGIC:
            return self._receive_chunks()
        magic, error, cookie = SIMPLE_REPLY.unpack(self._take(SIMPLE_REPLY.size))
        if magic != SIMPLE_REPLY_MAGIC:
            raise AssertionError(f"a reply with magic {magic:#x}")
        length = self._read_lengths.pop(cookie, 0)
        return Reply(cookie, error, b"" if error else self._take(length))

    def _receive_chunks(self) -> Reply:
        """A reply in chunks; the chunks of one stand together."""
        cookie, error, done, pieces = 0, 0, False, dict[int, bytes]()
        while not done:
            if self.style is ReplyStyle.EXTENDED:
                magic, flags, kind, cookie, _, length = EXTENDED_REPLY.unpack(self._take(EXTENDED_REPLY.size))
                expected = EXTENDED_REPLY_MAGIC
            else:
                magic, flags, kind, cookie, length = STRUCTURED_REPLY.unpack(self._take(STRUCTURED_REPLY.size))
                expected = STRUCTURED_REPLY_MAGIC
            if self.style is ReplyStyle.SIMPLE or magic != expected:
                raise AssertionError(f"a reply with magic {magic:#x}")
            payload = self._take(length)
            done = bool(flags & ReplyFlag.DONE)
            if kind == Chunk.ERROR:
                error = int.from_bytes(payload[:4], "big")
            elif kind == Chunk.OFFSET_DATA:
                pieces[int.from_bytes(payload[:8], "big")] = payload[8:]
            elif kind == Chunk.OFFSET_HOLE:
                pieces[int.from_bytes(payload[:8], "big")] = bytes(int.from_bytes(payload[8:12], "big"))
            else:
                assert kind == Chunk.NONE, f"a chunk of type {kind}"
        data = b"".join(piece for _, piece in sorted(pieces.items()))
        length = self._read_lengths.pop(cookie, 0)
        assert error or len(data) == length
        return Reply(cookie, error, b"" if error else data)

    def request(self, command: Command, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> Reply:
        """Send one request and wait for its reply; nothing else may be in flight."""
        cookie = self.send(command, offset, length, data, flags)
        reply = self.receive()
        assert reply.cookie == cookie
        return reply

    def read(self, offset: int, length: int) -> bytes:
        reply = self.request(Command.READ, offset, length)
        if reply.error:
            raise OSError(reply.error, f"reading {length} bytes at {offset}")
        return reply.data

    def _go(self, name: str) -> tuple[int, int]:
        Greeting.parse(self._take(Greeting.sizeof()))
        self.socket.sendall(CLIENT_FLAGS.pack(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
        if self._tls is not None:
            self._start_tls(self._tls)
        if self.style in STYLE_OPTIONS:
            self.socket.sendall(OPTION_HEADER.pack(OPTION_MAGIC, STYLE_OPTIONS[self.style], 0))
            agreed = OptionReplyHeader.parse(self._take(OptionReplyHeader.sizeof()))
            assert (agreed.type, agreed.length) == (OptionReply.ACK, 0)
        body = InfoRequest.build({"name": name.encode(), "wanted": []})
        self.socket.sendall(OPTION_HEADER.pack(OPTION_MAGIC, Option.GO, len(body)) + body)
        answer = None
        while True:
            reply = OptionReplyHeader.parse(self._take(OptionReplyHeader.sizeof()))
            body = self._take(reply.length)
            if reply.type == OptionReply.ACK:
                assert answer is not None, "GO was acknowledged without INFO_EXPORT"
                return answer
            if reply.type != OptionReply.INFO:
                raise RefusedError(body.decode(errors="replace"))
            if int.from_bytes(body[:2], "big") == Info.EXPORT:
                export = InfoExport.parse(body)
                answer = export.size_bytes, export.flags

    def _start_tls(self, context: ssl.SSLContext) -> None:
        self.socket.sendall(OPTION_HEADER.pack(OPTION_MAGIC, Option.STARTTLS, 0))
        reply = OptionReplyHeader.parse(self._take(OptionReplyHeader.sizeof()))
        if reply.type != OptionReply.ACK:
            raise RefusedError(self._take(reply.length).decode(errors="replace"))
        assert not self._received, "clear text behind the reply to STARTTLS"
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")

    def _take(self, length: int) -> bytes:
        while len(self._received) < length:
            data = self.socket.recv(1 << 18)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            self._received += data
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken
