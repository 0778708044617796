"""From the registry's word to the first message: what the winner of an epoch does before it is the master.

Theory: a majority of the voters must promise the epoch; then nothing of an earlier one can be confirmed any more. The
newest copy among those that promised has everything that ever was, so the winner fetches it if its own is older. What
is kept in the registry is read last, because nobody else can change it now.

Rules
- Whose copy cannot be fetched has promised nothing: any other majority will do, what is confirmed is in each.
- A little is waited after the majority: the others may show something newer, and are saved a snapshot.
- No majority within COLLECT_S, or no registry: given up.
"""

import logging
from collections.abc import Callable, Collection
from enum import Enum
from typing import Any

from metadata.directory.joiner import OpenStream
from metadata.directory.outbox import Outbox
from metadata.directory.registry_keys import KEPT
from metadata.directory.replica import Replica
from metadata.registry_calls import Reading, Unavailable
from metadata.seams import Clock, Registry, Timer
from protocol.directory import NOWHERE, Position
from protocol.directory_control import (
    Collect,
    Promise,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotEntries,
    SnapshotRequest,
    unpack_starts,
)
from protocol.invariant import invariant

RETRY_S = 0.1
GRACE_S = 0.05
COLLECT_S = 10.0
FETCH_S = 5.0  # without progress
READ_RETRY_S = 1.0

_log = logging.getLogger(__name__)


class Phase(Enum):
    """How far it is."""

    PROMISES = "collecting promises"
    NEWEST = "fetching the newest copy"
    KEPT = "reading what the registry keeps"
    OVER = "over"


class Turn(Enum):
    """What makes it go on."""

    BEHIND = "a majority promised, one of them has more"
    NEWEST_HERE = "a majority promised, this copy is the newest"
    FETCHED = "fetched"
    FETCH_FAILED = "its holder is gone"
    READ = "read"
    GIVEN_UP = "given up"


TRANSITIONS: dict[Phase, dict[Turn, Phase]] = {
    Phase.PROMISES: {Turn.BEHIND: Phase.NEWEST, Turn.NEWEST_HERE: Phase.KEPT, Turn.GIVEN_UP: Phase.OVER},
    Phase.NEWEST: {Turn.FETCHED: Phase.KEPT, Turn.FETCH_FAILED: Phase.PROMISES, Turn.GIVEN_UP: Phase.OVER},
    Phase.KEPT: {Turn.READ: Phase.OVER, Turn.GIVEN_UP: Phase.OVER},
    Phase.OVER: {Turn.GIVEN_UP: Phase.OVER},
}


class Collecting:
    """One epoch that this node has won."""

    def __init__(
        self,
        clock: Clock,
        registry: Registry,
        epoch: int,
        voters: Collection[int],
        replica: Replica,
        outbox: Outbox,
        address_of: Callable[[int], str],
        open_stream: OpenStream,
        ready: Callable[[Reading], None],
        failed: Callable[[str], None],
    ) -> None:
        """`ready(kept)` or `failed(why)` is called once, unless it is given up before, and not from in here."""
        self.phase = Phase.PROMISES
        self._clock = clock
        self._registry = registry
        self._epoch = epoch
        self._voters = frozenset(voters)
        self._replica = replica
        self._outbox = outbox
        self._address_of = address_of
        self._open_stream = open_stream
        self._ready = ready
        self._failed = failed
        self._promises: dict[int, Position] = {}
        self._deadline_s = clock.now() + COLLECT_S
        self._majority_at_s = 0.0
        self._give_up_stream: Callable[[], None] | None = None
        self._timer: Timer | None = None
        self._ask()

    def _move(self, turn: Turn) -> None:
        after = TRANSITIONS[self.phase].get(turn)
        invariant(after is not None, f"a candidate that is {self.phase.value} cannot go on by: {turn.value}")
        assert after is not None  # for the type checker
        self.phase = after

    def _arm(self, delay_s: float, callback: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self._clock.call_later(delay_s, callback)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- promises ---

    def _ask(self) -> None:
        now_s = self._clock.now()
        if now_s > self._deadline_s:
            self._end("no majority of the voters answers")
        elif self._majority_at_s and now_s >= self._majority_at_s + GRACE_S:
            self._take_newest()
        else:
            for node in sorted(self._voters - self._promises.keys()):
                self._outbox.send(node, Collect(self._epoch))
            self._arm(RETRY_S, self._ask)

    def promised(self, node: int, promise: Promise) -> None:
        """A voter has promised."""
        if self.phase is not Phase.PROMISES or promise.epoch != self._epoch or node not in self._voters:
            return
        self._promises[node] = promise.position
        if len(self._promises) == len(self._voters):
            self._take_newest()
        elif 2 * len(self._promises) > len(self._voters) and not self._majority_at_s:
            self._majority_at_s = self._clock.now()
            self._arm(GRACE_S, self._ask)

    def _take_newest(self) -> None:
        newest = max(self._promises.values())
        if newest <= self._replica.position:
            self._move(Turn.NEWEST_HERE)
            self._read_kept()
        else:
            self._move(Turn.BEHIND)
            self._fetch(min(node for node, position in self._promises.items() if position == newest))

    # --- the newest copy ---

    def _fetch(self, holder: int) -> None:
        self._replica.stage_drop()
        address = self._address_of(holder)
        if not address:
            self._arm(0.0, lambda: self._fetch_failed(holder, "its address is not known"))
            return
        self._arm(FETCH_S, lambda: self._fetch_failed(holder, "it sends nothing"))
        self._give_up_stream = self._open_stream(
            address,
            SnapshotRequest(0, self._epoch, "", NOWHERE, ()),
            lambda body: self._heard(holder, body),
            lambda reason: self._fetch_failed(holder, reason),
        )

    def _heard(self, holder: int, body: Any) -> None:
        replica = self._replica
        match body:
            case SnapshotBegin():
                replica.stage(body.position, self._epoch, unpack_starts(body.history))
            case SnapshotEntries() if replica.staging is not None:
                replica.stage_entries(body.entries)
            case SnapshotEnd() if replica.staging is not None and body.position == replica.staging.begin:
                self._close_stream()
                replica.stage_end(body.position, self._clock.now())
                self._move(Turn.FETCHED)
                self._read_kept()
                return
            case _:
                self._fetch_failed(holder, "it refuses")
                return
        self._arm(FETCH_S, lambda: self._fetch_failed(holder, "it sends nothing"))

    def _fetch_failed(self, holder: int, reason: str) -> None:
        _log.warning("cannot fetch the newest copy for epoch %d from node %016x: %s", self._epoch, holder, reason)
        self._close_stream()
        self._replica.stage_drop()
        self._promises.pop(holder, None)
        self._majority_at_s = 0.0
        self._move(Turn.FETCH_FAILED)
        self._arm(RETRY_S, self._ask)

    def _close_stream(self) -> None:
        if self._give_up_stream is not None:
            self._give_up_stream()
            self._give_up_stream = None

    # --- what is kept ---

    def _read_kept(self) -> None:
        self._disarm()
        if self._clock.now() > self._deadline_s:
            self._end("the registry does not answer")
        else:
            self._registry.range_later(KEPT, self._read)

    def _read(self, reading: Reading | Unavailable) -> None:
        if self.phase is not Phase.KEPT:
            return
        if isinstance(reading, Unavailable):
            self._arm(READ_RETRY_S, self._read_kept)
            return
        self._move(Turn.READ)
        self._ready(reading)

    # --- the end ---

    def _end(self, why: str) -> None:
        self.give_up()
        self._failed(why)

    def give_up(self) -> None:
        """Not wanted any more."""
        if self.phase is Phase.NEWEST:
            self._replica.stage_drop()
        self._move(Turn.GIVEN_UP)
        self._disarm()
        self._close_stream()
