"""`derive`: a flat declaration becomes the `struct` with the same bytes, anything else is refused when it is made."""

import construct
import pytest
from construct import Array, Bytes, Const, Enum, Int8ub, Int8ul, Int16ub, Int16ul, Int32sl, Int64ul, Struct

from protocol.layout import derive, join


def test_a_flat_declaration_becomes_its_struct() -> None:
    declaration = Struct("a" / Int8ul, "b" / Bytes(3), "c" / Const(7, Int16ul), "d" / Int32sl, "e" / Int64ul)
    fast = derive(declaration)
    assert fast.format == "<B3sHlQ"
    packed = declaration.build({"a": 1, "b": b"xyz", "d": -5, "e": 1 << 40})
    assert fast.pack(1, b"xyz", 7, -5, 1 << 40) == packed


def test_an_enum_is_the_integer_under_it() -> None:
    assert derive(Struct("kind" / Enum(Int16ub, one=1), "x" / Int8ub)).format == ">HB"


def test_one_byte_fields_take_the_byte_order_of_the_others() -> None:
    assert derive(Struct("a" / Int8ul, "b" / Int16ub)).format == ">BH"


@pytest.mark.parametrize(
    "declaration",
    [
        Struct("a" / Int16ul, "b" / Int16ub),
        Struct("a" / Array(3, Int8ul)),
        Struct("a" / Bytes(construct.this.length)),
        Struct("a" / Struct("b" / Int8ul)),
        Struct("a" / construct.CString("ascii")),
        Struct("a" / construct.VarInt),
    ],
)
def test_what_is_not_flat_and_of_fixed_size_is_refused(declaration: object) -> None:
    with pytest.raises(TypeError):
        derive(declaration)


def test_leading_fields_can_be_joined_into_one_integer() -> None:
    declaration = Struct("a" / Int16ub, "b" / Int16ub, "c" / Const(9, construct.Int32ub), "d" / Int16ub)
    fast = derive(declaration, joined=3)
    assert fast.format == ">QH"
    assert fast.pack(join(declaration, 3, 1, 2, 9), 7) == declaration.build({"a": 1, "b": 2, "d": 7})
    twice = declaration.build({"a": 1, "b": 2, "d": 7}) + declaration.build({"a": 3, "b": 4, "d": 8})
    assert derive(declaration, joined=3, times=2).unpack(twice) == (*fast.unpack(twice[:10]), *fast.unpack(twice[10:]))
    with pytest.raises(TypeError):
        derive(declaration, joined=2)
