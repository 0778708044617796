"""What replication asks of the log that holds a replica, and how two logs are compared.

Theory. A log is a line of modifications, each named (epoch, txid) for ever. Two logs of a family are alike up to some
position and then, perhaps, different for ever: an owner that died may have appended what nobody else has. Where that is
follows from their *histories* alone: for each epoch the last txid that the log has of it. Two logs that both have
modifications of an epoch have the same ones, up to the shorter's end, because one owner ordered them.

Beside modifications a log takes *copies*: a region as another replica had it. They lie in the local log between the
modifications: a cut takes away those behind the first modification that goes, and leaves those right behind the last
one that stays, which are of that very position.

Rules
- `done` callbacks come from the loop, never from inside the call, in the order of the calls, with 0 or an errno. After
  an errno that is not ENOSPC or ECANCELED the log has failed: everything else is answered with one too.
- Whoever calls keeps to the order; the log refuses what does not follow its `last`.
- What is persisted by a call is durable when its `done` comes; after a crash before that, it happened or it did not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from metadata.seams import Buffer, Done
from protocol.peer import BEGINNING, Copy, Epochs, Modification, Position, RegionState, Runs

Tap = Callable[[Modification], None]
Found = Mapping[int, tuple[str, Buffer]]
"""By MBA: the node that had the block, and its content."""
BlockSource = Callable[[Sequence[int], Callable[[Found], None]], None]
"""Asked for MBAs, at most BLOCKS_LIMIT; calls back once, from the loop, with those that it could get."""


class ReplicaLog(Protocol):
    """One replica's log and maps, open. All methods are for the loop's thread."""

    @property
    def incarnation(self) -> int:
        """Drawn and persisted whenever it is opened, and higher than the one before; an empty disk begins anywhere."""

    @property
    def incarnations(self) -> Sequence[int]:
        """Those since which nothing appended can have been lost, in order, the present one last; at most
        INCARNATIONS_LIMIT. An opening of an empty disk, and one after the host rebooted while the log was open, begins
        them anew. Persisted."""

    @property
    def promised_epoch(self) -> int:
        """The highest epoch that was promised; persisted."""

    @property
    def last(self) -> Position:
        """The newest modification appended."""

    @property
    def durable(self) -> Position:
        """The newest one that is synced, with every copy before it."""

    @property
    def committed_txid(self) -> int:
        """Of the newest that is known to be on every member: neither a checkpoint nor freeing passes it."""

    @property
    def room_bytes(self) -> int:
        """That may be appended before the reserve."""

    @property
    def epochs(self) -> Epochs:
        """The history up to `last`, at most EPOCHS_LIMIT of the newest."""

    # --- an owner's ---

    def begin_epoch(self, epoch: int) -> None:
        """What is ordered here from now on belongs to this epoch, which has been promised."""

    def tap(self, tap: Tap | None) -> None:
        """Have each modification that is *ordered* here, in order, in the same wake, as soon as it is appended. Its
        buffers stay as they are until the loop's next turn. None: nothing is ordered here any more, whatever waits for
        that."""

    # --- a replica's ---

    def promise(self, epoch: int, done: Done) -> None:
        """Persist that no lower epoch is obeyed any more."""

    def append(self, modifications: Sequence[Modification], done: Done) -> None:
        """Append what another node has ordered: ESTALE unless it follows `last`, ENOSPC if there is no room; `last` has
        moved when `done(0)` comes. Calls may follow each other without waiting."""

    def append_now(self, modifications: Sequence[Modification]) -> int | None:
        """Append what needs no waiting, from the first one on, and return how many those are; the buffers are free
        again. The rest is for `append`. None: what came before them waits itself."""

    def settle(self, done: Done) -> None:
        """Appends and copies that have not been done are given up, answered with ECANCELED; `done` when nothing is
        under way any more."""

    def set_committed(self, txid: int) -> None:
        """It only rises, and may pass `last`. An append may wait for it."""

    def sync(self, done: Done) -> None:
        """`done(0)` when `durable` has reached what `last` was at the call."""

    # --- logs that differ ---

    def modifications(
        self, after: Position, limit_bytes: int, done: Callable[[int, Sequence[Modification] | None], None]
    ) -> None:
        """What follows `after`, which the log has: at least one unless there is none, and not many more than
        `limit_bytes`; None if the log does not go back that far."""

    def cut(self, at: Position, done: Done) -> None:
        """Take away everything from the first modification behind `at` on, durably. EINVAL if `at` is behind `last`,
        ENOENT below the last checkpoint, and below what was committed when a region was fetched last; at BEGINNING the
        log then starts over as that of an empty disk, in one durable step. The log is opened anew: nothing else may be
        under way; taps end."""

    @property
    def tree(self) -> bytes:
        """The rows of all layers as of `last`, as in a TREE record."""

    def skip(self, to: Position, epochs: Epochs, regions: Runs, tree: bytes, done: Done) -> None:
        """In one durable step: the log goes on after `to` with this history and this tree, and these regions are to be
        fetched, with those that were already. What was in the log before cannot be cut any more."""

    # --- regions ---

    def regions_after(self, txid: int) -> Runs:
        """Regions modified later."""

    @property
    def resync(self) -> Runs:
        """Regions that are still to be fetched; persisted."""

    @property
    def resync_count(self) -> int:
        """How many they are."""

    def resync_done(self, regions: Runs, done: Done) -> None:
        """They are fetched: the copies are durable and cannot be cut away any more."""

    def digest_region(self, region: int, done: Callable[[Mapping[int, bytes]], None]) -> None:
        """What this log has of a region, out of date or not: a digest of each block (protocol/packing.py), at most
        COMPARED_LIMIT, under a number that is the same in every log."""

    def read_region(
        self, region: int, known: Mapping[int, bytes] | None, done: Callable[[int, Copy | None], None]
    ) -> None:
        """A region, exactly as of what is `last` when `done` is called: who puts it into a stream does it in that very
        call. What is `known` to the other log, which has said so on that stream, is left out; None: nothing is left
        out, and all travels as it is."""

    def apply_copy(self, copy: Copy, done: Done) -> None:
        """*Replace* the region, in the order of the calls of
        `append`: what the source lacks goes, and the region has the source's txid. ESTALE unless the copy is of `last`;
        ENOENT if a block that was left out of it is not here."""

    def check_region(self, region: int, done: Callable[[RegionState], None]) -> None:
        """What the log holds of a region, in the order of the calls of `append`, exactly as of what is `last` when
        `done` is called. Never, if the log fails."""

    # --- single blocks ---

    def repair_from(self, source: BlockSource | None) -> None:
        """Where blocks that have rotted here may be asked for; None: nowhere."""

    def read_blocks(self, mbas: Sequence[int], is_patient: bool, done: Callable[[Mapping[int, bytes]], None]) -> None:
        """Blocks by their MBAs, those that are here and have the right checksum. `is_patient`: one that has rotted is
        repaired first, if it can be."""


def common_position(one: Epochs, other: Epochs) -> Position:
    """The last position that both logs have; BEGINNING if the histories show none."""
    ends = dict(other)
    for epoch, txid in reversed(one):
        if epoch in ends:
            return Position(epoch, min(txid, ends[epoch]))
    return BEGINNING


def history_up_to(epochs: Epochs, at: Position) -> Epochs:
    """The history of a log that was cut at `at`, which it has."""
    kept = [each for each in epochs if each.epoch < at.epoch]
    return (*kept, at) if at.txid else ()


def position_of(epochs: Epochs, txid: int) -> Position:
    """The position with this txid in a log with this history, which has it."""
    return next((Position(epoch, txid) for epoch, last_txid in epochs if txid <= last_txid), BEGINNING)
