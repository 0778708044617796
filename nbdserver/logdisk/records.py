"""Reading a segment back: its records in the order of their chain, until the chain ends.

`parse_record` is pure: bytes in, a record or the reason why there is none out. Replay, the cleaner and the offline
check read segments through it.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from metadata.seams import Buffer
from protocol.checksum import crc32c
from protocol.disk import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    MOVE,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    REGION,
    SEAL,
    SEAL_BODY,
    SEGMENT_HEADER,
    SEGMENT_HEADER_BYTES,
    SEGMENT_MAGIC,
    TREE,
    WRITE,
    WRITE_BLOCK_BYTES,
    body_bytes,
    extents_of_array,
    record_crc,
)


@dataclass(slots=True)
class SegmentStart:
    """A valid segment header."""

    family: bytes
    segment: int
    epoch: int
    sequence: int
    salt: bytes
    previous_crc: int
    crc: int


@dataclass(slots=True)
class Record:
    """A record whose header is a valid link of its chain; its data blocks are at `data_offset` in the segment."""

    kind: int
    layer: int
    epoch: int
    txid: int
    lsn: int
    durable_lsn: int
    previous_crc: int
    crc: int
    offset: int
    data_offset: int
    blocks: int
    extents: "array[int]"  # (lba, count | kind << 32) pairs
    mbas: "array[int]"
    old: "array[int]"  # (segment, offset) pairs of a MOVE
    checksums: "array[int]"
    successor: int
    successor_salt: bytes
    rows: bytes  # of a TREE; head and runs of a REGION

    @property
    def end(self) -> int:
        """Offset of the next record."""
        return self.data_offset + self.blocks * BLOCK_BYTES


def parse_segment_header(data: bytes) -> SegmentStart | None:
    """The header at the start of a segment file, or None if it is not one."""
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    magic, family, segment, epoch, sequence, salt, previous_crc, crc = SEGMENT_HEADER.unpack_from(data)
    if magic != SEGMENT_MAGIC or crc32c(data[: SEGMENT_HEADER_BYTES - 4]) != crc:
        return None
    return SegmentStart(family, segment, epoch, sequence, salt, previous_crc, crc)


def body_length(key: bytes, header: bytes) -> int | None:
    """Length of the body that follows a record header, or None if this is no record header of the life that `key`
    names.

    Client data cannot pass for one, because it does not know the salt in `key`; so the length can be believed.
    """
    if len(header) < RECORD_HEADER_BYTES:
        return None
    fields = RECORD_HEADER.unpack(header)
    if (
        fields[0] != RECORD_MAGIC
        or record_crc(key, header) != fields[-1]
        or fields[1] not in (WRITE, MOVE, SEAL, TREE, REGION)
    ):
        return None
    return body_bytes(fields[1], fields[3], fields[4])


def parse_record(key: bytes, header: bytes, body: bytes, offset: int) -> Record | None:
    """The record at `offset`, or None if its CRC says that it was not written in this life of the segment.

    Whether it is the *next* link (`previous_crc`, lsn) is the caller's to check.
    """
    if body_length(key, header) != len(body):
        return None
    fields = RECORD_HEADER.unpack(header)
    _, kind, aligned, extents, blocks, layer, epoch, previous_crc, txid, lsn, durable_lsn, body_crc, crc = fields
    if crc32c(body) != body_crc:
        return None
    extent_array, mbas, old, checksums = array("Q"), array("Q"), array("I"), array("I")
    successor, successor_salt, rows = 0, b"", b""
    if kind == WRITE:
        extent_array, mbas, checksums = parse_write_body(body, extents, blocks)
    elif kind == MOVE:
        mbas.frombytes(body[: 8 * blocks])
        old.frombytes(body[8 * blocks : 16 * blocks])
        checksums.frombytes(body[16 * blocks :])
    elif kind == TREE:
        rows = body
    elif kind == REGION:
        cut = len(body) - WRITE_BLOCK_BYTES * blocks
        rows = body[:cut]
        mbas.frombytes(body[cut : cut + 8 * blocks])
        checksums.frombytes(body[cut + 8 * blocks :])
    else:
        successor, _, successor_salt = SEAL_BODY.unpack(body)
    data_offset = offset + len(header) + len(body)
    if aligned:
        data_offset += -data_offset % BLOCK_BYTES
    return Record(
        kind, layer, epoch, txid, lsn, durable_lsn, previous_crc, crc, offset, data_offset, blocks,
        extent_array, mbas, old, checksums, successor, successor_salt, rows,
    )  # fmt: skip


def parse_write_body(body: bytes, extents: int, blocks: int) -> "tuple[array[int], array[int], array[int]]":
    """(extents as in Record, MBAs, checksums) of a body that is as long as it has to be."""
    extent_array, mbas, checksums = array("Q"), array("Q"), array("I")
    cut = extents * EXTENT_BYTES
    extent_array.frombytes(body[:cut])
    mbas.frombytes(body[cut : cut + 8 * blocks])
    checksums.frombytes(body[cut + 8 * blocks :])
    return extent_array, mbas, checksums


def next_record(key: bytes, data: Buffer, base: int, at: int) -> Record | int:
    """The record at `at` in `data`, a piece of a segment that begins at `base`, if it lies whole in it. Otherwise how
    many bytes it takes, or 0 if the chain is broken there."""
    header = bytes(data[at : at + RECORD_HEADER_BYTES])
    length = body_length(key, header)
    if length is None:
        return RECORD_HEADER_BYTES if len(header) < RECORD_HEADER_BYTES else 0
    body = bytes(data[at + RECORD_HEADER_BYTES : at + RECORD_HEADER_BYTES + length])
    if len(body) < length:
        return RECORD_HEADER_BYTES + length
    record = parse_record(key, header, body, base + at)
    if record is None:
        return 0
    return record if record.end - base <= len(data) else record.end - base - at


def extents_of(record: Record) -> Iterator[tuple[int, int, int]]:
    """(lba, count, kind) of a WRITE record."""
    return extents_of_array(record.extents)
