"""What the nodes of a cluster say to each other about the directory: bodies of sealed frames, each declared once.

docs/directory.md says who sends what when. A *message* is an update, or a part of a large one, with its epoch and
sequence; an *update* is one change of one key. Integers are big-endian.

Theory: a body is a fixed head, and what repeats is fixed heads again, so that packers derived from the declarations do
the work: construct alone would cost an agent more than all the rest of a message. `encode` gives a body, `decode` takes
one whole: a body that is cut off, has bytes left over or numbers that cannot be is a `MalformedError`, nothing else.

Rules
- A kind keeps its number and its layout for ever within a frame version; a new layout is a new kind.
- `Updates` fits into a datagram: whoever fills one asks `UPDATES_ROOM_BYTES`.
"""

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from struct import Struct as Packer
from typing import Any, ClassVar, NamedTuple

from construct import Int8ub, Int16ub, Int32ub, Int64ub, Struct

from protocol.invariant import invariant
from protocol.layout import derive
from protocol.sealed_frames import DATAGRAM_BODY_BYTES

KEY_LIMIT_BYTES = 480  # what the registry takes, less its own prefix
VALUE_LIMIT_BYTES = 256 << 10
PAYLOAD_BYTES = 1200  # of an update in one message
PREFIXES_LIMIT = 64
HISTORY_LIMIT = 8  # epochs that a heartbeat names
RANGES_LIMIT = 64  # of sequences in a request or a refusal


class MalformedError(Exception):
    """A body that is none of its kind."""


class Kind(IntEnum):
    """Of a frame."""

    UPDATES = 1
    HEARTBEAT = 2
    REQUEST = 3
    REFUSAL = 4
    POSITION = 5
    COLLECT = 6
    PROMISE = 7
    REPORT = 8
    JOIN = 9
    JOIN_REFUSED = 10
    DELEGATE = 11
    HOLD = 12
    HELD = 13
    READY = 14
    ACTIVE = 15
    SNAPSHOT_REQUEST = 16
    SNAPSHOT_BEGIN = 17
    SNAPSHOT_ENTRIES = 18
    SNAPSHOT_END = 19
    SNAPSHOT_REFUSED = 20
    SUBSCRIBE = 21
    SUBSCRIBED = 22
    SUBSCRIBE_REFUSED = 23


class Reason(IntEnum):
    """Of a refusal."""

    NOT_HERE = 1  # this node does not have it (any more, or yet)
    NOT_NOW = 2  # too much to do
    GONE = 3  # it is below the master's floor: it can never come
    NOT_MASTER = 4
    NO_DELEGATE = 5
    HOLD_BROKEN = 6  # the messages from the hold on are gone: begin again
    OTHER_EPOCH = 7


class Action(IntEnum):
    """Of an update."""

    PUT = 1
    DELETE = 2


class Confirm(IntEnum):
    """When a publication is answered."""

    NONE = 0
    SITE = 1
    REGISTRY = 2


class NodeKind(IntEnum):
    """How a node is reached: by datagrams in the own site, or over TCP across a WAN."""

    FIRST = 1
    SECOND = 2


# --- updates and messages -------------------------------------------------------------------------------------------

UpdateHead = Struct(
    "action" / Int8ub,
    "is_kept" / Int8ub,  # 1: the registry has this key too
    "expires_ms" / Int32ub,  # 0: never
    "origin" / Int64ub,  # id of the node that reported it
    "number" / Int64ub,  # of its report
    "key_bytes" / Int16ub,
    "value_bytes" / Int32ub,
)
MessageHead = Struct(
    "epoch" / Int32ub,
    "sequence" / Int64ub,
    "part" / Int16ub,  # from 0
    "parts" / Int16ub,
    "payload_bytes" / Int16ub,
)
PositionHead = Struct("epoch" / Int32ub, "sequence" / Int64ub)

UPDATE_HEAD = derive(UpdateHead)
MESSAGE_HEAD = derive(MessageHead)
POSITION_HEAD = derive(PositionHead)
MESSAGE_HEAD_BYTES = MESSAGE_HEAD.size
PARTS_LIMIT = -(-(UPDATE_HEAD.size + KEY_LIMIT_BYTES + VALUE_LIMIT_BYTES) // PAYLOAD_BYTES)


class Position(NamedTuple):
    """(epoch, sequence) of the last message of an update; compares by epoch first."""

    epoch: int
    sequence: int


NOWHERE = Position(0, 0)


class Update(NamedTuple):
    """One change of one key."""

    action: Action
    key: str
    value: bytes = b""
    is_kept: bool = False
    expires_ms: int = 0
    origin: int = 0
    number: int = 0

    def encode(self) -> bytes:
        key = self.key.encode()
        invariant(0 < len(key) <= KEY_LIMIT_BYTES and len(self.value) <= VALUE_LIMIT_BYTES, "an update within bounds")
        head = UPDATE_HEAD.pack(
            self.action, self.is_kept, self.expires_ms, self.origin, self.number, len(key), len(self.value)
        )
        return head + key + self.value

    @staticmethod
    def decode(payload: bytes) -> "Update":
        """Raises MalformedError."""
        if len(payload) < UPDATE_HEAD.size:
            raise MalformedError("an update is cut off")
        action, is_kept, expires_ms, origin, number, key_bytes, value_bytes = UPDATE_HEAD.unpack_from(payload)
        end = UPDATE_HEAD.size + key_bytes
        if end + value_bytes != len(payload) or not 0 < key_bytes <= KEY_LIMIT_BYTES or value_bytes > VALUE_LIMIT_BYTES:
            raise MalformedError("an update has a wrong length")
        if action not in _ACTIONS or is_kept > 1 or b"\0" in payload[UPDATE_HEAD.size : end]:
            raise MalformedError("an update of an unknown kind")
        return Update(
            _ACTIONS[action], _text(payload[UPDATE_HEAD.size : end]), bytes(payload[end:]), bool(is_kept), expires_ms,
            origin, number,
        )  # fmt: skip


_ACTIONS = {int(action): action for action in Action}


class Message(NamedTuple):
    """An update, or part `part` of `parts` of one, in the one order of all."""

    epoch: int
    sequence: int
    part: int
    parts: int
    payload: bytes

    @property
    def size_bytes(self) -> int:
        """In a frame."""
        return MESSAGE_HEAD_BYTES + len(self.payload)


def cut(update: bytes) -> list[bytes]:
    """The payloads of the messages that an encoded update takes."""
    return [update[start : start + PAYLOAD_BYTES] for start in range(0, len(update), PAYLOAD_BYTES)]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise MalformedError("a text is not UTF-8") from None


# --- bodies -----------------------------------------------------------------------------------------------------------

UpdatesHead = Struct("epoch" / Int32ub, "wants_position" / Int8ub, "count" / Int8ub)
HeartbeatHead = Struct(
    "epoch" / Int32ub,
    "newest" / Int64ub,
    "confirmed" / Int64ub,
    "floor" / Int64ub,  # the lowest sequence that the master can resend
    "wants_position" / Int8ub,
    "count" / Int8ub,
)
RequestHead = Struct("epoch" / Int32ub, "count" / Int8ub)
RefusalHead = Struct("epoch" / Int32ub, "reason" / Int8ub, "floor" / Int64ub, "count" / Int8ub)
RangeHead = Struct("first" / Int64ub, "count" / Int16ub)
PositionReportHead = Struct("epoch" / Int32ub, "persisted_epoch" / Int32ub, "sequence" / Int64ub)
ReportHead = Struct("epoch" / Int32ub, "confirm" / Int8ub)

UPDATES_HEAD = derive(UpdatesHead)
HEARTBEAT_HEAD = derive(HeartbeatHead)
REQUEST_HEAD = derive(RequestHead)
REFUSAL_HEAD = derive(RefusalHead)
RANGE_HEAD = derive(RangeHead)
POSITION_REPORT_HEAD = derive(PositionReportHead)
REPORT_HEAD = derive(ReportHead)
UPDATES_ROOM_BYTES = DATAGRAM_BODY_BYTES - UPDATES_HEAD.size
"""For messages in one Updates frame."""

Ranges = tuple[tuple[int, int], ...]
"""(first sequence, count), each."""


@dataclass(frozen=True, slots=True)
class Updates:
    """Messages, from the master or resent by anyone. `wants_position`: tell the master when they are persisted."""

    kind: ClassVar[Kind] = Kind.UPDATES
    epoch: int
    wants_position: bool
    messages: tuple[Message, ...]

    def encode(self) -> bytes:
        pieces = [UPDATES_HEAD.pack(self.epoch, self.wants_position, len(self.messages))]
        for epoch, sequence, part, parts, payload in self.messages:
            pieces.append(MESSAGE_HEAD.pack(epoch, sequence, part, parts, len(payload)))
            pieces.append(payload)
        return b"".join(pieces)

    @staticmethod
    def decode(body: bytes) -> "Updates":
        epoch, wants_position, count = _head(UPDATES_HEAD, body)
        messages = []
        offset = UPDATES_HEAD.size
        for _ in range(count):
            if len(body) < offset + MESSAGE_HEAD_BYTES:
                raise MalformedError("a message is cut off")
            of_epoch, sequence, part, parts, payload_bytes = MESSAGE_HEAD.unpack_from(body, offset)
            offset += MESSAGE_HEAD_BYTES
            if not part < parts <= PARTS_LIMIT or not 0 < payload_bytes <= PAYLOAD_BYTES or sequence <= part:
                raise MalformedError("a message has impossible numbers")
            messages.append(Message(of_epoch, sequence, part, parts, body[offset : offset + payload_bytes]))
            offset += payload_bytes
        _whole(body, offset)
        return Updates(epoch, bool(wants_position), tuple(messages))


Starts = tuple[tuple[int, int], ...]
"""(epoch, its first sequence), oldest first."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The master's sign of life, and how far it is."""

    kind: ClassVar[Kind] = Kind.HEARTBEAT
    epoch: int
    newest: int
    confirmed: int
    floor: int
    wants_position: bool
    history: Starts

    def encode(self) -> bytes:
        head = HEARTBEAT_HEAD.pack(
            self.epoch, self.newest, self.confirmed, self.floor, self.wants_position, len(self.history)
        )
        return head + b"".join(POSITION_HEAD.pack(*item) for item in self.history)

    @staticmethod
    def decode(body: bytes) -> "Heartbeat":
        epoch, newest, confirmed, floor, wants_position, count = _head(HEARTBEAT_HEAD, body)
        _whole(body, HEARTBEAT_HEAD.size + count * POSITION_HEAD.size)
        history = tuple(POSITION_HEAD.iter_unpack(body[HEARTBEAT_HEAD.size :]))
        rises = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(history))
        if not history or count > HISTORY_LIMIT or not rises or history[-1][0] != epoch or not history[0][1]:
            raise MalformedError("a heartbeat has an impossible history")
        return Heartbeat(epoch, newest, confirmed, floor, bool(wants_position), history)


def _pack_ranges(ranges: Ranges) -> bytes:
    invariant(len(ranges) <= RANGES_LIMIT, "too many ranges for a frame")
    return b"".join(RANGE_HEAD.pack(*item) for item in ranges)


def _unpack_ranges(body: bytes, offset: int, count: int) -> Ranges:
    _whole(body, offset + count * RANGE_HEAD.size)
    ranges = tuple(RANGE_HEAD.iter_unpack(body[offset:]))
    if not 0 < count <= RANGES_LIMIT or not all(first and number for first, number in ranges):
        raise MalformedError("impossible ranges of sequences")
    return ranges


@dataclass(frozen=True, slots=True)
class Request:
    """Please resend these."""

    kind: ClassVar[Kind] = Kind.REQUEST
    epoch: int
    ranges: Ranges

    def encode(self) -> bytes:
        return REQUEST_HEAD.pack(self.epoch, len(self.ranges)) + _pack_ranges(self.ranges)

    @staticmethod
    def decode(body: bytes) -> "Request":
        epoch, count = _head(REQUEST_HEAD, body)
        return Request(epoch, _unpack_ranges(body, REQUEST_HEAD.size, count))


@dataclass(frozen=True, slots=True)
class Refusal:
    """These cannot be resent by this node. `floor`: the lowest sequence that it has."""

    kind: ClassVar[Kind] = Kind.REFUSAL
    epoch: int
    reason: Reason
    floor: int
    ranges: Ranges

    def encode(self) -> bytes:
        head = REFUSAL_HEAD.pack(self.epoch, self.reason, self.floor, len(self.ranges))
        return head + _pack_ranges(self.ranges)

    @staticmethod
    def decode(body: bytes) -> "Refusal":
        epoch, reason, floor, count = _head(REFUSAL_HEAD, body)
        return Refusal(epoch, _reason(reason), floor, _unpack_ranges(body, REFUSAL_HEAD.size, count))


@dataclass(frozen=True, slots=True)
class PositionReport:
    """Agent to master: alive, and what it has persisted."""

    kind: ClassVar[Kind] = Kind.POSITION
    epoch: int
    position: Position

    def encode(self) -> bytes:
        return POSITION_REPORT_HEAD.pack(self.epoch, *self.position)

    @staticmethod
    def decode(body: bytes) -> "PositionReport":
        epoch, persisted_epoch, sequence = _head(POSITION_REPORT_HEAD, body)
        _whole(body, POSITION_REPORT_HEAD.size)
        return PositionReport(epoch, Position(persisted_epoch, sequence))


@dataclass(frozen=True, slots=True)
class Report:
    """A node to the master: publish this, an encoded update whose origin and number say who asks for the how-manieth.

    `confirm` is what its publisher waits for.
    """

    kind: ClassVar[Kind] = Kind.REPORT
    epoch: int
    confirm: int
    update: bytes

    def encode(self) -> bytes:
        return REPORT_HEAD.pack(self.epoch, self.confirm) + self.update

    @staticmethod
    def decode(body: bytes) -> "Report":
        epoch, confirm = _head(REPORT_HEAD, body)
        return Report(epoch, confirm, body[REPORT_HEAD.size :])


def _head(packer: Packer, body: bytes) -> tuple[Any, ...]:
    if len(body) < packer.size:
        raise MalformedError("it is cut off")
    return packer.unpack_from(body)


def _whole(body: bytes, end: int) -> None:
    if len(body) != end:
        raise MalformedError("it has a wrong length")


_REASONS = {int(reason): reason for reason in Reason}


def _reason(number: int) -> Reason:
    if number not in _REASONS:
        raise MalformedError(f"unknown reason {number}")
    return _REASONS[number]
