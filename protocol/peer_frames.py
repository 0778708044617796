"""Frames between peers as bytes: what `protocol/peer.py` declares, packed. peer_decoding.py takes them apart.

Rules
- Blocks are neither copied nor joined when a frame is packed: its buffers go to the socket as they are.
"""

from array import array
from collections.abc import Mapping, Sequence

from protocol.checksum import crc32c
from protocol.disk import LAYER_ROW
from protocol.invariant import invariant
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
    EPOCHS_LIMIT,
    FETCH_BODY,
    FETCHED_BODY,
    FRAME_LIMIT_BYTES,
    INCARNATIONS_LIMIT,
    KINDS_SINCE,
    MAGIC,
    MODIFICATION_HEADER,
    MODIFICATIONS_LIMIT,
    OPEN_BODY,
    OPENED_BODY,
    PEER_HEADER,
    POSITION_BODY,
    REFUSED_BODY,
    REGION_RUN,
    RUNS_LIMIT,
    SKIP_BODY,
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
    ReadBlocks,
    Refused,
    Runs,
    Skip,
)
from protocol.peer_clients import NODE_BYTES, Forward, Forwarded, Keep, Kept, Look


def encode(frame: Frame) -> list[Buffer]:
    """The frame as buffers to send one after the other; blocks are not copied."""
    kind, meta, data = _parts(frame)
    size_bytes = len(meta) + sum(map(len, data))
    invariant(size_bytes <= FRAME_LIMIT_BYTES, f"a frame of {size_bytes} bytes is too large")
    unsigned = PEER_HEADER.pack(MAGIC, KINDS_SINCE.get(kind, 1), kind, 0, size_bytes, len(meta), 0)[:-4]
    return [unsigned + crc32c(unsigned + meta).to_bytes(4, "little") + meta, *data]


def _parts(frame: Frame) -> tuple[Kind, bytes, Sequence[Buffer]]:
    """(kind, meta, blocks)."""
    match frame:
        case Append():
            modifications = frame.modifications
            head = APPEND_BODY.pack(
                frame.number, frame.committed_txid, frame.durable_txid, frame.sync_txid, frame.epoch, len(modifications)
            )
            return Kind.APPEND, head + _pack_modifications(modifications), _blocks(modifications)
        case Appended():
            last, durable = frame.last, frame.durable
            meta = APPENDED_BODY.pack(
                frame.number, last.txid, durable.txid, frame.room_bytes, last.epoch, durable.epoch
            )
            return Kind.APPENDED, meta, ()
        case Fetched():
            head = FETCHED_BODY.pack(frame.is_gone, len(frame.modifications))
            return Kind.FETCHED, head + _pack_modifications(frame.modifications), _blocks(frame.modifications)
        case Copy():
            blocks = len(frame.checksums) // 4
            fields = frame.region, frame.txid, frame.region_txid, blocks, len(frame.entries)
            if not frame.parts and not frame.kept:
                return Kind.COPY, COPY_BODY.pack(*fields) + frame.entries + frame.checksums, frame.data
            head = COPY_PARTS_BODY.pack(*fields, len(frame.parts), not frame.kept)
            sizes = b"".join(COPY_PART.pack(part.blocks, len(part.data)) for part in frame.parts)
            meta = b"".join((head, frame.entries, frame.checksums, frame.kept, sizes))
            return Kind.COPY_PARTS, meta, [part.data for part in frame.parts]
        case Check():
            return Kind.CHECK, CHECK_BODY.pack(frame.region), ()
        case Checked():
            return Kind.CHECKED, CHECKED_BODY.pack(frame.region, *frame.state), ()
        case Compare():
            return Kind.COMPARE, COMPARE_BODY.pack(frame.region), ()
        case Compared():
            invariant(len(frame.mbas) <= COMPARED_LIMIT, "too many blocks are compared at once")
            head = COMPARED_BODY.pack(frame.region, len(frame.mbas), 0)
            return Kind.COMPARED, head + array("Q", frame.mbas).tobytes() + frame.digests, ()
        case Copied():
            return Kind.COPIED, COPIED_BODY.pack(frame.region, frame.errno, 0), ()
        case Open():
            owner = frame.owner.encode()
            invariant(len(owner) <= NODE_BYTES, "a node's name is too long")
            return (
                Kind.OPEN,
                OPEN_BODY.pack(frame.oldest_version, frame.newest_version, 0, frame.epoch, frame.family, owner),
                (),
            )
        case Opened():
            return Kind.OPENED, _pack_opened(frame), ()
        case Cut():
            return Kind.CUT, POSITION_BODY.pack(frame.at.epoch, 0, frame.at.txid), ()
        case Skip():
            head = SKIP_BODY.pack(
                frame.to.epoch,
                len(frame.epochs),
                frame.to.txid,
                len(frame.regions),
                len(frame.tree) // LAYER_ROW.size,
            )
            return Kind.SKIP, head + _pack_epochs(frame.epochs) + _pack_runs(frame.regions) + frame.tree, ()
        case Fetch():
            return Kind.FETCH, FETCH_BODY.pack(frame.after.epoch, 0, frame.after.txid, frame.limit_bytes), ()
        case Refused():
            return Kind.REFUSED, REFUSED_BODY.pack(frame.epoch, frame.reason), ()
        case ReadBlocks():
            return Kind.READ_BLOCKS, _pack_mbas(frame.number, frame.mbas), ()
        case Blocks():
            return Kind.BLOCKS, _pack_mbas(frame.number, frame.mbas) + frame.checksums, frame.data
        case Forward():
            return Kind.FORWARD, frame.pack(), ()
        case Forwarded():
            return Kind.FORWARDED, frame.pack(), ()
        case Keep():
            return Kind.KEEP, frame.pack(), ()
        case Kept():
            return Kind.KEPT, frame.pack(), ()
        case Look():
            return Kind.LOOK, frame.pack(), ()


def blocks_frame(number: int, found: Mapping[int, bytes]) -> Blocks:
    """The answer to READ_BLOCKS, with these blocks by their MBAs."""
    data = list(found.values())
    return Blocks(number, list(found), array("I", map(crc32c, data)).tobytes(), data)


def _pack_mbas(number: int, mbas: Sequence[int]) -> bytes:
    invariant(len(mbas) <= BLOCKS_LIMIT, "too many blocks are asked for at once")
    return BLOCKS_BODY.pack(number, len(mbas), 0) + array("Q", mbas).tobytes()


def _pack_modifications(modifications: Sequence[Modification]) -> bytes:
    invariant(len(modifications) <= MODIFICATIONS_LIMIT, "a frame has too many modifications")
    pieces: list[bytes] = []
    for each in modifications:
        pieces.append(
            MODIFICATION_HEADER.pack(each.epoch, each.layer, each.txid, each.blocks, each.extents, each.kind, 0)
        )
        pieces.append(each.body)
    return b"".join(pieces)


def _blocks(modifications: Sequence[Modification]) -> list[Buffer]:
    return [buffer for each in modifications for buffer in each.data]


def _pack_opened(frame: Opened) -> bytes:
    invariant(0 < len(frame.incarnations) <= INCARNATIONS_LIMIT, "a replica that is open has incarnations")
    head = OPENED_BODY.pack(
        frame.version, len(frame.incarnations), len(frame.epochs), len(frame.resync), frame.incarnation,
        frame.incarnations[0], frame.room_bytes, frame.last.epoch, frame.durable.epoch, frame.last.txid,
        frame.durable.txid, frame.committed_txid,
    )  # fmt: skip
    incarnations = array("Q", frame.incarnations).tobytes()
    return head + _pack_epochs(frame.epochs) + _pack_runs(frame.resync) + incarnations


def _pack_epochs(epochs: Epochs) -> bytes:
    invariant(len(epochs) <= EPOCHS_LIMIT, "a history has too many epochs")
    return b"".join(POSITION_BODY.pack(epoch, 0, txid) for epoch, txid in epochs)


def _pack_runs(runs: Runs) -> bytes:
    invariant(len(runs) <= RUNS_LIMIT, "there are too many runs of regions")
    return b"".join(REGION_RUN.pack(first, count) for first, count in runs)
