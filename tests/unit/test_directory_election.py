"""Becoming the master: who may try, who has won, and what must be here before the first message."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from metadata.directory import collecting as phases
from metadata.directory import election as stages
from metadata.directory.collecting import COLLECT_S, FETCH_S, GRACE_S, RETRY_S, Collecting, Phase
from metadata.directory.election import REST_S, SPREAD_S, Election, Stage
from metadata.directory.registry_keys import LEASE_KEY, STATE_KEY, MasterState, Member
from metadata.directory.replica import Replica
from metadata.registry_calls import Change, Event, Outcome, Reading, Swap, Unavailable
from protocol.directory import NOWHERE, NodeKind, Position
from protocol.directory_control import (
    Collect,
    Entry,
    Promise,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotEntries,
    SnapshotRefused,
    SnapshotRequest,
    pack_starts,
)
from tests.unit.directory_rig import Outbox, SetClock, filled_replica, make_replica, put

ME, BOB, EVE = 1, 2, 3


@pytest.mark.parametrize(
    ("table", "states", "moves"),
    [(stages.TRANSITIONS, Stage, stages.Move), (phases.TRANSITIONS, Phase, phases.Turn)],
    ids=["election", "collecting"],
)
def test_every_state_and_move_is_in_the_table(table: Any, states: Any, moves: Any) -> None:
    assert set(table) == set(states)
    assert {move for of_state in table.values() for move in of_state} == set(moves)


# --- collecting -------------------------------------------------------------------------------------------------------


class Candidate:
    """A Collecting for epoch 2 whose own copy is at (1, 2)."""

    def __init__(self, *voters: int, addresses: dict[int, str] | None = None) -> None:
        self.clock = SetClock()
        self.outbox = Outbox()
        self.replica = filled_replica(1, put("a"))
        self.readings: list[Callable[[Reading | Unavailable], None]] = []
        self.streams: list[tuple[str, Any, Callable[[Any], None], Callable[[str], None]]] = []
        self.said: list[str] = []
        known = {BOB: "10.0.0.2:2", EVE: "10.0.0.3:2"} if addresses is None else addresses
        self.collecting = Collecting(
            self.clock,
            self,  # type: ignore[arg-type]
            2,
            voters,
            self.replica,
            self.outbox,
            lambda node: known.get(node, ""),
            self._open,
            lambda kept: self.said.append("ready"),
            lambda why: self.said.append(why),
        )

    def range_later(self, prefix: str, done: Callable[[Reading | Unavailable], None]) -> None:
        self.readings.append(done)

    def _open(
        self, address: str, first: Any, heard: Callable[[Any], None], failed: Callable[[str], None]
    ) -> Callable[[], None]:
        self.streams.append((address, first, heard, failed))
        return lambda: None

    def promise(self, node: int, epoch: int = 1, sequence: int = 2, of_epoch: int = 2) -> None:
        self.collecting.promised(node, Promise(of_epoch, Position(epoch, sequence)))

    def asked(self) -> list[int]:
        return [node for node, _ in self.outbox.take(Collect)]


def test_who_has_not_promised_is_asked_again() -> None:
    candidate = Candidate(ME, BOB, EVE)
    assert candidate.asked() == [ME, BOB, EVE]
    candidate.promise(BOB)
    candidate.clock.advance(RETRY_S)
    assert candidate.asked() == [ME, EVE]


def test_a_majority_is_enough_after_a_little_grace() -> None:
    candidate = Candidate(ME, BOB, EVE)
    candidate.promise(ME)
    candidate.clock.advance(1.0)
    assert candidate.collecting.phase is Phase.PROMISES
    candidate.promise(BOB)
    assert candidate.collecting.phase is Phase.PROMISES
    candidate.clock.advance(GRACE_S)
    assert candidate.collecting.phase is Phase.KEPT


def test_half_is_no_majority() -> None:
    candidate = Candidate(ME, BOB, EVE, 4)
    candidate.promise(ME)
    candidate.promise(BOB)
    candidate.clock.advance(COLLECT_S - 1.0)
    assert candidate.collecting.phase is Phase.PROMISES
    candidate.clock.advance(2.0)
    assert candidate.said == ["no majority of the voters answers"]
    candidate.outbox.take()
    candidate.clock.advance(60.0)
    assert candidate.asked() == []


@pytest.mark.parametrize(("node", "of_epoch"), [(9, 2), (EVE, 1), (EVE, 3)])
def test_strangers_and_promises_of_other_epochs_do_not_count(node: int, of_epoch: int) -> None:
    candidate = Candidate(ME, BOB, EVE)
    candidate.promise(ME)
    candidate.promise(node, of_epoch=of_epoch)
    candidate.clock.advance(1.0)
    assert candidate.collecting.phase is Phase.PROMISES


def test_the_newest_copy_is_by_epoch_before_sequence() -> None:
    candidate = Candidate(ME, BOB, EVE)
    for node, epoch, sequence in ((ME, 1, 2), (EVE, 1, 99), (BOB, 2, 5)):
        candidate.promise(node, epoch, sequence)
    address, request, _, _ = candidate.streams[0]
    assert address == "10.0.0.2:2"
    assert request == SnapshotRequest(0, 2, "", NOWHERE, ())


def test_a_newer_copy_is_fetched_before_the_master_begins() -> None:
    candidate = Candidate(ME, BOB)
    candidate.promise(ME)
    candidate.promise(BOB, 1, 7)
    assert candidate.collecting.phase is Phase.NEWEST
    hear = candidate.streams[0][2]
    hear(SnapshotBegin(0, 2, Position(1, 7), pack_starts(((1, 1),))))
    hear(SnapshotEntries(0, (Entry(Position(1, 6), put("b")),)))
    hear(SnapshotEnd(0, 2, Position(1, 7)))
    assert candidate.replica.map.range("") == [("b", b"v")]
    assert candidate.replica.position == Position(1, 7)
    candidate.readings[0](Reading(1, ()))
    assert candidate.said == ["ready"]


@pytest.mark.parametrize("how", ["refused", "lost", "silent", "unknown address"])
def test_a_copy_that_cannot_be_fetched_takes_its_promise_with_it(how: str) -> None:
    candidate = Candidate(ME, BOB, EVE, addresses={} if how == "unknown address" else None)
    for node, sequence in ((ME, 2), (BOB, 7), (EVE, 2)):
        candidate.promise(node, 1, sequence)
    if how == "refused":
        candidate.streams[0][2](SnapshotRefused(0, 1))  # type: ignore[arg-type]
    elif how == "lost":
        candidate.streams[0][3]("the connection broke")
    elif how == "silent":
        candidate.clock.advance(FETCH_S)
    else:
        candidate.clock.advance(0.0)
    assert candidate.collecting.phase is Phase.PROMISES
    candidate.outbox.take()
    candidate.clock.advance(RETRY_S)
    assert candidate.asked() == [BOB]
    candidate.promise(BOB, 1, 2)
    assert candidate.collecting.phase is Phase.KEPT


def test_what_the_registry_keeps_is_asked_for_until_it_answers() -> None:
    candidate = Candidate(ME)
    candidate.promise(ME)
    candidate.readings[0](Unavailable("no answer"))
    candidate.clock.advance(2.0)
    candidate.readings[1](Reading(1, ()))
    assert candidate.said == ["ready"]


def test_after_it_was_given_up_nothing_is_said_any_more() -> None:
    candidate = Candidate(ME)
    candidate.promise(ME)
    candidate.collecting.give_up()
    candidate.readings[0](Reading(1, ()))
    candidate.clock.advance(60.0)
    assert candidate.said == []


# --- the registry's part ----------------------------------------------------------------------------------------------


class FakeLease:
    """A lease that notes that it was given back."""

    id = 77
    valid_until_s = float("inf")
    is_released = False

    def release(self) -> None:
        self.is_released = True


class FakeRegistry:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.changed: Callable[[Event], None] = lambda event: None
        self.grants: list[tuple[Callable[[], None], Callable[[Any], None]]] = []
        self.swaps: list[tuple[Sequence[Change], Callable[[Swap], None]]] = []
        self.revision = 0

    def watch(self, prefix: str, changed: Callable[[Event], None], after: int | None = None) -> "FakeRegistry":
        assert prefix == "directory/"
        self.changed = changed
        return self

    def cancel(self) -> None:
        self.changed = lambda event: None

    def grant_later(self, ttl_s: float, lost: Callable[[], None], done: Callable[[Any], None]) -> None:
        self.grants.append((lost, done))

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        self.swaps.append((changes, done))

    def range_later(self, prefix: str, done: Callable[[Any], None]) -> None:
        done(Reading(1, ()))

    def tell(self, is_reset: bool = False, **values: bytes | None) -> None:
        self.revision += 1
        keys = {"state": STATE_KEY, "lease": LEASE_KEY}
        self.changed(Event(self.revision, is_reset, tuple((keys[name], value) for name, value in values.items())))


def state_of(master: int = BOB, epoch: int = 4, number: int = 9, incarnation: int = 1) -> MasterState:
    voters = {ME: "me", BOB: "bob", EVE: "eve"}
    return MasterState(number, epoch, master, incarnation, "name", "10.0.0.9:1", "10.0.0.9:2", voters)


class Elector:
    """An Election of node ME, and what it says."""

    def __init__(self, replica: Replica | None = None, kind: NodeKind = NodeKind.FIRST) -> None:
        self.clock = SetClock()
        self.registry = FakeRegistry()
        self.outbox = Outbox()
        self.replica = replica or filled_replica(1, put("a"))
        self.replica.store.node = ME
        self.said: list[str] = []
        self.election = Election(
            self.clock,
            self.registry,  # type: ignore[arg-type]
            random.Random(1),
            Member(ME, kind, "me", "10.0.0.1:1", "10.0.0.1:2"),
            self.replica,
            self.outbox,
            lambda node: "",
            lambda *_: lambda: None,
            lambda state, kept: self.said.append(f"begin {state.epoch}"),
            lambda why: self.said.append("end"),
            lambda: None,
        )

    def try_now(self) -> FakeLease | None:
        """Let it try; the lease it was given, None if it did not ask for one."""
        self.clock.advance(SPREAD_S)
        if not self.registry.grants:
            return None
        lease = FakeLease()
        self.registry.grants.pop()[1](lease)
        return lease

    def swap(self, outcome: Outcome) -> MasterState:
        """Answer its swap; the state that it wanted."""
        changes, done = self.registry.swaps.pop()
        wanted = next(change.new for change in changes if change.key == STATE_KEY)
        assert wanted is not None
        done(Swap(outcome))
        return MasterState.decode(wanted)

    def lead(self) -> FakeLease:
        self.registry.tell(is_reset=True, state=state_of().encode())
        lease = self.try_now()
        assert lease is not None
        won = self.swap(Outcome.SWAPPED)
        for node in won.voters:
            self.election.promised(node, Promise(won.epoch, Position(1, 2)))
        assert self.election.stage is Stage.LEADING
        return lease


def test_a_voter_that_finds_no_lease_raises_the_epoch_and_takes_both_keys_in_one_swap() -> None:
    elector = Elector()
    elector.registry.tell(is_reset=True, state=state_of().encode())
    assert elector.try_now() is not None
    changes = {change.key: change for change in elector.registry.swaps[0][0]}
    assert changes[LEASE_KEY] == Change(LEASE_KEY, None, b"me", FakeLease.id)
    assert changes[STATE_KEY].expected == state_of().encode()
    won = elector.swap(Outcome.SWAPPED)
    assert (won.epoch, won.number, won.master, won.voters) == (5, 10, ME, state_of().voters)
    assert elector.election.stage is Stage.COLLECTING


def test_an_epoch_that_was_promised_is_passed() -> None:
    replica = filled_replica(1, put("a"))
    replica.store.promise(20)
    elector = Elector(replica)
    elector.registry.tell(is_reset=True, state=state_of().encode())
    elector.try_now()
    assert elector.swap(Outcome.SWAPPED).epoch == 21


@pytest.mark.parametrize(
    "told",
    [
        {"state": state_of().encode(), "lease": b"bob"},  # there is a master
        {"state": MasterState(9, 4, BOB, 1, "bob", "", "", {BOB: "bob"}).encode()},  # no voter
        {"state": b"?"},
        {},  # the registry lost what this copy knows of
    ],
    ids=["a lease", "no voter", "unreadable", "lost content"],
)
def test_who_may_not_try_does_not(told: dict[str, bytes]) -> None:
    elector = Elector()
    elector.registry.tell(is_reset=True, **told)
    assert elector.try_now() is None
    assert elector.election.stage is Stage.FOLLOWING


def test_a_registry_that_lost_its_content_is_named() -> None:
    elector = Elector()
    elector.registry.tell(is_reset=True)
    assert "lost its content" in elector.election.registry_error


def test_the_first_node_of_a_cluster_makes_epoch_1_with_itself_as_the_voter() -> None:
    elector = Elector(make_replica())
    elector.registry.tell(is_reset=True)
    assert elector.try_now() is not None
    won = elector.swap(Outcome.SWAPPED)
    assert (won.epoch, won.voters) == (1, {ME: "me"})


@pytest.mark.parametrize("kind", [NodeKind.FIRST, NodeKind.SECOND])
def test_nothing_is_tried_before_the_registry_was_heard_nor_across_a_wan(kind: NodeKind) -> None:
    elector = Elector(make_replica(), kind)
    if kind is NodeKind.SECOND:
        elector.registry.tell(is_reset=True)
    assert elector.try_now() is None


@pytest.mark.parametrize("outcome", [Outcome.LOST, Outcome.UNKNOWN, Outcome.NOT_DONE])
def test_who_did_not_win_gives_the_lease_back_and_tries_again_later(outcome: Outcome) -> None:
    elector = Elector()
    elector.registry.tell(is_reset=True, state=state_of().encode())
    lease = elector.try_now()
    assert lease is not None
    elector.swap(outcome)
    assert lease.is_released
    assert elector.election.stage is Stage.FOLLOWING
    elector.clock.advance(2.0)
    assert elector.try_now() is not None


def test_a_win_whose_answer_was_lost_is_learnt_from_the_watch() -> None:
    elector = Elector()
    elector.registry.tell(is_reset=True, state=state_of().encode())
    elector.try_now()
    wanted = elector.swap(Outcome.UNKNOWN)
    elector.registry.tell(state=wanted.encode())
    assert elector.election.stage is Stage.COLLECTING
    assert elector.election.epoch == 5


def test_the_win_of_an_earlier_life_is_none_of_this_one() -> None:
    elector = Elector()
    elector.registry.tell(is_reset=True, state=state_of(ME, incarnation=99).encode(), lease=b"me")
    assert elector.election.stage is Stage.FOLLOWING


def test_a_higher_epoch_in_the_registry_ends_the_term() -> None:
    elector = Elector()
    lease = elector.lead()
    assert elector.said == ["begin 5"]
    elector.registry.tell(state=state_of(BOB, epoch=6, number=11).encode())
    assert elector.said == ["begin 5", "end"]
    assert (elector.election.stage, elector.election.epoch) == (Stage.FOLLOWING, 0)
    assert lease.is_released


def test_an_old_state_that_a_late_watch_brings_changes_nothing() -> None:
    elector = Elector()
    elector.lead()
    elector.registry.tell(state=state_of().encode())
    assert elector.election.stage is Stage.LEADING


def test_a_master_whose_lease_is_lost_goes_on_and_takes_it_again_if_the_state_is_its_own() -> None:
    elector = Elector()
    elector.lead()
    elector.registry.tell(lease=b"me")
    lost, _ = (elector.registry.grants or [(elector.election._lease_lost, None)])[0]
    elector.registry.tell(lease=None)
    lost()
    assert elector.said == ["begin 5"]
    elector.registry.grants.pop()[1](FakeLease())
    changes, done = elector.registry.swaps.pop()
    state = next(change for change in changes if change.key == STATE_KEY)
    assert state.is_check
    assert state.expected is not None
    assert MasterState.decode(state.expected).master == ME
    done(Swap(Outcome.SWAPPED))
    assert elector.election.stage is Stage.LEADING


def test_who_gives_up_rests_so_that_others_try_first() -> None:
    elector = Elector()
    lease = elector.lead()
    elector.registry.tell(lease=b"me")
    elector.election.give_up("nobody hears me", REST_S)
    assert lease.is_released
    elector.registry.tell(lease=None)
    assert elector.try_now() is None
    elector.clock.advance(REST_S)
    assert elector.try_now() is not None


def test_a_node_whose_store_failed_does_not_try() -> None:
    elector = Elector()
    elector.replica.store.has_failed = True
    elector.registry.tell(is_reset=True, state=state_of().encode())
    assert elector.try_now() is None
