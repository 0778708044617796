"""CRC-32C: the fast one is the portable one, and both are the published one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.checksum import CHECKSUM_IS_FAST, crc32c, portable_crc32c


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_the_published_values(data: bytes, crc: int) -> None:
    assert crc32c(data) == portable_crc32c(data) == crc


@given(st.binary(max_size=5000))
def test_the_fast_and_the_portable_one_agree(data: bytes) -> None:
    assert crc32c(data) == portable_crc32c(data)


def test_this_machine_has_the_fast_one() -> None:
    assert CHECKSUM_IS_FAST
