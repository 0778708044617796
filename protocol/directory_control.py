"""The directory's rarer bodies: terms of masters, joins, snapshots and subscriptions.

Theory and rules as in `protocol/directory.py`; these are too rare for packers of their own, so construct builds and
parses them. Each dataclass names its kind and its declaration.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Self

import construct
from construct import Array, Flag, GreedyBytes, Int8ub, Int32ub, Int64ub, PascalString, Struct, Terminated, this

from protocol.directory import (
    POSITION_HEAD,
    PREFIXES_LIMIT,
    Heartbeat,
    Kind,
    MalformedError,
    NodeKind,
    Position,
    PositionHead,
    PositionReport,
    Reason,
    Refusal,
    Report,
    Request,
    Starts,
    Update,
    Updates,
)
from protocol.invariant import invariant

NAME_LIMIT_BYTES = 255

_Name = PascalString(Int8ub, "utf8")
_Key = PascalString(construct.Int16ub, "utf8")


def _take_texts(parsed: Any, _: Any) -> tuple[str, ...]:
    if len(parsed["items"]) > PREFIXES_LIMIT:
        raise construct.ValidationError("more prefixes than a node may subscribe to")
    return tuple(parsed["items"])


_Prefixes = construct.ExprAdapter(
    Struct("count" / Int8ub, "items" / Array(this.count, _Key)),
    _take_texts,
    lambda texts, _: {"count": len(texts), "items": list(texts)},
)
_Position = construct.ExprAdapter(
    PositionHead,
    lambda parsed, _: Position(parsed.epoch, parsed.sequence),
    lambda position, _: position._asdict(),
)
_Reason = construct.ExprAdapter(Int8ub, lambda number, _: Reason(number), lambda reason, _: int(reason))
_NodeKind = construct.ExprAdapter(Int8ub, lambda number, _: NodeKind(number), lambda kind, _: int(kind))


@dataclass(frozen=True)
class _Body:
    """A body whose fields are those of its declaration."""

    kind: ClassVar[Kind]
    declaration: ClassVar[Any]

    def encode(self) -> bytes:
        body: bytes = self.declaration.build({item.name: getattr(self, item.name) for item in fields(self)})
        return body

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Raises MalformedError."""
        try:
            parsed = cls.declaration.parse(body)
        except (construct.ConstructError, ValueError) as error:
            raise MalformedError(str(error).splitlines()[0] if str(error) else "it is cut off") from None
        return cls(**{item.name: parsed[item.name] for item in fields(cls)})


def _declare(*members: Any) -> Any:
    return Struct(*members, Terminated)


@dataclass(frozen=True)
class Collect(_Body):
    """A new master to each voter: promise me this epoch."""

    kind = Kind.COLLECT
    declaration = _declare("epoch" / Int32ub)
    epoch: int


@dataclass(frozen=True)
class Promise(_Body):
    """A voter: nothing below this epoch from now on; this is what I have persisted."""

    kind = Kind.PROMISE
    declaration = _declare("epoch" / Int32ub, "position" / _Position)
    epoch: int
    position: Position


@dataclass(frozen=True)
class Join(_Body):
    """A node to the master: let me in, or give me a snapshot. `attempt` is drawn by it and names all that follows."""

    kind = Kind.JOIN
    declaration = _declare(
        "attempt" / Int64ub,
        "node_kind" / _NodeKind,
        "name" / _Name,
        "datagrams" / _Name,
        "streams" / _Name,
        "prefixes" / _Prefixes,
    )
    attempt: int
    node_kind: NodeKind
    name: str
    datagrams: str
    streams: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class JoinRefused(_Body):
    """The master: not so."""

    kind = Kind.JOIN_REFUSED
    declaration = _declare("attempt" / Int64ub, "epoch" / Int32ub, "reason" / _Reason)
    attempt: int
    epoch: int
    reason: Reason


@dataclass(frozen=True)
class Delegate(_Body):
    """The master: ask this node for the snapshot."""

    kind = Kind.DELEGATE
    declaration = _declare("attempt" / Int64ub, "epoch" / Int32ub, "delegate" / Int64ub, "streams" / _Name)
    attempt: int
    epoch: int
    delegate: int
    streams: str


@dataclass(frozen=True)
class Hold(_Body):
    """A delegate to the master: keep the messages after this position, for that join."""

    kind = Kind.HOLD
    declaration = _declare("attempt" / Int64ub, "joiner" / Int64ub, "epoch" / Int32ub, "position" / _Position)
    attempt: int
    joiner: int
    epoch: int
    position: Position


@dataclass(frozen=True)
class Held(_Body):
    """The master: it does, or it cannot."""

    kind = Kind.HELD
    declaration = _declare("attempt" / Int64ub, "epoch" / Int32ub, "is_held" / Flag)
    attempt: int
    epoch: int
    is_held: bool


@dataclass(frozen=True)
class Ready(_Body):
    """A joiner to the master: my copy is exact, persisted up to this position."""

    kind = Kind.READY
    declaration = _declare("attempt" / Int64ub, "epoch" / Int32ub, "position" / _Position)
    attempt: int
    epoch: int
    position: Position


@dataclass(frozen=True)
class Active(_Body):
    """The master: you are a member."""

    kind = Kind.ACTIVE
    declaration = _declare("attempt" / Int64ub, "epoch" / Int32ub)
    attempt: int
    epoch: int


@dataclass(frozen=True)
class SnapshotRequest(_Body):
    """A joiner, or a new master (attempt 0: nothing is held for it), to the node that has the snapshot.

    `after` is the last key that it has, "" for none; `held_from` the position that the messages are held from, as an
    earlier SnapshotBegin of this attempt said, or NOWHERE.
    """

    kind = Kind.SNAPSHOT_REQUEST
    declaration = _declare(
        "attempt" / Int64ub, "epoch" / Int32ub, "after" / _Key, "held_from" / _Position, "prefixes" / _Prefixes
    )
    attempt: int
    epoch: int
    after: str
    held_from: Position
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class SnapshotBegin(_Body):
    """Entries follow; replay from the message after `position` on. `history` is packed epoch starts."""

    kind = Kind.SNAPSHOT_BEGIN
    declaration = _declare("attempt" / Int64ub, "epoch" / Int32ub, "position" / _Position, "history" / GreedyBytes)
    attempt: int
    epoch: int
    position: Position
    history: bytes


@dataclass(frozen=True)
class SnapshotEnd(_Body):
    """No more entries: the copy is exact once replayed to `position`."""

    kind = Kind.SNAPSHOT_END
    declaration = _declare("attempt" / Int64ub, "epoch" / Int32ub, "position" / _Position)
    attempt: int
    epoch: int
    position: Position


@dataclass(frozen=True)
class SnapshotRefused(_Body):
    """Not from here, not now."""

    kind = Kind.SNAPSHOT_REFUSED
    declaration = _declare("attempt" / Int64ub, "reason" / _Reason)
    attempt: int
    reason: Reason


@dataclass(frozen=True)
class Subscribe(_Body):
    """A second-kind member over its stream: messages after this position, under my prefixes."""

    kind = Kind.SUBSCRIBE
    declaration = _declare("epoch" / Int32ub, "position" / _Position, "prefixes" / _Prefixes)
    epoch: int
    position: Position
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class Subscribed(_Body):
    """The master: they follow, of this history (packed epoch starts)."""

    kind = Kind.SUBSCRIBED
    declaration = _declare("epoch" / Int32ub, "history" / GreedyBytes)
    epoch: int
    history: bytes


@dataclass(frozen=True)
class SubscribeRefused(_Body):
    """The master: join, or ask the master of `epoch`."""

    kind = Kind.SUBSCRIBE_REFUSED
    declaration = _declare("epoch" / Int32ub, "reason" / _Reason)
    epoch: int
    reason: Reason


# --- entries of a snapshot --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as a copy holds it: the put that made it, and the position of that update's last message."""

    position: Position
    update: Update

    def encode(self) -> bytes:
        return POSITION_HEAD.pack(*self.position) + self.update.encode()

    @staticmethod
    def decode(data: bytes) -> "Entry":
        """Raises MalformedError."""
        if len(data) < POSITION_HEAD.size:
            raise MalformedError("an entry is cut off")
        return Entry(Position(*POSITION_HEAD.unpack_from(data)), Update.decode(data[POSITION_HEAD.size :]))


_Sized = construct.Prefixed(Int32ub, GreedyBytes)
_SnapshotEntries = _declare("attempt" / Int64ub, "count" / Int32ub, "entries" / Array(this.count, _Sized))
ENTRIES_LIMIT = 4096


@dataclass(frozen=True)
class SnapshotEntries:
    """Entries in the order of their keys; the last key is where a cut stream goes on."""

    kind: ClassVar[Kind] = Kind.SNAPSHOT_ENTRIES
    attempt: int
    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        invariant(len(self.entries) <= ENTRIES_LIMIT, "too many entries for a frame")
        items = [entry.encode() for entry in self.entries]
        body: bytes = _SnapshotEntries.build({"attempt": self.attempt, "count": len(items), "entries": items})
        return body

    @staticmethod
    def decode(body: bytes) -> "SnapshotEntries":
        try:
            parsed = _SnapshotEntries.parse(body)
        except construct.ConstructError:
            raise MalformedError("entries are cut off") from None
        return SnapshotEntries(parsed.attempt, tuple(Entry.decode(item) for item in parsed.entries))


@lru_cache(maxsize=64)
def pack_starts(history: Starts) -> bytes:
    """(epoch, first) pairs as unpack_starts takes them; kept, because the same few are packed again and again."""
    return b"".join(POSITION_HEAD.pack(*start) for start in history)


def unpack_starts(data: bytes) -> Starts:
    """Raises MalformedError."""
    if len(data) % POSITION_HEAD.size:
        raise MalformedError("a history is cut off")
    return tuple((epoch, first) for epoch, first in POSITION_HEAD.iter_unpack(data))


BODIES: dict[int, Any] = {
    Kind.UPDATES: Updates,
    Kind.HEARTBEAT: Heartbeat,
    Kind.REQUEST: Request,
    Kind.REFUSAL: Refusal,
    Kind.POSITION: PositionReport,
    Kind.REPORT: Report,
    Kind.SNAPSHOT_ENTRIES: SnapshotEntries,
    **{body.kind: body for body in _Body.__subclasses__()},
}
"""What each kind's body is: `decode` raises MalformedError."""


def decode_body(kind: int, body: bytes) -> Any:
    """The body of a frame as its class. Raises MalformedError, for an unknown kind too."""
    of_kind = BODIES.get(kind)
    if of_kind is None:
        raise MalformedError(f"kind {kind} is unknown to this program")
    return of_kind.decode(body)
