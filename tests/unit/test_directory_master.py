"""The master's parts: what is confirmed, who is let in, what is kept in the registry, what expires, what is resent."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from metadata.directory.admission import HOLD_S, JOINS_LIMIT, Admission
from metadata.directory.buffer import MessageBuffer
from metadata.directory.confirmations import Confirmations
from metadata.directory.expiries import Expiries
from metadata.directory.kept import KEPT_LIMIT, RETRY_S, WAITING_LIMIT, Kept
from metadata.directory.map import DirectoryMap
from metadata.directory.registry_keys import KEPT, KEPT_PREFIX, STATE_KEY, MasterState, Member, StateError
from metadata.directory.term import HEARTBEAT_S, RESEND_BURST, TAIL_S, Link, Resending, Term, frames
from metadata.registry_calls import Change, Outcome, Reading, Swap, Unavailable
from protocol.directory import (
    UPDATES_ROOM_BYTES,
    Heartbeat,
    NodeKind,
    Position,
    Reason,
    Refusal,
    Update,
    Updates,
)
from protocol.directory_control import Active, Delegate, Held, Hold, Join, JoinRefused, Ready
from tests.unit.directory_rig import Outbox, SetClock, delete, filled_replica, messages, put

ME, BOB, EVE, NEW = 1, 2, 3, 9
EPOCH = 2


# --- confirmations ----------------------------------------------------------------------------------------------------


def confirmations(*voters: int) -> Confirmations:
    return Confirmations(EPOCH, voters, first=10)


def at(sequence: int, epoch: int = EPOCH) -> Position:
    return Position(epoch, sequence)


@pytest.mark.parametrize(("voters", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (1000, 501)])
def test_a_majority_is_more_than_half(voters: int, needed: int) -> None:
    counted = confirmations(*range(voters))
    answered: list[int] = []
    counted.wait(12, lambda: answered.append(12))
    for node in range(needed):
        assert answered == []
        counted.persisted(node, at(12))
    assert answered == [12]
    assert counted.confirmed == 12


def test_positions_of_an_earlier_epoch_count_for_nothing() -> None:
    counted = confirmations(ME, BOB, EVE)
    answered: list[int] = []
    counted.wait(12, lambda: answered.append(12))
    for node in (ME, BOB, EVE):
        counted.persisted(node, at(99, EPOCH - 1))
    assert (answered, counted.confirmed) == ([], 0)


def test_nodes_that_are_no_voters_do_not_count() -> None:
    counted = confirmations(ME, BOB, EVE)
    counted.wait(12, lambda: None)
    for node in (ME, 7, 8, 9):
        counted.persisted(node, at(12))
    assert counted.confirmed == 0


def test_everybody_who_waits_for_less_is_answered_in_order_and_a_late_one_at_once() -> None:
    counted = confirmations(ME)
    answered: list[int] = []
    for sequence in (11, 12, 12, 14):
        counted.wait(sequence, lambda sequence=sequence: answered.append(sequence))  # type: ignore[misc]
    counted.persisted(ME, at(13))
    assert answered == [11, 12, 12]
    assert counted.is_waiting
    counted.persisted(ME, at(20))
    counted.wait(20, lambda: answered.append(20))
    assert answered == [11, 12, 12, 14, 20]


def test_while_the_voters_are_changed_both_lists_are_needed() -> None:
    counted = confirmations(ME, BOB)
    for node in (ME, BOB):
        counted.persisted(node, at(11))
    assert counted.change_voters({ME, BOB, EVE, NEW}) is False  # two of four have it: no majority
    counted.persisted(EVE, at(11))
    assert counted.change_voters({ME, EVE, NEW})
    assert counted.change_voters({ME}) is False
    answered: list[int] = []
    counted.wait(15, lambda: answered.append(15))
    counted.persisted(ME, at(15))
    counted.persisted(EVE, at(15))  # a majority of the new list only
    assert answered == []
    counted.persisted(BOB, at(15))
    assert answered == [15]


@pytest.mark.parametrize(("is_taken", "deciding"), [(True, EVE), (False, BOB)])
def test_after_the_answer_one_list_decides(is_taken: bool, deciding: int) -> None:
    counted = confirmations(ME, BOB)
    for node in (ME, BOB, EVE):
        counted.persisted(node, at(11))
    assert counted.change_voters({ME, EVE})
    counted.wait(12, lambda: None)
    counted.persisted(ME, at(12))
    counted.voters_changed(is_taken)
    counted.persisted(deciding, at(12))
    assert counted.confirmed == 12


def test_new_voters_must_have_what_the_epoch_began_with() -> None:
    """It may hold what an earlier master confirmed."""
    counted = confirmations(ME, BOB, EVE)
    counted.persisted(ME, at(9))
    assert not counted.change_voters({ME})
    counted.persisted(ME, at(10))
    assert counted.change_voters({ME})


# --- the term ---------------------------------------------------------------------------------------------------------


def term_of(*updates: Update, voters: tuple[int, ...] = (ME,)) -> tuple[Term, Outbox]:
    outbox = Outbox()
    replica = filled_replica(1, *updates)
    counted = Confirmations(EPOCH, voters, replica.position.sequence + 1)
    return Term(EPOCH, ME, replica, counted, outbox, 100.0), outbox


def test_updates_of_one_turn_share_datagrams_and_everybody_gets_them() -> None:
    term, outbox = term_of()
    term.audience = (BOB, EVE)
    for key in "abc":
        term.publish(put(key))
    assert outbox.take() == []
    term.flush(100.0)
    sent = outbox.take(Updates)
    assert [node for node, _ in sent] == [BOB, EVE]
    assert [message.sequence for message in sent[0][1].messages] == [2, 3, 4]
    assert {message.epoch for message in sent[0][1].messages} == {EPOCH}


def test_a_position_is_wanted_only_while_somebody_waits() -> None:
    term, outbox = term_of(voters=(ME, BOB, EVE))
    term.audience = (BOB,)
    term.publish(put("a"))
    term.flush(100.0)
    term.confirmations.wait(term.publish(put("b")), lambda: None)
    term.flush(100.0)
    assert [body.wants_position for _, body in outbox.take(Updates)] == [False, True]


def test_the_heartbeat_is_regular_and_follows_a_burst_soon() -> None:
    term, outbox = term_of()
    term.audience = (BOB,)
    beats = []
    for step in range(1, 200):
        now_s = 100.0 + step / 200
        if step == 105:
            term.publish(put("a"))
            term.flush(now_s)
        term.beat(now_s)
        beats += [step] if outbox.take(Heartbeat) else []
    assert beats == [1, 51, 101, 111, 161]
    assert HEARTBEAT_S == 0.25
    assert TAIL_S == 0.03


def test_where_messages_are_lost_more_heartbeats_follow_a_burst() -> None:
    term, outbox = term_of(put("a"))
    term.audience = (BOB,)
    term.beat(100.0)
    term.requested(BOB, ((2, 1),), 100.0)
    term.publish(put("b"))
    term.flush(100.0)
    outbox.take()
    beats = []
    for step in range(1, 150):
        term.beat(100.0 + step / 200)
        beats += [step] if outbox.take(Heartbeat) else []
    assert beats == pytest.approx([6, 18, 42, 90, 140], abs=1)


def test_second_kind_nodes_get_whole_updates_under_their_prefixes_and_their_own() -> None:
    term, outbox = term_of(put("load/1"), put("other"))
    term.link(Link(BOB, ("load/",)), Position(1, 1))
    term.publish(put("load/2", bytes(3000)))
    term.publish(put("other"))
    term.publish(put("mine", origin=BOB, number=1))
    term.flush(100.0)
    sequences = [message.sequence for _, body in outbox.take(Updates) for message in body.messages]
    assert sequences == [2, 4, 5, 6, 8]


def test_a_link_reaches_as_far_back_as_the_buffer_and_the_history_do() -> None:
    term, _ = term_of(put("a"))
    assert term.reaches(Position(1, 1))
    assert not term.reaches(Position(1, 0))
    assert not term.reaches(Position(1, 3))  # it has a message that this history does not have


def test_frames_hold_as_many_messages_as_fit() -> None:
    found = messages(1, 1, *(put(f"key{index}", bytes(200)) for index in range(20)), put("large", bytes(3000)))
    packed = frames(found)
    assert [message for piece in packed for message in piece] == found
    sizes = [sum(message.size_bytes for message in piece) for piece in packed]
    assert max(sizes) <= UPDATES_ROOM_BYTES
    assert all(a + b[0].size_bytes > UPDATES_ROOM_BYTES for a, b in zip(sizes, packed[1:], strict=False))


# --- resending --------------------------------------------------------------------------------------------------------


def resending() -> tuple[Resending, Outbox]:
    replica = filled_replica(1, *(put(f"key{index}") for index in range(1000)))
    outbox = Outbox()
    replica.buffer = MessageBuffer(limit_bytes=30_000)
    replica.buffer.restart(2)
    for message in messages(1, 2, *(put(f"key{index}") for index in range(1000))):
        replica.buffer.append(message)
    return Resending(replica, outbox, 100.0), outbox


@pytest.mark.parametrize(("is_master", "reason"), [(True, Reason.GONE), (False, Reason.NOT_HERE)])
def test_what_is_not_here_is_refused_by_name(is_master: bool, reason: Reason) -> None:
    answering, outbox = resending()
    answering.answer(BOB, 1, ((2, 3), (999, 4)), is_master, 100.0)
    bodies = [body for _, body in outbox.take()]
    resent = [message.sequence for body in bodies if isinstance(body, Updates) for message in body.messages]
    refused = {body.reason: body.ranges for body in bodies if isinstance(body, Refusal)}
    assert resent == [999, 1000, 1001]
    assert refused.pop(reason)[0] == (2, 3)
    assert sum(len(ranges) for ranges in refused.values()) <= 1
    assert (1002, 1) in {item for body in bodies if isinstance(body, Refusal) for item in body.ranges}


def test_no_more_is_resent_than_the_budget_allows_and_the_rest_is_refused_for_now() -> None:
    answering, outbox = resending()
    for _ in range(20):
        answering.answer(BOB, 1, ((900, 60),), True, 100.0)
    assert answering.resent == RESEND_BURST
    assert answering.refused == 20 * 60 - RESEND_BURST
    assert {body.reason for _, body in outbox.take(Refusal)} == {Reason.NOT_NOW}
    answering.answer(BOB, 1, ((900, 60),), True, 100.1)
    assert answering.resent == RESEND_BURST + 60


# --- what expires -----------------------------------------------------------------------------------------------------


def test_a_key_is_deleted_when_its_time_is_over_unless_it_was_put_again() -> None:
    directory = DirectoryMap()
    first, again = put("a", expires_ms=1000), put("a", expires_ms=5000)
    directory.apply(at(1), first)
    expiries = Expiries(directory, 100.0)
    assert list(expiries.over(100.9)) == []
    directory.apply(at(2), again)
    expiries.taken(at(2), again, 100.9)
    assert list(expiries.over(101.0)) == []
    assert expiries.due_at_s == pytest.approx(105.9)
    assert list(expiries.over(105.9)) == ["a"]


# --- letting nodes in -------------------------------------------------------------------------------------------------


def member(node: int, name: str, kind: NodeKind = NodeKind.FIRST) -> Member:
    return Member(node, kind, name, f"10.0.0.{node}:1", f"10.0.0.{node}:2")


class Door:
    """An Admission whose registry answers when the test says so."""

    def __init__(self, *members: Member) -> None:
        self.members = {one.node: one for one in (member(ME, "me"), *members)}
        self.term, self.outbox = term_of(put("a"), voters=(ME,))
        self.changes: list[tuple[dict[int, str | None], Callable[[], None]]] = []
        self.suspected: set[int] = set()
        self.is_busy = False
        self.admission = Admission(
            self.term,
            self.term.confirmations,
            self.members[ME],
            lambda: self.members,
            self.suspected.__contains__,
            self._change,
            self.outbox,
            random.Random(1),
        )
        self.term.publish(put("begin"))
        self.term.confirmations.persisted(ME, self.term.replica.position)

    def _change(self, changes: dict[int, str | None], taken: Callable[[], None]) -> bool:
        if self.is_busy:
            return False
        self.changes.append((changes, taken))
        return True

    def take(self) -> None:
        """The registry has taken the first change."""
        changes, taken = self.changes[0]
        voters = self.term.confirmations.voters
        self.term.confirmations.voters = (voters | {node for node, name in changes.items() if name}) - {
            node for node, name in changes.items() if name is None
        }
        taken()
        self.admission.voters_settled()

    def join(self, attempt: int = 5, node: int = NEW, name: str = "new", kind: NodeKind = NodeKind.FIRST) -> Any:
        self.admission.join(node, Join(attempt, kind, name, "10.0.0.9:1", "10.0.0.9:2", ()), 100.0)
        ((to, body),) = self.outbox.take()
        assert to == node
        return body

    def ready(self, attempt: int = 5, node: int = NEW, position: Position | None = None) -> list[tuple[int, Any]]:
        self.admission.ready(node, Ready(attempt, EPOCH, position or self.term.replica.position), 100.0)
        return self.outbox.take()


def test_a_join_goes_from_delegate_to_active_and_costs_the_master_six_messages() -> None:
    door = Door(member(BOB, "bob"))
    assert door.join() == Delegate(5, EPOCH, BOB, "10.0.0.2:2")
    position = door.term.replica.position
    door.admission.hold(BOB, Hold(5, NEW, EPOCH, position), 100.0)
    assert door.outbox.take() == [(BOB, Held(5, EPOCH, True))]
    assert door.ready() == []
    assert [changes for changes, _ in door.changes] == [{NEW: "new"}]
    assert door.term.replica.map.get("member/new") is None
    door.take()
    assert door.outbox.take() == [(NEW, Active(5, EPOCH))]
    assert Member.decode("member/new", door.term.replica.map.get("member/new") or b"") == member(NEW, "new")
    assert door.admission.messages == 6


def test_nobody_is_active_before_a_majority_has_what_it_has() -> None:
    door = Door(member(BOB, "bob"))
    door.join()
    door.term.publish(put("later"))
    assert door.ready() == []
    assert door.changes == []
    door.term.confirmations.persisted(ME, door.term.replica.position)
    assert len(door.changes) == 1


def test_every_step_may_come_twice() -> None:
    door = Door(member(BOB, "bob"))
    door.join()
    door.join()
    door.ready()
    door.ready()
    assert len(door.changes) == 1
    door.take()
    door.outbox.take()
    assert door.ready() == [(NEW, Active(5, EPOCH))]
    assert door.join() == Active(5, EPOCH)  # late: it is no second join
    assert len(door.changes) == 1
    assert door.admission.joining() == {}


def test_joins_that_are_ready_while_the_registry_is_asked_share_the_next_swap() -> None:
    door = Door(member(BOB, "bob"))
    for number in (20, 21, 22):
        door.join(number, number, f"n{number}")
        door.ready(number, number)
    assert [changes for changes, _ in door.changes] == [{20: "n20"}, {21: "n21"}, {22: "n22"}]
    door = Door(member(BOB, "bob"))
    door.is_busy = True
    for number in (20, 21, 22):
        door.join(number, number, f"n{number}")
        door.ready(number, number)
    door.is_busy = False
    door.admission.voters_settled()
    assert [changes for changes, _ in door.changes] == [{20: "n20", 21: "n21", 22: "n22"}]
    door.take()
    assert sorted(node for node, _ in door.outbox.take(Active)) == [20, 21, 22]


def test_the_join_that_asks_again_gets_another_delegate() -> None:
    door = Door(member(BOB, "bob"), member(EVE, "eve"))
    assert {door.join().delegate, door.join().delegate} == {BOB, EVE}
    assert door.join().delegate in (BOB, EVE)


def test_no_delegate_is_suspect_across_a_wan_or_joining_itself() -> None:
    door = Door(member(BOB, "bob"), member(EVE, "eve"), member(4, "far", NodeKind.SECOND))
    door.suspected.add(BOB)
    assert door.join().delegate == EVE
    door.join(attempt=6, node=EVE, name="eve")
    assert door.join().delegate == ME  # with nobody else the master does it itself


def test_a_node_that_lost_its_disk_takes_the_place_of_the_one_of_its_name() -> None:
    door = Door(member(BOB, "bob"))
    door.join(name="bob")
    door.ready()
    assert door.changes[0][0] == {NEW: "bob", BOB: None}


def test_a_second_kind_node_is_active_without_being_a_voter() -> None:
    door = Door(member(BOB, "bob"))
    door.join(kind=NodeKind.SECOND)
    assert door.ready() == [(NEW, Active(5, EPOCH))]
    assert door.changes == []


@pytest.mark.parametrize(
    ("attempt", "node", "position"), [(6, NEW, None), (5, BOB, None), (5, NEW, Position(EPOCH - 1, 99))]
)
def test_ready_without_a_join_or_with_another_history_is_refused(
    attempt: int, node: int, position: Position | None
) -> None:
    door = Door(member(BOB, "bob"))
    door.join()
    assert door.ready(attempt, node, position) == [(node, JoinRefused(attempt, EPOCH, Reason.HOLD_BROKEN))]


def test_the_number_of_joins_is_bounded_and_silent_ones_are_forgotten() -> None:
    door = Door(member(BOB, "bob"))
    for number in range(JOINS_LIMIT):
        assert isinstance(door.join(100 + number, 100 + number, f"n{number}"), Delegate)
    assert door.join() == JoinRefused(5, EPOCH, Reason.NOT_NOW)
    door.admission.alive(100, 100.0 + HOLD_S / 2)
    assert door.admission.tick(100.0 + HOLD_S)
    assert list(door.admission.joining()) == [100]
    assert isinstance(door.join(), Delegate)


def test_a_hold_for_no_join_or_of_what_is_gone_is_not_given() -> None:
    door = Door(member(BOB, "bob"))
    door.join()
    for hold in (
        Hold(6, NEW, EPOCH, door.term.replica.position),
        Hold(5, BOB, EPOCH, door.term.replica.position),
        Hold(5, NEW, EPOCH - 1, door.term.replica.position),
        Hold(5, NEW, EPOCH, Position(EPOCH, 99)),
    ):
        door.admission.hold(BOB, hold, 100.0)
        ((_, answer),) = door.outbox.take(Held)
        assert not answer.is_held


# --- kept in the registry ---------------------------------------------------------------------------------------------

STATE = MasterState(4, EPOCH, ME, 1, "me", "10.0.0.1:1", "10.0.0.1:2", {ME: "me"})


class SlowRegistry:
    """Makes swaps when the test says so, and can keep the answer to itself."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {STATE_KEY: STATE.encode()}
        self.pending: list[tuple[list[Change], Callable[[Swap], None]]] = []

    def swap_later(self, changes: list[Change], done: Callable[[Swap], None]) -> None:
        self.pending.append((changes, done))

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        done(Reading(1, tuple((name, value) for name, value in self.values.items() if name == key)))

    def range_later(self, prefix: str, done: Callable[[Reading | Unavailable], None]) -> None:
        done(self.reading(prefix))

    def reading(self, prefix: str = KEPT) -> Reading:
        return Reading(1, tuple(sorted(item for item in self.values.items() if item[0].startswith(prefix))))

    def answer(self, told: Outcome | None = None, is_made: bool = True) -> None:
        changes, done = self.pending.pop(0)
        holds = all(self.values.get(change.key) == change.expected for change in changes)
        if holds and is_made:
            for change in changes:
                if change.new is None:
                    self.values.pop(change.key, None)
                else:
                    self.values[change.key] = change.new
        done(Swap(told or (Outcome.SWAPPED if holds else Outcome.LOST)))


class Keeper:
    """A Kept over it, and what it says."""

    def __init__(self) -> None:
        self.clock = SetClock()
        self.registry = SlowRegistry()
        self.state = STATE
        self.said: list[str] = []
        self.kept = Kept(
            self.clock, self.registry, EPOCH, lambda: self.state.encode(), lambda: self.said.append("lost")  # type: ignore[arg-type]
        )  # fmt: skip
        assert self.kept.load(self.registry.reading()) == {}

    def change(self, update: Update, name: str) -> None:
        self.kept.change(
            update,
            lambda: self.said.append(f"{name} taken"),
            lambda is_unknown: self.said.append(f"{name} unknown" if is_unknown else f"{name} not done"),
        )

    def loaded(self) -> dict[str, Update]:
        return Kept(self.clock, self.registry, EPOCH + 1, STATE.encode, lambda: None).load(  # type: ignore[arg-type]
            self.registry.reading()
        )


def test_changes_are_made_one_after_the_other_and_a_new_master_finds_them() -> None:
    keeper = Keeper()
    keeper.change(put("a", b"1"), "first")
    keeper.change(put("a", b"2"), "second")
    keeper.change(put("b"), "third")
    assert len(keeper.registry.pending) == 1
    for _ in range(3):
        keeper.registry.answer()
    assert keeper.said == ["first taken", "second taken", "third taken"]
    assert {key: update.value for key, update in keeper.loaded().items()} == {"a": b"2", "b": b"v"}
    assert all(update.is_kept for update in keeper.loaded().values())
    keeper.change(delete("a"), "fourth")
    keeper.registry.answer()
    assert list(keeper.loaded()) == ["b"]


def test_a_key_is_kept_as_soon_as_it_waits() -> None:
    keeper = Keeper()
    assert not keeper.kept.has("a")
    keeper.change(put("a"), "first")
    assert keeper.kept.has("a")


def test_no_more_changes_wait_and_no_more_keys_are_kept_than_the_bounds() -> None:
    keeper = Keeper()
    for number in range(WAITING_LIMIT):
        assert keeper.kept.takes("a")
        keeper.change(put("a"), str(number))
    assert not keeper.kept.takes("a")
    full = Keeper()
    full.kept._values = {f"key{number}": b"" for number in range(KEPT_LIMIT)}
    assert full.kept.takes("key7")
    assert not full.kept.takes("new")


def test_an_unknown_answer_is_settled_by_asking_again() -> None:
    for is_made in (True, False):
        keeper = Keeper()
        keeper.change(put("a"), "first")
        keeper.registry.answer(Outcome.UNKNOWN, is_made)
        assert keeper.said == []
        keeper.clock.advance(RETRY_S)
        keeper.registry.answer()
        assert keeper.said == ["first taken"]
        assert list(keeper.loaded()) == ["a"]


def test_while_the_registry_is_away_changes_wait_and_are_made_when_it_is_back() -> None:
    keeper = Keeper()
    keeper.change(put("a"), "first")
    for _ in range(5):
        keeper.registry.answer(Outcome.NOT_DONE, is_made=False)
        keeper.clock.advance(RETRY_S)
    keeper.registry.answer()
    assert keeper.said == ["first taken"]


def test_a_change_of_the_voters_meanwhile_does_not_end_the_term() -> None:
    keeper = Keeper()
    keeper.change(put("a"), "first")
    keeper.state = STATE.changed(voters={ME: "me", BOB: "bob"})
    keeper.registry.values[STATE_KEY] = keeper.state.encode()
    keeper.registry.answer()
    assert keeper.said == []
    keeper.clock.advance(RETRY_S)
    keeper.registry.answer()
    assert keeper.said == ["first taken"]


def test_another_master_ends_the_term_and_nothing_of_it_is_written() -> None:
    keeper = Keeper()
    keeper.change(put("a"), "first")
    keeper.change(put("b"), "second")
    keeper.registry.values[STATE_KEY] = STATE.changed(epoch=EPOCH + 1, master=BOB).encode()
    keeper.registry.answer()
    assert keeper.said == ["lost"]
    keeper.kept.end()
    assert keeper.said[1:] == ["first unknown", "second not done"]
    assert keeper.loaded() == {}


def test_two_masters_never_give_the_same_number() -> None:
    keeper = Keeper()
    keeper.change(put("a"), "first")
    keeper.registry.answer()
    number = keeper.registry.values[KEPT]
    value = keeper.registry.values[KEPT_PREFIX + "a"]
    assert value.startswith(number)
    assert number[:4] == EPOCH.to_bytes(4, "big")


# --- the registry's state ---------------------------------------------------------------------------------------------


def test_the_state_is_read_as_it_was_written_and_its_number_rises() -> None:
    assert MasterState.decode(STATE.encode()) == STATE
    assert STATE.changed(epoch=9).number == STATE.number + 1


@pytest.mark.parametrize(
    "value", [b"", b"{}", b"[]", b'{"version": 1}', STATE.encode().replace(b'"voters":{', b'"voters":{"x":"y",')]
)
def test_a_state_that_cannot_be_read_is_an_error(value: bytes) -> None:
    with pytest.raises(StateError, match="cannot be read"):
        MasterState.decode(value)


def test_a_state_of_a_newer_program_is_named() -> None:
    with pytest.raises(StateError, match="version 2; this program knows version 1"):
        MasterState.decode(STATE.encode().replace(b'"version":1', b'"version":2'))


@pytest.mark.parametrize("value", [b"", b"{}", b"[1]", b'{"id":"x","kind":"first","datagrams":"","streams":""}'])
def test_what_is_no_members_record_disturbs_nothing(value: bytes) -> None:
    assert Member.decode("member/x", value) is None
