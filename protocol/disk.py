"""Disk formats: segment files and the values in LevelDB, each declared once (docs/disk-format.md draws them).

All integers are little-endian, and so are the arrays: a big-endian host is refused at import. A segment file is

    SegmentHeader | RecordHeader body data | RecordHeader body data | ... | RecordHeader(SEAL) body | rest of an old
    life

and every header is a link of one chain: its CRC covers the salt and sequence number of this life of the segment, its
own fields, with the previous header's CRC and the body's among them. The salt is random for each life and never leaves
the segment header, so that neither the remains of a former life nor client data that looks like a record can be a link.

A body is, for WRITE: extents (lba, count | kind << 32) u64 pairs, then per block the MBA (u64), then per block the
CRC-32C (u32); for MOVE: per block the MBA (u64), then per block old segment and old offset (u32 pairs), then per
block the CRC-32C (u32); for SEAL: SealBody; for TREE: the rows of the layers that were made or changed; for REGION:
RegionBody. Data blocks follow the body, 4,096 bytes each, in the order of the MBAs, at whatever offset that is, or if
the header says `aligned` at the next multiple of 4,096 in the segment.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from struct import Struct as Packer

from construct import Array, Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from protocol.checksum import crc32c
from protocol.invariant import invariant
from protocol.layout import derive

if sys.byteorder != "little":
    raise ImportError("nbdserver keeps its maps little-endian and does not run on a big-endian machine")

FORMAT_VERSION = 1
BLOCK_BYTES = 4096
_SPLIT_BLOCKS = 256

WRITE = 1
MOVE = 2
SEAL = 3
TREE = 4
REGION = 5

EXTENT_DATA = 0
EXTENT_HOLE = 1

SEGMENT_MAGIC = b"nbdSEG\x00\x01"
RECORD_MAGIC = 0x314C444E  # "NDL1"

SegmentHeader = Struct(
    "magic" / Const(SEGMENT_MAGIC),
    "family" / Bytes(16),
    "segment" / Int32ul,  # number of the file; PBAs name it
    "epoch" / Int32ul,  # of the owner that began this life
    "sequence" / Int64ul,  # of this life in the order of the log
    "salt" / Bytes(8),
    "previous_crc" / Int32ul,  # of the header that the chain ended with before
    "crc" / Int32ul,
)

RecordHeader = Struct(
    "magic" / Const(RECORD_MAGIC, Int32ul),
    "kind" / Int8ul,
    "aligned" / Int8ul,  # 1: the data begins at a multiple of 4,096 in the segment
    "extents" / Int16ul,  # of a TREE: rows
    "blocks" / Int32ul,
    "layer" / Int32ul,
    "epoch" / Int32ul,
    "previous_crc" / Int32ul,
    "txid" / Int64ul,  # of this modification; a MOVE repeats the last one
    "lsn" / Int64ul,  # number of this record in the local log, moves and seals included
    "durable_lsn" / Int64ul,  # highest lsn known durable when this was written
    "body_crc" / Int32ul,
    "crc" / Int32ul,  # of the chain's key and the fields above: what is no header is told without reading a body
)

SealBody = Struct(
    "successor" / Int32ul,
    "reserved" / Int32ul,
    "successor_salt" / Bytes(8),
)

Extent = Struct("lba" / Int64ul, "count" / Int32ul, "kind" / Int32ul)
MovedBlock = Struct("segment" / Int32ul, "offset" / Int32ul)

WriteBody = Struct(
    "extents" / Array(lambda this: this._.extents, Extent),
    "mbas" / Array(lambda this: this._.blocks, Int64ul),
    "checksums" / Array(lambda this: this._.blocks, Int32ul),
)
MoveBody = Struct(
    "mbas" / Array(lambda this: this._.blocks, Int64ul),
    "old" / Array(lambda this: this._.blocks, MovedBlock),
    "checksums" / Array(lambda this: this._.blocks, Int32ul),
)

NAMELESS = 0  # kinds of layers
HEAD = 1
SNAPSHOT = 2
NAME_BYTES = 128

LayerRow = Struct(
    "layer" / Int32ul,
    "parent" / Int32ul,  # 0: none
    "first_mba" / Int64ul,  # what is lower belongs to the layers below
    "size_bytes" / Int64ul,
    "volume" / Int32ul,  # number in the family of the volume whose head or snapshot it is
    "kind" / Int32ul,
    "created_s" / Int64ul,  # of a snapshot
    "name" / Bytes(NAME_BYTES),  # of a snapshot
)
RegionHead = Struct(
    "first_lba" / Int64ul,
    "count" / Int32ul,
    "reserved" / Int32ul,
    "region_txid" / Int64ul,  # of the region's last modification where it was read
)
CopyRun = Struct(
    "layer" / Int32ul,
    "first" / Int32ul,  # from the first LBA on
    "count" / Int32ul,
    "reserved" / Int32ul,
    "mba" / Int64ul,  # of the first; 0: none of them shows anything
)
RegionBody = Struct(
    *RegionHead.subcons,
    "runs" / Array(lambda this: this._.extents, CopyRun),
    "mbas" / Array(lambda this: this._.blocks, Int64ul),
    "checksums" / Array(lambda this: this._.blocks, Int32ul),
)
TreeBody = Struct("rows" / Array(lambda this: this._.extents, LayerRow))
TreeState = Struct("next_layer" / Int32ul, "reserved" / Int32ul)

SEGMENT_HEADER = derive(SegmentHeader)
RECORD_HEADER = derive(RecordHeader)
SEAL_BODY = derive(SealBody)
LAYER_ROW = derive(LayerRow)
TREE_STATE = derive(TreeState)
REGION_HEAD = derive(RegionHead)
COPY_RUN = derive(CopyRun)

SEGMENT_HEADER_BYTES = SEGMENT_HEADER.size
RECORD_HEADER_BYTES = RECORD_HEADER.size
SEAL_BYTES = RECORD_HEADER.size + SEAL_BODY.size
SEAL_BODY_BYTES = SEAL_BODY.size
EXTENT_BYTES: int = Extent.sizeof()
MAX_RECORD_EXTENTS = 0xFFFF
WRITE_BLOCK_BYTES = 12  # of the body, a block
MOVE_BLOCK_BYTES = 20


def body_bytes(kind: int, extents: int, blocks: int) -> int:
    """Length of a record's body."""
    if kind == WRITE:
        return EXTENT_BYTES * extents + WRITE_BLOCK_BYTES * blocks
    if kind == TREE:
        return LAYER_ROW.size * extents
    if kind == REGION:
        return REGION_HEAD.size + COPY_RUN.size * extents + WRITE_BLOCK_BYTES * blocks
    return MOVE_BLOCK_BYTES * blocks if kind == MOVE else SEAL_BODY_BYTES


def pack_segment_header(
    family: bytes, segment: int, epoch: int, sequence: int, salt: bytes, previous_crc: int
) -> bytes:
    """The first SEGMENT_HEADER_BYTES of a segment file."""
    unsigned = SEGMENT_HEADER.pack(SEGMENT_MAGIC, family, segment, epoch, sequence, salt, previous_crc, 0)[:-4]
    return unsigned + crc32c(unsigned).to_bytes(4, "little")


def chain_key(sequence: int, salt: bytes) -> bytes:
    """What every record header's CRC in one life of a segment starts from."""
    return sequence.to_bytes(8, "little") + salt


def pack_record_header(
    key: bytes, kind: int, extents: int, layer: int, epoch: int, previous_crc: int, txid: int, lsn: int, durable_lsn:
    int, blocks: int, body: bytes, aligned: bool,
) -> tuple[bytes, int]:  # fmt: skip
    """Return (header and body, CRC of the header, which is the next record's `previous_crc`)."""
    unsigned = RECORD_HEADER.pack(
        RECORD_MAGIC,
        kind,
        aligned,
        extents,
        blocks,
        layer,
        epoch,
        previous_crc,
        txid,
        lsn,
        durable_lsn,
        crc32c(body),
        0,
    )[:-4]
    crc = crc32c(key + unsigned)
    return unsigned + crc.to_bytes(4, "little") + body, crc


def record_crc(key: bytes, header: bytes) -> int:
    """The CRC that the packed `header` should carry."""
    return crc32c(key + header[:-4])


@cache
def block_splitter(blocks: int) -> Packer:
    """A packer whose `unpack_from` cuts a buffer into that many `bytes` of one block, in one call."""
    invariant(0 < blocks <= 8192, "a run has 1 to 8,192 blocks")
    return derive(Struct(*(f"block{index}" / Bytes(BLOCK_BYTES) for index in range(blocks))))


def wrong_blocks(data: bytes | bytearray | memoryview, checksums: "array[int]") -> list[int]:
    """Indexes of the blocks in `data` whose CRC is not the one given; missing bytes are wrong."""
    wrong: list[int] = []
    whole = len(data) // BLOCK_BYTES
    for first in range(0, whole, _SPLIT_BLOCKS):
        count = min(_SPLIT_BLOCKS, whole - first)
        blocks = block_splitter(count).unpack_from(data, first * BLOCK_BYTES)
        found = array("I", map(crc32c, blocks))
        expected = checksums[first : first + count]
        if found != expected:
            wrong += [first + index for index in range(count) if found[index] != expected[index]]
    return wrong + list(range(whole, len(checksums)))


def extents_of_array(values: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(lba, count, kind) of extents as in a body: (lba, count | kind << 32) pairs."""
    for index in range(0, len(values), 2):
        packed = values[index + 1]
        yield values[index], packed & 0xFFFFFFFF, packed >> 32


# LevelDB values: version, CRC-32C of key and payload, payload. The key is covered, so that a misdirected value is told.
ValueHeader = Struct("version" / Int8ul, "crc" / Int32ul)
VALUE_HEADER = derive(ValueHeader)


def pack_value(key: bytes, payload: bytes) -> bytes:
    """A payload as LevelDB holds it."""
    return VALUE_HEADER.pack(FORMAT_VERSION, crc32c(key + payload)) + payload


class DamagedValueError(Exception):
    """A LevelDB value whose version or CRC is wrong; `key` says which."""

    def __init__(self, key: bytes, reason: str) -> None:
        super().__init__(f"metadata at key {key.hex()} is damaged: {reason}")
        self.key = key


def unpack_value(key: bytes, value: bytes) -> bytes:
    """The payload of a LevelDB value; raises DamagedValueError."""
    if len(value) < VALUE_HEADER.size:
        raise DamagedValueError(key, f"only {len(value)} bytes")
    version, crc = VALUE_HEADER.unpack_from(value)
    payload = value[VALUE_HEADER.size :]
    if version != FORMAT_VERSION:
        raise DamagedValueError(key, f"version {version}, expected {FORMAT_VERSION}")
    if crc32c(key + payload) != crc:
        raise DamagedValueError(key, "wrong checksum")
    return payload


# Payloads of the fixed keys.
CheckpointState = Struct(
    "lsn" / Int64ul,
    "txid" / Int64ul,
    "epoch" / Int32ul,
    "segment" / Int32ul,  # where the log goes on after `lsn`; 0: nowhere yet
    "offset" / Int32ul,
    "previous_crc" / Int32ul,
    "sequence" / Int64ul,
    "salt" / Bytes(8),
    "next_mba" / Int64ul,
    "next_hole" / Int64ul,
    "live_blocks" / Int64ul,
)
SegmentUsage = Struct(
    "sequence" / Int64ul,
    "salt" / Bytes(8),
    "live_blocks" / Int32ul,
    "end" / Int32ul,  # bytes written; where the seal is
    "txid" / Int64ul,  # of the last modification in it
    "lsn" / Int64ul,  # of the last record in it
)
PendingHole = Struct(
    "hole" / Int64ul,
    "first_lba" / Int64ul,  # an address: layer and LBA
    "count" / Int64ul,
    "cursor" / Int64ul,  # pages of the logical map below it are done: layer and page
)
FamilyState = Struct(
    "family" / Bytes(16),
    "size_bytes" / Int64ul,
    "segment_bytes" / Int32ul,
    "reserved" / Int32ul,
)
OpenState = Struct(
    "generation" / Int64ul,
    "epoch" / Int32ul,
    "clean" / Int32ul,
    "boot_id" / Bytes(36),
)

ReplicaState = Struct(
    "incarnation" / Int64ul,  # raised at each opening
    "intact_since" / Int64ul,  # incarnation
    "promised_epoch" / Int32ul,
    "reserved" / Int32ul,
    "fetched_txid" / Int64ul,  # what was committed when a region was fetched last
)
Splice = Struct(
    "segment" / Int32ul,  # where the log goes on
    "reserved" / Int32ul,
    "sequence" / Int64ul,  # of that segment's life
    "salt" / Bytes(8),
)

CHECKPOINT_STATE = derive(CheckpointState)
SEGMENT_USAGE = derive(SegmentUsage)
PENDING_HOLE = derive(PendingHole)
FAMILY_STATE = derive(FamilyState)
OPEN_STATE = derive(OpenState)
REPLICA_STATE = derive(ReplicaState)
SPLICE = derive(Splice)
