"""The directory's map, its history of epochs and its failure detector."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.directory.history import History
from metadata.directory.map import DirectoryMap, Watchers
from metadata.directory.suspicion import HIGH, LOW, Suspicion
from protocol.directory import HISTORY_LIMIT, NOWHERE, Action, Position, Update
from protocol.directory_control import Entry
from protocol.invariant import InvariantError


def put(key: str, value: bytes = b"v") -> Update:
    return Update(Action.PUT, key, value)


def delete(key: str) -> Update:
    return Update(Action.DELETE, key)


CHANGES = st.lists(
    st.tuples(st.sampled_from([Action.PUT, Action.DELETE]), st.sampled_from(["a", "ab", "b", "é", "\U0010ffff"])),
    max_size=40,
)


@given(CHANGES, st.sampled_from(["", "a", "ab", "c", "é", "\U0010ffff"]))
def test_the_map_is_what_its_updates_say_in_the_order_of_the_keys(
    changes: list[tuple[Action, str]], prefix: str
) -> None:
    directory, model = DirectoryMap(), dict[str, bytes]()
    for sequence, (action, key) in enumerate(changes, 1):
        value = b"%d" % sequence
        directory.apply(Position(1, sequence), Update(action, key, value))
        if action is Action.PUT:
            model[key] = value
        else:
            model.pop(key, None)
    expected = sorted((key, value) for key, value in model.items() if key.startswith(prefix))
    assert directory.range(prefix) == expected
    assert len(directory) == len(model)
    assert all(directory.get(key) == value for key, value in model.items())


@given(CHANGES, st.randoms(use_true_random=False))
def test_a_snapshot_read_while_its_source_changes_is_exact_once_replayed(
    changes: list[tuple[Action, str]], rng: random.Random
) -> None:
    updates = [Update(action, key, b"%d" % index) for index, (action, key) in enumerate(changes)]
    begin = rng.randint(0, len(updates))
    source, end = DirectoryMap(), begin
    for sequence in range(begin):
        source.apply(Position(1, sequence + 1), updates[sequence])
    copy, after = DirectoryMap(), ""
    while entries := source.after(after, rng.randint(1, 2)):
        for entry in entries:
            copy.insert(entry)
        after = entries[-1].update.key
        for _ in range(rng.randint(0, 3)):
            if end < len(updates):
                source.apply(Position(1, end + 1), updates[end])
                end += 1
    for sequence in range(begin, end):
        copy.apply(Position(1, sequence + 1), updates[sequence])
    assert list(copy.entries()) == list(source.entries())


def test_an_update_that_is_not_newer_changes_nothing() -> None:
    directory = DirectoryMap([Entry(Position(1, 5), put("a", b"new"))])
    assert not directory.apply(Position(1, 5), put("a", b"same"))
    assert not directory.apply(Position(1, 4), delete("a"))
    assert directory.get("a") == b"new"
    assert directory.apply(Position(1, 6), delete("a"))
    assert not directory.apply(Position(1, 7), delete("a"))


def test_differences_name_what_was_put_changed_and_deleted() -> None:
    old = DirectoryMap([Entry(Position(1, 1), put(key)) for key in "abc"])
    new = DirectoryMap([Entry(Position(1, 2), put("b", b"x")), *(Entry(Position(1, 1), put(key)) for key in "cd")])
    assert list(old.differences(new)) == [("a", None), ("b", b"x"), ("d", b"v")]


def test_a_watcher_hears_of_its_prefix_until_it_ends() -> None:
    watchers, heard = Watchers(), list[tuple[str, bytes | None]]()
    end = watchers.add("a/", lambda key, value: heard.append((key, value)))
    watchers.tell("a/1", b"x")
    watchers.tell("b/1", b"x")
    watchers.tell("a/1", None)
    end()
    end()
    watchers.tell("a/1", b"y")
    assert heard == [("a/1", b"x"), ("a/1", None)]


def test_a_watch_ended_by_another_watcher_hears_nothing_more() -> None:
    watchers, heard = Watchers(), list[str]()
    ends = []
    watchers.add("", lambda key, value: ends[0]())
    ends.append(watchers.add("", lambda key, value: heard.append(key)))
    watchers.tell("a", b"")
    assert heard == []


# --- history ----------------------------------------------------------------------------------------------------------

HISTORY = History(((2, 10), (5, 20)))


@pytest.mark.parametrize(
    ("position", "is_on_it"),
    [
        (NOWHERE, False),
        (Position(1, 9), False),  # from before what is known
        (Position(2, 10), True),
        (Position(2, 19), True),
        (Position(2, 20), False),  # it has a message that vanished with its master
        (Position(3, 20), False),
        (Position(5, 20), True),
        (Position(5, 99), True),
        (Position(5, 19), False),
        (Position(6, 30), False),
    ],
)
def test_a_node_is_on_a_history_or_has_something_else(position: Position, is_on_it: bool) -> None:
    assert HISTORY.has(position) is is_on_it


def test_only_the_last_epochs_are_kept() -> None:
    history = History()
    for epoch in range(1, HISTORY_LIMIT + 3):
        history = history.begun(epoch, 10 * epoch)
    assert len(history.starts) == HISTORY_LIMIT
    assert history.epoch_of(29) == 0
    assert history.epoch_of(30) == 3


def test_an_epoch_begins_where_the_copy_ends_whatever_epochs_it_had_heard_of() -> None:
    assert HISTORY.begun(6, 20).starts == ((2, 10), (6, 20))


@pytest.mark.parametrize("start", [(5, 30), (4, 30)])
def test_epochs_and_their_starts_rise(start: tuple[int, int]) -> None:
    with pytest.raises(InvariantError):
        HISTORY.begun(*start)


# --- suspicion --------------------------------------------------------------------------------------------------------


def heard(intervals: list[float]) -> tuple[Suspicion, float]:
    now_s = 100.0
    suspicion = Suspicion(1.0, now_s)
    for interval in intervals:
        now_s += interval
        suspicion.heard(now_s)
    return suspicion, now_s


def test_a_regular_pulse_is_missed_after_a_few_beats() -> None:
    suspicion, now_s = heard([1.0] * 50)
    assert not suspicion.suspects(now_s + LOW - 0.01)
    assert suspicion.suspects(now_s + LOW)


def test_an_irregular_pulse_is_waited_for_longer_but_not_for_ever() -> None:
    suspicion, now_s = heard([0.2, 3.0] * 50)
    assert not suspicion.suspects(now_s + LOW + 1)
    assert suspicion.suspects(now_s + HIGH)


def test_a_long_silence_does_not_make_the_next_one_less_alarming() -> None:
    suspicion, now_s = heard([1.0] * 50 + [1000.0])
    assert suspicion.suspects(now_s + LOW)


def test_losing_a_third_of_the_beats_raises_no_suspicion() -> None:
    rng = random.Random(5)
    suspicion, now_s = heard([1.0] * 10)
    alarms = 0
    for _ in range(10_000):
        now_s += 1.0
        alarms += suspicion.suspects(now_s - 0.001)
        if rng.random() > 0.3:
            suspicion.heard(now_s)
    assert alarms / 10_000 < 0.01
