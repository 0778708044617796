"""An owner's link to one replica: opens it, makes its log follow ours, keeps it there.

Theory. A link is always on its way to *streaming*: the replica's log is ours up to what was sent, and what is ordered
goes out with the next frame. It comes there from whatever the replica has. Its log is cut at the last common position;
if its checkpoint is beyond that (all lost their power, and this one had kept more), it starts over as an empty one. If
our log goes back that far, what follows is read from it and sent; otherwise the replica skips to our committed txid,
and the regions that changed meanwhile are copied while the stream goes on. A replica that is too slow for the stream is
brought along from the log again.

Rules (docs/replication.md has the reasons)
- A grant counts from when the answered frame was sent (rule 2).
- Nothing is sent twice: what was ordered while the log was read, and came with it, is left out.
- Skipping is to a committed position only: it is never cut away.
- At most BACKLOG_LIMIT_BYTES of modifications are under way.

What has to be copied is the affair of copying.py.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Protocol

from metadata.ranges import numbers_of
from metadata.seams import Clock, Network
from nbdserver.replication.append_frames import FRAME_BYTES, AppendFrame
from nbdserver.replication.block_requests import Answered, BlockRequests, answer
from nbdserver.replication.copy_budget import CopyBudget
from nbdserver.replication.copying import CopyCounts, Copying
from nbdserver.replication.dialling import Dialling
from nbdserver.replication.grants import BEAT_S, OWNER_COUNTS_S
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.replication.replica_log import ReplicaLog, common_position, history_up_to, position_of
from protocol.peer import (
    BEGINNING,
    KINDS_SINCE,
    Appended,
    Blocks,
    Check,
    Checked,
    Compared,
    Copied,
    Cut,
    Fetch,
    Fetched,
    Frame,
    Kind,
    Modification,
    Open,
    Opened,
    Position,
    ReadBlocks,
    Refused,
    RegionState,
    Skip,
)

BACKLOG_LIMIT_BYTES = 64 << 20
SILENCE_S = 10.0  # after which a stream is given up that nobody has said is lost


class State(Enum):
    """Where a link is."""

    CONNECTING = "connecting"
    OPENING = "opening"
    OPEN = "open"  # a candidate looks before it decides
    ALIGNING = "aligning"
    CATCHING_UP = "catching up"
    STREAMING = "streaming"
    CLOSED = "closed"


class LinkEvents(Protocol):
    """Whose link it is."""

    epoch: int

    def frames(self, modifications: Sequence[Modification]) -> Sequence[AppendFrame]:
        """These, or a beat if there are none, to be sent now."""

    def send_ordered(self) -> None:
        """Send all that was ordered, to all who are streaming (`send_frame`)."""

    def opened(self, link: "Link") -> None:
        """OPENED has come: call `follow` when the replica shall follow our log."""

    def appended(self, link: "Link") -> None:
        """The replica has answered."""

    def refused(self, link: "Link", refused: Refused) -> None:
        """It has ended the stream with a reason, of which `link.reason` is the sentence."""

    def aligned(self, link: "Link", frame: Cut | Skip) -> None:
        """It was told to cut its log, or to skip to a later position."""

    def copied(self, link: "Link") -> None:
        """It has fetched what it lacked."""

    def may_skip(self, link: "Link") -> bool:
        """Our log does not go back to what it has: whether it may be told to skip now, with the tree of layers as it
        is. It is asked for again later."""


class Link:
    """One replica, as its owner sees it."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        log: ReplicaLog,
        events: LinkEvents,
        family: bytes,
        us: str,
        node: str,
        address_of: Callable[[str], str],
        budget: CopyBudget,
        counts: CopyCounts,
    ) -> None:
        self.node = node
        self.state = State.CONNECTING
        self.opened: Opened | None = None  # what it said last on the stream that is there
        self.appended = BEGINNING
        self.durable_txid = 0
        self.room_bytes = 0
        self.granted_until_s = 0.0
        self.heard_s = clock.now()
        self.backlog_bytes = 0
        """Of modifications that were sent and not answered."""
        self.unsent_bytes = 0
        """At most, of those that it lacks besides: what was on its way when its stream was lost, or ordered since."""
        self.reason = ""
        """Why the stream was lost last; "" once it has been opened again."""
        self.events = events
        self._clock = clock
        self._log = log
        self._family = family
        self._us = us
        self._dialling = Dialling(clock, network, lambda: address_of(node), self)
        self._sent = BEGINNING  # position of the last modification sent
        self._cut_at: Position | None = None  # as it was told to on the stream that is there
        self._sent_s: deque[tuple[int, float, int]] = deque()  # (number, when, bytes) of frames not answered
        self._last_sent_s = 0.0
        self._told_sync_txid = 0
        self._is_reading = False
        self.copying = Copying(clock, log, budget, self, counts)
        self._fetched: Callable[[Fetched | None], None] | None = None
        self._requests = BlockRequests(clock)
        self._check: tuple[int, Callable[[RegionState | None], None]] | None = None
        self._dialling.begin()

    # --- the stream ---

    def connected(self, stream: PeerStream) -> None:
        """StreamEvents."""
        self.state = State.OPENING
        self._sent_s.clear()
        self.unsent_bytes += self.backlog_bytes
        self.backlog_bytes = 0
        self._cut_at = None
        self.heard_s = self._clock.now()
        stream.send(Open(self._family, self.events.epoch, self._us))

    def lost(self, reason: str) -> None:
        """StreamEvents."""
        self.reason = reason
        self.reopen()

    def reopen(self) -> None:
        """Begin again with a new stream."""
        self._forget_stream()
        if self.state is not State.CLOSED:
            self.state = State.CONNECTING
            self._dialling.again()

    def close(self) -> None:
        """No more of it; idempotent."""
        self.state = State.CLOSED
        self._forget_stream()

    def _forget_stream(self) -> None:
        self._dialling.forget()
        self.opened = None
        self.copying.end()
        check, self._check = self._check, None
        if check is not None:
            self._clock.call_soon(partial(check[1], None))
        if self.state is State.CLOSED:
            self._requests.forget()
        else:
            self._requests.ask_again()
        fetched, self._fetched = self._fetched, None
        if fetched is not None:
            self._clock.call_soon(partial(fetched, None))

    def received(self, stream: PeerStream, frame: Frame) -> None:
        """StreamEvents."""
        self.heard_s = self._clock.now()
        match frame:
            case Appended():
                self._appended(frame)
            case Copied():
                self.copying.copied(frame)
            case Checked():
                self._checked(frame)
            case Compared():
                self.copying.compared(frame)
            case ReadBlocks():
                answer(self._log, stream, frame, is_patient=True)
            case Blocks():
                self._requests.answered(frame)
            case Opened():
                self._opened(frame)
            case Fetched():
                fetched, self._fetched = self._fetched, None
                if fetched is not None:
                    fetched(frame)
            case Refused():
                self.reason = f"it refuses: {frame.reason.name.lower().replace('_', ' ')}"
                self.reopen()
                self.events.refused(self, frame)
            case _:
                self.reopen()

    # --- opening: its log becomes the beginning of ours ---

    def _opened(self, frame: Opened) -> None:
        self._dialling.is_open()
        self.opened = frame
        self.appended = self._sent = frame.last
        self._told_sync_txid = 0
        self.durable_txid = frame.durable.txid
        self.room_bytes = frame.room_bytes
        self.state = State.OPEN
        self.reason = ""
        self.events.opened(self)

    def fetch(self, after: Position, limit_bytes: int, done: Callable[[Fetched | None], None]) -> None:
        """Read its log; None if the stream is lost. One at a time, of a link that is OPEN."""
        stream = self._dialling.stream
        if stream is None or self.state is not State.OPEN:
            self._clock.call_soon(partial(done, None))
            return
        self._fetched = done
        stream.send(Fetch(after, limit_bytes))

    def follow(self) -> None:
        """Bring it to where our log is, and keep it there."""
        opened, stream = self.opened, self._dialling.stream
        if opened is None or stream is None or self.state is not State.OPEN:
            return
        common = common_position(self._log.epochs, opened.epochs)
        if common < opened.last:
            self._cut_at = BEGINNING if common == self._cut_at else common  # it could not be cut there
            self._align(stream, Cut(self._cut_at))
            return
        if opened.version < KINDS_SINCE[Kind.BLOCKS]:
            self._requests.forget()  # asked before it was known who is there
        self.copying.begin(numbers_of(opened.resync), opened.version)
        self.state = State.CATCHING_UP
        self._catch_up()

    def _catch_up(self) -> None:
        """Send what our log has after what was sent."""
        stream = self._dialling.stream
        if stream is None or self.state is not State.CATCHING_UP or self._is_reading:
            return
        if self._sent == self._log.last:
            self.state = State.STREAMING
            self.unsent_bytes = 0
            self._requests.send(stream)
            self.copying.more()
            return
        if self.backlog_bytes >= BACKLOG_LIMIT_BYTES:
            return  # goes on with the next answer
        self._is_reading = True

        def read(errno: int, modifications: Sequence[Modification] | None) -> None:
            self._is_reading = False
            if stream is not self._dialling.stream:
                self._catch_up()
                return
            if self.state is not State.CATCHING_UP or errno:
                return
            if modifications is not None:
                self._send(modifications)
                self._catch_up()
            elif self.opened is not None and self._sent == self.opened.last:
                self._skip(stream)  # nothing was sent since it was opened
            elif self.appended == self._sent:
                self.reopen()  # our log has a hole where we were let skip something: it has to as well
            # Else it goes on with the next answer: a stream that ends takes with it what is not appended yet.

        self._log.modifications(self._sent, FRAME_BYTES, read)

    def _skip(self, stream: PeerStream) -> None:
        """Our log does not go back to what it has."""
        log = self._log
        if not self.events.may_skip(self) or log.committed_txid <= self._sent.txid:
            return  # again with the next beat
        to = position_of(log.epochs, log.committed_txid)
        regions = log.regions_after(self._sent.txid)
        self._align(stream, Skip(to, history_up_to(log.epochs, to), regions, log.tree))

    def _align(self, stream: PeerStream, frame: Cut | Skip) -> None:
        self.state = State.ALIGNING
        stream.send(frame)
        self.events.aligned(self, frame)

    # --- streaming ---

    def send_frame(self, frame: AppendFrame) -> None:
        """What was ordered just now, if it is streaming."""
        if self.state is not State.STREAMING:
            self.unsent_bytes += frame.size_bytes
            return
        if frame.append.modifications[0].txid == self._sent.txid + 1:
            self._send_frame(frame)
            if self.backlog_bytes <= BACKLOG_LIMIT_BYTES:
                return
        self.state = State.CATCHING_UP
        self._catch_up()

    def beat(self) -> None:
        """Keep the grant, and tell what is committed, if nothing else does; every BEAT_S."""
        if self.state not in (State.ALIGNING, State.STREAMING, State.CATCHING_UP):
            return
        now_s = self._clock.now()
        if now_s - self.heard_s > SILENCE_S:
            self.reason = f"it has been silent for {SILENCE_S:g} s"
            self.reopen()
            return
        self.copying.more()
        self._catch_up()
        if self.state is not State.ALIGNING and now_s - self._last_sent_s >= BEAT_S / 2:
            self._send(())

    def tell(self, sync_txid: int) -> None:
        """A beat now, unless it has been said that everything up to there is to be made durable."""
        if self.is_following and self._told_sync_txid < sync_txid:
            self._send(())

    def _send(self, modifications: Sequence[Modification]) -> None:
        for frame in self.events.frames(modifications):
            self._send_frame(frame)

    def _send_frame(self, frame: AppendFrame) -> None:
        stream = self._dialling.stream
        assert stream is not None
        append, size_bytes, self._last_sent_s, buffers = frame
        self._sent_s.append((append.number, self._last_sent_s, size_bytes))
        self.backlog_bytes += size_bytes
        self._told_sync_txid = append.sync_txid
        if append.modifications:
            self._sent = append.modifications[-1].position
        stream.send_packed(buffers)

    def _appended(self, frame: Appended) -> None:
        sent_s = self._sent_s
        while sent_s and sent_s[0][0] <= frame.number:
            _, at_s, size_bytes = sent_s.popleft()
            self.backlog_bytes -= size_bytes
            self.granted_until_s = at_s + OWNER_COUNTS_S
        self.appended = frame.last
        self.durable_txid = frame.durable.txid
        self.room_bytes = frame.room_bytes
        self.events.appended(self)
        self._catch_up()

    @property
    def is_following(self) -> bool:
        """What it has appended is the beginning of our log."""
        return self.state in (State.CATCHING_UP, State.STREAMING)

    @property
    def is_streaming(self) -> bool:
        """It has been sent everything."""
        return self.state is State.STREAMING

    @property
    def is_congested(self) -> bool:
        """So much is under way that no more should be ordered."""
        return self.backlog_bytes > BACKLOG_LIMIT_BYTES // 2 and self.is_following

    # --- single blocks ---

    def read_blocks(self, mbas: Sequence[int], answered: Answered) -> None:
        """What the replica has of them, as of everything that is ordered here by now; asked as soon as it has been sent
        all of that."""
        if self.state is State.CLOSED or (self.opened is not None and self.opened.version < KINDS_SINCE[Kind.BLOCKS]):
            self._clock.call_soon(partial(answered, {}))
            return
        self._requests.ask(mbas, answered)
        self.events.send_ordered()
        if self._dialling.stream is not None and self.state is State.STREAMING:
            self._requests.send(self._dialling.stream)

    # --- whether it holds the same ---

    def check_region(self, region: int, txid: int, checked: Callable[[RegionState | None], None]) -> None:
        """See comparison.Member; one at a time."""
        self.events.send_ordered()
        opened = self.opened
        may_ask = opened is not None and opened.version >= KINDS_SINCE[Kind.CHECK] and not self.regions_left
        if not may_ask or self.state is not State.STREAMING or self._sent.txid != txid:
            self._clock.call_soon(partial(checked, None))
            return
        self._check = region, checked
        self.send(Check(region))

    def _checked(self, frame: Checked) -> None:
        check = self._check
        if check is not None and check[0] == frame.region:
            self._check = None
            check[1](frame.state)

    def copy_again(self, region: int) -> None:
        """See comparison.Member."""
        self.copying.add(region)

    # --- copies ---

    @property
    def regions_left(self) -> int:
        """That it has still to fetch."""
        return self.copying.regions_left

    @property
    def sent_txid(self) -> int:
        """CopyStream."""
        return self._sent.txid

    def send_ordered(self) -> None:
        """CopyStream."""
        self.events.send_ordered()

    def send(self, frame: Frame) -> None:
        """CopyStream."""
        if self._dialling.stream is not None:
            self._dialling.stream.send(frame)

    def all_copied(self) -> None:
        """CopyStream."""
        self.events.copied(self)
