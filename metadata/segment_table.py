"""The segment usage table (SUT): what the log knows about each segment in use.

Per segment file: its life's sequence number and salt, where it ends, how many of its blocks are live, the txid and
lsn of its last record. In memory it is a handful of lists indexed by segment number, because the hot path counts a
live block up and a dead one down for every block written. By its last txid what a replica lacks is found in the
log, and by its last lsn the cleaner tells old from young.

Rules
- A segment is *in use* from `begin` to `free`; a checkpoint writes the rows that changed and deletes those without a
  live block.
- Only the open segment's `end`, `txid` and `lsn` change; a row written after `freeze` takes its live blocks from the
  frozen copy.
- The number 0 names no segment: in a PBA it is absence.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from metadata.pages import KeyRange
from metadata.seams import Batch
from protocol.disk import SEGMENT_USAGE, pack_value, unpack_value
from protocol.invariant import invariant

_PREFIX = b"S"
_ROWS_A_STEP = 256


def _key(segment: int) -> bytes:
    return _PREFIX + segment.to_bytes(4, "big")


@dataclass
class FrozenRows:
    """The table at one instant, as far as `SegmentTable.encode` needs it."""

    live: list[int]
    appended: dict[int, bytes]
    open_segment: int  # 0: none is open
    sequence: int  # of the open segment's life: later ones began after the freeze
    lsn: int
    dead: list[int] = field(default_factory=list)


class SegmentTable:
    """Rows of segments in use."""

    def __init__(self) -> None:
        self.live: list[int] = [0]  # live blocks by segment number; read and written by the hot path
        self.end: list[int] = [0]
        self.sequence: list[int] = [0]  # 0: not in use
        self.salt: list[bytes] = [b""]
        self.txid: list[int] = [0]
        self.lsn: list[int] = [0]
        self.in_use: set[int] = set()
        self._changed: set[int] = set()
        self._written_live: list[int] = [0]

    def begin(self, segment: int, sequence: int, salt: bytes) -> None:
        """A new life of the segment file begins."""
        while len(self.live) <= segment:
            for column in (self.live, self.end, self.sequence, self.txid, self.lsn):
                column.append(0)
            self.salt.append(b"")
        invariant(segment > 0 and segment not in self.in_use, "a segment begins when it is free")
        self.live[segment] = self.end[segment] = self.txid[segment] = self.lsn[segment] = 0
        self.sequence[segment] = sequence
        self.salt[segment] = salt
        self.in_use.add(segment)
        self._changed.add(segment)

    def appended(self, segment: int, end: int, txid: int, lsn: int) -> None:
        """A record was appended that ends at byte `end`."""
        self.end[segment] = end
        self.txid[segment] = txid
        self.lsn[segment] = lsn
        self._changed.add(segment)

    def free(self, segment: int) -> None:
        """The segment holds nothing any more."""
        invariant(self.live[segment] == 0, "a freed segment has no live block")
        self.in_use.remove(segment)
        self.sequence[segment] = 0
        self._changed.discard(segment)

    @property
    def segments_with_live_blocks(self) -> int:
        """How many segments hold any live block."""
        return len(self.live) - self.live.count(0)

    def row(self, segment: int, live_blocks: int | None = None) -> bytes:
        """The packed row of a segment, with another count of live blocks if one is given."""
        return SEGMENT_USAGE.pack(
            self.sequence[segment],
            self.salt[segment],
            self.live[segment] if live_blocks is None else live_blocks,
            self.end[segment],
            self.txid[segment],
            self.lsn[segment],
        )

    def freeze(self, open_segment: int, sequence: int, lsn: int) -> "FrozenRows":
        """Fix what the next `encode` writes: one copy of a list, and the rows of the few segments appended to."""
        appended = {segment: self.row(segment) for segment in self._changed if segment in self.in_use}
        self._changed = set()
        return FrozenRows(self.live[:], appended, open_segment, sequence, lsn)

    def encode(self, batch: Batch, frozen: "FrozenRows") -> Iterator[int]:
        """Put the rows that differ from the last checkpoint's into `batch`, some hundred segments a step; those whose
        last live block was gone are deleted there and named in `frozen.dead`. Their `free` is the caller's, once the
        batch is synced."""
        live, written = frozen.live, self._written_live
        written += [0] * (len(live) - len(written))
        for first in range(0, len(live), _ROWS_A_STEP):
            stop = min(first + _ROWS_A_STEP, len(live))
            values = 0
            for segment in range(first, stop):
                if segment not in self.in_use or self.sequence[segment] > frozen.sequence:
                    continue
                if live[segment] == 0 and segment != frozen.open_segment and self.lsn[segment] <= frozen.lsn:
                    batch.delete(_key(segment))
                    frozen.dead.append(segment)
                elif segment in frozen.appended or live[segment] != written[segment]:
                    row = frozen.appended.get(segment) or self.row(segment, live[segment])
                    key = _key(segment)
                    batch.put(key, pack_value(key, row))
                else:
                    continue
                written[segment] = live[segment]
                values += 1
            yield values

    @staticmethod
    def key_range() -> KeyRange:
        """Where the rows are in LevelDB."""
        return _PREFIX, bytes((_PREFIX[0] + 1,))

    def load(self, items: Iterator[tuple[bytes, bytes]]) -> None:
        """Take the rows of the last checkpoint; raises DamagedValueError."""
        for key, value in items:
            segment = int.from_bytes(key[1:], "big")
            sequence, salt, live, end, txid, lsn = SEGMENT_USAGE.unpack(unpack_value(key, value))
            self.begin(segment, sequence, salt)
            self.live[segment] = live
            self.appended(segment, end, txid, lsn)
            self._written_live += [0] * (segment + 1 - len(self._written_live))
            self._written_live[segment] = live
        self._changed = set()
