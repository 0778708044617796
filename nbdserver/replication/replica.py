"""A replica: follows whoever owns its family.

Theory. It obeys one stream at a time: that of the highest epoch, and of one epoch the newest. What comes on it is done
in its order by the log, which answers in its order; so "all frames up to this number are appended" is one number.

     OPEN ─► promise the epoch, let what was under way end ─► OPENED ─► APPEND, COPY, ... ─► APPENDED, COPIED

Rules (docs/replication.md has the reasons)
- The epoch is persisted before OPENED (rule 4); a lower one is refused; what comes from older streams is dropped.
- Only what follows the last position is appended (7).
- A grant is counted from each answer; a process that has just started counts as having granted (3).
- While this node is a candidate it grants nothing to epochs up to the one that it wants to replace (3).
- A region's bit is cleared when its copy can neither be lost nor be cut away (13).

Known weakness: appends that wait for a slow device hold up the answers to beats: the owner then removes this replica,
as it would a dead one.
"""

import errno as errnos
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from metadata.ranges import runs_of
from metadata.seams import Clock, Timer
from nbdserver.replication.block_requests import Answered, BlockRequests, answer
from nbdserver.replication.grants import REPLICA_COUNTS_S
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.replication.replica_log import ReplicaLog
from protocol.peer import (
    KINDS_SINCE,
    OLDEST_VERSION,
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
    ReadBlocks,
    Refusal,
    Refused,
    Skip,
)

SYNC_S = 1.0
FETCH_LIMIT_BYTES = 16 << 20


CopyPlace = tuple[int, int]
"""(region, txid of the last modification before the copy in the log)."""


class Replica:
    """One family's replica on this node. `higher_epoch(epoch)` is called when a stream with one is opened."""

    def __init__(self, clock: Clock, log: ReplicaLog, higher_epoch: Callable[[int], None]) -> None:
        self.log = log
        self.granted_until_s = clock.now() + REPLICA_COUNTS_S
        self._clock = clock
        self._higher_epoch = higher_epoch
        self._withheld_epoch = 0  # grants nothing to owners of it, or of lower ones
        self._epoch = log.promised_epoch  # of the stream that is obeyed
        self._persisted_epoch = log.promised_epoch
        self._stream: PeerStream | None = None
        self._owner = ""  # whose stream it is
        self._version = VERSION  # that is spoken on it
        self._requests = BlockRequests(clock)
        self._is_opening = False
        self._number = 0  # of the last frame whose modifications are appended
        self._queued = log.last  # position of the last modification given to the log
        self._applied: list[CopyPlace] = []  # copies that are not durable yet
        self._durable: list[CopyPlace] = []  # copies behind the committed txid
        self._clearing = 0  # bits being cleared
        self._is_syncing = False
        self._sync_again = False
        self._answer_due = False
        self._timer: Timer | None = clock.call_later(SYNC_S, self._sync_by_itself)

    # --- for the node ---

    @property
    def epoch(self) -> int:
        """The highest that is obeyed."""
        return self._epoch

    def open(self, stream: PeerStream, frame: Open) -> None:
        """A stream has begun with OPEN for this family."""
        if frame.epoch < self._epoch:
            stream.close(Refused(self._epoch, Refusal.EPOCH))
            return
        if frame.epoch <= self._withheld_epoch:
            stream.close(Refused(self._epoch, Refusal.CANDIDATE))
            return
        if not (frame.oldest_version <= VERSION and frame.newest_version >= OLDEST_VERSION):
            stream.close(Refused(self._epoch, Refusal.VERSION))
            return
        self._drop_stream()
        stream.received_frame, stream.lost_stream = self._received, self._lost
        stream.batch_ended = self._answer_if_due
        self._stream, self._is_opening = stream, True
        self._owner, self._version = frame.owner, min(VERSION, frame.newest_version)
        if frame.epoch > self._epoch:
            self._epoch = frame.epoch
            self._higher_epoch(frame.epoch)

        def promised(errno: int) -> None:
            if not errno:
                self._persisted_epoch = max(frame.epoch, self._persisted_epoch)
            if self._stream is not stream:
                return
            if errno:
                self._refuse(Refusal.FAILED)
            else:
                # What is under way for an older stream comes first; what waits there may wait for this one.
                self.log.settle(partial(self._opened, stream))

        if self._persisted_epoch < frame.epoch:
            self.log.promise(frame.epoch, promised)
        else:
            promised(0)

    def withhold(self, epoch: int) -> None:
        """Obey nobody of this epoch any more, nor of lower ones: this node is a candidate."""
        self._withheld_epoch = epoch
        if self._epoch <= epoch:
            self._refuse(Refusal.CANDIDATE)
            self._drop_stream()

    def give_again(self) -> None:
        """It is not a candidate any more, nor an owner."""
        self._withheld_epoch = 0

    def own(self, epoch: int) -> None:
        """This node owns the family under this epoch."""
        self._drop_stream()
        self._epoch = self._withheld_epoch = epoch

    def close(self) -> None:
        """Obey nobody, do nothing by itself any more."""
        self._drop_stream()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop_stream(self) -> None:
        stream, self._stream = self._stream, None
        self._is_opening = False
        self._forget_copies()
        self._requests.forget()
        if stream is not None:
            stream.close()

    # --- the stream ---

    def _opened(self, stream: PeerStream, errno: int) -> None:
        """The log stands still; say where, if the stream still is the one."""
        if stream is not self._stream:
            return
        if self._clearing:
            # A bit that is set again by what follows must not be cleared by what went before.
            self._clock.call_later(0.001, partial(self._opened, stream, errno))
            return
        if errno and errno not in (errnos.ESTALE, errnos.ENOENT):  # ENOENT: the log still ends where it did
            self._refuse(Refusal.FAILED)
            return
        log = self.log
        self._is_opening = False
        self._number = 0
        self._queued = log.last
        stream.send(
            Opened(
                log.incarnations,
                log.last,
                log.durable,
                log.committed_txid,
                log.room_bytes,
                log.epochs,
                log.resync,
                self._version,
            )
        )

    def _lost(self, stream: PeerStream, reason: str) -> None:
        if stream is self._stream:
            self._drop_stream()

    def _refuse(self, reason: Refusal) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close(Refused(self._epoch, reason))

    def _received(self, stream: PeerStream, frame: Frame) -> None:
        if stream is not self._stream:
            return
        if self._is_opening:
            self._refuse(Refusal.NOT_NEXT)  # an owner waits for OPENED
            return
        match frame:
            case Append():
                self._append(stream, frame)
            case Copy():
                self._copy(stream, frame)
            case Check():
                self.log.check_region(frame.region, lambda state: stream.send(Checked(frame.region, state)))
            case Compare():
                self.log.digest_region(frame.region, partial(self._compared, stream, frame.region))
            case Cut() | Skip():
                self._align(stream, frame)
            case Fetch():
                self._fetch(stream, frame)
            case ReadBlocks():
                # After everything that came before it.
                self.log.append((), lambda _: answer(self.log, stream, frame, is_patient=False))
            case Blocks():
                self._requests.answered(frame)
            case _:
                self._refuse(Refusal.NOT_NEXT)

    def _append(self, stream: PeerStream, frame: Append) -> None:
        log = self.log
        if frame.epoch != self._epoch:
            self._refuse(Refusal.EPOCH)
            return
        if frame.modifications and not self._follows(frame.modifications):
            self._refuse(Refusal.NOT_NEXT)
            return
        if frame.modifications:
            self._queued = frame.modifications[-1].position
        log.set_committed(frame.committed_txid)  # an append may wait for a checkpoint, and that for this
        appended = partial(self._appended, stream, frame.number, frame.sync_txid)
        count = log.append_now(frame.modifications)
        if count == len(frame.modifications):
            appended(0)
        else:
            log.append([each.kept() for each in frame.modifications[count or 0 :]], appended)

    def _appended(self, stream: PeerStream, number: int, sync_txid: int, errno: int) -> None:
        if stream is not self._stream:
            return
        if errno:
            self._refuse(Refusal.NO_ROOM if errno == errnos.ENOSPC else Refusal.FAILED)
            return
        log = self.log
        self._number = number
        if self._durable:
            self._clear_bits()
        if sync_txid > log.durable.txid:
            self._sync()
        self._answer_soon()

    def _follows(self, modifications: Sequence[Modification]) -> bool:
        """Whether they follow what was appended last, and each other."""
        last = self._queued
        for each in modifications:
            if each.txid != last.txid + 1 or each.epoch < last.epoch:
                return False
            last = each.position
        return True

    def _answer_soon(self) -> None:
        """One answer a wake, however many frames."""
        if not self._answer_due:
            self._answer_due = True
            if self._stream is None or not self._stream.is_receiving:
                self._clock.call_soon(self._answer_if_due)

    def _answer_if_due(self) -> None:
        if not self._answer_due:
            return
        self._answer_due = False
        stream, log = self._stream, self.log
        if stream is None or self._is_opening:
            return
        self.granted_until_s = self._clock.now() + REPLICA_COUNTS_S
        stream.send(Appended(self._number, log.last, log.durable, log.room_bytes))

    # --- logs that differ ---

    def _align(self, stream: PeerStream, frame: Cut | Skip) -> None:
        self._is_opening = True
        self._forget_copies()
        aligned = partial(self._opened, stream)
        if isinstance(frame, Cut):
            self.log.cut(frame.at, aligned)
        else:
            self.log.skip(frame.to, frame.epochs, frame.regions, frame.tree, aligned)

    def _fetch(self, stream: PeerStream, frame: Fetch) -> None:
        def read(errno: int, modifications: Sequence[Modification] | None) -> None:
            if stream is not self._stream:
                return
            if errno:
                self._refuse(Refusal.FAILED)
            else:
                stream.send(Fetched(modifications or (), is_gone=modifications is None))

        self.log.modifications(frame.after, min(frame.limit_bytes, FETCH_LIMIT_BYTES), read)

    # --- single blocks ---

    @property
    def node(self) -> str:
        """Of the owner that is obeyed."""
        return self._owner

    def read_blocks(self, mbas: Sequence[int], answered: Answered) -> None:
        """What the owner has of them; nothing if none is obeyed at this moment."""
        stream = self._stream
        if stream is None or self._is_opening or self._version < KINDS_SINCE[Kind.BLOCKS]:
            self._clock.call_soon(partial(answered, {}))
            return
        self._requests.ask(mbas, answered)
        self._requests.send(stream)

    # --- copies ---

    def _copy(self, stream: PeerStream, frame: Copy) -> None:
        place = self._queued

        def applied(errno: int) -> None:
            if stream is not self._stream:
                return
            if errno:
                stream.send(Copied(frame.region, errno))
                return
            self._applied.append((frame.region, place.txid))
            self._sync()

        self.log.apply_copy(frame, applied)

    def _compared(self, stream: PeerStream, region: int, digests: Mapping[int, bytes]) -> None:
        """Say what is here of a region."""
        stream.send(Compared(region, list(digests), b"".join(digests.values())))

    def _forget_copies(self) -> None:
        """Their bits stay: they are made again."""
        self._applied.clear()
        self._durable.clear()

    def _clear_bits(self) -> None:
        """Of the regions whose copies are durable, and not behind the committed txid."""
        committed_txid, stream = self.log.committed_txid, self._stream
        regions = sorted({region for region, txid in self._durable if txid <= committed_txid})
        if not regions or stream is None:
            return
        self._durable = [each for each in self._durable if each[1] > committed_txid]
        self._clearing += 1

        def cleared(errno: int) -> None:
            self._clearing -= 1
            if stream is self._stream:
                for region in regions:
                    stream.send(Copied(region, errno))

        self.log.resync_done(runs_of(regions), cleared)

    # --- durability ---

    def _sync_by_itself(self) -> None:
        self._timer = self._clock.call_later(SYNC_S, self._sync_by_itself)
        if self.log.durable < self.log.last:
            self._sync()

    def _sync(self) -> None:
        """One at a time; who asks meanwhile has the next one."""
        if self._is_syncing:
            self._sync_again = True
            return
        self._is_syncing = True
        applied = self._applied[:]

        def synced(errno: int) -> None:
            self._is_syncing = False
            if errno:
                self._refuse(Refusal.FAILED)
                return
            if applied and self._applied[: len(applied)] == applied:
                del self._applied[: len(applied)]
                self._durable += applied
                self._clear_bits()
            if self._sync_again:
                self._sync_again = False
                self._sync()
            self._answer_soon()

        self.log.sync(synced)
