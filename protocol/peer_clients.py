"""What a node that a client has come to and the one that serves the client say to each other: frames of peer.py.

Theory: such a client's stream begins with FORWARD. Once that was answered by a FORWARDED without a refusal it carries
what the client and its session say, and no frame any more. A stream of the forwarder's own carries KEEP and KEPT: which
of its clients are still there, and that the other side lives. LOOK asks for a KEEP at once. A KEEP in the other
direction comes before the KEPT of the same beat, and names those that are there (a forwarder of a version before
ignores it).
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass

from construct import Bytes, Int32ul, Int64ul, Struct

from protocol.invariant import invariant
from protocol.layout import derive

FORWARDER_BYTES = 16
NODE_BYTES = 64

ForwardBody = Struct(
    "forwarder" / Bytes(FORWARDER_BYTES),
    "number" / Int64ul,
    "node" / Bytes(NODE_BYTES),
    "export_bytes" / Int32ul,  # of its name, which follows; then numbers, then the client's state
    "count" / Int32ul,  # numbers
)
ForwardedBody = Struct("refusal_bytes" / Int32ul, "lineage" / Int32ul)  # a sentence follows; is_final if there is one
KeepBody = Struct(
    "forwarder" / Bytes(FORWARDER_BYTES),
    "beat" / Int64ul,
    "look" / Int64ul,
    "last" / Int64ul,
    "count" / Int64ul,  # numbers that follow
)
LookBody = Struct("number" / Int64ul)
KeptBody = Struct("beat" / Int64ul)

FORWARD_BODY = derive(ForwardBody)
FORWARDED_BODY = derive(ForwardedBody)
KEEP_BODY = derive(KeepBody)
KEPT_BODY = derive(KeptBody)
LOOK_BODY = derive(LookBody)

Take = Callable[[int], bytes]
"""Gives so many of the next bytes of a frame, or raises."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A client that has come to another node, in the middle of its handshake."""

    forwarder: bytes
    """Of the process that it has come to; another one each time it starts."""
    number: int
    """Of this client there; it rises."""
    node: str
    export: str
    """A volume's name."""
    others: tuple[int, ...]
    """Clients there of the same host and export: those of a lower number that are missing have gone."""
    client: bytes
    """A HandshakingClient of protocol/handover.py."""

    def pack(self) -> bytes:
        node, export = self.node.encode(), self.export.encode()
        invariant(len(node) <= NODE_BYTES, "a node's name is too long")
        head = FORWARD_BODY.pack(self.forwarder, self.number, node, len(export), len(self.others))
        return b"".join([head, export, _packed(self.others), self.client])

    @classmethod
    def unpack(cls, take: Take, rest: Callable[[], bytes]) -> "Forward":
        forwarder, number, node, export_bytes, count = FORWARD_BODY.unpack(take(FORWARD_BODY.size))
        export, others = take(export_bytes).decode(), _numbers(take, count)
        return cls(forwarder, number, node.rstrip(b"\0").decode(), export, others, rest())


@dataclass(frozen=True, slots=True)
class Forwarded:
    """It goes on here, or a sentence why not, and the stream is over."""

    refusal: str = ""
    lineage: int = 0
    """Tells whether a client can go on at another node as if nothing had happened: it is the same wherever the same
    volume has all that was ever acknowledged. 0: not said (versions before)."""
    is_final: bool = False
    """Of a refusal: it is of no use to ask again."""

    def pack(self) -> bytes:
        refusal = self.refusal.encode()
        return FORWARDED_BODY.pack(len(refusal), int(self.is_final) if refusal else self.lineage) + refusal

    @classmethod
    def unpack(cls, take: Take) -> "Forwarded":
        refusal_bytes, said = FORWARDED_BODY.unpack(take(FORWARDED_BODY.size))
        if refusal_bytes:
            return cls(take(refusal_bytes).decode(), is_final=bool(said))
        return cls(lineage=said)


@dataclass(frozen=True, slots=True)
class Keep:
    """Of the clients up to the number `last` that were forwarded here, these are still there."""

    forwarder: bytes
    beat: int
    """Of this frame."""
    last: int
    numbers: tuple[int, ...]
    look: int = 0
    """Of the LOOK that this answers."""

    def pack(self) -> bytes:
        head = KEEP_BODY.pack(self.forwarder, self.beat, self.look, self.last, len(self.numbers))
        return head + _packed(self.numbers)

    @classmethod
    def unpack(cls, take: Take) -> "Keep":
        forwarder, beat, look, last, count = KEEP_BODY.unpack(take(KEEP_BODY.size))
        return cls(forwarder, beat, last, _numbers(take, count), look)


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer to a KEEP."""

    beat: int

    def pack(self) -> bytes:
        return KEPT_BODY.pack(self.beat)

    @classmethod
    def unpack(cls, take: Take) -> "Kept":
        return cls(*KEPT_BODY.unpack(take(KEPT_BODY.size)))


@dataclass(frozen=True, slots=True)
class Look:
    """Which of the clients are still there?"""

    number: int

    def pack(self) -> bytes:
        return LOOK_BODY.pack(self.number)

    @classmethod
    def unpack(cls, take: Take) -> "Look":
        return cls(*LOOK_BODY.unpack(take(LOOK_BODY.size)))


ClientFrame = Forward | Forwarded | Keep | Kept | Look


def _packed(numbers: tuple[int, ...]) -> bytes:
    return array("Q", numbers).tobytes()


def _numbers(take: Take, count: int) -> tuple[int, ...]:
    return tuple(array("Q", take(8 * count)))
