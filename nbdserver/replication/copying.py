"""The regions that one replica lacks, copied to it by its owner.

     to be copied ─► its turn ─► COMPARE ─► COMPARED ─► read, less what the replica has ─► COPY ─► COPIED

Theory. A region changed somewhere since the replica was away; most of its blocks did not. So the replica is asked what
it has, and only the rest travels. Between its answer and the copy the stream may change any of it; it changes both
sides alike, so what was equal stays equal.

Rules (docs/replication.md has the reasons)
- A copy is sent at the very place in the stream that it is of (14), so only while streaming.
- At most COPIES_AT_ONCE regions of a replica are under way, and WINDOW_BYTES of them; turns are given by the budget of
  the whole process.
- A copy that could not be applied because a block that it leaves out is not there is made again, whole.
- A replica of version 1 is not asked, and gets all blocks as they are.
"""

import errno as errnos
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from metadata.region_table import REGION_BYTES
from metadata.seams import Clock
from nbdserver.replication.copy_budget import CopyBudget, Turn
from nbdserver.replication.replica_log import ReplicaLog
from protocol.disk import BLOCK_BYTES
from protocol.peer import DIGEST_BYTES, KINDS_SINCE, Compare, Compared, Copied, Copy, Frame, Kind

COPIES_AT_ONCE = 64
WINDOW_BYTES = 4 * REGION_BYTES
"""A region counts whole until it is known what of it travels."""
RATE_S = 10.0
"""The time over which the rate is told."""


@dataclass
class CopyCounts:
    """Of all regions of a family that were copied from here."""

    sent_bytes: int = 0
    """Of blocks, as they travelled."""
    saved_bytes: int = 0
    """Of the blocks in those regions that did not have to travel."""


class CopyStream(Protocol):
    """What copying needs of its link."""

    @property
    def is_streaming(self) -> bool: ...

    @property
    def sent_txid(self) -> int:
        """Of the last modification sent."""

    def send_ordered(self) -> None:
        """Send what was ordered."""

    def send(self, frame: Frame) -> None: ...

    def all_copied(self) -> None:
        """Nothing is left to copy."""


class Copying:
    """Of one link."""

    def __init__(self, clock: Clock, log: ReplicaLog, budget: CopyBudget, link: CopyStream, counts: CopyCounts) -> None:
        """`counts`: what all links of the family count together."""
        self.regions_total = 0
        """That the replica had to fetch when its stream was opened."""
        self.sent_bytes = 0
        self.saved_bytes = 0
        """Of this link, as in CopyCounts."""
        self._clock = clock
        self._log = log
        self._budget = budget
        self._link = link
        self._counts = counts
        self._left: list[int] = []
        self._whole: set[int] = set()  # regions of which nothing may be left out
        self._under_way: dict[int, Turn] = {}
        self._read_bytes: dict[int, int] = {}  # by region under way
        self._turn: Turn | None = None  # that is waited for
        self._compares = False
        self._life = 0  # of the stream: what was begun in another one is over
        self._done_s: deque[float] = deque()  # when regions were copied lately
        self._looked_at = 0  # regions that were read on this stream
        self._looked_at_bytes = 0
        self.began_s = clock.now()
        """When its stream was opened."""

    # --- how it stands ---

    @property
    def regions_left(self) -> int:
        """That the replica has still to fetch."""
        return len(self._left) + len(self._under_way)

    @property
    def region_bytes(self) -> int:
        """What a region that is left holds, by the mean of those that were read on this stream; all of it at first."""
        return max(BLOCK_BYTES, self._looked_at_bytes // self._looked_at) if self._looked_at else REGION_BYTES

    @property
    def bytes_per_s(self) -> int:
        """Of what regions hold, whatever of it had to travel, in the last RATE_S."""
        now_s = self._clock.now()
        self._forget_old(now_s)
        over_s = min(RATE_S, max(now_s - self.began_s, 1.0))
        return int(len(self._done_s) * self.region_bytes / over_s)

    @property
    def reason(self) -> str:
        """Why nothing is copied at this moment, though there is something; "" otherwise."""
        if not self.regions_left or self._under_way:
            return ""
        if not self._link.is_streaming:
            return "it has to get what was written meanwhile first"
        return self._turn.reason if self._turn is not None else ""

    def _forget_old(self, now_s: float) -> None:
        while self._done_s and self._done_s[0] < now_s - RATE_S:
            self._done_s.popleft()

    # --- the stream ---

    def begin(self, regions: Iterable[int], version: int) -> None:
        """These are to be copied, on a stream of this version."""
        self.end()
        self._left = sorted(regions, reverse=True)
        self.regions_total = len(self._left)
        self._compares = version >= KINDS_SINCE[Kind.COMPARE]
        self.began_s = self._clock.now()
        self._done_s.clear()
        self._looked_at = self._looked_at_bytes = 0

    def end(self) -> None:
        """The stream is over."""
        self._life += 1
        self._left = []
        self._whole.clear()
        under_way, self._under_way = self._under_way, {}
        for turn in under_way.values():
            turn.give_back()
        self._read_bytes.clear()
        if self._turn is not None:
            self._turn.give_back()
            self._turn = None

    def add(self, region: int) -> None:
        """One more, of a stream that is there."""
        if region not in self._left and region not in self._under_way:
            self._left.append(region)
            self.more()

    def more(self) -> None:
        """Ask for a turn, if one is of use."""
        if self._turn is None and self._left and self._link.is_streaming and self._has_room:
            self._turn = self._budget.ask(partial(self._begin_one, self._life))

    @property
    def _has_room(self) -> bool:
        under_way = self._under_way
        size_bytes = sum(turn.size_bytes for turn in under_way.values())
        return len(under_way) < COPIES_AT_ONCE and size_bytes + REGION_BYTES <= WINDOW_BYTES

    def _begin_one(self, life: int) -> None:
        turn = self._turn
        if life != self._life or turn is None:
            return
        self._turn = None
        if not self._link.is_streaming or not self._left:
            turn.give_back()
            return
        region = self._left.pop()
        self._under_way[region] = turn
        if not self._compares:
            self._read(region, None)
        elif region in self._whole:
            self._read(region, {})
        else:
            self._link.send(Compare(region))
        self.more()

    def compared(self, frame: Compared) -> None:
        """The replica has said what it has."""
        if frame.region in self._under_way and frame.region not in self._read_bytes:
            digests = frame.digests
            known = {mba: digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] for at, mba in enumerate(frame.mbas)}
            self._read(frame.region, known)

    def _read(self, region: int, known: Mapping[int, bytes] | None) -> None:
        self._read_bytes[region] = 0
        self._log.read_region(region, known, partial(self._region_read, self._life, region))

    def _region_read(self, life: int, region: int, errno: int, copy: Copy | None) -> None:
        if life != self._life or region not in self._under_way:
            return
        link = self._link
        link.send_ordered()
        if errno or copy is None or not link.is_streaming or link.sent_txid != copy.txid:
            self._over(region)
            self._left.append(region)
            return  # again when it streams, or with the next beat
        size_bytes = len(copy.checksums) // 4 * BLOCK_BYTES
        sent_bytes = sum(len(part.data) for part in copy.parts) if copy.parts else sum(map(len, copy.data))
        self._read_bytes[region] = size_bytes
        self._looked_at += 1
        self._looked_at_bytes += size_bytes
        self.sent_bytes += sent_bytes
        self.saved_bytes += size_bytes - sent_bytes
        self._counts.sent_bytes += sent_bytes
        self._counts.saved_bytes += size_bytes - sent_bytes
        link.send(copy)
        self._under_way[region].shrink(sent_bytes)
        self.more()

    def copied(self, frame: Copied) -> None:
        """The replica has applied one, and it is durable there; or it could not."""
        if frame.region in self._under_way:
            self._over(frame.region)
            if frame.errno:
                if frame.errno == errnos.ENOENT:
                    self._whole.add(frame.region)
                self._left.append(frame.region)
            else:
                now_s = self._clock.now()
                self._forget_old(now_s)
                self._done_s.append(now_s)
        self.more()
        if not self.regions_left:
            self._link.all_copied()

    def _over(self, region: int) -> None:
        self._under_way.pop(region).give_back(self._read_bytes.pop(region, 0))
