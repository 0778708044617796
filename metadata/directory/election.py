"""Becoming the master through the registry: who may try, who has won, and the lease that says so.

Theory: the registry says who may try (no lease) and who has won (the swap). It is watched, so a node learns of every
change, of its own success too when the answer was lost. The winner of an epoch is no master yet (`Collecting`).

Rules
- Only a voter tries; the first node of a cluster makes epoch 1, unless its own copy knows of epochs before.
- The lease is a reason to try, not authority: a master whose lease is lost goes on, and takes it again if the state is
  still its own.
- Who gives up gives the lease back and rests, so that others try first.
- Answers that belong to an earlier attempt do nothing.
"""

import logging
from collections.abc import Callable
from enum import Enum
from random import Random

from metadata.directory.collecting import Collecting
from metadata.directory.joiner import OpenStream
from metadata.directory.outbox import Outbox
from metadata.directory.registry_keys import LEASE_KEY, LEASE_TTL_S, STATE_KEY, WATCHED, MasterState, Member, StateError
from metadata.directory.replica import Replica
from metadata.registry_calls import Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.seams import Clock, Lease, Registry, Timer
from protocol.directory import NOWHERE, NodeKind
from protocol.directory_control import Promise
from protocol.invariant import invariant

SPREAD_S = 0.3  # candidates try at random within it: mostly one at a time
RETRY_S = 1.0
REST_S = 3.0  # after giving up

_log = logging.getLogger(__name__)


class Stage(Enum):
    """How far a node is on its way to be the master."""

    FOLLOWING = "following"
    TRYING = "asking the registry"
    COLLECTING = "collecting"
    LEADING = "leading"


class Move(Enum):
    """What makes it go on."""

    TRY = "no lease"
    LOST = "another one won, or no answer"
    WON = "the registry's state names this node"
    READY = "a majority has promised, the newest is here"
    GIVEN_UP = "higher epoch, or no majority"


TRANSITIONS: dict[Stage, dict[Move, Stage]] = {
    Stage.FOLLOWING: {Move.TRY: Stage.TRYING, Move.WON: Stage.COLLECTING},
    Stage.TRYING: {Move.LOST: Stage.FOLLOWING, Move.WON: Stage.COLLECTING},
    Stage.COLLECTING: {Move.READY: Stage.LEADING, Move.GIVEN_UP: Stage.FOLLOWING},
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
        self._collecting: Collecting | None = None
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
        epoch = self._epoch = state.epoch
        _log.info("%s won epoch %d and collects promises of %d voters", self._me.name, epoch, len(state.voters))
        self._collecting = Collecting(
            self._clock,
            self._registry,
            epoch,
            state.voters,
            self._replica,
            self._outbox,
            self._address_of,
            self._open_stream,
            self._is_ready,
            lambda why: self.give_up(why, REST_S),
        )

    def promised(self, node: int, promise: Promise) -> None:
        """A voter has promised."""
        if self._collecting is not None:
            self._collecting.promised(node, promise)

    def _is_ready(self, kept: Reading) -> None:
        if self.state is None or self.state.epoch != self._epoch:
            self.give_up("the registry's state is another one", 0.0)
            return
        self._collecting = None
        self._move(Move.READY)
        _log.info("%s is the master of epoch %d", self._me.name, self._epoch)
        self._begin(self.state, kept)
        self._consider()

    # --- the end ---

    def give_up(self, why: str, rest_s: float) -> None:
        """Not the master, or no candidate, any more."""
        if self.stage in (Stage.FOLLOWING, Stage.TRYING):
            return
        was_leading = self.stage is Stage.LEADING
        _log.info("%s gives epoch %d up: %s", self._me.name, self._epoch, why)
        self._drop_collecting()
        self._move(Move.GIVEN_UP)
        self._rest_until_s = self._clock.now() + rest_s
        self._release()
        if was_leading:
            self._end(why)
        self._arm(rest_s + SPREAD_S * self._random.random(), self._consider)

    def _drop_collecting(self) -> None:
        collecting, self._collecting = self._collecting, None
        if collecting is not None:
            collecting.give_up()

    @property
    def epoch(self) -> int:
        """The epoch that this node has won, 0 if it is not on its way to be the master."""
        return self._epoch if self.stage not in (Stage.FOLLOWING, Stage.TRYING) else 0

    def close(self) -> None:
        """The node ends."""
        self._watch.cancel()
        self._drop_collecting()
        if self._timer is not None:
            self._timer.cancel()
        self._release()
