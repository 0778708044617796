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


def test_every_derived_struct_is_in_this_test() -> None:
    fast = {name for name in vars(nbd) if isinstance(getattr(nbd, name), struct.Struct)}
    assert len(fast) == len(DERIVED)


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
