"""CRC-32C (Castagnoli) behind one function: google-crc32c's C extension where it loads, crcmod otherwise.

`crc32c` takes `bytes` (the C extension refuses mutable buffers). `CHECKSUM_IS_FAST` is False when no C code computes
it; the server then warns loudly, because every block read or written would pay some 500 µs.
"""

from collections.abc import Callable

import crcmod.predefined

_portable: Callable[[bytes], int] = crcmod.predefined.mkPredefinedCrcFun("crc-32c")


def portable_crc32c(data: bytes) -> int:
    """CRC-32C by crcmod: the portable fallback, and the oracle in tests."""
    return _portable(data)


crc32c: Callable[[bytes], int]
CHECKSUM_IS_FAST: bool

try:
    import google_crc32c

    _native: bool = google_crc32c.implementation == "c"
except ImportError:
    _native = False

if _native:
    crc32c = google_crc32c.value
    CHECKSUM_IS_FAST = True
    CHECKSUM_LIBRARY = "google-crc32c"
else:
    crc32c = portable_crc32c
    # crcmod's own C extension is slow (8 µs a block) but usable; its pure-Python loop is not.
    CHECKSUM_IS_FAST = bool(getattr(crcmod.crcmod, "_usingExtension", False))
    CHECKSUM_LIBRARY = "crcmod (C)" if CHECKSUM_IS_FAST else "crcmod (pure Python)"
