"""What an owner and the replicas of its family say to each other: frames on one stream a replica.

    PeerHeader (20 bytes)   meta (meta_bytes)   blocks (body_bytes - meta_bytes)

Theory. The stream carries the family's modifications in their order, as many as there are in one frame a wake; replies
carry where the replica's log stands. A modification travels as the body of its record on the disk, so that nobody packs
it twice. The header's CRC covers the header and the meta; each block is covered by the CRC-32C that its record has for
it anyway. So every byte is checked, and once.

    owner ─► OPEN, then CUT, SKIP, APPEND (a beat is one without modifications), COPY, FETCH
    replica ─► OPENED, then APPENDED, COPIED, FETCHED; or REFUSED, which ends the stream
    both ─► READ_BLOCKS, answered by BLOCKS: what has rotted at one, the other may have
    owner ─► COMPARE, answered by COMPARED: what the replica has of a region; COPY_PARTS is then a copy of the rest
    owner ─► CHECK, answered by CHECKED: whether it holds the same

Streams about clients of other nodes come by the same address; their frames are in peer_clients.py.

Rules
- The header, OPEN and OPENED begin alike in every version; what follows what is known in them is skipped. OPEN offers
  the versions from OLDEST_VERSION to VERSION, OPENED chooses the highest that both know: each version talks to the one
  before it. A frame carries the version that its kind came with (KINDS_SINCE), so that an older program takes all that
  it knows; what is newer is not said to it.
- What is refused is a PeerFrameError with a sentence for people: close the stream, nothing of the frame counts.
- Bounds: FRAME_LIMIT_BYTES a frame, MODIFICATIONS_LIMIT a frame, EPOCHS_LIMIT epochs of a history, RUNS_LIMIT runs of
  regions, BLOCKS_LIMIT blocks read by their MBAs, COMPARED_LIMIT blocks of a region compared, PART_BLOCKS blocks a part
  of a copy; whoever sends has to cut before.

`protocol/peer_frames.py` packs what is declared here, `protocol/peer_decoding.py` takes it apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from protocol.disk import BLOCK_BYTES
from protocol.layout import derive
from protocol.peer_clients import NODE_BYTES, ClientFrame

MAGIC = 0x3150444E  # "NDP1"
VERSION = 2
OLDEST_VERSION = 1  # the one before it
FRAME_LIMIT_BYTES = 128 << 20  # the largest record is a segment's, of 64 MiB
MODIFICATIONS_LIMIT = 4096
EPOCHS_LIMIT = 1024
INCARNATIONS_LIMIT = 64
RUNS_LIMIT = 1 << 20
BLOCKS_LIMIT = 256
COMPARED_LIMIT = 4096
DIGEST_BYTES = 16
PART_BLOCKS = 16

PeerHeader = Struct(
    "magic" / Const(MAGIC, Int32ul),
    "version" / Int8ul,
    "kind" / Int8ul,
    "flags" / Int16ul,
    "body_bytes" / Int32ul,
    "meta_bytes" / Int32ul,
    "crc" / Int32ul,  # of the fields above and the meta
)
OpenBody = Struct(
    "oldest_version" / Int8ul,
    "newest_version" / Int8ul,
    "reserved" / Int16ul,
    "epoch" / Int32ul,
    "family" / Bytes(16),
    "owner" / Bytes(NODE_BYTES),
)
OpenedBody = Struct(
    "version" / Int8ul,
    "incarnations" / Int8ul,  # that follow last: those since which nothing appended can have been lost, in order
    "epochs" / Int16ul,  # that follow first: the history of the log
    "runs" / Int32ul,  # that follow: regions that are still to be fetched
    "incarnation" / Int64ul,
    "intact_since" / Int64ul,  # the first of these incarnations: who does not know of them takes all from it on
    "room_bytes" / Int64ul,
    "last_epoch" / Int32ul,
    "durable_epoch" / Int32ul,
    "last_txid" / Int64ul,
    "durable_txid" / Int64ul,
    "committed_txid" / Int64ul,
)
AppendBody = Struct(
    "number" / Int64ul,  # of this frame: on a stream it rises
    "committed_txid" / Int64ul,
    "durable_txid" / Int64ul,  # durable on every member
    "sync_txid" / Int64ul,  # is to be made durable now
    "epoch" / Int32ul,
    "count" / Int32ul,  # modifications that follow
)
ModificationHeader = Struct(
    "epoch" / Int32ul,
    "layer" / Int32ul,
    "txid" / Int64ul,
    "blocks" / Int32ul,
    "extents" / Int16ul,  # of a TREE: rows
    "kind" / Int8ul,
    "reserved" / Int8ul,
)
AppendedBody = Struct(
    "number" / Int64ul,  # of the last frame that is answered by this
    "last_txid" / Int64ul,
    "durable_txid" / Int64ul,
    "room_bytes" / Int64ul,
    "last_epoch" / Int32ul,
    "durable_epoch" / Int32ul,
)
PositionBody = Struct("epoch" / Int32ul, "reserved" / Int32ul, "txid" / Int64ul)  # of CUT, and each of a history
SkipBody = Struct("epoch" / Int32ul, "epochs" / Int32ul, "txid" / Int64ul, "runs" / Int32ul, "rows" / Int32ul)
RegionRun = Struct("first" / Int64ul, "count" / Int64ul)
CopyBody = Struct(
    "region" / Int64ul,
    "txid" / Int64ul,  # of the last modification before it
    "region_txid" / Int64ul,  # of its last modification
    "blocks" / Int32ul,
    "entries_bytes" / Int32ul,
)
CopyPartsBody = Struct(
    *CopyBody.subcons,
    "parts" / Int32ul,
    "is_whole" / Int32ul,  # 0: a bit a block follows, set where the block does not travel, because it is there
)
CopyPart = Struct("blocks" / Int32ul, "size_bytes" / Int32ul)  # Zstandard, unless as many bytes as the blocks have
CompareBody = Struct("region" / Int64ul)
ComparedBody = Struct("region" / Int64ul, "count" / Int32ul, "reserved" / Int32ul)  # MBAs follow, then digests
CheckBody = Struct("region" / Int64ul)
CheckedBody = Struct("region" / Int64ul, "region_txid" / Int64ul, "digest" / Bytes(DIGEST_BYTES))
CopiedBody = Struct("region" / Int64ul, "errno" / Int32ul, "reserved" / Int32ul)
FetchBody = Struct("epoch" / Int32ul, "reserved" / Int32ul, "txid" / Int64ul, "limit_bytes" / Int64ul)
FetchedBody = Struct("is_gone" / Int32ul, "count" / Int32ul)
RefusedBody = Struct("epoch" / Int32ul, "reason" / Int32ul)
BlocksBody = Struct(
    "number" / Int64ul, "count" / Int32ul, "reserved" / Int32ul
)  # of READ_BLOCKS and BLOCKS; MBAs follow

PEER_HEADER = derive(PeerHeader)
OPEN_BODY = derive(OpenBody)
OPENED_BODY = derive(OpenedBody)
APPEND_BODY = derive(AppendBody)
MODIFICATION_HEADER = derive(ModificationHeader)
APPENDED_BODY = derive(AppendedBody)
POSITION_BODY = derive(PositionBody)
SKIP_BODY = derive(SkipBody)
REGION_RUN = derive(RegionRun)
COPY_BODY = derive(CopyBody)
COPY_PARTS_BODY = derive(CopyPartsBody)
COPY_PART = derive(CopyPart)
CHECK_BODY = derive(CheckBody)
CHECKED_BODY = derive(CheckedBody)
COMPARE_BODY = derive(CompareBody)
COMPARED_BODY = derive(ComparedBody)
COPIED_BODY = derive(CopiedBody)
FETCH_BODY = derive(FetchBody)
FETCHED_BODY = derive(FetchedBody)
REFUSED_BODY = derive(RefusedBody)
BLOCKS_BODY = derive(BlocksBody)

PEER_HEADER_BYTES = PEER_HEADER.size

Buffer = bytes | memoryview


class Kind(IntEnum):
    """What a frame is."""

    OPEN = 1
    OPENED = 2
    CUT = 3
    SKIP = 4
    APPEND = 5
    APPENDED = 6
    COPY = 7
    COPIED = 8
    FETCH = 9
    FETCHED = 10
    REFUSED = 11
    READ_BLOCKS = 12
    BLOCKS = 13
    FORWARD = 14
    FORWARDED = 15
    KEEP = 16
    KEPT = 17
    COMPARE = 18
    COMPARED = 19
    COPY_PARTS = 20
    CHECK = 21
    CHECKED = 22
    LOOK = 23


KINDS_SINCE = {kind: 2 for kind in Kind if kind > Kind.REFUSED}
"""Version with which a kind came, 1 for the others."""


class Refusal(IntEnum):
    """Why a replica refuses."""

    EPOCH = 1  # it has promised a higher one
    NOT_HERE = 2  # it has no replica of this family
    VERSION = 3
    NOT_NEXT = 4  # it does not follow its last position
    NO_ROOM = 5
    FAILED = 6  # its disk
    CANDIDATE = 7  # it wants to own the family itself, and has asked the registry or is about to


class PeerFrameError(Exception):
    """A frame that is not taken: one line."""


class Position(NamedTuple):
    """One modification of a family, for ever; ordered as logs are compared."""

    epoch: int
    txid: int


BEGINNING = Position(0, 0)
Epochs = tuple[Position, ...]
"""The history of a log: each epoch that has modifications in it, with the last of them; the oldest first."""
Runs = tuple[tuple[int, int], ...]
"""Regions: (first, count), in order."""


class Modification(NamedTuple):
    """A WRITE or TREE record without what belongs to the log that it was read from."""

    epoch: int
    txid: int
    kind: int
    layer: int
    extents: int  # of a TREE: rows
    blocks: int
    body: bytes
    """As on the disk: extents, MBAs, checksums; or rows."""
    data: Sequence[Buffer]
    """Blocks, one after the other, in buffers of whole blocks."""

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.txid)

    def kept(self) -> "Modification":
        """The same with blocks of its own."""
        return self._replace(data=[bytes(each) for each in self.data])

    @property
    def size_bytes(self) -> int:
        """On the wire."""
        return MODIFICATION_HEADER.size + len(self.body) + self.blocks * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Open:
    """An owner, or a candidate, opens a replica under its epoch."""

    family: bytes
    epoch: int
    owner: str
    oldest_version: int = OLDEST_VERSION
    newest_version: int = VERSION


@dataclass(frozen=True, slots=True)
class Opened:
    """How a replica stands."""

    incarnations: Sequence[int]
    """Since which nothing appended can have been lost, in order, the present one last."""
    last: Position
    durable: Position
    committed_txid: int
    room_bytes: int
    epochs: Epochs
    resync: Runs
    version: int = VERSION

    @property
    def incarnation(self) -> int:
        """Of the replica as it is open now."""
        return self.incarnations[-1]


@dataclass(frozen=True, slots=True)
class Cut:
    """Cut the log behind `at`; answered by OPENED."""

    at: Position


@dataclass(frozen=True, slots=True)
class Skip:
    """Go on after `to`, which is committed, and note the regions as to be fetched; answered by OPENED."""

    to: Position
    epochs: Epochs
    regions: Runs
    tree: bytes
    """The rows of all layers as of that position, as in a TREE record."""


class Append(NamedTuple):
    """Modifications in order; none: a beat."""

    epoch: int
    number: int
    committed_txid: int
    durable_txid: int
    sync_txid: int
    modifications: Sequence[Modification] = ()


class Appended(NamedTuple):
    """All frames up to `number` are appended."""

    number: int
    last: Position
    durable: Position
    room_bytes: int


class Part(NamedTuple):
    """At most PART_BLOCKS of the blocks of a copy as they travel: packed, or as they are if that is no shorter."""

    blocks: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class Copy:
    """A region as of `txid`, which is its place in the stream. `entries` is the log's affair."""

    region: int
    txid: int
    region_txid: int
    entries: bytes
    checksums: bytes
    """Of all blocks."""
    data: Sequence[Buffer]
    """Of the blocks that travel."""
    kept: bytes = b""
    """A bit a block, the lowest first: whether it does not travel, because the replica has it. Empty: all travel."""
    parts: Sequence[Part] = ()
    """`data` as it travels; empty: as it is, and that all travels (version 1)."""


class RegionState(NamedTuple):
    """What a replica holds of a region: the txid of its last modification, and a digest of what is shown there."""

    region_txid: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Check:
    """Say what you hold of a region at this place in the stream."""

    region: int


@dataclass(frozen=True, slots=True)
class Checked:
    """What the replica holds of it."""

    region: int
    state: RegionState


@dataclass(frozen=True, slots=True)
class Compare:
    """Say what you have of a region."""

    region: int


@dataclass(frozen=True, slots=True)
class Compared:
    """MBAs of blocks that the replica has in the region, and a digest of the content of each."""

    region: int
    mbas: Sequence[int]
    digests: bytes


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy was applied and what it needed is done (errno 0), or it could not be."""

    region: int
    errno: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Send what the log has after a position."""

    after: Position
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """What follows; `is_gone`: the log does not go back that far."""

    modifications: Sequence[Modification]
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The stream ends; `epoch` is the highest that the replica has promised."""

    epoch: int
    reason: Refusal


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Send these blocks, of those that are there at this place in the stream."""

    number: int
    """Of this question among those of its sender."""
    mbas: Sequence[int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Those of them that are there and have not rotted."""

    number: int
    mbas: Sequence[int]
    checksums: bytes
    data: Sequence[Buffer]


Frame = (
    Open | Opened | Cut | Skip | Append | Appended | Copy | Copied | Fetch | Fetched | Refused
    | ReadBlocks | Blocks | Compare | Compared | Check | Checked | ClientFrame
)  # fmt: skip
