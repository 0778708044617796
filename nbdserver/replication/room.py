"""Room for what is to be ordered: in the log of every replica that has to have it, and on the way there.

Theory. Room is asked for before anything is ordered (rule 18). What counts is what a replica has room for when it has
everything that is ordered, also what it could not be sent because its stream is lost. Where there is none, one of two
things is the matter. The links are *congested*: more is under way than the others can take at once, or one has yet to
be sent what it missed. Then whoever writes waits, and as the requests of a connection that wait are bounded, so is what
is under way. Or a log has no room: cleaning may gain some in a moment, so that is waited for, but not for long.

Rules
- Who waits is served in order, at most BURST_BYTES before the next answer of a replica.
- What finds no room is told ENOSPC after NO_ROOM_S, and from then on at once until there is room for as much again. A
  little room that stays is no sign of that.
- Nobody is told anything once the owner is deposed.
"""

import errno as errnos
from collections import deque
from collections.abc import Sequence

from metadata.seams import Clock, Done
from nbdserver.replication.link import Link
from nbdserver.replication.replica_log import ReplicaLog

BURST_BYTES = 16 << 20
RESERVE_BYTES = 4 << 20
"""Ordered between two looks at the room: headers, and what other clients write."""
NO_ROOM_S = 5.0


class Room:
    """Of one owner."""

    def __init__(self, clock: Clock, log: ReplicaLog) -> None:
        self.needed: Sequence[Link] = ()
        """To the replicas that have to have what is ordered."""
        self._clock = clock
        self._log = log
        self._waiting: deque[tuple[int, Done]] = deque()
        self._is_to_look = False
        self._lacking_since_s: float | None = None
        self._lacking_bytes = 0  # the least that has found no room since

    @property
    def is_congested(self) -> bool:
        """Whether more is under way than should be."""
        return any(link.is_congested for link in self.needed)

    def room_bytes(self) -> int:
        """That may still be ordered; 0 while the links are congested."""
        return 0 if self.is_congested else self._log_bytes()

    def _log_bytes(self) -> int:
        room_bytes = self._log.room_bytes
        for link in self.needed:
            room_bytes = min(room_bytes, link.room_bytes - link.backlog_bytes - link.unsent_bytes)
        return max(0, room_bytes - RESERVE_BYTES)

    def ask(self, size_bytes: int, done: Done) -> None:
        """`done(0)` when so much may be ordered, ENOSPC if there is no room for it. Never from inside this call."""
        self._waiting.append((size_bytes, done))
        if not self._is_to_look:
            self._is_to_look = True
            self._clock.call_soon(self._look_soon)

    def _look_soon(self) -> None:
        self._is_to_look = False
        self.look()

    def look(self) -> None:
        """Something may have changed: a replica has answered, the set has changed, time has gone by."""
        if not self._waiting and self._lacking_since_s is None:
            return
        granted_bytes = 0
        if self._lacking_since_s is not None and self._log_bytes() >= self._lacking_bytes:
            self._lacking_since_s = None
        while self._waiting and granted_bytes < BURST_BYTES and not self.is_congested:
            size_bytes, done = self._waiting[0]
            has_room = granted_bytes + size_bytes <= self._log_bytes()
            if not has_room and (granted_bytes or self._is_behind or not self._has_lacked_long(size_bytes)):
                return
            self._waiting.popleft()
            granted_bytes += size_bytes if has_room else 0
            done(0 if has_room else errnos.ENOSPC)

    @property
    def _is_behind(self) -> bool:
        """Whether some replica has yet to say how much room is left when it has everything."""
        return any(link.unsent_bytes for link in self.needed)

    def _has_lacked_long(self, size_bytes: int) -> bool:
        now_s = self._clock.now()
        if self._lacking_since_s is None:
            self._lacking_since_s, self._lacking_bytes = now_s, size_bytes
        self._lacking_bytes = min(self._lacking_bytes, size_bytes)
        return now_s - self._lacking_since_s >= NO_ROOM_S

    def close(self) -> None:
        """Nobody is told anything any more."""
        self._waiting.clear()
