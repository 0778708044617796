"""The fixed keys of a family's LevelDB: what it is, whether it was closed cleanly, and where its checkpoint stands.

One value each, versioned and checksummed. `family` never changes: its size is that of the first volume when it was
made, and counts for a family that has no rows of layers yet. `open` is written, synced, when
the family is opened for writing and when it is closed; `checkpoint` and the pending holes are part of every
checkpoint's batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from metadata.logical_map import ADDRESS_SHIFT, LAYER_SHIFT
from metadata.pages import KeyRange
from metadata.seams import Batch, Store
from protocol.disk import (
    CHECKPOINT_STATE,
    FAMILY_STATE,
    OPEN_STATE,
    PENDING_HOLE,
    DamagedValueError,
    pack_value,
    unpack_value,
)

_FAMILY = b"F"
_OPEN = b"O"
_CHECKPOINT = b"C"
_HOLE = b"H"
HOLE_KEYS: KeyRange = (_HOLE, b"I")


@dataclass(frozen=True)
class Family:
    """What a family is."""

    family: bytes
    size_bytes: int
    segment_bytes: int


@dataclass(frozen=True)
class OpenState:
    """How the family was last opened or closed."""

    generation: int
    epoch: int
    clean: bool
    boot_id: str


@dataclass(frozen=True)
class Checkpoint:
    """Where the log goes on after the state that the maps in LevelDB describe."""

    lsn: int
    txid: int
    epoch: int
    segment: int
    offset: int
    previous_crc: int
    sequence: int
    salt: bytes
    next_mba: int
    next_hole: int
    live_blocks: int


@dataclass
class PendingHole:
    """A discarded range that is not worked into the logical map yet; pages below `cursor` are.

    `first_lba` is an address and `cursor` the number of a page as in metadata/logical_map: the layer is part of them.
    """

    hole: int
    first_lba: int
    count: int
    cursor: int


def read_family(store: Store) -> Family:
    """Raises DamagedValueError."""
    family, size_bytes, segment_bytes, _ = FAMILY_STATE.unpack(_read(store, _FAMILY))
    return Family(family, size_bytes, segment_bytes)


def put_family(batch: Batch, family: Family) -> None:
    _put(batch, _FAMILY, FAMILY_STATE.pack(family.family, family.size_bytes, family.segment_bytes, 0))


def read_open_state(store: Store) -> OpenState:
    """Raises DamagedValueError."""
    generation, epoch, clean, boot_id = OPEN_STATE.unpack(_read(store, _OPEN))
    return OpenState(generation, epoch, bool(clean), boot_id.rstrip(b"\x00").decode("ascii", "replace"))


def put_open_state(batch: Batch, state: OpenState) -> None:
    boot_id = state.boot_id.encode("ascii")[:36]
    _put(batch, _OPEN, OPEN_STATE.pack(state.generation, state.epoch, int(state.clean), boot_id))


def read_checkpoint(store: Store) -> Checkpoint:
    """Raises DamagedValueError."""
    return Checkpoint(*CHECKPOINT_STATE.unpack(_read(store, _CHECKPOINT)))


def put_checkpoint(batch: Batch, checkpoint: Checkpoint) -> None:
    _put(
        batch,
        _CHECKPOINT,
        CHECKPOINT_STATE.pack(
            checkpoint.lsn,
            checkpoint.txid,
            checkpoint.epoch,
            checkpoint.segment,
            checkpoint.offset,
            checkpoint.previous_crc,
            checkpoint.sequence,
            checkpoint.salt,
            checkpoint.next_mba,
            checkpoint.next_hole,
            checkpoint.live_blocks,
        ),
    )


def read_pending_holes(store: Store) -> list[PendingHole]:
    """The holes of the last checkpoint, oldest first; raises DamagedValueError."""
    return [_hole(unpack_value(key, value)) for key, value in store.range(*HOLE_KEYS)]


def _hole(payload: bytes) -> PendingHole:
    hole, first_lba, count, cursor = PENDING_HOLE.unpack(payload)
    if not first_lba >> ADDRESS_SHIFT:  # from before layers: of the only one
        first_lba, cursor = first_lba | 1 << ADDRESS_SHIFT, cursor | 1 << LAYER_SHIFT
    return PendingHole(hole, first_lba, count, cursor)


def put_pending_holes(batch: Batch, holes: Sequence[PendingHole], gone: Sequence[int]) -> None:
    """Write the pending holes as they are now and delete those in `gone`."""
    for number in gone:
        batch.delete(_HOLE + number.to_bytes(8, "big"))
    for hole in holes:
        _put(
            batch,
            _HOLE + hole.hole.to_bytes(8, "big"),
            PENDING_HOLE.pack(hole.hole, hole.first_lba, hole.count, hole.cursor),
        )


def _read(store: Store, key: bytes) -> bytes:
    value = store.get(key)
    if value is None:
        raise DamagedValueError(key, "missing")
    return unpack_value(key, value)


def _put(batch: Batch, key: bytes, payload: bytes) -> None:
    batch.put(key, pack_value(key, payload))
