"""All regions of a family compared, on the owner with every member: a scrub of what the replicas hold.

     own state of a region ─► CHECK at that very place in each stream ─► CHECKED of all ─► verdict ─► copies, or an
     alarm

Theory. A scrub on each node finds blocks that are not what their checksums say. This finds replicas that disagree about
which blocks there are: each says, at the same position of the log, the txid of a region and a digest of what it shows.
If the owner is right, whoever is not is sent the region again, as one that returns is. If another one is right the
owner cannot repair itself while it is the owner; if nobody can be said to be right, nothing is touched.

Rules
- A region is compared only while every member's stream has everything, and nothing is copied to it: otherwise it is
  tried again, TRIES times, and then it counts as not compared.
- One region at a time, `REGION_COST_BYTES` of the scrub's rate each.
- What is found is reported with what to do about it, and kept: MOST_KEPT regions at most.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol

from metadata.ranges import numbers_of
from metadata.region_table import REGION_BYTES
from metadata.seams import Clock, Timer
from nbdserver.logdisk.pacing import Pace
from nbdserver.replication.in_sync_set import Report
from nbdserver.replication.replica_log import ReplicaLog
from nbdserver.replication.verdict import right_nodes
from protocol.peer import RegionState

REGION_COST_BYTES = 64 << 10
MOST_KEPT = 64
WAIT_S = 5.0
"""For the answers of the members."""
TRIES = 20
AGAIN_S = 0.25


class Member(Protocol):
    """Another member, as its owner sees it."""

    node: str

    def check_region(self, region: int, txid: int, checked: Callable[[RegionState | None], None]) -> None:
        """What it holds of a region at the place in the stream behind `txid`; None if that place is not now, it cannot
        say, or the stream is lost."""

    def copy_again(self, region: int) -> None:
        """Send it the region."""


@dataclass(frozen=True)
class Difference:
    """A region of which not all hold the same."""

    offset_bytes: int
    wrong: str
    """Nodes, or "" if nobody can say."""
    is_repaired: bool
    to_do: str


class Comparison:
    """One pass over all regions; `done` at its end, unless it was stopped."""

    def __init__(
        self,
        clock: Clock,
        log: ReplicaLog,
        us: str,
        members: Callable[[], Sequence[Member]],
        bytes_per_s: int,
        report: Report,
        done: Callable[[list[Difference], int], None],
    ) -> None:
        """`done(differences, regions that could not be compared)`."""
        self._clock = clock
        self._log = log
        self._us = us
        self._members = members
        self._pace = Pace(bytes_per_s, clock.now())
        self._report = report
        self._done = done
        self._differences: list[Difference] = []
        self._regions: Iterator[int] = iter(numbers_of(log.regions_after(0)))
        self._states: dict[str, RegionState] = {}
        self._waiting: set[str] = set()
        self._timer: Timer | None = None
        self._tries = 0
        self._not_compared = 0
        self._is_stopped = False
        self._next()

    def stop(self) -> None:
        """Compare nothing more, and tell nobody."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        if self._is_stopped:
            return
        region = next(self._regions, None)
        if region is None or not self._members():
            self._is_stopped = True
            self._done(self._differences, self._not_compared)
            return
        self._tries = 0
        self._check(region)

    def _check(self, region: int) -> None:
        self._tries += 1
        self._log.check_region(region, partial(self._checked_here, region))

    def _checked_here(self, region: int, state: RegionState) -> None:
        """Ask the members at this very moment."""
        if self._is_stopped:
            return
        self._states = {self._us: state}
        members = self._members()
        self._waiting = {member.node for member in members}
        self._timer = self._clock.call_later(WAIT_S, partial(self._all_checked, region))
        txid = self._log.last.txid
        for member in members:
            member.check_region(region, txid, partial(self._checked, region, self._states, member.node))

    def _checked(self, region: int, states: dict[str, RegionState], node: str, state: RegionState | None) -> None:
        if self._is_stopped or states is not self._states or node not in self._waiting:
            return  # it was waited for in vain, and answers late
        self._waiting.discard(node)
        if state is not None:
            states[node] = state
        if not self._waiting:
            self._all_checked(region)

    def _all_checked(self, region: int) -> None:
        if self._is_stopped:
            return
        if self._timer is not None:
            self._timer.cancel()
        states, self._states, self._waiting = self._states, {}, set()
        if {member.node for member in self._members()} - states.keys():
            if self._tries < TRIES:
                self._timer = self._clock.call_later(AGAIN_S, partial(self._check, region))
                return
            self._not_compared += 1
        elif len(set(states.values())) > 1:
            self._judge(region, states)
        wait_s = self._pace.wait_s(REGION_COST_BYTES, 0, self._clock.now())
        self._timer = self._clock.call_later(wait_s, self._next)

    def _judge(self, region: int, states: Mapping[str, RegionState]) -> None:
        right = right_nodes(states)
        wrong = sorted(states.keys() - right) if right else []
        is_repaired = self._us in right
        if is_repaired:
            to_do = ""
            for member in self._members():
                if member.node in wrong:
                    member.copy_again(region)
        elif right:
            to_do = f"take the volume over at {sorted(right)[0]} (attach there), then scrub it again"
        else:
            to_do = "nobody can say who is right: compare the range with a backup, write it again, then scrub it again"
        found = Difference(region * REGION_BYTES, ", ".join(wrong), is_repaired, to_do)
        txids = {node: state.region_txid for node, state in sorted(states.items())}
        self._report("replicas-differ", {**asdict(found), "length_bytes": REGION_BYTES, "txids": txids})
        if len(self._differences) < MOST_KEPT:
            self._differences.append(found)
