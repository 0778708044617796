"""The disk formats: construct and the derived fast path make and read the same bytes, of whole records too."""

import struct
from array import array
from typing import Any

import pytest
from construct import Bytes, Const, Container
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.logdisk.records import body_length, extents_of, parse_record, parse_segment_header
from protocol import disk
from protocol.checksum import portable_crc32c
from protocol.disk import (
    BLOCK_BYTES,
    MOVE,
    RECORD_HEADER_BYTES,
    SEAL,
    WRITE,
    DamagedValueError,
    MoveBody,
    RecordHeader,
    SealBody,
    SegmentHeader,
    WriteBody,
    block_splitter,
    body_bytes,
    chain_key,
    pack_record_header,
    pack_segment_header,
    pack_value,
    unpack_value,
    wrong_blocks,
)

DERIVED = {
    "SegmentHeader": "SEGMENT_HEADER",
    "RecordHeader": "RECORD_HEADER",
    "SealBody": "SEAL_BODY",
    "LayerRow": "LAYER_ROW",
    "TreeState": "TREE_STATE",
    "ValueHeader": "VALUE_HEADER",
    "CheckpointState": "CHECKPOINT_STATE",
    "SegmentUsage": "SEGMENT_USAGE",
    "PendingHole": "PENDING_HOLE",
    "FamilyState": "FAMILY_STATE",
    "OpenState": "OPEN_STATE",
    "ReplicaState": "REPLICA_STATE",
    "Splice": "SPLICE",
    "RegionHead": "REGION_HEAD",
    "CopyRun": "COPY_RUN",
}
U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
SALT = st.binary(min_size=8, max_size=8)
EXTENTS = st.lists(st.tuples(U64, U32, U32), max_size=5)


def blocks_of(*columns: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*columns), max_size=6)


def test_every_derived_struct_is_in_this_test() -> None:
    assert {name for name, value in vars(disk).items() if isinstance(value, struct.Struct)} == set(DERIVED.values())


@pytest.mark.parametrize("name", DERIVED)
@given(data=st.data())
def test_construct_and_the_derived_struct_pack_and_parse_alike(name: str, data: st.DataObject) -> None:
    declaration, fast = getattr(disk, name), getattr(disk, DERIVED[name])
    values: dict[str, Any] = {}
    for renamed in declaration.subcons:
        field = renamed.subcon
        if isinstance(field, Const):
            values[renamed.name] = field.value
        elif isinstance(field, Bytes):
            values[renamed.name] = data.draw(st.binary(min_size=field.length, max_size=field.length))
        else:
            values[renamed.name] = data.draw(st.integers(0, 256 ** field.sizeof() - 1))
    packed = fast.pack(*values.values())
    assert packed == declaration.build(values)
    parsed = declaration.parse(packed)
    assert {field: parsed[field] for field in values} == values
    assert dict(zip(values, fast.unpack(packed), strict=True)) == values


@given(st.binary(min_size=16, max_size=16), U32, U32, U64, SALT, U32)
def test_a_segment_header_is_what_its_declaration_says(
    family: bytes, segment: int, epoch: int, sequence: int, salt: bytes, previous_crc: int
) -> None:
    packed = pack_segment_header(family, segment, epoch, sequence, salt, previous_crc)
    declared = SegmentHeader.parse(packed)
    start = parse_segment_header(packed)
    assert start is not None
    for name in ("family", "segment", "epoch", "sequence", "salt", "previous_crc", "crc"):
        assert getattr(start, name) == declared[name]
    assert (start.family, start.segment, start.epoch) == (family, segment, epoch)
    assert declared.crc == portable_crc32c(packed[:-4])


def packed_record(
    kind: int, extents: int, blocks: int, body: bytes, key: bytes, fields: tuple[int, ...], aligned: bool = False
) -> bytes:
    layer, epoch, previous_crc, txid, lsn, durable_lsn = fields
    return pack_record_header(
        key, kind, extents, layer, epoch, previous_crc, txid, lsn, durable_lsn, blocks, body, aligned
    )[0]  # fmt: skip


FIELDS = st.tuples(U32, U32, U32, U64, U64, U64)


def check_header(record: bytes, kind: int, fields: tuple[int, ...], key: bytes) -> Container[Any]:
    header = RecordHeader.parse(record)
    assert header.kind == kind
    assert (header.layer, header.epoch, header.previous_crc, header.txid, header.lsn, header.durable_lsn) == fields
    unsigned, body = record[: RECORD_HEADER_BYTES - 4], record[RECORD_HEADER_BYTES:]
    assert header.body_crc == portable_crc32c(body)
    assert header.crc == portable_crc32c(key + unsigned)
    return header


@given(EXTENTS, blocks_of(U64, U32), U64, SALT, FIELDS)
def test_a_write_record_is_what_its_declaration_says(
    extents: list[tuple[int, int, int]], blocks: list[tuple[int, ...]], sequence: int, salt: bytes, fields: Any
) -> None:
    key = chain_key(sequence, salt)
    packed = array("Q", [item for lba, count, kind in extents for item in (lba, count | kind << 32)])
    mbas, checksums = array("Q", [mba for mba, _ in blocks]), array("I", [crc for _, crc in blocks])
    body = packed.tobytes() + mbas.tobytes() + checksums.tobytes()
    assert len(body) == body_bytes(WRITE, len(extents), len(blocks))
    whole = packed_record(WRITE, len(extents), len(blocks), body, key, fields)
    header = check_header(whole, WRITE, fields, key)
    declared = WriteBody.parse(body, extents=header.extents, blocks=header.blocks, _=header)
    assert [(extent.lba, extent.count, extent.kind) for extent in declared.extents] == extents
    assert list(zip(declared.mbas, declared.checksums, strict=True)) == blocks
    built = WriteBody.build(
        {
            "extents": [{"lba": lba, "count": count, "kind": kind} for lba, count, kind in extents],
            "mbas": list(mbas),
            "checksums": list(checksums),
        },
        extents=len(extents),
        blocks=len(blocks),
    )
    assert built == body
    record = parse_record(key, whole[:RECORD_HEADER_BYTES], built, 100)
    assert record is not None
    assert list(extents_of(record)) == extents
    assert list(zip(record.mbas, record.checksums, strict=True)) == blocks
    assert record.end == 100 + len(whole) + BLOCK_BYTES * len(blocks)
    aligned = packed_record(WRITE, len(extents), len(blocks), body, key, fields, aligned=True)
    record = parse_record(key, aligned[:RECORD_HEADER_BYTES], built, 100)
    assert record is not None
    assert record.data_offset % BLOCK_BYTES == 0
    assert 0 <= record.data_offset - 100 - len(aligned) < BLOCK_BYTES


@given(blocks_of(U64, U32, U32, U32), U64, SALT, FIELDS)
def test_a_move_record_is_what_its_declaration_says(
    blocks: list[tuple[int, ...]], sequence: int, salt: bytes, fields: Any
) -> None:
    key = chain_key(sequence, salt)
    mbas = array("Q", [mba for mba, *_ in blocks])
    old = array("I", [item for _, segment, offset, _ in blocks for item in (segment, offset)])
    checksums = array("I", [crc for *_, crc in blocks])
    body = mbas.tobytes() + old.tobytes() + checksums.tobytes()
    assert len(body) == body_bytes(MOVE, 0, len(blocks))
    whole = packed_record(MOVE, 0, len(blocks), body, key, fields)
    check_header(whole, MOVE, fields, key)
    declared = MoveBody.parse(body, blocks=len(blocks))
    assert [(block.segment, block.offset) for block in declared.old] == [(block[1], block[2]) for block in blocks]
    built = MoveBody.build(
        {
            "mbas": list(mbas),
            "old": [{"segment": segment, "offset": offset} for _, segment, offset, _ in blocks],
            "checksums": list(checksums),
        },
        blocks=len(blocks),
    )
    assert built == body
    record = parse_record(key, whole[:RECORD_HEADER_BYTES], built, 0)
    assert record is not None
    assert (record.mbas, record.old, record.checksums) == (mbas, old, checksums)


@given(U32, SALT, U64, SALT, FIELDS)
def test_a_seal_is_what_its_declaration_says(
    successor: int, new_salt: bytes, sequence: int, salt: bytes, fields: Any
) -> None:
    key = chain_key(sequence, salt)
    body = SealBody.build({"successor": successor, "reserved": 0, "successor_salt": new_salt})
    whole = packed_record(SEAL, 0, 0, body, key, fields)
    check_header(whole, SEAL, fields, key)
    record = parse_record(key, whole[:RECORD_HEADER_BYTES], body, 0)
    assert record is not None
    assert (record.successor, record.successor_salt) == (successor, new_salt)


@given(blocks_of(U64, U32), SALT, FIELDS, st.data())
def test_a_record_with_any_other_bit_or_key_does_not_count(
    blocks: list[tuple[int, ...]], salt: bytes, fields: Any, data: st.DataObject
) -> None:
    key = chain_key(7, salt)
    body = array("Q", [mba for mba, _ in blocks]).tobytes() + array("I", [crc for _, crc in blocks]).tobytes()
    whole = packed_record(WRITE, 0, len(blocks), body, key, fields)
    header = whole[:RECORD_HEADER_BYTES]
    assert parse_record(key, header, body, 0) is not None
    assert parse_record(chain_key(8, salt), header, body, 0) is None
    assert parse_record(chain_key(7, bytes(8) if any(salt) else b"1" * 8), header, body, 0) is None
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged_header = bytes(flipped[:RECORD_HEADER_BYTES])
    if body_length(key, damaged_header) == len(body):
        assert parse_record(key, damaged_header, bytes(flipped[RECORD_HEADER_BYTES:]), 0) is None


@given(st.binary(max_size=100))
def test_bytes_that_are_no_header_are_none(data: bytes) -> None:
    assert body_length(b"key", data) is None
    assert parse_segment_header(data) is None


@given(st.binary(max_size=50), st.binary(max_size=300), st.data())
def test_a_value_comes_back_and_any_other_bit_or_key_is_damage(key: bytes, payload: bytes, data: st.DataObject) -> None:
    value = pack_value(key, payload)
    assert unpack_value(key, value) == payload
    flipped = bytearray(value)
    flipped[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for wrong_key, wrong in ((key, bytes(flipped)), (key, value[:-1]), (key + b"x", value), (key, b"")):
        with pytest.raises(DamagedValueError, match="key " + wrong_key.hex()):
            unpack_value(wrong_key, wrong)


def test_the_splitter_cuts_a_run_into_its_blocks() -> None:
    data = bytes(range(256)) * 16 * 5
    assert b"".join(block_splitter(5).unpack(data)) == data
    assert {len(block) for block in block_splitter(5).unpack(data)} == {BLOCK_BYTES}


def test_wrong_and_missing_blocks_are_named() -> None:
    blocks = [bytes([number % 251]) * BLOCK_BYTES for number in range(300)]
    checksums = array("I", [portable_crc32c(block) for block in blocks])
    assert wrong_blocks(b"".join(blocks), checksums) == []
    blocks[7], blocks[299] = blocks[8], blocks[0]
    assert wrong_blocks(b"".join(blocks), checksums) == [7, 299]
    assert wrong_blocks(b"".join(blocks)[:-1], checksums) == [7, 299]
    assert wrong_blocks(b"".join(blocks[:298]), checksums) == [7, 298, 299]
