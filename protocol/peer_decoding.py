"""Frames between peers taken apart, as they come in a stream.

Rules
- Nothing of a frame is given out before all of it was checked.
- The blocks of an APPEND are a view of the buffer: they stay as they are until the next frame is asked for.
- The buffer grows to the length of the frame that does not fit, and back when SMALL_FRAMES would have fitted before.
"""

from array import array
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any

from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, LAYER_ROW, TREE, WRITE, body_bytes, wrong_blocks
from protocol.packing import travelling, unpack
from protocol.peer import (
    APPEND_BODY,
    APPENDED_BODY,
    BLOCKS_BODY,
    BLOCKS_LIMIT,
    CHECK_BODY,
    CHECKED_BODY,
    COMPARE_BODY,
    COMPARED_BODY,
    COMPARED_LIMIT,
    COPIED_BODY,
    COPY_BODY,
    COPY_PART,
    COPY_PARTS_BODY,
    DIGEST_BYTES,
    EPOCHS_LIMIT,
    FETCH_BODY,
    FETCHED_BODY,
    FRAME_LIMIT_BYTES,
    MAGIC,
    MODIFICATION_HEADER,
    MODIFICATIONS_LIMIT,
    OLDEST_VERSION,
    OPEN_BODY,
    OPENED_BODY,
    PART_BLOCKS,
    PEER_HEADER,
    PEER_HEADER_BYTES,
    POSITION_BODY,
    REFUSED_BODY,
    REGION_RUN,
    RUNS_LIMIT,
    SKIP_BODY,
    VERSION,
    Append,
    Appended,
    Blocks,
    Buffer,
    Check,
    Checked,
    Compare,
    Compared,
    Copied,
    Copy,
    Cut,
    Epochs,
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
    Runs,
    Skip,
)
from protocol.peer_clients import Forward, Forwarded, Keep, Kept, Look

_APPENDED_BYTES = PEER_HEADER_BYTES + APPENDED_BODY.size


def frame_bytes(data: Buffer | bytearray, begin: int = 0, end: int | None = None) -> int:
    """How long the frame is that begins with the bytes from `begin` to `end`; 0 if there are too few of them.
    PeerFrameError."""
    if (len(data) if end is None else end) - begin < PEER_HEADER_BYTES:
        return 0
    magic, version, kind, _, size_bytes, meta_bytes, _ = PEER_HEADER.unpack_from(data, begin)
    if magic != MAGIC:
        raise PeerFrameError("it is no frame of ours")
    if not OLDEST_VERSION <= version <= VERSION and kind not in (Kind.OPEN, Kind.OPENED, Kind.REFUSED):
        raise PeerFrameError(f"it has version {version}, this program knows {OLDEST_VERSION} to {VERSION}")
    if size_bytes > FRAME_LIMIT_BYTES or meta_bytes > size_bytes:
        raise PeerFrameError("its length is wrong")
    return PEER_HEADER_BYTES + int(size_bytes)


def decode(data: Buffer) -> Frame:
    """One whole frame; every byte of it is checked. The blocks of an APPEND are views of `data`. PeerFrameError."""
    if not data or frame_bytes(data) != len(data):
        raise PeerFrameError("its length is wrong")
    return _frame_of(memoryview(data))


def _frame_of(data: memoryview) -> Frame:
    """The frame that these bytes are, by the lengths in their header."""
    _, _, kind, _, _, meta_bytes, crc = PEER_HEADER.unpack_from(data)
    end = PEER_HEADER_BYTES + meta_bytes
    head = bytes(data[:end])
    if crc32c(head[: PEER_HEADER_BYTES - 4] + head[PEER_HEADER_BYTES:]) != crc:
        raise PeerFrameError("its checksum is wrong: it was damaged on its way")
    if kind == Kind.APPENDED:  # what an owner is told all the time
        if not len(data) == end == _APPENDED_BYTES:
            raise PeerFrameError("its length is wrong")
        number, txid, durable_txid, room, epoch, durable_epoch = APPENDED_BODY.unpack_from(head, PEER_HEADER_BYTES)
        return Appended(number, Position(epoch, txid), Position(durable_epoch, durable_txid), room)
    blocks = data[end:]
    reader = _Reader(head, blocks if kind == Kind.APPEND else memoryview(bytes(blocks)))
    try:
        frame = _decode(kind, reader)
    except UnicodeDecodeError as error:
        raise PeerFrameError("a name in it is no UTF-8") from error
    if not reader.is_at_end and kind not in (Kind.OPEN, Kind.OPENED):
        raise PeerFrameError("its length is wrong")
    return frame


class _Reader:
    """Takes a frame apart, from its front: the meta, and the blocks behind it."""

    __slots__ = ("_at", "_blocks", "_blocks_at", "_head")

    def __init__(self, head: bytes, blocks: memoryview) -> None:
        """Header and meta, and what follows them."""
        self._head = head
        self._blocks = blocks
        self._at = PEER_HEADER_BYTES
        self._blocks_at = 0

    def take(self, size_bytes: int) -> bytes:
        """The next bytes of the meta."""
        begin, end = self._at, self._at + size_bytes
        if end > len(self._head):
            raise PeerFrameError("it ends too early")
        self._at = end
        return self._head[begin:end]

    def unpack(self, packer: Struct) -> tuple[Any, ...]:
        """The next fields of the meta."""
        begin = self._at
        self._at = begin + packer.size
        if self._at > len(self._head):
            raise PeerFrameError("it ends too early")
        return packer.unpack_from(self._head, begin)

    def rest(self) -> bytes:
        """What is left of the meta."""
        return self.take(len(self._head) - self._at)

    def blocks(self, count: int, checksums: bytes) -> Sequence[memoryview]:
        """The next blocks, as one buffer, if they have these checksums."""
        if not count:
            return ()
        data = self.body(count * BLOCK_BYTES)
        if wrong_blocks(data, array("I", checksums)):
            raise PeerFrameError("the checksum of a block is wrong: it was damaged on its way")
        return (data,)

    def body(self, size_bytes: int) -> memoryview:
        """The next bytes behind the meta; whoever takes them checks them."""
        begin, end = self._blocks_at, self._blocks_at + size_bytes
        if end > len(self._blocks):
            raise PeerFrameError("it ends too early")
        self._blocks_at = end
        return self._blocks[begin:end]

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._head) and self._blocks_at == len(self._blocks)


def _decode(kind: int, reader: _Reader) -> Frame:
    match kind:
        case Kind.APPEND:
            number, committed, durable, sync, epoch, count = reader.unpack(APPEND_BODY)
            return Append(epoch, number, committed, durable, sync, _modifications(reader, count))
        case Kind.FETCHED:
            is_gone, count = reader.unpack(FETCHED_BODY)
            return Fetched(_modifications(reader, count), bool(is_gone))
        case Kind.COPY:
            region, txid, region_txid, blocks, entries_bytes = reader.unpack(COPY_BODY)
            entries = reader.take(entries_bytes)
            checksums = reader.take(4 * blocks)
            return Copy(region, txid, region_txid, entries, checksums, reader.blocks(blocks, checksums))
        case Kind.COPY_PARTS:
            return _copy_parts(reader)
        case Kind.CHECK:
            (region,) = reader.unpack(CHECK_BODY)
            return Check(region)
        case Kind.CHECKED:
            region, *state = reader.unpack(CHECKED_BODY)
            return Checked(region, RegionState(*state))
        case Kind.COMPARE:
            (region,) = reader.unpack(COMPARE_BODY)
            return Compare(region)
        case Kind.COMPARED:
            region, count, _ = reader.unpack(COMPARED_BODY)
            if count > COMPARED_LIMIT:
                raise PeerFrameError("it compares too many blocks")
            compared = array("Q", reader.take(8 * count))
            return Compared(region, compared, reader.take(DIGEST_BYTES * count))
        case Kind.COPIED:
            region, errno, _ = reader.unpack(COPIED_BODY)
            return Copied(region, errno)
        case Kind.OPEN:
            oldest, newest, _, epoch, family, owner = reader.unpack(OPEN_BODY)
            return Open(family, epoch, owner.rstrip(b"\0").decode(), oldest, newest)
        case Kind.OPENED:
            return _opened(reader)
        case Kind.CUT:
            epoch, _, txid = reader.unpack(POSITION_BODY)
            return Cut(Position(epoch, txid))
        case Kind.SKIP:
            epoch, epochs, txid, runs, rows = reader.unpack(SKIP_BODY)
            history, regions = _epochs(reader, epochs), _runs(reader, runs)
            return Skip(Position(epoch, txid), history, regions, reader.take(rows * LAYER_ROW.size))
        case Kind.FETCH:
            epoch, _, txid, limit_bytes = reader.unpack(FETCH_BODY)
            return Fetch(Position(epoch, txid), limit_bytes)
        case Kind.REFUSED:
            epoch, reason = reader.unpack(REFUSED_BODY)
            return Refused(epoch, Refusal(reason) if reason in Refusal.__members__.values() else Refusal.FAILED)
        case Kind.READ_BLOCKS:
            number, mbas = _mbas(reader)
            return ReadBlocks(number, mbas)
        case Kind.BLOCKS:
            number, mbas = _mbas(reader)
            checksums = reader.take(4 * len(mbas))
            return Blocks(number, mbas, checksums, reader.blocks(len(mbas), checksums))
        case Kind.FORWARD:
            return Forward.unpack(reader.take, reader.rest)
        case Kind.FORWARDED:
            return Forwarded.unpack(reader.take)
        case Kind.KEEP:
            return Keep.unpack(reader.take)
        case Kind.KEPT:
            return Kept.unpack(reader.take)
        case Kind.LOOK:
            return Look.unpack(reader.take)
    raise PeerFrameError(f"it is of kind {kind}, which this program does not know")


def _copy_parts(reader: _Reader) -> Copy:
    fields = reader.unpack(COPY_PARTS_BODY)
    region, txid, region_txid, blocks, entries_bytes, count, is_whole = fields
    entries = reader.take(entries_bytes)
    checksums = array("I", reader.take(4 * blocks))
    kept = b"" if is_whole else reader.take((blocks + 7) // 8)
    travel = checksums if is_whole else array("I", travelling(kept, checksums))
    parts: list[Part] = []
    data: list[Buffer] = []
    at = 0
    for part_blocks, size_bytes in COPY_PART.iter_unpack(reader.take(count * COPY_PART.size)):
        if at + part_blocks > len(travel):
            raise PeerFrameError("it has another number of blocks than it says")
        if not 0 < part_blocks <= PART_BLOCKS or size_bytes > part_blocks * BLOCK_BYTES:
            raise PeerFrameError("a part of it has a wrong size")
        part = Part(part_blocks, reader.body(size_bytes))
        try:
            plain = unpack(part)
        except ValueError as error:
            raise PeerFrameError(f"a part of it cannot be unpacked: {error}") from error
        if wrong_blocks(plain, travel[at : at + part_blocks]):
            raise PeerFrameError("the checksum of a block is wrong: it was damaged on its way")
        parts.append(part)
        data.append(plain)
        at += part_blocks
    if at != len(travel):
        raise PeerFrameError("it has another number of blocks than it says")
    return Copy(region, txid, region_txid, entries, checksums.tobytes(), data, kept, parts)


def _mbas(reader: _Reader) -> tuple[int, Sequence[int]]:
    number, count, _ = reader.unpack(BLOCKS_BODY)
    if count > BLOCKS_LIMIT:
        raise PeerFrameError("it is about too many blocks")
    return number, array("Q", reader.take(8 * count))


def _modifications(reader: _Reader, count: int) -> Sequence[Modification]:
    if count > MODIFICATIONS_LIMIT:
        raise PeerFrameError("it has too many modifications")
    found: list[Modification] = []
    for _ in range(count):
        epoch, layer, txid, blocks, extents, kind, _ = reader.unpack(MODIFICATION_HEADER)
        if kind not in (WRITE, TREE) or (kind == TREE and blocks):
            raise PeerFrameError(f"a record of kind {kind} with {blocks} blocks is no modification")
        body = reader.take(body_bytes(kind, extents, blocks))
        data = reader.blocks(blocks, body[len(body) - 4 * blocks :])
        found.append(Modification(epoch, txid, kind, layer, extents, blocks, body, data))
    return found


def _opened(reader: _Reader) -> Opened:
    (
        version, count, epochs, runs, incarnation, intact_since, room_bytes,
        last_epoch, durable_epoch, last_txid, durable_txid, committed_txid,
    ) = reader.unpack(OPENED_BODY)  # fmt: skip
    history, resync = _epochs(reader, epochs), _runs(reader, runs)
    incarnations: Sequence[int] = array("Q", reader.take(8 * count)) if count else range(intact_since, incarnation + 1)
    if not incarnations or incarnations[-1] != incarnation:
        raise PeerFrameError("a replica is said to be open in another incarnation than its last one")
    return Opened(
        incarnations, Position(last_epoch, last_txid), Position(durable_epoch, durable_txid), committed_txid,
        room_bytes, history, resync, version,
    )  # fmt: skip


def _epochs(reader: _Reader, count: int) -> Epochs:
    if count > EPOCHS_LIMIT:
        raise PeerFrameError("a history in it has too many epochs")
    packed = reader.take(count * POSITION_BODY.size)
    return tuple(Position(epoch, txid) for epoch, _, txid in POSITION_BODY.iter_unpack(packed))


def _runs(reader: _Reader, count: int) -> Runs:
    if count > RUNS_LIMIT:
        raise PeerFrameError("it has too many runs of regions")
    return tuple((first, many) for first, many in REGION_RUN.iter_unpack(reader.take(count * REGION_RUN.size)))


class FrameBuffer:
    """Where the bytes of a stream gather until frames are complete."""

    FIRST_BYTES = 256 << 10
    SMALL_FRAMES = 256

    def __init__(self) -> None:
        self._begin = 0  # of what is not used yet
        self._end = 0
        self._needed_bytes = PEER_HEADER_BYTES  # from `_begin` on, to go on
        self._small_frames = 0  # since the last one that did not fit into FIRST_BYTES
        self._take_room(self.FIRST_BYTES)

    def _take_room(self, size_bytes: int) -> None:
        self._room = memoryview(bytearray(size_bytes))

    def writable(self) -> memoryview:
        """Room for the next bytes, at least what is missing of a frame."""
        if self._begin + self._needed_bytes > len(self._room):
            self._make_room()
        return self._room[self._end :]

    def _make_room(self) -> None:
        """Begin at the front again, in more room if the frame needs it; a frame's limit bounds it."""
        held = bytes(self._room[self._begin : self._end])
        if self._needed_bytes > len(self._room):
            self._take_room(self._needed_bytes)
        self._room[: len(held)] = held
        self._begin, self._end = 0, len(held)

    def received(self, size_bytes: int) -> Iterator[Frame]:
        """So many bytes were put there: the frames that are complete now. PeerFrameError."""
        self._end += size_bytes
        while True:
            begin = self._begin
            length = frame_bytes(self._room, begin, self._end)
            self._needed_bytes = length or PEER_HEADER_BYTES
            if not length or begin + length > self._end:
                break
            self._begin = begin + length
            self._small_frames = 0 if length > self.FIRST_BYTES else self._small_frames + 1
            yield _frame_of(self._room[begin : begin + length])
        if self._begin == self._end:
            self._begin = self._end = 0
            if self._small_frames > self.SMALL_FRAMES and len(self._room) > self.FIRST_BYTES:
                self._take_room(self.FIRST_BYTES)

    def leftover(self) -> bytes:
        """What is behind the last frame that was given out."""
        return bytes(self._room[self._begin : self._end])
