"""The one way from a construct declaration to a fast packer.

construct parses a 28-byte header in some 8 µs, `struct` in 0.09. Formats are declared once, with construct; a
fixed-size header on the hot path gets a `struct.Struct` *derived* from that declaration here, so that the two cannot
drift. Nothing else in the code makes a `struct.Struct`; a property test packs and parses every derived format both
ways.

Rules: only flat, fixed-size declarations of unsigned and signed integers of one byte order, constants of such types,
enums over them, and `Bytes(n)`; anything else raises TypeError when the module is imported, not when a frame arrives.
"""

import struct
from typing import Any

import construct

JOINED_BYTES = 8


def derive(declaration: Any, joined: int = 0, times: int = 1) -> struct.Struct:
    """Return the `struct.Struct` that packs the fields of a flat construct `Struct` in their order.

    Constants are ordinary fields of the result: the caller passes and compares them. With `joined` its first so many
    fields, eight bytes together, are one integer: what a hot path compares or packs as a constant (`join` makes it).
    The result is for `times` such structures, one after the other. Raises TypeError for a declaration that is not flat,
    not of fixed size, mixes byte orders, or whose joined fields are not eight bytes.
    """
    order = ""
    codes: list[str] = []
    for subcon in declaration.subcons:
        code, byte_order = _field_code(subcon)
        if byte_order and order and byte_order != order:
            raise TypeError(f"{declaration!r} mixes byte orders")
        order = order or byte_order
        codes.append(code)
    if joined:
        if struct.Struct("=" + "".join(codes[:joined])).size != JOINED_BYTES:
            raise TypeError(f"the first {joined} fields of {declaration!r} are not {JOINED_BYTES} bytes")
        codes[:joined] = "Q"
    derived = struct.Struct((order or "<") + "".join(codes) * times)
    if derived.size != declaration.sizeof() * times:
        raise TypeError(f"derived {derived.size} bytes for {times} times a declaration of {declaration.sizeof()}")
    return derived


def join(declaration: Any, joined: int, *values: int) -> int:
    """The integer that stands for `values`, of the first `joined` fields of a declaration, when they are `joined`."""
    fields = [_field_code(subcon) for subcon in declaration.subcons[:joined]]
    order = next(byte_order for _, byte_order in fields if byte_order)
    apart, joint = struct.Struct(order + "".join(code for code, _ in fields)), struct.Struct(f"{order}Q")
    (number,) = joint.unpack(apart.pack(*values))
    return int(number)


def _field_code(subcon: Any) -> tuple[str, str]:
    """Return (`struct` code, byte order or "") of one field."""
    while isinstance(subcon, (construct.Renamed, construct.Enum, construct.FlagsEnum)):
        subcon = subcon.subcon
    if isinstance(subcon, construct.Const):
        return _field_code(subcon.subcon)
    if isinstance(subcon, construct.FormatField):
        return subcon.fmtstr[1:], "" if subcon.length == 1 else subcon.fmtstr[0]
    if isinstance(subcon, construct.Bytes) and isinstance(subcon.length, int):
        return f"{subcon.length}s", ""
    raise TypeError(f"{subcon!r} has no fixed-size struct code")
