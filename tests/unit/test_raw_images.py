"""Raw images: holes stay holes, zeros are not sent, and what is cut off is noticed, in files, pipes and streams."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.images.client import PIECE_BYTES, pieces
from nbdserver.images.raw import GRAIN_BYTES, Sink, Source, filled

MIB = 1 << 20
SIZE_BYTES = 16 * MIB
PARTS = [(0, b"a" * 5000), (3 * MIB, b"b" * MIB), (4 * MIB, b"c" * 512), (SIZE_BYTES - 512, b"d" * 512)]


def whole() -> bytes:
    content = bytearray(SIZE_BYTES)
    for offset, data in PARTS:
        content[offset : offset + len(data)] = data
    return bytes(content)


def fill(descriptor: int, parts: list[tuple[int, bytes]] = PARTS, size_bytes: int = SIZE_BYTES) -> None:
    sink = Sink(descriptor, size_bytes)
    for offset, data in parts:
        sink.put(offset, data)
    sink.finish()


@contextmanager
def piped(content: bytes) -> Iterator[int]:
    """The reading end of a pipe that somebody writes to in uneven parts."""
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb", buffering=0) as stream:
            for start in range(0, len(content), 300_001):
                stream.write(content[start : start + 300_001])

    writer = Thread(target=write)
    writer.start()
    yield reading
    os.close(reading)
    writer.join()


def test_a_file_gets_holes_whatever_it_held(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"old" * SIZE_BYTES)
    with path.open("r+b") as file:
        fill(file.fileno())
    assert path.read_bytes() == whole()
    assert path.stat().st_blocks * 512 < 3 * MIB


def test_an_image_is_put_behind_what_a_file_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with path.open("w+b", buffering=0) as file:
        file.write(b"head")
        fill(file.fileno())
    assert path.read_bytes() == b"head" + whole()


def test_what_cannot_have_holes_gets_zeros(tmp_path: Path) -> None:
    path = tmp_path / "appended"
    with path.open("ab", buffering=0) as file:
        file.write(b"head")
        fill(file.fileno())
    assert path.read_bytes() == b"head" + whole()
    reading, writing = os.pipe()

    def write() -> None:
        fill(writing)
        os.close(writing)

    writer = Thread(target=write)
    writer.start()
    with open(reading, "rb") as stream:
        assert stream.read() == whole()
    writer.join()


def test_holes_of_a_file_are_not_read_and_zeros_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("w+b") as file:
        fill(file.fileno())
        os.pwrite(file.fileno(), bytes(MIB), 8 * MIB)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        source = Source(file.fileno())
        assert source.size_bytes == SIZE_BYTES
        assert source.beginning()[:2] == b"aa"
        found = [(offset, bytes(data)) for offset, data in source.data()]
    assert source.read_bytes == SIZE_BYTES
    assert sum(len(data) for _, data in found) <= MIB + 3 * GRAIN_BYTES
    content = bytearray(SIZE_BYTES)
    for offset, data in found:
        content[offset : offset + len(data)] = data
    assert content == whole()


@pytest.mark.parametrize("looked", [False, True])
def test_a_pipe_is_read_to_its_end_and_then_tells_its_size(looked: bool) -> None:
    with piped(whole()) as reading:
        source = Source(reading)
        assert source.size_bytes is None
        if looked:
            assert source.beginning()[:2] == b"aa"
        content = bytearray(SIZE_BYTES)
        for offset, data in source.data():
            content[offset : offset + len(data)] = data
    assert content == whole()
    assert source.read_bytes == SIZE_BYTES


def test_an_empty_pipe_has_no_beginning() -> None:
    with piped(b"") as reading:
        assert Source(reading).beginning() == b""


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * GRAIN_BYTES)), max_size=8))
def test_what_is_left_out_of_a_piece_is_zeros(runs: list[tuple[bool, int]]) -> None:
    piece = b"".join((b"x" if is_data else b"\0") * length for is_data, length in runs)
    content = bytearray(len(piece))
    last = -1
    for offset, data in filled(1000, piece):
        assert offset - 1000 > last, "two parts touch: they are one"
        assert data[:GRAIN_BYTES] != bytes(len(data[:GRAIN_BYTES]))
        content[offset - 1000 : offset - 1000 + len(data)] = data
        last = offset - 1000 + len(data)
    assert content == piece


@given(st.lists(st.tuples(st.integers(0, 1 << 50), st.integers(1, 3 * PIECE_BYTES)), max_size=4))
def test_ranges_are_cut_into_pieces_that_cover_them(ranges: list[tuple[int, int]]) -> None:
    cut = list(pieces(ranges))
    assert all(0 < length <= PIECE_BYTES for _, length in cut)
    assert sum(length for _, length in cut) == sum(length for _, length in ranges)
