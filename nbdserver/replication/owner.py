"""The owner of a family: orders and acknowledges. Who is in sync is in in_sync_set.py.

Theory. What the owner's own log has appended is *ordered*; what every needed replica has appended too is *committed*.
The committed txid only rises, and everything that anybody waits for is a txid: an acknowledgement, a read that shows
what is not acknowledged yet, a flush (by the durable txid of all). One comparison releases them all, in order.

Rules (docs/replication.md has the reasons)
- Nothing is answered without authority: the beginning is committed (rule 5), and every needed replica's grant is valid
  at this moment (2).
- Once deposed it answers nothing, ever: who waits is told ESHUTDOWN, which means *unknown*.
"""

import errno as errnos
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from metadata.replica_set import ReplicaSet, ReplicaSets
from metadata.seams import Clock, Done, Timer
from nbdserver.replication.append_frames import AppendFrame, append_frames
from nbdserver.replication.flush_habit import FlushHabit
from nbdserver.replication.grants import BEAT_S, GRANT_S
from nbdserver.replication.in_sync_set import InSyncSet, Report
from nbdserver.replication.link import Link, LinkEvents
from nbdserver.replication.placing import Placed
from nbdserver.replication.replica_log import ReplicaLog
from nbdserver.replication.room import Room
from nbdserver.replication.slow_disks import SLOW, SlowDisks
from protocol.disk import EXTENT_BYTES, TREE, extents_of_array
from protocol.invariant import invariant
from protocol.peer import BEGINNING, Cut, Modification, Refusal, Refused, Skip


class OwnerEvents(Protocol):
    """Whose owner it is."""

    def deposed(self, reason: str) -> None:
        """It is over: nothing more is answered."""

    def changed(self, value: ReplicaSet) -> None:
        """The registry has a new value."""

    def link(self, node: str, events: LinkEvents) -> Link:
        """A link to another node of the placement."""


class Owner:
    """One family, as long as this node owns it."""

    def __init__(
        self,
        clock: Clock,
        registry: ReplicaSets,
        key: str,
        node: str,
        log: ReplicaLog,
        value: ReplicaSet,
        links: Mapping[str, Link],
        events: OwnerEvents,
        report: Report,
    ) -> None:
        """Begin with the value that names this node, and links under its epoch that have not followed yet."""
        self.epoch = value.epoch
        self.is_deposed = False
        self._clock = clock
        self._node = node
        self._log = log
        self._events = events
        self._report = report
        self._begun_s = clock.now()
        self._begin_txid = log.last.txid
        self._committed_txid = log.committed_txid
        self._durable_txid = 0  # on every member
        self._sync_txid = 0  # what is to be made durable
        self._needed: Sequence[Link] = ()
        self._has_link_to_all = False
        self._room = Room(clock, log)
        self._waiting: deque[tuple[int, Done]] = deque()
        self._flushes: deque[tuple[int, Done]] = deque()
        self._unacknowledged: deque[Modification] = deque()
        self._ordered_txid = log.last.txid
        self._unsent: list[Modification] = []
        self._frame_number = 0
        self._is_sending_due = False
        self._habit = FlushHabit()
        self.slow_disks = SlowDisks()
        self._is_syncing = False
        self.in_sync = InSyncSet(clock, registry, key, node, value, links, self, report)
        self.links = self.in_sync.links
        log.begin_epoch(value.epoch)
        log.tap(self._ordered)
        for link in links.values():
            link.events = self
            link.follow()
        self._timer: Timer | None = clock.call_later(BEAT_S, self._tick)
        self._commit()

    # --- authority ---

    @property
    def value(self) -> ReplicaSet:
        """The registry's, as this owner has it."""
        return self.in_sync.value

    def needed_changed(self, needed: Sequence[Link], has_link_to_all: bool) -> None:
        """SetEvents."""
        self._needed, self._has_link_to_all = needed, has_link_to_all
        self._room.needed = needed
        self._room.look()

    @property
    def has_authority(self) -> bool:
        """Whether anything may be answered at this moment. To be asked after a request has come, before its answer."""
        if self.is_deposed or self._committed_txid < self._begin_txid or not self._has_link_to_all:
            return False
        if not self._needed:
            return True
        now_s = self._clock.now()
        for link in self._needed:  # noqa: SIM110 - at each batch of a client: `all` costs more
            if link.granted_until_s <= now_s:
                return False
        return True

    @property
    def waits_for(self) -> str:
        """What keeps it from answering at this moment; "" if nothing does."""
        if self.has_authority:
            return ""
        now_s = self._clock.now()
        silent = [link.node for link in self._needed if link.granted_until_s <= now_s]
        if silent:
            return f"{', '.join(silent)} to answer"
        return "all members to have what the last owner ordered"

    def depose(self, reason: str) -> None:
        """Another node owns the family, or this one cannot go on. Idempotent."""
        if self.is_deposed:
            return
        self.is_deposed = True
        self._report("owner-deposed", {"epoch": self.epoch, "reason": reason})
        self._log.tap(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.in_sync.close()
        waiting = [done for _, done in (*self._waiting, *self._flushes)]
        self._waiting.clear()
        self._flushes.clear()
        self._unacknowledged.clear()
        self._unsent.clear()
        self._room.close()
        for done in waiting:
            self._clock.call_soon(partial(done, errnos.ESHUTDOWN))
        self._events.deposed(reason)

    # --- for clients ---

    def room_bytes(self) -> int:
        """That may be ordered at once. To be asked before ordering (rule 18)."""
        return 0 if self.is_deposed else self._room.room_bytes()

    def ask_for_room(self, size_bytes: int, done: Done) -> None:
        """`done(0)` when so much may be ordered, ENOSPC if there is no room for it; never, once it is deposed."""
        if not self.is_deposed:
            self._room.ask(size_bytes, done)

    def commit(self, commit: Callable[[], int]) -> int:
        """What `commit` orders leaves for the replicas before this returns, in one frame for all."""
        self._is_sending_due = True
        try:
            errno = commit()
        finally:
            self._is_sending_due = False
        if self.is_deposed:
            return errno
        if self._habit.expects_flush(self._ordered_txid):
            self._sync_txid = self._ordered_txid
        self.send_ordered()
        if not self._needed:
            self._clock.call_soon(self._commit_alone)
        return errno

    def when_committed(self, txid: int, done: Done) -> None:
        """`done(0)` when everything up to `txid` is acknowledged, ESHUTDOWN if that is never known. In order of the
        calls; never from inside one. 0: as soon as anything may be answered."""
        if self.is_deposed:
            self._clock.call_soon(partial(done, errnos.ESHUTDOWN))
            return
        self._waiting.append((txid, done))
        if txid <= self._committed_txid:
            self._clock.call_soon(self._release)

    def flush(self, done: Done) -> None:
        """`done(0)` when everything acknowledged so far is durable on every member."""
        if self.is_deposed:
            self._clock.call_soon(partial(done, errnos.ESHUTDOWN))
            return
        self._flushes.append((self._committed_txid, done))
        self._habit.flushed(self._ordered_txid)
        self._sync_txid = max(self._sync_txid, self._committed_txid)
        self._sync()
        for link in self._needed:
            link.tell(self._sync_txid)
        self._clock.call_soon(self._release)

    @property
    def is_settled(self) -> bool:
        """Whether everything that was ordered is acknowledged."""
        return not self._unacknowledged

    @property
    def ordered_txid(self) -> int:
        """Of the newest modification."""
        return self._ordered_txid

    def unacknowledged(self, lba: int, count: int) -> int:
        """Txid of the newest modification of these blocks, in whichever layer, that is not acknowledged, 0 if all are
        (rule 17)."""
        for modification in reversed(self._unacknowledged):
            if modification.kind == TREE or _touches(modification, lba, count):
                return modification.txid
        return 0

    @property
    def members(self) -> list[Link]:
        """The other members, who have everything that is acknowledged."""
        return [link for link in self._needed if self.value.member(link.node) is not None]

    # --- ordering ---

    def _ordered(self, modification: Modification) -> None:
        self._ordered_txid = modification.txid
        self._unacknowledged.append(modification)
        self._unsent.append(modification)
        if not self._is_sending_due:
            self._is_sending_due = True
            self._clock.call_soon(self._send_by_itself)

    def _send_by_itself(self) -> None:
        """What was ordered outside of `commit`."""
        self._is_sending_due = False
        if not self.is_deposed:
            self.send_ordered()
            self._commit_alone()

    def send_ordered(self) -> None:
        """LinkEvents. One frame a wake, the same for all replicas."""
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            for frame in self.frames(unsent):
                for link in list(self.links.values()):
                    link.send_frame(frame)

    def frames(self, modifications: Sequence[Modification]) -> Sequence[AppendFrame]:
        """LinkEvents."""
        frames = append_frames(
            self.epoch,
            self._frame_number + 1,
            self._committed_txid,
            self._durable_txid,
            self._sync_txid,
            modifications,
            self._clock.now(),
        )
        self._frame_number += len(frames)
        return frames

    def _commit_alone(self) -> None:
        """No answer will say that what was ordered is committed."""
        if not self._needed and not self.is_deposed:
            self._commit()

    def _commit(self) -> None:
        """Everything that all needed replicas have appended is committed."""
        if not self._has_link_to_all:
            return
        txid = self._ordered_txid
        for link in self._needed:
            if link.appended.txid < txid:
                txid = link.appended.txid
        if txid > self._committed_txid and all(link.is_following for link in self._needed):
            self._committed_txid = txid
            self._log.set_committed(txid)
        self._release()

    def _release(self) -> None:
        """Answer who waits for what is committed and durable now, if anything may be answered."""
        committed_txid = self._committed_txid
        unacknowledged, flushes = self._unacknowledged, self._flushes
        if not (
            (unacknowledged and unacknowledged[0].txid <= committed_txid)
            or (self._waiting and self._waiting[0][0] <= committed_txid)
            or (flushes and flushes[0][0] <= self._durable_txid)
        ):
            return
        if not self.has_authority:
            return
        while unacknowledged and unacknowledged[0].txid <= committed_txid:
            unacknowledged.popleft()
        waiting = self._waiting
        ready: list[Done] = []
        while waiting and waiting[0][0] <= committed_txid:
            ready.append(waiting.popleft()[1])
        while flushes and flushes[0][0] <= self._durable_txid:
            ready.append(flushes.popleft()[1])
        for done in ready:
            done(0)

    # --- durability ---

    def _sync(self) -> None:
        if self._is_syncing:
            return
        self._is_syncing = True

        def synced(errno: int) -> None:
            self._is_syncing = False
            if errno:
                self.depose(f"the log could not be synced (errno {errno})")
                return
            self._durable()
            if self._flushes and self._log.durable.txid < self._flushes[-1][0]:
                self._sync()

        self._log.sync(synced)

    def _durable(self) -> None:
        """What is synced on every member."""
        if not self._has_link_to_all:
            return
        txid = self._ordered_txid
        for link in self._needed:
            if not link.is_following or link.durable_txid <= self._durable_txid:
                return
            txid = min(txid, link.durable_txid)
        txid = min(txid, self._log.durable.txid)
        if txid > self._durable_txid:
            self._durable_txid = txid
            self._release()

    # --- what links say ---

    def opened(self, link: Link) -> None:
        """LinkEvents."""
        opened = link.opened
        assert opened is not None
        self.in_sync.opened(link, opened, self._committed_txid)
        link.follow()

    def appended(self, link: Link) -> None:
        """LinkEvents."""
        if link not in self._needed:
            self.in_sync.add_if_ready(link)
            return
        if link.durable_txid > self._durable_txid:
            self._durable()
        self._commit()
        self._room.look()

    def aligned(self, link: Link, frame: Cut | Skip) -> None:
        """LinkEvents."""
        if isinstance(frame, Cut):
            self._report("replica-cut", {"node": link.node, "at": frame.at})
            if frame.at == BEGINNING:
                self.in_sync.starts_over(link.node)
        else:
            regions = sum(count for _, count in frame.regions)
            self._report("replica-skipped", {"node": link.node, "to": frame.to, "regions": regions})

    def may_skip(self, link: Link) -> bool:
        """LinkEvents. A member that cannot be brought along is removed first, or nothing is ever committed again: what
        it lacks cannot be read from the log any more."""
        if self.value.member(link.node) is not None:
            self.in_sync.remove(link.node, "the log that it lacks cannot be read")
            return False
        return self._committed_txid >= self._begin_txid and not any(
            modification.kind == TREE for modification in self._unacknowledged
        )

    def copied(self, link: Link) -> None:
        """LinkEvents."""
        self.in_sync.add_if_ready(link)

    def refused(self, link: Link, refused: Refused) -> None:
        """LinkEvents."""
        if refused.reason is Refusal.EPOCH and refused.epoch > self.epoch:
            self.depose(f"{link.node} obeys epoch {refused.epoch}")
        elif refused.reason is Refusal.CANDIDATE:
            self.in_sync.wants_to_own(link.node)
        elif refused.reason in (Refusal.NO_ROOM, Refusal.FAILED) and self.value.member(link.node) is not None:
            self.in_sync.remove(link.node, link.reason)

    def heard(self, value: ReplicaSet) -> None:
        """The registry shows this value."""
        self.in_sync.heard(value)

    # --- the in-sync set ---

    def _tick(self) -> None:
        self._timer = self._clock.call_later(BEAT_S, self._tick)
        for link in list(self.links.values()):
            link.beat()
        if self._clock.now() - self._begun_s > GRANT_S:
            self.in_sync.look(self._needed)
            self._look_at_disks()
        for link in list(self.links.values()):
            self.in_sync.add_if_ready(link)
        if self._log.durable < self._log.last:
            self._sync()
        self._room.look()
        self._release()
        self.in_sync.place_if_due()

    def _look_at_disks(self) -> None:
        wanted_txid = min(self._log.durable.txid, self._sync_txid)
        slow = self.slow_disks.look(self._clock.now(), wanted_txid, self.members, self.links)
        if slow:
            self.in_sync.remove(slow, SLOW)

    def place(self, nodes: Sequence[str], done: Placed) -> None:
        """Have replicas on these nodes alone, this one among them."""
        invariant(self._node in nodes, "an owner has a replica")
        self.in_sync.place(nodes, done)

    def has_everything(self, link: Link) -> bool:
        """SetEvents."""
        if not link.is_streaming or link.regions_left or link.appended.epoch > self.epoch:
            return False
        if link.appended.txid < self._committed_txid or link.granted_until_s <= self._clock.now():
            return False
        return self._committed_txid >= self._begin_txid and not self.slow_disks.is_slow(link.node)

    def new_link(self, node: str) -> Link:
        """SetEvents."""
        return self._events.link(node, self)

    def set_changed(self) -> None:
        """SetEvents."""
        self._events.changed(self.value)
        self._durable()
        self._commit()


def _touches(modification: Modification, lba: int, count: int) -> bool:
    """Whether a WRITE has any of these blocks."""
    extents = memoryview(modification.body)[: EXTENT_BYTES * modification.extents].cast("Q")
    return any(first < lba + count and lba < first + blocks for first, blocks, _ in extents_of_array(extents))
