"""The NBD frames: each fast path agrees with its declaration, and the layouts are those of the specification."""

import struct
from typing import Any

import pytest
from construct import Const, Enum
from hypothesis import given
from hypothesis import strategies as st

from protocol import nbd

DERIVED = {
    name: (declaration, getattr(nbd, fast))
    for name, fast in {
        "OptionHeader": "OPTION_HEADER",
        "OptionReplyHeader": "OPTION_REPLY_HEADER",
        "ClientFlags": "CLIENT_FLAGS",
        "MetaContextReplyStart": "META_CONTEXT_REPLY_START",
        "Request": "REQUEST",
        "ExtendedRequest": "EXTENDED_REQUEST",
        "SimpleReply": "SIMPLE_REPLY",
        "StructuredReply": "STRUCTURED_REPLY",
        "ExtendedReply": "EXTENDED_REPLY",
        "StructuredData": "STRUCTURED_DATA",
        "ExtendedData": "EXTENDED_DATA",
        "OffsetHole": "OFFSET_HOLE",
        "Extent": "EXTENT",
        "ExtentExt": "EXTENT_EXT",
        "BlockStatusStart": "BLOCK_STATUS_START",
        "BlockStatusExtStart": "BLOCK_STATUS_EXT_START",
    }.items()
    for declaration in [getattr(nbd, name)]
}

JOINED = {
    "JOINED_REQUEST": (nbd.REQUEST, 3),
    "JOINED_EXTENDED_REQUEST": (nbd.EXTENDED_REQUEST, 3),
    "JOINED_SIMPLE_REPLY": (nbd.SIMPLE_REPLY, 2),
    "JOINED_STRUCTURED_DATA": (nbd.STRUCTURED_DATA, 3),
    "JOINED_EXTENDED_DATA": (nbd.EXTENDED_DATA, 3),
}


def test_every_derived_struct_is_in_this_test() -> None:
    fast = {name for name in vars(nbd) if isinstance(getattr(nbd, name), struct.Struct)}
    assert len(fast) == len(DERIVED) + len(JOINED)


@pytest.mark.parametrize("name", JOINED)
@given(packed=st.binary(min_size=64, max_size=64))
def test_a_joined_struct_is_the_same_bytes(name: str, packed: bytes) -> None:
    joined = getattr(nbd, name)
    apart, fields = JOINED[name]
    packed = packed[: apart.size]
    head, *rest = joined.unpack(packed)
    assert head == int.from_bytes(packed[:8], "big")
    assert tuple(rest) == apart.unpack(packed)[fields:]
    assert joined.pack(head, *rest) == packed


def test_a_plain_read_and_its_replies_are_these_frames() -> None:
    read, done, data = nbd.Command.READ, nbd.ReplyFlag.DONE, nbd.Chunk.OFFSET_DATA
    for joined, apart, head, fields in (
        (nbd.JOINED_REQUEST, nbd.REQUEST, nbd.PLAIN_READ, (nbd.REQUEST_MAGIC, 0, read)),
        (nbd.JOINED_EXTENDED_REQUEST, nbd.EXTENDED_REQUEST, nbd.PLAIN_EXTENDED_READ,
         (nbd.EXTENDED_REQUEST_MAGIC, 0, read)),
        (nbd.JOINED_SIMPLE_REPLY, nbd.SIMPLE_REPLY, nbd.SIMPLE_SUCCESS, (nbd.SIMPLE_REPLY_MAGIC, 0)),
        (nbd.JOINED_STRUCTURED_DATA, nbd.STRUCTURED_DATA, nbd.STRUCTURED_WHOLE_DATA,
         (nbd.STRUCTURED_REPLY_MAGIC, done, data)),
        (nbd.JOINED_EXTENDED_DATA, nbd.EXTENDED_DATA, nbd.EXTENDED_WHOLE_DATA,
         (nbd.EXTENDED_REPLY_MAGIC, done, data)),
    ):  # fmt: skip
        rest = range(1, len(apart.unpack(bytes(apart.size))) - len(fields) + 1)
        assert joined.pack(head, *rest) == apart.pack(*fields, *rest)


@pytest.mark.parametrize("name", DERIVED)
@given(data=st.data())
def test_construct_and_the_derived_struct_pack_and_parse_alike(name: str, data: st.DataObject) -> None:
    declaration, fast = DERIVED[name]
    values: dict[str, int] = {}
    for renamed in declaration.subcons:
        field: Any = renamed.subcon
        assert not isinstance(field, Enum)
        if isinstance(field, Const):
            values[renamed.name] = field.value
        else:
            values[renamed.name] = data.draw(st.integers(0, 256 ** field.sizeof() - 1))
    packed = fast.pack(*values.values())
    assert packed == declaration.build(values)
    parsed = declaration.parse(packed)
    assert dict(zip(values, fast.unpack(packed), strict=True)) == {field: parsed[field] for field in values} == values


@pytest.mark.parametrize(
    ("frame", "fields", "packed"),
    [
        ("Greeting", {"flags": 3}, b"NBDMAGICIHAVEOPT\0\3"),
        ("OptionHeader", {"option": 7, "length": 9}, b"IHAVEOPT" + bytes([0, 0, 0, 7, 0, 0, 0, 9])),
        ("InfoRequest", {"name": b"ab", "wanted": [3, 1]}, b"\0\0\0\2ab\0\2\0\3\0\1"),
        ("MetaContextRequest", {"name": b"a", "queries": [b"x:y"]}, b"\0\0\0\1a\0\0\0\1\0\0\0\3x:y"),
        ("InfoBlockSize", {"minimum_bytes": 1, "preferred_bytes": 2, "maximum_payload_bytes": 3},
         b"\0\3" + bytes([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3])),
        ("ServerReply", {"name": b"n", "description": b"long"}, b"\0\0\0\1nlong"),
        ("Error", {"error": 5, "message": b"no"}, b"\0\0\0\5\0\2no"),
        ("BlockStatusPayload", {"length": 1, "context_ids": [2]}, bytes(7) + b"\1\0\0\0\2"),
        ("ExportNameReplyPadded", {"size_bytes": 1, "flags": 2}, bytes(7) + b"\1\0\2" + bytes(124)),
    ],
)  # fmt: skip
def test_a_frame_has_the_bytes_of_the_specification(frame: str, fields: dict[str, Any], packed: bytes) -> None:
    declaration = getattr(nbd, frame)
    assert declaration.build(fields) == packed
    parsed = declaration.parse(packed)
    assert {name: parsed[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("derived", "size_bytes"),
    [("REQUEST", 28), ("EXTENDED_REQUEST", 32), ("SIMPLE_REPLY", 16), ("STRUCTURED_REPLY", 20), ("EXTENDED_REPLY", 32)],
)
def test_headers_have_the_sizes_of_the_specification(derived: str, size_bytes: int) -> None:
    assert getattr(nbd, derived).size == size_bytes
