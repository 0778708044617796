"""A session without a network: its connection is a list, its clock is moved by hand, its client is these functions.

`Wire` is one client of an `Exports`; replies are parsed with the construct declarations, the oracle of the session's
fast paths.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from metadata.seams import Buffer, Receiver
from nbdserver.frontend.session import Session
from nbdserver.volume.export import Export, Exports
from protocol import nbd
from protocol.agreement import ReplyStyle
from protocol.handover import Handover, decode, encode
from protocol.nbd import Chunk, Command, CommandFlag, HandshakeFlag, Option, ReplyFlag
from tests.unit.memory_device import MemoryDevice

SIZE_BYTES = 1 << 20
HELLO = nbd.ClientFlags.build({"flags": int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)})


class HandClock:
    """Time that stands still until `advance`; `run` does what is due now."""

    def __init__(self) -> None:
        self.time_s = 1000.0
        self._soon: list[Callable[[], None]] = []
        self._timers: list[tuple[float, int, HandTimer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self.time_s

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "HandTimer":
        timer = HandTimer(callback)
        heapq.heappush(self._timers, (self.time_s + delay_s, next(self._order), timer))
        return timer

    def turn(self) -> bool:
        """One turn of the loop; False if nothing was to do."""
        soon, self._soon = self._soon, []
        for callback in soon:
            callback()
        return bool(soon)

    def run(self, turns: int = 10_000) -> None:
        """Turn until nothing is left to do."""
        for _ in range(turns):
            if not self.turn():
                return
        raise AssertionError("the loop does not come to rest")

    def advance(self, delay_s: float) -> None:
        self.time_s += delay_s
        while self._timers and self._timers[0][0] <= self.time_s:
            heapq.heappop(self._timers)[2].fire()
        self.run()


class HandTimer:
    """A callback that can be cancelled."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def fire(self) -> None:
        if self._callback is not None:
            self._callback()


class ListConnection:
    """Takes what is sent; with `taking` False the peer takes nothing."""

    def __init__(self, peer_name: str) -> None:
        self.peer_name = peer_name
        self.spins = True
        self.sent = bytearray()
        self.sends = 0
        self.taking = True
        self.reading = True
        self.hung_up = False
        self.closed = False
        self.aborted = False
        self.receiver: Receiver | None = None
        self.round_end: list[Callable[[], None]] | None = None  # None: its data arrives alone
        self._queued: list[bytes] = []

    def send(self, buffers: Sequence[Buffer]) -> None:
        assert not self.closed
        self.sends += 1
        data = b"".join(buffers)
        if self.taking:
            self.sent += data
        else:
            self._queued.append(data)

    @property
    def unsent_bytes(self) -> int:
        return sum(map(len, self._queued))

    def take(self) -> None:
        self.taking = True
        self.sent += b"".join(self._queued)
        self._queued.clear()

    def redirect(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def at_round_end(self, callback: Callable[[], None]) -> None:
        if self.round_end is None:
            callback()
        else:
            self.round_end.append(callback)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def has_hung_up(self) -> bool:
        return self.hung_up

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def detach(self) -> tuple[int, int, bytes] | None:
        if self.closed:
            return None
        self.closed = True
        return -1, id(self), b"".join(self._queued)


@dataclass
class Answer:
    """All that was replied to one request."""

    error: int = 0
    message: str = ""
    data: dict[int, bytes] = field(default_factory=dict)  # offset (0 in simple replies) -> bytes
    holes: dict[int, int] = field(default_factory=dict)
    statuses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # id of a context -> its extents
    done: bool = False

    @property
    def extents(self) -> list[tuple[int, int]]:
        """Of the only context."""
        (only,) = self.statuses.values()
        return only

    def joined(self) -> bytes:
        pieces = {**self.data, **{offset: bytes(length) for offset, length in self.holes.items()}}
        return b"".join(pieces[offset] for offset in sorted(pieces))


class Wire:
    """A client, its session and their connection."""

    def __init__(
        self,
        exports: Exports,
        clock: HandClock,
        style: ReplyStyle = ReplyStyle.STRUCTURED,
        peer_name: str = "192.0.2.1:1000",
        name: str = "disk",
        queries: Sequence[str] = ("base:allocation",),
    ) -> None:
        self.style = style
        self.clock = clock
        self.gone = gone = list[str]()
        self.connection = ListConnection(peer_name)
        self.session = Session(1, self.connection, clock, exports, lambda _, reason: gone.append(reason))
        self._cookies = itertools.count(1)
        self._reads: dict[int, int] = {}
        hello = HELLO
        if style is not ReplyStyle.SIMPLE:
            hello += option(Option.STRUCTURED_REPLY if style is ReplyStyle.STRUCTURED else Option.EXTENDED_HEADERS)
            if queries:
                wanted = {"name": name.encode(), "queries": [query.encode() for query in queries]}
                hello += option(Option.SET_META_CONTEXT, nbd.MetaContextRequest.build(wanted))
        self.feed(hello + named(Option.GO, name))
        self.greeting = bytes(self.connection.sent)
        self.connection.sent.clear()

    @property
    def entered(self) -> bool:
        return self.session.export is not None and not self.gone

    def feed(self, data: bytes, piece_bytes: int = 1 << 30) -> None:
        """Let the session receive, as much at a time as it has room for; what is not read is a failure."""
        view = memoryview(data)
        while view and not self.connection.closed:
            assert self.connection.reading, "fed while the connection is not read"
            room = self.session.buffer()
            assert len(room), "no room to receive into"
            size_bytes = min(len(room), len(view), piece_bytes)
            room[:size_bytes] = view[:size_bytes]
            view = view[size_bytes:]
            self.session.received(size_bytes)

    def hand_over(self, exports: Exports) -> None:
        """Let the session be frozen and another one, of `exports`, go on with the connection."""
        frozen: list[bool] = []
        self.session.freeze(lambda: frozen.append(True))
        self.clock.run()
        assert frozen == [True]
        given = self.session.hand_over()
        assert given is not None
        assert not self.connection.reading, "a frozen connection is read"
        state = decode(b"".join(encode(Handover("", 0.0, 0, [], [given[1]])))).clients[0]
        sent, taking = self.connection.sent, self.connection.taking
        self.connection = ListConnection(self.connection.peer_name)
        self.connection.sent, self.connection.taking = sent, taking
        gone = self.gone
        self.session = Session(1, self.connection, self.clock, exports, lambda _, reason: gone.append(reason), state)
        self.session.resume(state)

    def request(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """(cookie, bytes) of a request; WRITE takes its length from `data`."""
        cookie = next(self._cookies) << 40
        fields = {"flags": flags, "command": command, "cookie": cookie, "offset": offset, "length": length or len(data)}
        if command == Command.READ:
            self._reads[cookie] = length
        if self.style is ReplyStyle.EXTENDED:
            if data:
                fields.update(flags=flags | CommandFlag.PAYLOAD_LEN, length=len(data))
            built: bytes = nbd.ExtendedRequest.build(fields)
        else:
            built = nbd.Request.build(fields)
        return cookie, built + data

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> Answer:
        """Send one request, let the loop come to rest, and return its whole answer."""
        cookie, packed = self.request(command, offset, length, data, flags)
        self.feed(packed)
        self.clock.run()
        return self.answers()[cookie]

    def answers(self) -> dict[int, Answer]:
        """Parse and forget everything that was sent."""
        sent = bytes(self.connection.sent)
        self.connection.sent.clear()
        found: dict[int, Answer] = {}
        position = 0

        def take(size_bytes: int) -> bytes:
            nonlocal position
            taken = sent[position : position + size_bytes]
            assert len(taken) == size_bytes, "a reply is cut off"
            position += size_bytes
            return taken

        frame = nbd.ExtendedReply if self.style is ReplyStyle.EXTENDED else nbd.StructuredReply
        while position < len(sent):
            magic = int.from_bytes(sent[position : position + 4], "big")
            if magic == nbd.SIMPLE_REPLY_MAGIC:
                assert self.style is not ReplyStyle.EXTENDED
                simple = nbd.SimpleReply.parse(take(nbd.SimpleReply.sizeof()))
                answer = found.setdefault(simple.cookie, Answer())
                answer.error, answer.done = simple.error, True
                if simple.cookie in self._reads and not simple.error:
                    assert self.style is ReplyStyle.SIMPLE
                    answer.data[0] = take(self._reads[simple.cookie])
                continue
            header = frame.parse(take(frame.sizeof()))
            _take_chunk(found.setdefault(header.cookie, Answer()), header.flags, header.type, take(header.length))
        return found


def _take_chunk(answer: Answer, flags: int, kind: int, payload: bytes) -> None:
    assert not answer.done, "a chunk behind the last one"
    answer.done = bool(flags & ReplyFlag.DONE)
    if kind == Chunk.OFFSET_DATA:
        parsed = nbd.OffsetData.parse(payload)
        answer.data[parsed.offset] = parsed.data
    elif kind == Chunk.OFFSET_HOLE:
        parsed = nbd.OffsetHole.parse(payload)
        answer.holes[parsed.offset] = parsed.hole_bytes
    elif kind in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
        parsed = (nbd.BlockStatus if kind == Chunk.BLOCK_STATUS else nbd.BlockStatusExt).parse(payload)
        assert parsed.context_id not in answer.statuses, "a context is told of twice"
        answer.statuses[parsed.context_id] = [(extent.length, extent.flags) for extent in parsed.extents]
    elif kind == Chunk.ERROR:
        told = nbd.Error.parse(payload)
        answer.error, answer.message = told.error, told.message.decode()
    else:
        assert kind == Chunk.NONE
        assert not payload


def option(kind: int, data: bytes = b"") -> bytes:
    """One option of a handshake."""
    header: bytes = nbd.OptionHeader.build({"option": kind, "length": len(data)})
    return header + data


def named(kind: int, name: str) -> bytes:
    """INFO or GO, about one export."""
    return option(kind, nbd.InfoRequest.build({"name": name.encode(), "wanted": []}))


def feed(receiver: Receiver, data: bytes) -> None:
    """Let it receive, all at once."""
    receiver.buffer()[: len(data)] = data
    receiver.received(len(data))


@dataclass
class Rig:
    """A clock, a device, its export and the directory around it."""

    clock: HandClock
    device: MemoryDevice
    export: Export
    exports: Exports

    def wire(
        self,
        style: ReplyStyle = ReplyStyle.STRUCTURED,
        peer_name: str = "192.0.2.1:1000",
        queries: Sequence[str] = ("base:allocation",),
    ) -> Wire:
        return Wire(self.exports, self.clock, style, peer_name, queries=queries)


def make_rig(deferring: bool = False, size_bytes: int = SIZE_BYTES) -> Rig:
    """An export "disk" over a MemoryDevice."""
    clock = HandClock()
    device = MemoryDevice(size_bytes, clock.call_soon, deferring)
    exports = Exports()
    export = Export("disk", device)
    exports.add(export)
    return Rig(clock, device, export, exports)
