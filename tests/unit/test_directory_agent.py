"""The agent's parts: following, promising, reporting, joining, and sending a snapshot to another."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from metadata.directory import joiner as joining
from metadata.directory.delegate import HOLD_RETRY_S, HOLD_TRIES, SNAPSHOTS_LIMIT
from metadata.directory.delegate import Delegate as DelegateSide
from metadata.directory.follower import GONE_TRIES, POSITION_S, Follower
from metadata.directory.history import History
from metadata.directory.joiner import TRANSITIONS, Joiner, Joining
from metadata.directory.map import DirectoryMap
from metadata.directory.registry_keys import Member
from metadata.directory.replica import Replica
from metadata.directory.replica_store import ReplicaStore
from metadata.directory.reports import OVERTAKEN_TRIES, PATIENCE_S, RETRY_S, WAITING_LIMIT, Answer, Reports
from protocol.directory import (
    NOWHERE,
    Confirm,
    Heartbeat,
    NodeKind,
    Position,
    PositionReport,
    Reason,
    Refusal,
    Request,
    Starts,
    Updates,
)
from protocol.directory_control import (
    Active,
    Collect,
    Delegate,
    Entry,
    Held,
    Hold,
    Join,
    JoinRefused,
    Promise,
    Ready,
    SnapshotBegin,
    SnapshotEnd,
    SnapshotEntries,
    SnapshotRefused,
    SnapshotRequest,
    pack_starts,
)
from tests.unit.directory_rig import MemoryStore, Outbox, SetClock, filled_replica, make_replica, messages, put

MASTER, ME, RELAY, NEXT = 1, 2, 3, 4


# --- following --------------------------------------------------------------------------------------------------------


class Agent:
    """A follower whose copy took message 1 and one more of epoch 1."""

    def __init__(self, relays: tuple[int, ...] = (MASTER, ME, RELAY)) -> None:
        self.store = MemoryStore()
        filled_replica(1, put("a"), store=self.store)
        self.store.sync()
        rng = random.Random(1)
        self.outbox = Outbox()
        self.now_s = 100.0
        store = ReplicaStore(self.store, rng, lambda *told: self.follower.persisted(*told), lambda _: None)
        self.replica = Replica(store, rng)
        self.follower = Follower(ME, NodeKind.FIRST, self.replica, self.outbox, rng, lambda: relays, self.now_s)

    def heartbeat(
        self,
        epoch: int = 1,
        newest: int = 2,
        sender: int = MASTER,
        starts: Starts = ((1, 1),),
        floor: int = 1,
        wants_position: bool = False,
    ) -> bool:
        return self.follower.heartbeat(
            sender, Heartbeat(epoch, newest, 0, floor, wants_position, starts), self.now_s
        )  # fmt: skip

    def wait(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while (due_s := max(self.follower.due_at_s, self.now_s)) <= until_s:
            self.now_s = due_s + 1e-6
            self.follower.tick(self.now_s)
        self.now_s = until_s


def test_a_copy_that_is_a_beginning_of_the_masters_goes_on_by_messages() -> None:
    agent = Agent()
    assert agent.heartbeat(2, 3, starts=((1, 1), (2, 3)))
    assert agent.follower.is_following
    agent.follower.updates(Updates(2, False, tuple(messages(2, 3, put("b")))), agent.now_s)
    assert agent.replica.position == Position(2, 3)


def test_a_copy_that_is_not_needs_a_snapshot_and_takes_no_messages() -> None:
    agent = Agent()
    assert agent.heartbeat(2, 3, starts=((1, 1), (2, 2)))
    assert agent.follower.needs_snapshot
    agent.follower.updates(Updates(2, False, tuple(messages(2, 3, put("b")))), agent.now_s)
    assert agent.replica.position == Position(1, 2)


def test_messages_before_the_heartbeat_of_their_epoch_are_not_taken() -> None:
    agent = Agent()
    agent.heartbeat()
    agent.follower.updates(Updates(2, False, tuple(messages(2, 3, put("b")))), agent.now_s)
    assert agent.replica.position == Position(1, 2)


def test_an_old_master_is_not_listened_to_any_more() -> None:
    agent = Agent()
    agent.heartbeat(2, 2, sender=NEXT, starts=((1, 1), (2, 3)))
    assert not agent.heartbeat(1, 9)
    agent.follower.updates(Updates(1, False, tuple(messages(1, 3, put("b")))), agent.now_s)
    assert (agent.follower.master, agent.replica.position) == (NEXT, Position(1, 2))


def test_a_lost_last_message_is_noticed_by_the_heartbeat_and_asked_for() -> None:
    agent = Agent()
    agent.heartbeat(newest=4)
    agent.wait(0.02)
    assert agent.outbox.take(Request) == [(MASTER, Request(1, ((3, 2),)))]
    agent.follower.refusal(Refusal(1, Reason.NOT_NOW, 1, ((3, 2),)), agent.now_s)
    agent.wait(0.04)
    assert agent.outbox.take(Request) == [(RELAY, Request(1, ((3, 2),)))]


def test_without_relays_the_master_is_asked_again() -> None:
    agent = Agent(relays=(MASTER, ME))
    agent.heartbeat(newest=3)
    agent.wait(0.2)
    assert {node for node, _ in agent.outbox.take(Request)} == {MASTER}


def test_what_the_master_has_no_more_and_relays_refuse_needs_a_snapshot() -> None:
    agent = Agent()
    agent.heartbeat(newest=9, floor=5)
    tries = 0
    while agent.follower.is_following and tries < 20:
        agent.wait(0.1)
        for _, body in agent.outbox.take(Request):
            tries += 1
            agent.follower.refusal(Refusal(1, Reason.GONE, 5, body.ranges), agent.now_s)
    assert agent.follower.needs_snapshot
    assert GONE_TRIES <= tries <= GONE_TRIES + 1
    agent.heartbeat(newest=10, floor=5)
    assert agent.follower.needs_snapshot


def test_a_relay_answers_only_in_the_epoch_that_it_follows() -> None:
    agent = Agent()
    agent.replica.buffer.restart(2)
    agent.replica.buffer.append(messages(1, 2, put("a"))[0])
    agent.heartbeat()
    agent.follower.requested(RELAY, Request(2, ((2, 1),)), agent.now_s)
    assert agent.outbox.take() == []
    agent.follower.requested(RELAY, Request(1, ((2, 1),)), agent.now_s)
    assert [(node, body.messages[0].sequence) for node, body in agent.outbox.take(Updates)] == [(RELAY, 2)]


def test_a_position_is_told_when_it_is_wanted_and_persisted_not_before() -> None:
    agent = Agent()
    agent.heartbeat()
    agent.outbox.take()
    agent.follower.updates(Updates(1, True, tuple(messages(1, 3, put("b")))), agent.now_s)
    assert agent.outbox.take() == []
    agent.store.sync()
    assert agent.outbox.take() == [(MASTER, PositionReport(1, Position(1, 3)))]
    agent.follower.updates(Updates(1, False, tuple(messages(1, 4, put("c")))), agent.now_s)
    agent.store.sync()
    assert agent.outbox.take() == []


def test_a_lost_position_is_told_again_when_the_heartbeat_asks() -> None:
    agent = Agent()
    agent.heartbeat()
    agent.outbox.take()
    agent.heartbeat(wants_position=True)
    assert agent.outbox.take() == [(MASTER, PositionReport(1, Position(1, 2)))]


def test_a_sign_of_life_is_given_regularly() -> None:
    agent = Agent()
    agent.heartbeat()
    agent.wait(10 * POSITION_S)
    assert 8 <= len(agent.outbox.take(PositionReport)) <= 12


def test_a_promise_is_answered_when_it_is_persisted_with_what_is_persisted() -> None:
    agent = Agent()
    agent.heartbeat()
    agent.outbox.take()
    agent.follower.updates(Updates(1, False, tuple(messages(1, 3, put("b")))), agent.now_s)
    agent.follower.collect(NEXT, Collect(2))
    assert agent.outbox.take() == []
    agent.store.sync()
    assert agent.outbox.take() == [(NEXT, Promise(2, Position(1, 3)))]
    agent.follower.collect(NEXT, Collect(2))
    assert agent.outbox.take() == [(NEXT, Promise(2, Position(1, 3)))]


def test_after_a_promise_the_old_master_moves_nothing() -> None:
    agent = Agent()
    agent.heartbeat()
    agent.follower.collect(NEXT, Collect(2))
    assert not agent.heartbeat(newest=3)
    agent.follower.updates(Updates(1, True, tuple(messages(1, 3, put("b")))), agent.now_s)
    agent.store.sync()
    assert agent.replica.position == Position(1, 2)
    assert agent.outbox.take(PositionReport) == []


def test_a_lower_epoch_gets_no_promise() -> None:
    agent = Agent()
    agent.follower.collect(NEXT, Collect(5))
    agent.store.sync()
    agent.outbox.take()
    agent.follower.collect(RELAY, Collect(4))
    agent.store.sync()
    assert agent.outbox.take() == []


# --- reports ----------------------------------------------------------------------------------------------------------


class Reporter:
    """Reports, and the answers to them."""

    def __init__(self) -> None:
        self.reports = Reports(ME, incarnation=3)
        self.answers: list[tuple[str, Answer]] = []

    def add(self, key: str, confirm: Confirm = Confirm.NONE, now_s: float = 0.0) -> int:
        self.reports.add(put(key), confirm, lambda answer: self.answers.append((key, answer)), now_s)
        return max(self.reports._waiting)

    def due(self, now_s: float, epoch: int = 1) -> list[int]:
        return [type(put("x")).decode(report.update).number for report in self.reports.due(epoch, now_s)]


ONE = History(((1, 1),))


def test_a_report_is_said_again_until_it_is_seen() -> None:
    reporter = Reporter()
    number = reporter.add("a")
    assert reporter.due(0.0) == [number]
    assert reporter.due(RETRY_S / 2) == []
    assert reporter.due(RETRY_S) == [number]
    reporter.reports.seen(Position(1, 5), put("a", origin=ME, number=number), 1.0)
    assert reporter.due(9.0) == []
    reporter.reports.confirm(ONE, 0)
    assert reporter.answers == [("a", Answer.CONFIRMED)]


def test_a_site_wide_confirmation_waits_for_the_masters_word_in_the_same_history() -> None:
    reporter = Reporter()
    number = reporter.add("a", Confirm.SITE)
    reporter.reports.seen(Position(1, 5), put("a", origin=ME, number=number), 0.0)
    reporter.reports.confirm(ONE, 4)
    reporter.reports.confirm(History(((1, 1), (2, 5))), 9)  # another master's history does not have it
    assert reporter.answers == []
    reporter.reports.confirm(ONE, 5)
    assert reporter.answers == [("a", Answer.CONFIRMED)]


def test_a_report_that_vanished_with_its_master_is_said_again() -> None:
    reporter = Reporter()
    number = reporter.add("a", Confirm.SITE)
    reporter.due(0.0)
    reporter.reports.seen(Position(1, 5), put("a", origin=ME, number=number), 0.0)
    reporter.reports.replaced(DirectoryMap(), History(((1, 1), (2, 5))))
    assert reporter.due(9.0, epoch=2) == [number]


def test_a_snapshot_shows_what_was_published() -> None:
    reporter = Reporter()
    number = reporter.add("a")
    entry = Entry(Position(1, 5), put("a", origin=ME, number=number))
    reporter.reports.replaced(DirectoryMap([entry]), ONE)
    reporter.reports.confirm(ONE, 0)
    assert reporter.answers == [("a", Answer.CONFIRMED)]


def test_one_that_was_overtaken_was_not_published_and_gets_a_new_number() -> None:
    reporter = Reporter()
    first, second = reporter.add("a"), reporter.add("b")
    reporter.due(0.0)
    reporter.reports.seen(Position(1, 5), put("b", origin=ME, number=second), 0.0)
    (again,) = reporter.due(0.0)
    assert again > second > first


def test_what_a_snapshot_shows_to_be_overtaken_gets_a_new_number() -> None:
    reporter = Reporter()
    first, second = reporter.add("a"), reporter.add("b")
    reporter.due(0.0)
    entry = Entry(Position(1, 5), put("b", origin=ME, number=second))
    reporter.reports.replaced(DirectoryMap([entry]), ONE)
    (again,) = reporter.due(9.0)
    assert again > second > first


def test_what_nobody_waits_for_gets_a_new_number_when_the_master_takes_the_old_one_no_more() -> None:
    reports = Reports(ME, 1)
    reports.add(put("load"), Confirm.NONE, None, 0.0)
    numbers = [
        type(put("x")).decode(report.update).number
        for second in range(0, 100, 2)
        for report in reports.due(1, float(second))
    ]
    assert len(set(numbers)) == 1 + len(numbers) // OVERTAKEN_TRIES
    assert numbers == sorted(numbers)


def test_of_two_for_one_key_the_last_stays_the_last_when_the_first_is_overtaken() -> None:
    reporter = Reporter()
    reporter.add("key")
    other = reporter.add("other")
    reporter.add("key")
    reporter.due(0.0)
    reporter.reports.seen(Position(1, 5), put("other", origin=ME, number=other), 0.0)
    numbers = reporter.due(0.0)
    assert numbers == sorted(numbers)
    assert len(numbers) == 2
    assert min(numbers) > other + 1


def test_one_that_waits_for_the_registry_is_slow_before_it_is_overtaken() -> None:
    reporter = Reporter()
    first, second = reporter.add("a", Confirm.REGISTRY), reporter.add("b")
    reporter.due(0.0)
    reporter.reports.seen(Position(1, 5), put("b", origin=ME, number=second), 0.0)
    assert reporter.due(RETRY_S) == [first]


def test_what_was_said_to_a_master_is_never_answered_with_not_done() -> None:
    reporter = Reporter()
    reporter.add("said")
    reporter.due(0.0)
    reporter.add("never said")
    for waiting in reporter.reports.take_all():  # this node is the master now, and does not succeed
        waiting.answer(Answer.NOT_DONE)
    assert sorted(reporter.answers) == [("never said", Answer.NOT_DONE), ("said", Answer.UNKNOWN)]


def test_a_newer_value_replaces_one_that_nobody_waits_for() -> None:
    reports = Reports(ME, 1)
    for value in (b"1", b"2"):
        reports.add(put("load", value), Confirm.NONE, None, 0.0)
    assert len(reports) == 1
    assert type(put("x")).decode(reports.due(1, 0.0)[0].update).value == b"2"


def test_what_a_node_says_of_itself_is_said_again_when_it_vanished_with_its_master() -> None:
    reports = Reports(ME, 1)
    reports.said(put("as master", origin=ME, number=reports.next_number()), Position(1, 5))
    reports.add(put("as agent"), Confirm.NONE, None, 0.0)
    (report,) = reports.due(1, 0.0)
    reports.seen(Position(1, 6), type(put("x")).decode(report.update), 0.0)
    reports.confirm(ONE, 0)
    assert len(reports) == 0
    reports.replaced(DirectoryMap(), History(((1, 1), (2, 6))))  # "as master" was removed by somebody since
    assert [type(put("x")).decode(report.update).key for report in reports.due(2, 9.0)] == ["as agent"]


def test_what_others_have_changed_since_is_not_said_again() -> None:
    reports = Reports(ME, 1)
    for key in ("changed", "vanished", "there"):
        reports.said(put(key, origin=ME, number=reports.next_number()), Position(1, 5))
    reports.said(put("passing", origin=ME, number=9)._replace(expires_ms=5), Position(1, 5))
    entries = [
        Entry(Position(2, 7), put("changed")),
        Entry(Position(1, 5), put("there", origin=ME, number=(1 << 32) + 3)),
    ]
    reports.replaced(DirectoryMap(entries), History(((1, 1), (2, 5))))
    assert [type(put("x")).decode(report.update).key for report in reports.due(2, 9.0)] == ["vanished"]


def test_patience_ends_with_unknown_or_not_done() -> None:
    reporter = Reporter()
    reporter.add("said")
    reporter.due(0.0)
    reporter.add("never said")
    reporter.due(PATIENCE_S, epoch=0)
    assert sorted(reporter.answers) == [("never said", Answer.NOT_DONE), ("said", Answer.UNKNOWN)]


def test_no_more_wait_than_the_bound() -> None:
    reporter = Reporter()
    for index in range(WAITING_LIMIT + 1):
        reporter.add(f"key{index}")
    assert reporter.answers == [(f"key{WAITING_LIMIT}", Answer.NOT_DONE)]
    assert len(reporter.reports) == WAITING_LIMIT


# --- joining ----------------------------------------------------------------------------------------------------------


class Newcomer:
    """A joiner, and the streams that it opens."""

    def __init__(self, kind: NodeKind = NodeKind.FIRST) -> None:
        self.clock = SetClock()
        self.store = MemoryStore()
        self.replica = make_replica(self.store)
        self.outbox = Outbox()
        self.streams: list[tuple[str, SnapshotRequest, Callable[[Any], None], Callable[[str], None]]] = []
        self.given_up = 0
        me = Member(ME, kind, "me", "10.0.0.2:1", "10.0.0.2:2")
        self.joiner = Joiner(
            me, (), self.replica, self.outbox, random.Random(1), self.clock.now, self._open
        )  # fmt: skip

    def _open(
        self, address: str, first: Any, heard: Callable[[Any], None], failed: Callable[[str], None]
    ) -> Callable[[], None]:
        self.streams.append((address, first, heard, failed))

        def give_up() -> None:
            self.given_up += 1

        return give_up

    def wait(self, seconds: float) -> None:
        until_s = self.clock.now_s + seconds
        while self.joiner.due_at_s <= until_s:
            self.clock.now_s = max(self.clock.now_s, self.joiner.due_at_s)
            self.joiner.tick()
        self.clock.now_s = until_s

    def asked(self) -> Join:
        self.joiner.tick()
        ((node, join),) = self.outbox.take(Join)
        assert node == MASTER
        return join

    def named(self, epoch: int = 1) -> SnapshotRequest:
        """The master names a delegate; what the joiner says to that one."""
        join = self.asked()
        self.joiner.delegate(Delegate(join.attempt, epoch, RELAY, "10.0.0.3:2"))
        address, request, _, _ = self.streams[-1]
        assert address == "10.0.0.3:2"
        return request

    def hear(self, body: Any) -> None:
        self.streams[-1][2](body)
        self.joiner.tick()


STARTS = pack_starts(((1, 1),))


def test_every_state_of_a_join_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(Joining)
    assert {state for moves in TRANSITIONS.values() for state in moves.values()} == set(Joining)


def test_a_join_goes_its_way() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    request = newcomer.named()
    attempt = request.attempt
    assert (request.after, request.held_from) == ("", NOWHERE)
    newcomer.hear(SnapshotBegin(attempt, 1, Position(1, 5), STARTS))
    newcomer.hear(SnapshotEntries(attempt, (Entry(Position(1, 3), put("a")),)))
    newcomer.hear(SnapshotEnd(attempt, 1, Position(1, 6)))
    assert newcomer.joiner.state is Joining.CATCHING_UP
    newcomer.replica.insert(messages(1, 6, put("b"))[0], newcomer.clock.now())
    newcomer.replica.drain(newcomer.clock.now())
    newcomer.joiner.persisted()
    assert newcomer.joiner.state is Joining.CATCHING_UP  # exact, but not persisted
    newcomer.store.sync()
    newcomer.joiner.persisted()
    newcomer.joiner.tick()
    assert newcomer.outbox.take() == [(MASTER, Ready(attempt, 1, Position(1, 6)))]
    newcomer.joiner.active(Active(attempt, 1))
    assert newcomer.joiner.state is Joining.IDLE
    assert newcomer.joiner.due_at_s == float("inf")


def test_what_is_not_answered_is_said_again_less_and_less_often() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    newcomer.wait(20.0)
    asked = len(newcomer.outbox.take(Join))
    assert 10 <= asked <= 25


def test_a_copy_that_only_lacks_its_record_joins_without_a_snapshot() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, False)
    join = newcomer.asked()
    newcomer.joiner.delegate(Delegate(join.attempt, 1, RELAY, "10.0.0.3:2"))
    newcomer.joiner.tick()
    assert newcomer.streams == []
    assert [type(body) for _, body in newcomer.outbox.take()] == [Ready]


def test_a_cut_stream_goes_on_behind_the_last_key_with_whoever_is_named_next() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    attempt = newcomer.named().attempt
    newcomer.hear(SnapshotBegin(attempt, 1, Position(1, 5), STARTS))
    newcomer.hear(SnapshotEntries(attempt, (Entry(Position(1, 3), put("a")), Entry(Position(1, 4), put("b")))))
    newcomer.streams[-1][3]("the connection broke")
    assert newcomer.joiner.state is Joining.ASKING
    newcomer.clock.now_s += 1.0
    again = newcomer.named()
    assert (again.attempt, again.after, again.held_from) == (attempt, "b", Position(1, 5))


def test_a_new_epoch_starts_the_join_again() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    attempt = newcomer.named().attempt
    newcomer.hear(SnapshotBegin(attempt, 1, Position(1, 5), STARTS))
    newcomer.hear(SnapshotEntries(attempt, (Entry(Position(1, 3), put("a")),)))
    newcomer.joiner.need(MASTER, 2, True)
    assert newcomer.given_up == 1
    newcomer.clock.now_s += 1.0
    again = newcomer.named(epoch=2)
    assert again.attempt != attempt
    assert (again.after, again.held_from) == ("", NOWHERE)


@pytest.mark.parametrize("reason", [Reason.NOT_NOW, Reason.OTHER_EPOCH, Reason.HOLD_BROKEN])
def test_a_delegate_that_refuses_leads_to_another_try(reason: Reason) -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    request = newcomer.named()
    newcomer.hear(SnapshotRefused(request.attempt, reason))
    assert newcomer.joiner.state is Joining.ASKING


def test_a_delegate_that_says_nothing_is_given_up() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    newcomer.named()
    newcomer.wait(joining.PROGRESS_S)
    assert (newcomer.joiner.state, newcomer.given_up) == (Joining.ASKING, 1)


def test_when_the_messages_since_are_gone_the_snapshot_is_dropped() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    attempt = newcomer.named().attempt
    newcomer.hear(SnapshotBegin(attempt, 1, Position(1, 5), STARTS))
    newcomer.hear(SnapshotEnd(attempt, 1, Position(1, 9)))
    newcomer.wait(joining.CATCH_UP_S + 3.0)
    assert newcomer.replica.staging is None
    assert newcomer.joiner.state is Joining.ASKING


def test_a_master_that_forgot_the_join_makes_it_begin_again() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, False)
    join = newcomer.asked()
    newcomer.joiner.delegate(Delegate(join.attempt, 1, RELAY, "10.0.0.3:2"))
    newcomer.joiner.refused(JoinRefused(join.attempt, 1, Reason.HOLD_BROKEN))
    newcomer.clock.now_s += 1.0
    newcomer.named()
    assert newcomer.joiner.state is Joining.FETCHING


def test_what_belongs_to_another_join_is_not_listened_to() -> None:
    newcomer = Newcomer()
    newcomer.joiner.need(MASTER, 1, True)
    request = newcomer.named()
    newcomer.hear(SnapshotBegin(request.attempt + 1, 1, Position(1, 5), STARTS))
    assert newcomer.replica.staging is None
    newcomer.joiner.active(Active(request.attempt + 1, 1))
    assert newcomer.joiner.state is Joining.FETCHING


# --- sending a snapshot -----------------------------------------------------------------------------------------------


class FakeStream:
    """Collects what a delegate sends; takes a frame only when the test says so, if it is slow."""

    def __init__(self, peer: int = 9, is_slow: bool = False) -> None:
        self.peer = peer
        self.sent: list[Any] = []
        self.unsent_bytes = 0
        self.on_drained: Callable[[], None] | None = None
        self._is_slow = is_slow

    def send(self, body: Any) -> None:
        self.sent.append(body)

    def send_encoded(self, kind: int, body: bytes) -> None:
        self.sent.append(SnapshotEntries.decode(body))
        self.unsent_bytes = len(body) if self._is_slow else 0

    def drain(self) -> None:
        self.unsent_bytes = 0
        if self.on_drained is not None:
            self.on_drained()

    def keys(self) -> list[str]:
        return [entry.update.key for body in self.sent if isinstance(body, SnapshotEntries) for entry in body.entries]


class Sender:
    """A delegate with many keys, following epoch 1."""

    def __init__(self, count: int = 600) -> None:
        self.keys = sorted(f"key{index}" for index in range(count))
        self.replica = filled_replica(1, *(put(key, bytes(200)) for key in self.keys))
        self.outbox = Outbox()
        self.epoch = 1
        self.delegate = DelegateSide(self.replica, self.outbox, lambda: (MASTER, self.epoch))

    def request(self, stream: FakeStream, **changes: Any) -> None:
        fields: dict[str, Any] = {"attempt": 5, "epoch": 1, "after": "", "held_from": NOWHERE, "prefixes": ()}
        self.delegate.requested(stream, SnapshotRequest(**{**fields, **changes}), 100.0)  # type: ignore[arg-type]

    def held(self, is_held: bool = True) -> None:
        self.delegate.held(Held(5, 1, is_held))


def test_nothing_is_sent_before_the_master_holds_the_messages() -> None:
    sender, stream = Sender(), FakeStream()
    sender.request(stream)
    assert stream.sent == []
    assert sender.outbox.take() == [(MASTER, Hold(5, 9, 1, sender.replica.position))]
    sender.held()
    assert stream.sent[0] == SnapshotBegin(5, 1, sender.replica.position, STARTS)
    assert stream.keys() == sender.keys
    assert stream.sent[-1] == SnapshotEnd(5, 1, sender.replica.position)


def test_the_next_frame_follows_when_the_last_has_left() -> None:
    sender, stream = Sender(), FakeStream(is_slow=True)
    sender.request(stream)
    sender.held()
    frames = 1
    while not isinstance(stream.sent[-1], SnapshotEnd):
        assert sum(isinstance(body, SnapshotEntries) for body in stream.sent) == frames
        stream.drain()
        frames += 1
    assert stream.keys() == sender.keys
    assert frames > 2


def test_a_resume_sends_only_what_is_missing() -> None:
    sender, stream = Sender(), FakeStream()
    sender.request(stream, after=sender.keys[400], held_from=Position(1, 300))
    assert sender.outbox.take() == [(MASTER, Hold(5, 9, 1, Position(1, 300)))]
    sender.held()
    assert stream.sent[0].position == Position(1, 300)
    assert stream.keys() == sender.keys[401:]


def test_a_resume_whose_messages_are_gone_begins_at_the_first_key() -> None:
    sender, stream = Sender(), FakeStream()
    sender.request(stream, after=sender.keys[400], held_from=Position(1, 300))
    sender.held(is_held=False)
    sender.delegate.tick(101.0)
    assert sender.outbox.take()[-1] == (MASTER, Hold(5, 9, 1, sender.replica.position))
    sender.held()
    assert stream.keys() == sender.keys


def test_only_what_is_subscribed_to_is_sent() -> None:
    sender, stream = Sender(), FakeStream()
    sender.request(stream, prefixes=("key1", "key59"))
    sender.held()
    assert stream.keys() == [key for key in sender.keys if key.startswith(("key1", "key59"))]


def test_the_hold_is_asked_for_again_and_not_for_ever() -> None:
    sender, stream = Sender(), FakeStream()
    sender.request(stream)
    for step in range(1, HOLD_TRIES + 2):
        sender.delegate.tick(100.0 + 1.01 * step * HOLD_RETRY_S)
    assert len(sender.outbox.take(Hold)) == HOLD_TRIES
    assert stream.sent == [SnapshotRefused(5, Reason.NOT_NOW)]


@pytest.mark.parametrize(
    ("changes", "reason"), [({"epoch": 2}, Reason.OTHER_EPOCH), ({"attempt": 0}, Reason.OTHER_EPOCH)]
)
def test_a_snapshot_of_another_epoch_is_refused(changes: dict[str, Any], reason: Reason) -> None:
    sender, stream = Sender(), FakeStream()
    sender.request(stream, **changes)
    assert [body.reason for body in stream.sent] == [reason]


def test_a_new_master_that_collects_gets_it_without_a_hold() -> None:
    sender, stream = Sender(), FakeStream()
    sender.replica.store.promise(2)
    sender.request(stream, attempt=0, epoch=2)
    assert sender.outbox.take() == []
    assert stream.keys() == sender.keys


def test_the_end_of_the_epoch_ends_what_is_being_sent() -> None:
    sender, stream = Sender(), FakeStream(is_slow=True)
    sender.request(stream)
    sender.held()
    sender.delegate.epoch_changed()
    assert stream.sent[-1] == SnapshotRefused(5, Reason.OTHER_EPOCH)
    assert stream.on_drained is None


def test_no_more_snapshots_at_once_than_the_bound() -> None:
    sender = Sender()
    streams = [FakeStream(peer=10 + index) for index in range(SNAPSHOTS_LIMIT + 1)]
    for stream in streams:
        sender.request(stream)
    assert [bool(stream.sent) for stream in streams] == [False] * SNAPSHOTS_LIMIT + [True]
    sender.delegate.ended(streams[0])  # type: ignore[arg-type]
    sender.request(streams[-1])
    assert len(streams[-1].sent) == 1


def test_a_node_without_a_copy_of_its_own_sends_none() -> None:
    stream = FakeStream()
    delegate = DelegateSide(make_replica(), Outbox(), lambda: (MASTER, 1))
    delegate.requested(stream, SnapshotRequest(5, 1, "", NOWHERE, ()), 100.0)  # type: ignore[arg-type]
    assert stream.sent == [SnapshotRefused(5, Reason.NOT_HERE)]
