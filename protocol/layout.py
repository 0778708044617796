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


def derive(declaration: Any) -> struct.Struct:
    """Return the `struct.Struct` that packs the fields of a flat construct `Struct` in their order.

    Constants are ordinary fields of the result: the caller passes and compares them. Raises TypeError for a
    declaration that is not flat, not of fixed size, or mixes byte orders.
    """
    order = ""
    codes: list[str] = []
    for subcon in declaration.subcons:
        code, byte_order = _field_code(subcon)
        if byte_order and order and byte_order != order:
            raise TypeError(f"{declaration!r} mixes byte orders")
        order = order or byte_order
        codes.append(code)
    derived = struct.Struct((order or "<") + "".join(codes))
    if derived.size != declaration.sizeof():
        raise TypeError(f"derived {derived.size} bytes for a declaration of {declaration.sizeof()}")
    return derived


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
