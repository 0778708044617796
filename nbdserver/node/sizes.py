"""Sizes as people write them, in powers of 1024.

`10G`, `10GiB` and `10g` are all 10 * 1024^3. KB, MB, GB and TB mean powers of 1000 to some and of 1024 to others:
they are refused with a hint, because a disk that is 7 % smaller than meant is found out late.
"""

import re

from nbdserver.block import BLOCK_BYTES

MAX_VOLUME_BYTES = 16 << 40
"""16 TiB: what the maps, the protocol tests and the recovery bounds are made and measured for."""

_POWERS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_PATTERN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


class SizeError(ValueError):
    """A size that cannot be meant; the message is one line and says what would be right."""


def parse_size(text: str) -> int:
    """Return the bytes that `text` (`4096`, `512M`, `1.5T`, `10GiB`) means. Raises SizeError."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise SizeError(f"{text!r} is not a size; write for example 512M, 10G or 1.5T")
    number, unit = match.groups()
    letter = unit[:1].upper()
    if unit.upper() in ("KB", "MB", "GB", "TB"):
        raise SizeError(f"{text!r} is ambiguous; write {number}{letter} (or {number}{letter}iB) for powers of 1024")
    known = unit.upper() in _POWERS or (unit[1:].upper() == "IB" and letter in _POWERS)
    if not known:
        raise SizeError(f"{text!r} has an unknown unit {unit!r}; use K, M, G or T (powers of 1024)")
    # Integer arithmetic: a float would round what is above 2^53.
    whole, _, fraction = number.partition(".")
    scale: int = 10 ** len(fraction)
    size_bytes, rest = divmod(int(whole + fraction) << _POWERS[letter], scale)
    if rest:
        raise SizeError(f"{text!r} is not a whole number of bytes; write for example {size_bytes}")
    return size_bytes


def parse_volume_size(text: str) -> int:
    """Return a volume's size in bytes: whole blocks, at most 16 TiB. Raises SizeError."""
    size_bytes = parse_size(text)
    check_volume_size(size_bytes, text)
    return size_bytes


def check_volume_size(size_bytes: int, text: str = "") -> None:
    """Raise SizeError unless a volume can have `size_bytes`."""
    shown = text or str(size_bytes)
    if size_bytes < BLOCK_BYTES:
        raise SizeError(
            f"{shown!r} is too small for a volume; the least is {BLOCK_BYTES} bytes (write for example 10G)"
        )
    if size_bytes > MAX_VOLUME_BYTES:
        raise SizeError(f"{shown!r} is too large for a volume; the most is {format_size(MAX_VOLUME_BYTES)}")
    if size_bytes % BLOCK_BYTES:
        nearest = (size_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        raise SizeError(f"{shown!r} is not a multiple of {BLOCK_BYTES} bytes; the next one is {nearest}")


def format_size(size_bytes: int) -> str:
    """Return the shortest exact form (`10G`, `1536M`, `4097`), which `parse_size` reads back."""
    for letter in ("T", "G", "M", "K"):
        if size_bytes and size_bytes % (1 << _POWERS[letter]) == 0:
            return f"{size_bytes >> _POWERS[letter]}{letter}"
    return str(size_bytes)


def round_size(size_bytes: float) -> str:
    """Return a rounded form for people (`3.2 GiB`)."""
    for letter in ("T", "G", "M", "K"):
        unit = 1 << _POWERS[letter]
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {letter}iB"
    return f"{size_bytes:.0f} B"
