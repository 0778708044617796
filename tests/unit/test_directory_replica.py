"""A node's copy: in order, without gaps, persisted, and replaced by a snapshot only as a whole."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.directory.replica import Replica
from metadata.directory.replica_store import GARBAGE_A_BATCH, ReplicaStore
from protocol.directory import NOWHERE, MalformedError, Message, Position
from protocol.directory_control import Entry
from tests.unit.directory_rig import MemoryStore, delete, filled_replica, make_replica, messages, put

LARGE = bytes(range(256)) * 20  # five messages


def entries(replica: Replica) -> dict[str, bytes]:
    return dict(replica.map.range(""))


def reopened(store: MemoryStore) -> Replica:
    return make_replica(store)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_updates_are_applied_in_their_order_whatever_order_they_come_in() -> None:
    replica = filled_replica(1)
    for message in reversed(messages(1, 2, put("a", b"1"), put("a", b"2"), delete("b"), put("b", b"3"))):
        replica.insert(message, 0.0)
        replica.drain(0.0)
    assert entries(replica) == {"a": b"2", "b": b"3"}
    assert replica.position == Position(1, 5)


def test_a_large_update_is_applied_when_its_last_part_has_come() -> None:
    replica = filled_replica(1)
    parts = messages(1, 2, put("large", LARGE))
    assert len(parts) == 5
    for message in parts[:-1]:
        replica.insert(message, 0.0)
    replica.drain(0.0)
    assert (replica.position, entries(replica)) == (Position(1, 1), {})
    replica.insert(parts[-1], 0.0)
    replica.drain(0.0)
    assert (replica.position, entries(replica)) == (Position(1, 6), {"large": LARGE})


def test_a_message_of_another_epoch_than_the_history_says_is_of_no_use() -> None:
    replica = filled_replica(1)
    assert not replica.insert(messages(2, 2, put("a"))[0], 0.0)
    assert replica.follow(((1, 1), (2, 3)))
    assert not replica.insert(messages(2, 2, put("a"))[0], 0.0)
    assert replica.insert(messages(1, 2, put("a"))[0], 0.0)
    assert replica.insert(messages(2, 3, put("b"))[0], 0.0)


def test_a_copy_with_updates_that_vanished_does_not_follow() -> None:
    replica = filled_replica(1, put("a"), put("b"))
    assert not replica.follow(((1, 1), (2, 3)))
    assert replica.follow(((1, 1), (2, 4)))


def test_parts_that_a_dead_master_did_not_finish_are_dropped_by_its_followers() -> None:
    replica = filled_replica(1, put("a"))
    for message in messages(1, 3, put("large", LARGE))[:3]:
        replica.insert(message, 0.0)
    replica.drain(0.0)
    assert replica.buffer.newest == 5
    assert replica.follow(((1, 1), (2, 3)))
    assert replica.buffer.newest == 2
    for message in messages(2, 3, put("b")):
        replica.insert(message, 0.0)
    replica.drain(0.0)
    assert entries(replica) == {"a": b"v", "b": b"v"}


def test_a_new_master_begins_after_its_last_whole_update() -> None:
    replica = filled_replica(1, put("a"))
    for message in messages(1, 3, put("large", LARGE))[:3]:
        replica.insert(message, 0.0)
    replica.drain(0.0)
    replica.begin_epoch(2)
    replica.publish(messages(2, 3, put("b")), put("b"))
    assert replica.position == Position(2, 3)
    assert replica.history.starts == ((1, 1), (2, 3))
    assert replica.queue.missing == 0


def test_an_update_that_is_not_understood_is_an_error() -> None:
    replica = filled_replica(1)
    replica.insert(Message(1, 2, 0, 1, b"?"), 0.0)
    with pytest.raises(MalformedError):
        replica.drain(0.0)


def test_watchers_hear_what_changes_and_reporters_what_is_taken() -> None:
    replica = filled_replica(1)
    heard: list[object] = []
    taken: list[Position] = []
    replica.watchers.add("a", lambda key, value: heard.append((key, value)))
    replica.on_applied = lambda position, update: taken.append(position)
    for message in messages(1, 2, put("a"), delete("a"), delete("a"), put("b")):
        replica.insert(message, 0.0)
    replica.drain(0.0)
    assert heard == [("a", b"v"), ("a", None)]
    assert taken == [Position(1, sequence) for sequence in (2, 3, 4, 5)]


# --- the store --------------------------------------------------------------------------------------------------------


def test_a_restart_finds_the_position_and_exactly_what_belongs_to_it() -> None:
    store = MemoryStore()
    replica = filled_replica(1, put("a", b"1"), put("b"), delete("b"), store=store)
    store.sync()
    again = reopened(store)
    assert entries(again) == {"a": b"1"}
    assert (again.position, again.history.starts) == (replica.position, ((1, 1),))
    assert again.store.node == replica.store.node
    assert again.store.incarnation == replica.store.incarnation + 1


def test_a_store_that_is_put_back_from_a_copy_begins_a_newer_life_than_all_that_were() -> None:
    def incarnation(least: int) -> int:
        return ReplicaStore(store, random.Random(1), lambda *_: None, lambda _: None, (), least).incarnation

    store = MemoryStore()
    assert [incarnation(least) for least in (0, 1000, 1000, 900)] == [1, 1000, 1001, 1002]


def test_a_crash_loses_the_end_and_nothing_in_the_middle() -> None:
    store = MemoryStore()
    replica = filled_replica(1, put("a"), store=store)
    store.sync()
    for message in messages(1, 3, put("b"), put("c")):
        replica.insert(message, 0.0)
        replica.drain(0.0)
    assert len(store.pending) == 1  # one batch at a time
    again = reopened(store)
    assert (entries(again), again.position) == ({"a": b"v"}, Position(1, 2))


def test_a_position_is_persisted_when_its_batch_is_synced_not_before() -> None:
    store = MemoryStore()
    told: list[Position] = []
    rng = random.Random(1)
    replica = Replica(ReplicaStore(store, rng, lambda position, _: told.append(position), lambda _: None), rng)
    replica.stage(Position(1, 1), 1, ((1, 1),))
    replica.stage_end(Position(1, 1), 0.0)
    store.sync()
    replica.insert(messages(1, 2, put("a"))[0], 0.0)
    replica.drain(0.0)
    assert told[-1] == Position(1, 1)
    assert replica.store.persisted == Position(1, 1)
    store.sync()
    assert told[-1] == replica.store.persisted == Position(1, 2)


def test_a_write_that_fails_is_the_end_and_nothing_is_persisted_after_it() -> None:
    store = MemoryStore()
    failures: list[int] = []
    rng = random.Random(1)
    replica_store = ReplicaStore(store, rng, lambda *_: None, failures.append)
    replica_store.move_to(Position(1, 1), ((1, 1),))
    replica_store.flush()
    store.fails = 5
    store.sync()
    assert (failures, replica_store.has_failed, replica_store.persisted) == ([5], True, NOWHERE)
    store.fails = 0
    replica_store.move_to(Position(1, 2), ((1, 1),))
    replica_store.flush()
    assert store.pending == []


def test_a_node_whose_first_write_fails_says_so() -> None:
    store = MemoryStore()
    store.fails = 28
    assert ReplicaStore(store, random.Random(1), lambda *_: None, lambda _: None).has_failed


def test_the_promise_survives_a_restart_and_covers_the_epoch_of_the_position() -> None:
    store = MemoryStore()
    replica = filled_replica(3, put("a"), store=store)
    assert replica.store.promised == 3
    replica.store.promise(7)
    replica.store.flush()
    store.sync()
    assert reopened(store).store.promised == 7


def test_a_copy_of_another_subscription_is_of_no_use_and_is_cleared_away() -> None:
    store = MemoryStore()
    replica = make_replica(store, ["a/"])
    replica.stage(Position(1, 1), 1, ((1, 1),))
    replica.stage_entries([Entry(Position(1, 1), put("a/1"))])
    replica.stage_end(Position(1, 1), 0.0)
    store.sync()
    assert make_replica(store, ["a/"]).position == Position(1, 1)
    other = make_replica(store, ["a/", "b/"])
    assert (other.position, entries(other)) == (NOWHERE, {})
    other.store.flush()
    store.sync()
    assert not list(store.range(b"e", b"f"))


# --- snapshots --------------------------------------------------------------------------------------------------------


def staged(replica: Replica, begin: int = 10, epoch: int = 1) -> None:
    replica.stage(Position(epoch, begin), epoch, ((epoch, 1),))


def test_a_snapshot_is_used_only_when_it_is_exact() -> None:
    replica = filled_replica(1, put("old"))
    staged(replica)
    replica.stage_entries([Entry(Position(1, 5), put("a", b"5")), Entry(Position(1, 12), put("b", b"12"))])
    replica.stage_end(Position(1, 12), 0.0)
    assert entries(replica) == {"old": b"v"}
    assert replica.queue.missing == 2
    for message in messages(1, 11, put("a", b"11"), put("b", b"12")):
        replica.insert(message, 0.0)
    replica.drain(0.0)
    assert entries(replica) == {"a": b"11", "b": b"12"}
    assert (replica.position, replica.installs) == (Position(1, 12), 2)
    replica.insert(messages(1, 13, put("c"))[0], 0.0)
    replica.drain(0.0)
    assert replica.position == Position(1, 13)


def test_a_deletion_before_the_last_entry_does_not_bring_the_key_back() -> None:
    replica = make_replica()
    staged(replica)
    for message in messages(1, 11, delete("b")):
        replica.insert(message, 0.0)
    replica.drain(0.0)  # too early: the entry is still to come
    replica.stage_entries([Entry(Position(1, 3), put("b"))])
    replica.stage_end(Position(1, 11), 0.0)
    assert (entries(replica), replica.position) == ({}, Position(1, 11))


def test_watchers_hear_how_the_snapshot_differs() -> None:
    replica = filled_replica(1, put("gone"), put("same"))
    heard: list[object] = []
    replica.watchers.add("", lambda key, value: heard.append((key, value)))
    staged(replica)
    replica.stage_entries([Entry(Position(1, 9), put("new")), Entry(Position(1, 3), put("same"))])
    replica.stage_end(Position(1, 10), 0.0)
    assert heard == [("gone", None), ("new", b"v")]


def test_a_restart_before_the_end_finds_the_old_copy_and_what_was_received() -> None:
    store = MemoryStore()
    replica = filled_replica(1, put("old"), store=store)
    staged(replica)
    replica.stage_entries([Entry(Position(1, 5), put("a"))])
    store.sync()
    again = reopened(store)
    assert entries(again) == {"old": b"v"}
    assert again.staging is not None
    assert (again.staging.after, again.staging.begin) == ("a", Position(1, 10))
    again.stage(Position(1, 10), 1, ((1, 1),))  # the delegate goes on
    again.stage_entries([Entry(Position(1, 6), put("b"))])
    again.stage_end(Position(1, 10), 0.0)
    store.sync()
    assert entries(reopened(store)) == {"a": b"v", "b": b"v"}


@pytest.mark.parametrize(("begin", "epoch"), [(11, 1), (10, 2)])
def test_a_snapshot_that_begins_elsewhere_begins_anew(begin: int, epoch: int) -> None:
    replica = make_replica()
    staged(replica)
    replica.stage_entries([Entry(Position(1, 5), put("a"))])
    staged(replica, begin, epoch)
    assert replica.staging is not None
    assert replica.staging.after == ""
    replica.stage_end(Position(epoch, begin), 0.0)
    assert entries(replica) == {}


def test_a_snapshot_that_is_given_up_leaves_nothing_behind() -> None:
    store = MemoryStore()
    replica = filled_replica(1, put("old"), store=store)
    staged(replica)
    replica.stage_entries([Entry(Position(1, 5), put("a"))])
    store.sync()
    replica.stage_drop()
    replica.store.flush()
    store.sync()
    again = reopened(store)
    assert (again.staging, entries(again)) == (None, {"old": b"v"})
    assert len(list(store.range(b"e", b"f"))) == 1


def test_the_copy_that_was_replaced_is_deleted_by_and_by() -> None:
    store = MemoryStore()
    replica = filled_replica(1, *(put(f"old{index}") for index in range(GARBAGE_A_BATCH + 10)), store=store)
    store.sync()
    staged(replica, GARBAGE_A_BATCH + 20)
    replica.stage_entries([Entry(Position(1, 5), put("a"))])
    replica.stage_end(Position(1, GARBAGE_A_BATCH + 20), 0.0)
    while store.pending:
        batch, done = store.pending.pop(0)
        assert len(batch.changes) < GARBAGE_A_BATCH + 10
        store.write(batch)
        done(0)
    assert len(list(store.range(b"e", b"f"))) == 1
    assert entries(reopened(store)) == {"a": b"v"}


@given(st.integers(0, 30), st.integers(0, 2**32))
def test_a_crash_at_any_batch_of_a_snapshot_leaves_a_copy_that_once_was(synced: int, seed: int) -> None:
    rng = random.Random(seed)
    store = MemoryStore()
    replica = filled_replica(1, *(put(f"old{index}") for index in range(3)), store=store)
    store.sync()
    before = (replica.position, entries(replica))
    staged(replica)
    new = sorted(f"new{index}" for index in range(20))
    done_batches = 0
    while new or replica.staging is not None:
        count = rng.randint(1, 5)
        if new:
            replica.stage_entries([Entry(Position(1, 9), put(key)) for key in new[:count]])
            new = new[count:]
        else:
            replica.stage_end(Position(1, 10), 0.0)
        while store.pending and done_batches < synced:
            batch, done = store.pending.pop(0)
            store.write(batch)
            done_batches += 1
            done(0)
    after = (replica.position, entries(replica))
    again = reopened(store)
    assert (again.position, entries(again)) in (before, after)


# --- filtered ---------------------------------------------------------------------------------------------------------


def test_a_filtered_stream_moves_on_over_what_was_not_subscribed_to() -> None:
    replica = filled_replica(1)
    for message in (*messages(1, 3, put("a")), *messages(1, 7, put("large", LARGE))):
        replica.take_filtered(message)
    assert replica.position == Position(1, 11)
    replica.pass_to(15)
    assert replica.position == Position(1, 15)
    replica.take_filtered(messages(1, 14, put("old"))[0])
    assert entries(replica) == {"a": b"v", "large": LARGE}


def test_a_filtered_stream_does_not_move_on_in_the_middle_of_an_update() -> None:
    replica = filled_replica(1)
    parts = messages(1, 2, put("large", LARGE))
    replica.take_filtered(parts[0])
    replica.pass_to(20)
    assert replica.position == Position(1, 1)
    for message in parts:  # the stream broke and begins with this update again
        replica.take_filtered(message)
    assert entries(replica) == {"large": LARGE}


def test_a_filtered_snapshot_misses_nothing_once_it_is_exact() -> None:
    replica = make_replica()
    staged(replica)
    replica.stage_end(Position(1, 20), 0.0)
    replica.stage_filtered(messages(1, 12, put("a"))[0])
    assert replica.installs == 0
    replica.stage_pass_to(22)
    assert (replica.position, replica.queue.missing, entries(replica)) == (Position(1, 22), 0, {"a": b"v"})
