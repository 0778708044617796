"""Which epoch ordered which modifications of a log.

Theory. (epoch, txid) names one modification for ever, and along a log both only rise. So a log is told by the first
txid of each epoch; two logs are compared by that (nbdserver/replication/replica_log.py).

Rules
- An epoch without a modification is not in the history: the next one takes its place.
- At most EPOCHS_LIMIT are kept, the newest ones; of what is older it is said that nothing is known.
- Entries behind the end of the log (an epoch that has begun and ordered nothing yet) do not count.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise

from metadata.seams import Batch, Store
from protocol.disk import DamagedValueError, pack_value, unpack_value
from protocol.invariant import invariant
from protocol.peer import EPOCHS_LIMIT, Epochs, Position

_KEY = b"E"


class EpochHistory:
    """(epoch, first txid) of each epoch of one log, oldest first."""

    def __init__(self, entries: Iterable[tuple[int, int]] = ()) -> None:
        self._entries: list[tuple[int, int]] = []
        for epoch, first_txid in entries:
            self.begin(epoch, first_txid)

    def begin(self, epoch: int, txid: int) -> None:
        """`txid` is, or will be, the first modification that `epoch` orders."""
        entries = self._entries
        invariant(not entries or epoch > entries[-1][0], "epochs rise along a log")
        while entries and entries[-1][1] >= txid:
            entries.pop()
        entries.append((epoch, txid))
        del entries[: max(0, len(entries) - EPOCHS_LIMIT)]

    def note(self, epoch: int, txid: int) -> None:
        """A modification was appended or replayed."""
        if not self._entries or self._entries[-1][0] != epoch:
            self.begin(epoch, txid)

    def up_to(self, txid: int) -> list[tuple[int, int]]:
        """The entries of a log that ends with `txid`."""
        return self._entries[: self._count(txid)]

    def ends(self, txid: int) -> Epochs:
        """The same as a peer is told it: the last txid of each epoch."""
        entries = [*self.up_to(txid), (0, txid + 1)]
        return tuple(Position(epoch, stop - 1) for (epoch, _), (_, stop) in pairwise(entries))

    def take_over(self, ends: Epochs) -> None:
        """The history of another log becomes this one's."""
        self._entries = []
        first = 1
        for epoch, last in ends:
            self._entries.append((epoch, first))
            first = last + 1

    def epoch_of(self, txid: int) -> int:
        """The epoch that ordered it; 0 before the first modification, and where nothing is known."""
        at = self._count(txid)
        return self._entries[at - 1][0] if at else 0

    def position(self, txid: int) -> Position:
        """The name of a modification."""
        entries = self._entries
        if entries and entries[-1][1] <= txid:
            return Position(entries[-1][0], txid)
        return Position(self.epoch_of(txid), txid)

    def _count(self, txid: int) -> int:
        return bisect_right(self._entries, txid, key=lambda entry: entry[1])


def pack_epochs(entries: Iterable[tuple[int, int]]) -> bytes:
    """Pairs of u64."""
    return array("Q", [number for entry in entries for number in entry]).tobytes()


def unpack_epochs(payload: bytes) -> list[tuple[int, int]]:
    """ValueError if it is none."""
    numbers = array("Q", payload)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def read_epochs(store: Store, epoch: int, txid: int) -> EpochHistory:
    """The history as of the last checkpoint, which stands at `txid`; raises DamagedValueError.

    A family from before there was one has all its modifications from the checkpoint's epoch.
    """
    value = store.get(_KEY)
    if value is None:
        return EpochHistory([(epoch, 1)] if txid else [])
    try:
        return EpochHistory(unpack_epochs(unpack_value(_KEY, value)))
    except ValueError as error:
        raise DamagedValueError(_KEY, f"no history of epochs ({error})") from error


def put_epochs(batch: Batch, entries: Iterable[tuple[int, int]]) -> None:
    """Write the history of a checkpoint."""
    batch.put(_KEY, pack_value(_KEY, pack_epochs(entries)))
