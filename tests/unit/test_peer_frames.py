"""Frames between peers: what is packed comes out again, in any pieces, and nothing damaged does."""

import contextlib
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, LAYER_ROW, TREE, WRITE
from protocol.packing import Packer
from protocol.peer import (
    BLOCKS_LIMIT,
    COMPARED_LIMIT,
    DIGEST_BYTES,
    KINDS_SINCE,
    MAGIC,
    PART_BLOCKS,
    PEER_HEADER,
    PEER_HEADER_BYTES,
    VERSION,
    Append,
    Appended,
    Blocks,
    Check,
    Checked,
    Compare,
    Compared,
    Copied,
    Copy,
    Cut,
    Fetch,
    Fetched,
    Frame,
    Kind,
    Modification,
    Open,
    Opened,
    Part,
    PeerFrameError,
    Position,
    ReadBlocks,
    Refusal,
    Refused,
    RegionState,
    Skip,
)
from protocol.peer_clients import Forward, Forwarded, Keep, Kept, Look
from protocol.peer_decoding import FrameBuffer, decode, frame_bytes
from protocol.peer_frames import encode

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
positions = st.builds(Position, u32, u64)
histories = st.lists(positions, max_size=4).map(tuple)
runs = st.lists(st.tuples(u64, u64), max_size=4).map(tuple)
forwarders = st.binary(min_size=16, max_size=16)
names = st.text("abcé-1", max_size=20)
numbers = st.lists(u64, max_size=4).map(tuple)
blocks = st.lists(st.binary(min_size=1, max_size=8).map(lambda seed: (seed * BLOCK_BYTES)[:BLOCK_BYTES]), max_size=3)


def checksums_of(data: list[bytes]) -> bytes:
    return array("I", map(crc32c, data)).tobytes()


@st.composite
def modifications(draw: st.DrawFn) -> Modification:
    epoch, txid, layer = draw(u32), draw(u64), draw(u32)
    if draw(st.booleans()):
        rows = draw(st.integers(1, 3))
        return Modification(epoch, txid, TREE, layer, rows, 0, bytes(rows * LAYER_ROW.size), ())
    data = draw(blocks)
    extents = draw(st.lists(st.tuples(u64, u64), max_size=3))
    body = array("Q", [value for extent in extents for value in extent]).tobytes()
    body += array("Q", draw(st.lists(u64, min_size=len(data), max_size=len(data)))).tobytes() + checksums_of(data)
    return Modification(epoch, txid, WRITE, layer, len(extents), len(data), body, data)


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    data = draw(blocks)
    return Copy(draw(u64), draw(u64), draw(u64), draw(st.binary(max_size=40)), checksums_of(data), data)


@st.composite
def copies_of_the_rest(draw: st.DrawFn) -> Copy:
    whole = draw(st.lists(st.sampled_from([bytes(BLOCK_BYTES), b"ab" * 2048, bytes(range(256)) * 16]), max_size=20))
    keeps = draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole)))
    bits = sum(keep << at for at, keep in enumerate(keeps))
    data = [each for each, keep in zip(whole, keeps, strict=True) if not keep]
    packer = Packer()
    parts = [packer.pack(data[at : at + 7]) for at in range(0, len(data), 7)]
    kept = bits.to_bytes((len(whole) + 7) // 8, "little") if bits else b""
    return Copy(draw(u64), draw(u64), draw(u64), draw(st.binary(max_size=40)), checksums_of(whole), data, kept, parts)


@st.composite
def compared(draw: st.DrawFn) -> Compared:
    mbas = draw(st.lists(u64, max_size=5))
    return Compared(draw(u64), mbas, bytes(range(DIGEST_BYTES)) * len(mbas))


@st.composite
def blocks_by_mba(draw: st.DrawFn) -> Blocks:
    data = draw(blocks)
    return Blocks(draw(u64), draw(st.lists(u64, min_size=len(data), max_size=len(data))), checksums_of(data), data)


batches = st.lists(modifications(), max_size=3)
incarnations = st.lists(u64, min_size=1, max_size=5).map(lambda numbers: array("Q", numbers))
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Open, st.binary(min_size=16, max_size=16), u32, names),
    st.builds(Opened, incarnations, positions, positions, u64, u64, histories, runs),
    st.builds(Cut, positions),
    st.builds(Skip, positions, histories, runs, st.sampled_from([b"", bytes(3 * LAYER_ROW.size)])),
    st.builds(Append, u32, u64, u64, u64, u64, batches),
    st.builds(Appended, u64, positions, positions, u64),
    copies(),
    st.builds(Copied, u64, u32),
    st.builds(Fetch, positions, u64),
    st.builds(Fetched, batches, st.booleans()),
    st.builds(Refused, u32, st.sampled_from(Refusal)),
    st.builds(ReadBlocks, u64, st.lists(u64, max_size=4)),
    blocks_by_mba(),
    st.builds(Forward, forwarders, u64, names, names, numbers, st.binary(max_size=40)),
    st.builds(Forwarded, names),
    st.builds(Keep, forwarders, u64, u64, numbers, u64),
    st.builds(Look, u64),
    st.builds(Kept, u64),
    copies_of_the_rest(),
    st.builds(Compare, u64),
    st.builds(Check, u64),
    st.builds(Checked, u64, st.builds(RegionState, u64, st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES))),
    compared(),
)


def packed(frame: Frame) -> bytes:
    return b"".join(encode(frame))


def signed(version: int, kind: int, meta: bytes, data: bytes = b"") -> bytes:
    """A frame with the right checksum, whatever is in it."""
    unsigned = PEER_HEADER.pack(MAGIC, version, kind, 0, len(meta) + len(data), len(meta), 0)[:-4]
    return unsigned + crc32c(unsigned + meta).to_bytes(4, "little") + meta + data


def feed(data: bytes, piece_bytes: int, buffer: FrameBuffer | None = None) -> list[Frame]:
    """What comes out of a stream of these bytes, in pieces."""
    buffer = buffer or FrameBuffer()
    found: list[Frame] = []
    at = 0
    while at < len(data):
        room = buffer.writable()
        piece = data[at : at + min(piece_bytes, len(room))]
        room[: len(piece)] = piece
        at += len(piece)
        # A copy of each: blocks lie in the buffer only until the next piece comes.
        found += [decode(packed(frame)) for frame in buffer.received(len(piece))]
    return found


@pytest.mark.fuzz
@given(frames)
def test_what_is_packed_comes_out_again(frame: Frame) -> None:
    data = packed(frame)
    assert frame_bytes(data) == len(data)
    again = decode(data)
    assert type(again) is type(frame)
    assert packed(again) == data


@pytest.mark.fuzz
@given(st.lists(frames, min_size=1, max_size=4), st.integers(1, 5000))
def test_a_stream_may_come_in_any_pieces(sent: list[Frame], piece_bytes: int) -> None:
    data = b"".join(map(packed, sent))
    assert b"".join(map(packed, feed(data, piece_bytes))) == data


@pytest.mark.fuzz
@given(frames, st.data())
def test_a_damaged_frame_is_refused(frame: Frame, data: st.DataObject) -> None:
    whole = bytearray(packed(frame))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PeerFrameError):
        decode(bytes(whole))


@pytest.mark.fuzz
@given(st.binary(max_size=200), st.integers(0, 255), st.integers(0, 1 << 20))
def test_whatever_has_the_right_checksum_is_taken_apart_or_refused(meta: bytes, kind: int, more: int) -> None:
    whole = signed(VERSION, kind, meta, bytes(more % 3 * BLOCK_BYTES))
    with contextlib.suppress(PeerFrameError):
        assert packed(decode(whole))


@pytest.mark.fuzz
@given(st.binary(max_size=100))
def test_a_strangers_bytes_are_refused_or_waited_for(data: bytes) -> None:
    with pytest.raises(PeerFrameError):
        feed(data + bytes(PEER_HEADER_BYTES), 7)


def test_a_frame_larger_than_the_first_room_comes_out_and_the_room_is_given_back() -> None:
    data = [bytes([number]) * BLOCK_BYTES for number in range(200)]
    body = bytes(16) + bytes(8 * len(data)) + checksums_of(data)
    frame = Append(3, 1, 0, 0, 0, [Modification(3, 9, WRITE, 1, 1, len(data), body, data)])
    buffer = FrameBuffer()
    (found,) = feed(packed(frame), 100_000, buffer)
    assert isinstance(found, Append)
    assert b"".join(found.modifications[0].data) == b"".join(data)
    room_bytes = len(buffer.writable())
    assert room_bytes == len(packed(frame))
    for _ in range(FrameBuffer.SMALL_FRAMES):
        feed(packed(Append(3, 1, 0, 0, 0)), 100_000, buffer)
    assert len(buffer.writable()) == room_bytes  # others of its size may follow
    feed(packed(Append(3, 1, 0, 0, 0)), 100_000, buffer)
    assert len(buffer.writable()) == FrameBuffer.FIRST_BYTES


def test_the_length_that_a_header_claims_is_bounded() -> None:
    header = PEER_HEADER.pack(MAGIC, VERSION, Kind.APPEND, 0, 0xFFFFFFFF, 0, 0)
    with pytest.raises(PeerFrameError, match="length"):
        frame_bytes(header)


def test_a_later_version_can_open_and_be_opened() -> None:
    later = bytearray(packed(Open(bytes(16), 7, "node-1", VERSION, VERSION + 1)))
    meta = bytes(later[PEER_HEADER_BYTES:]) + b"what version 2 knows"
    opened = decode(signed(VERSION + 1, Kind.OPEN, meta))
    assert opened == Open(bytes(16), 7, "node-1", VERSION, VERSION + 1)
    with pytest.raises(PeerFrameError, match="version"):
        frame_bytes(PEER_HEADER.pack(MAGIC, VERSION + 1, Kind.APPEND, 0, 0, 0, 0))


@given(frames)
def test_a_frame_says_with_which_version_its_kind_came(frame: Frame) -> None:
    """So the program before takes what it knows, and refuses the rest."""
    _, version, kind, *_ = PEER_HEADER.unpack_from(packed(frame))
    assert version == KINDS_SINCE.get(kind, 1)
    assert (version == 1) == (kind <= Kind.REFUSED)


def test_so_many_blocks_may_be_asked_for() -> None:
    whole = packed(ReadBlocks(1, range(BLOCKS_LIMIT)))
    assert len(decode(whole).mbas) == BLOCKS_LIMIT  # type: ignore[union-attr]
    meta = whole[PEER_HEADER_BYTES:]
    more = meta[:8] + (BLOCKS_LIMIT + 1).to_bytes(4, "little") + meta[12:] + bytes(8)
    with pytest.raises(PeerFrameError, match="too many blocks"):
        decode(signed(VERSION, Kind.READ_BLOCKS, more))


def test_so_many_blocks_may_be_compared() -> None:
    frame = Compared(1, range(COMPARED_LIMIT), bytes(DIGEST_BYTES * COMPARED_LIMIT))
    assert len(decode(packed(frame)).mbas) == COMPARED_LIMIT  # type: ignore[union-attr]
    meta = bytes(8) + (COMPARED_LIMIT + 1).to_bytes(4, "little") + bytes(4 + 24 * (COMPARED_LIMIT + 1))
    with pytest.raises(PeerFrameError, match="too many blocks"):
        decode(signed(VERSION, Kind.COMPARED, meta))


DATA = [bytes([number]) * BLOCK_BYTES for number in range(3)]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([Part(2, b"".join(DATA[:2]))], "another number of blocks"),
        ([Part(2, b"".join(DATA[:2])), Part(2, b"".join(DATA[:2]))], "another number of blocks"),
        ([Part(3, b"".join(reversed(DATA)))], "checksum"),
        ([Part(0, b""), Part(3, b"".join(DATA))], "wrong size"),
        ([Part(3, b"garbage")], "cannot be unpacked"),
        ([Part(3, bytes(3 * BLOCK_BYTES + 1))], "wrong size"),
    ],
)
def test_parts_that_do_not_hold_together_are_refused(parts: list[Part], why: str) -> None:
    copy = Copy(1, 2, 3, b"", checksums_of(DATA), (), b"", parts)
    with pytest.raises(PeerFrameError, match=why):
        decode(packed(copy))


def test_a_part_has_so_many_blocks_at_most() -> None:
    data = [bytes(BLOCK_BYTES)] * (PART_BLOCKS + 1)
    parts = [Part(len(data), b"".join(data))]
    with pytest.raises(PeerFrameError, match="wrong size"):
        decode(packed(Copy(1, 2, 3, b"", checksums_of(data), (), b"", parts)))
