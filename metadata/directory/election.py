"""Becoming the master: through the registry, then through a majority of the voters.

Theory: the registry says who may try (no lease) and who has won (the swap). It is watched, so a node learns of every
change, of its own success too when the answer was lost. The winner of an epoch is no master yet: a majority must
promise the epoch, the newest history among them must be here, and what is kept in the registry must be known.

Rules
- Only a voter tries; the first node of a cluster makes epoch 1, unless its own copy knows of epochs before.
- The lease is a reason to try, not authority: a master whose lease is lost goes on, and takes it again if the state is
  still its own.
- No majority within COLLECT_S: the lease is given back, and others may try.
- Everything that waits for an answer belongs to one attempt (`_Term`); answers of an earlier one do nothing.
"""

import logging
from collections.abc import Callable
from enum import Enum
from random import Random
from typing import Any

from metadata.directory.joiner import OpenStream
from metadata.directory.outbox import Outbox
from metadata.directory.registry_keys import (
    KEPT,
    LEASE_KEY,
    LEASE_TTL_S,
    STATE_KEY,
    WATCHED,
    MasterState,
    Member,
    StateError,
)
from metadata.directory.replica import Replica
from metadata.registry_calls import Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.seams import Clock, Lease, Registry, Timer
from protocol.directory import NOWHERE, NodeKind, Position
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

SPREAD_S = 0.3  # candidates try at random within it: mostly one at a time
RETRY_S = 1.0
COLLECT_RETRY_S = 0.1
COLLECT_GRACE_S = 0.05  # after the majority: the others' answers may show something newer, and save them a snapshot
COLLECT_S = 10.0
FETCH_S = 5.0  # without progress
REST_S = 3.0  # after giving up: the others try first

_log = logging.getLogger(__name__)


class Stage(Enum):
    """How far a node is on its way to be the master."""

    FOLLOWING = "following"
    TRYING = "asking the registry"
    COLLECTING = "collecting promises"
    FETCHING = "fetching the newest copy"
    READING = "reading what the registry keeps"
    LEADING = "leading"


class Move(Enum):
    """What makes it go on."""

    TRY = "no lease"
    LOST = "another one won, or no answer"
    WON = "the registry's state names this node"
    BEHIND = "a majority promised, one of them has more"
    NEWEST = "a majority promised, this copy is the newest"
    FETCHED = "fetched"
    FETCH_FAILED = "its holder is gone"
    READ = "read"
    GIVEN_UP = "higher epoch, or no majority"


TRANSITIONS: dict[Stage, dict[Move, Stage]] = {
    Stage.FOLLOWING: {Move.TRY: Stage.TRYING, Move.WON: Stage.COLLECTING},
    Stage.TRYING: {Move.LOST: Stage.FOLLOWING, Move.WON: Stage.COLLECTING},
    Stage.COLLECTING: {Move.BEHIND: Stage.FETCHING, Move.NEWEST: Stage.READING, Move.GIVEN_UP: Stage.FOLLOWING},
    Stage.FETCHING: {
        Move.FETCHED: Stage.READING,
        Move.FETCH_FAILED: Stage.COLLECTING,
        Move.GIVEN_UP: Stage.FOLLOWING,
    },
    Stage.READING: {Move.READ: Stage.LEADING, Move.GIVEN_UP: Stage.FOLLOWING},
    Stage.LEADING: {Move.GIVEN_UP: Stage.FOLLOWING},
}


class Election:
    """One node's part in choosing the master."""

    def __init__(
        self,
        clock: Clock,
        registry: Registry,
        random: Random,
        me: Member,
        replica: Replica,
        outbox: Outbox,
        address_of: Callable[[int], str],
        open_stream: OpenStream,
        begin: Callable[[MasterState, Reading], None],
        end: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        """`begin(state, kept)`: this node is the master; `end(why)`: not any more; `changed()`: the state was heard.
        `address_of(node)`: where it takes streams, "" if that is not known."""
        self.stage = Stage.FOLLOWING
        self.state: MasterState | None = None
        """The registry's, as last heard."""
        self.registry_error = ""
        """Why nothing can be elected, for people."""
        self._clock = clock
        self._registry = registry
        self._random = random
        self._me = me
        self._replica = replica
        self._outbox = outbox
        self._address_of = address_of
        self._open_stream = open_stream
        self._begin = begin
        self._end = end
        self._changed = changed
        self._state_value: bytes | None = None
        self._lease_holder: bytes | None = None
        self._has_heard = False
        self._lease: Lease | None = None
        self._is_leasing = False
        self._epoch = 0
        self._promises: dict[int, Position] = {}
        self._deadline_s = 0.0
        self._majority_at_s = 0.0
        self._give_up: Callable[[], None] | None = None
        self._rest_until_s = 0.0
        self._timer: Timer | None = None
        self._attempt = 0
        self._watch = registry.watch(WATCHED, self._heard)

    # --- what the registry says ---

    def _heard(self, event: Event) -> None:
        if event.is_reset:
            self._state_value = self._lease_holder = None
        for key, value in event.changes:
            if key == STATE_KEY:
                self._state_value = value
            elif key == LEASE_KEY:
                self._lease_holder = value
        self._has_heard = True
        self._read_state()
        self._consider()

    def _read_state(self) -> None:
        value = self._state_value
        try:
            state = MasterState.decode(value) if value is not None else None
        except StateError as error:
            self.registry_error = str(error)
            _log.error("%s", error)
            self.state = None
            return
        if state is not None and self.state is not None and state.number < self.state.number:
            return  # this node swapped it already and the watch is behind
        self.state = state
        if state is None:
            return
        is_mine = (state.master, state.incarnation) == (self._me.node, self._replica.store.incarnation)
        if self._epoch and (state.epoch > self._epoch or (state.epoch == self._epoch and not is_mine)):
            self.give_up(f"{state.name} is the master of epoch {state.epoch}", 0.0)
        if is_mine and state.epoch > self._epoch and state.epoch >= self._replica.store.promised:
            self._won(state)
        self._changed()

    def took(self, state: MasterState) -> None:
        """This master has swapped the state itself."""
        self.state, self._state_value = state, state.encode()
        self._changed()

    # --- trying ---

    def _may_try(self) -> bool:
        if not self._has_heard or self._me.kind is not NodeKind.FIRST or self._replica.store.has_failed:
            return False
        if self._lease_holder is not None or self._clock.now() < self._rest_until_s:
            return False
        if self._state_value is None:
            if self._replica.store.promised or self._replica.position != NOWHERE:
                self.registry_error = (
                    f"the registry has no {STATE_KEY}, but this node has seen epoch {self._replica.store.promised}: "
                    "it has lost its content; restore it, or remove this node's data to begin the cluster anew"
                )
                return False
            return True
        return self.state is not None and self._me.node in self.state.voters

    def _consider(self) -> None:
        if self.stage is Stage.LEADING:
            self._lease_again()
        elif self.stage is Stage.FOLLOWING and self._may_try():
            self._arm(SPREAD_S * self._random.random(), self._try)

    def _arm(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()

        def fire() -> None:
            self._timer = None
            callback()

        self._timer = self._clock.call_later(delay_s, fire)

    def _move(self, move: Move) -> None:
        after = TRANSITIONS[self.stage].get(move)
        invariant(after is not None, f"a node that is {self.stage.value} cannot go on by: {move.value}")
        assert after is not None  # for the type checker
        self.stage = after

    def _try(self) -> None:
        if self.stage is not Stage.FOLLOWING or not self._may_try():
            return
        self._move(Move.TRY)
        self._attempt += 1
        attempt = self._attempt
        self._registry.grant_later(LEASE_TTL_S, self._lease_lost, lambda lease: self._granted(attempt, lease))

    def _granted(self, attempt: int, lease: Lease | Unavailable) -> None:
        is_current = attempt == self._attempt and self.stage is Stage.TRYING
        if isinstance(lease, Unavailable):
            if is_current:
                self._failed(lease.reason)
            return
        if not is_current or not self._may_try():
            lease.release()
            if is_current:
                self._failed("")
            return
        self._lease = lease
        store = self._replica.store
        old = self.state
        values = {
            "master": self._me.node,
            "incarnation": store.incarnation,
            "name": self._me.name,
            "datagrams": self._me.datagrams,
            "streams": self._me.streams,
        }
        if old is None:
            new = MasterState(1, 1, voters={self._me.node: self._me.name}, **values)  # type: ignore[arg-type]
        else:
            new = old.changed(epoch=max(old.epoch, store.promised) + 1, **values)
        changes = [
            Change(LEASE_KEY, None, self._me.name.encode(), lease.id),
            Change(STATE_KEY, self._state_value, new.encode()),
        ]
        self._registry.swap_later(changes, lambda swap: self._swapped(attempt, new, swap))

    def _swapped(self, attempt: int, new: MasterState, swap: Swap) -> None:
        if swap.outcome is Outcome.SWAPPED and (self.state is None or self.state.number < new.number):
            self.took(new)
        if attempt != self._attempt or self.stage is not Stage.TRYING:
            return
        if swap.outcome is Outcome.SWAPPED and self.state == new:
            self._won(new)
        else:
            # UNKNOWN: if it was made, or is made later, the watch says so.
            self._failed(swap.reason)

    def _failed(self, reason: str) -> None:
        self._release()
        self._move(Move.LOST)
        self.registry_error = reason
        self._arm(RETRY_S * (0.5 + self._random.random()), self._consider)

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _lease_lost(self) -> None:
        self._lease = None
        if self.stage is Stage.LEADING:
            self._lease_again()

    def _lease_again(self) -> None:
        """The lease is gone while this node leads: take it again, if the state is still its own."""
        if self._lease is not None or self._is_leasing or self._lease_holder is not None:
            return
        self._is_leasing = True
        epoch = self._epoch

        def over(reason: str) -> None:
            self._is_leasing = False
            self.registry_error = reason
            self._clock.call_later(RETRY_S, self._consider)

        def granted(lease: Lease | Unavailable) -> None:
            if isinstance(lease, Unavailable):
                over(lease.reason)
                return
            if self.stage is not Stage.LEADING or self._epoch != epoch:
                lease.release()
                over("")
                return
            self._lease = lease
            changes = [
                Change(LEASE_KEY, None, self._me.name.encode(), lease.id),
                Change(STATE_KEY, self._state_value, self._state_value),
            ]
            self._registry.swap_later(changes, swapped)

        def swapped(swap: Swap) -> None:
            if swap.outcome is not Outcome.SWAPPED:
                self._release()
            over(swap.reason)

        self._registry.grant_later(LEASE_TTL_S, self._lease_lost, granted)

    # --- collecting ---

    def _won(self, state: MasterState) -> None:
        if self.stage not in (Stage.FOLLOWING, Stage.TRYING):
            self.give_up("a newer epoch of its own", 0.0)
        self._move(Move.WON)
        self._epoch = state.epoch
        self._promises = {}
        self._majority_at_s = 0.0
        self._deadline_s = self._clock.now() + COLLECT_S
        _log.info("%s won epoch %d and collects promises of %d voters", self._me.name, state.epoch, len(state.voters))
        self._collect()

    def _collect(self) -> None:
        if self.stage is not Stage.COLLECTING or self.state is None:
            return
        now_s = self._clock.now()
        if now_s > self._deadline_s:
            self.give_up("no majority of the voters answers", REST_S)
            return
        if self._majority_at_s and now_s >= self._majority_at_s + COLLECT_GRACE_S:
            self._take_newest()
            return
        for node in self.state.voters:
            if node not in self._promises:
                self._outbox.send(node, Collect(self._epoch))
        self._arm(COLLECT_RETRY_S, self._collect)

    def promised(self, node: int, promise: Promise) -> None:
        """A voter has promised."""
        state = self.state
        if self.stage is not Stage.COLLECTING or state is None or promise.epoch != self._epoch:
            return
        if node not in state.voters:
            return
        self._promises[node] = promise.position
        if len(self._promises) == len(state.voters):
            self._take_newest()
        elif 2 * len(self._promises) > len(state.voters) and not self._majority_at_s:
            self._majority_at_s = self._clock.now()
            self._arm(COLLECT_GRACE_S, self._collect)

    def _take_newest(self) -> None:
        newest = max(self._promises.values())
        if newest <= self._replica.position:
            self._move(Move.NEWEST)
            self._read_kept()
            return
        holder = min(node for node, position in self._promises.items() if position == newest)
        self._move(Move.BEHIND)
        self._fetch(holder)

    def _fetch(self, holder: int) -> None:
        address = self._address_of(holder)
        if not address:
            self._clock.call_soon(lambda: self._fetch_failed(holder, self._epoch, "its address is not known"))
            return
        epoch = self._epoch
        self._replica.stage_drop()
        self._arm(FETCH_S, lambda: self._fetch_failed(holder, epoch, "it sends nothing"))
        self._give_up = self._open_stream(
            address,
            SnapshotRequest(0, epoch, "", NOWHERE, ()),
            lambda body: self._fetched(holder, epoch, body),
            lambda reason: self._fetch_failed(holder, epoch, reason),
        )

    def _fetched(self, holder: int, epoch: int, body: Any) -> None:
        if self.stage is not Stage.FETCHING or epoch != self._epoch or getattr(body, "attempt", None) != 0:
            return
        replica = self._replica
        match body:
            case SnapshotBegin():
                replica.stage(body.position, epoch, unpack_starts(body.history))
            case SnapshotEntries() if replica.staging is not None:
                replica.stage_entries(body.entries)
            case SnapshotEnd() if replica.staging is not None and body.position == replica.staging.begin:
                self._close_stream()
                replica.stage_end(body.position, self._clock.now())
                self._move(Move.FETCHED)
                self._read_kept()
                return
            case _:
                self._fetch_failed(holder, epoch, "it refuses")
                return
        self._arm(FETCH_S, lambda: self._fetch_failed(holder, epoch, "it sends nothing"))

    def _fetch_failed(self, holder: int, epoch: int, reason: str) -> None:
        if self.stage is not Stage.FETCHING or epoch != self._epoch:
            return
        _log.warning("%s cannot fetch the newest copy: %s", self._me.name, reason)
        self._close_stream()
        self._replica.stage_drop()
        # Any other majority will do: what is confirmed is in each.
        self._promises.pop(holder, None)
        self._majority_at_s = 0.0
        self._move(Move.FETCH_FAILED)
        self._arm(COLLECT_RETRY_S, self._collect)

    def _close_stream(self) -> None:
        if self._give_up is not None:
            self._give_up()
            self._give_up = None

    def _read_kept(self) -> None:
        epoch = self._epoch
        if self._clock.now() > self._deadline_s:
            self.give_up("the registry does not answer", REST_S)
            return

        def read(reading: Reading | Unavailable) -> None:
            if self.stage is not Stage.READING or epoch != self._epoch or self.state is None:
                return
            if isinstance(reading, Unavailable):
                self.registry_error = reading.reason
                self._arm(RETRY_S, self._read_kept)
                return
            self._move(Move.READ)
            _log.info("%s is the master of epoch %d", self._me.name, epoch)
            self._begin(self.state, reading)
            self._consider()

        self._registry.range_later(KEPT, read)

    # --- the end ---

    def give_up(self, why: str, rest_s: float) -> None:
        """Not the master, or no candidate, any more."""
        if self.stage in (Stage.FOLLOWING, Stage.TRYING):
            return
        was_leading = self.stage is Stage.LEADING
        _log.info("%s gives epoch %d up: %s", self._me.name, self._epoch, why)
        self._close_stream()
        if self.stage is Stage.FETCHING:
            self._replica.stage_drop()
        self._move(Move.GIVEN_UP)
        self._rest_until_s = self._clock.now() + rest_s
        self._release()
        if was_leading:
            self._end(why)
        self._arm(rest_s + SPREAD_S * self._random.random(), self._consider)

    @property
    def epoch(self) -> int:
        """The epoch that this node has won, 0 if it is not on its way to be the master."""
        return self._epoch if self.stage not in (Stage.FOLLOWING, Stage.TRYING) else 0

    def close(self) -> None:
        """The node ends."""
        self._watch.cancel()
        self._close_stream()
        if self._timer is not None:
            self._timer.cancel()
        self._release()
