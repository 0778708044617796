"""What every registry promises, as sentences: the same ones run on the embedded one, on etcd and on the simulator's.

A subclass gives the fixture `rig`. Nothing here knows how time goes by in it.
"""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import pytest

from metadata.registry_calls import (
    MAX_SWAP_BYTES,
    VERSION_KEY,
    Change,
    Event,
    Outcome,
    Reading,
    Swap,
    Unavailable,
)
from metadata.seams import Clock, Lease, Registry, Watch

SHORT_TTL_S = 2.0


class Rig(Protocol):
    """One registry, seen by two of its users (they may be the same)."""

    registry: Registry
    other: Registry
    clock: Clock

    def run_until(self, holds: Callable[[], bool]) -> None:
        """Let things happen until `holds()`; fail when it takes too long."""

    def run_for(self, duration_s: float) -> None:
        """Let things happen for so long."""

    def stand_still(self, duration_s: float) -> None:
        """Let time go by, but nothing happen in this process."""


def read(rig: Rig, key: str, registry: Registry | None = None) -> bytes | None:
    answers: list[Reading | Unavailable] = []
    (registry or rig.registry).get_later(key, answers.append)
    rig.run_until(lambda: bool(answers))
    assert isinstance(answers[0], Reading)
    return answers[0].items[0][1] if answers[0].items else None


def wait_until_gone(rig: Rig, key: str) -> None:
    for _ in range(100):
        if read(rig, key) is None:
            return
        rig.run_for(0.05)
    raise AssertionError(f"{key} is still there")


def read_range(rig: Rig, prefix: str) -> Reading:
    answers: list[Reading | Unavailable] = []
    rig.registry.range_later(prefix, answers.append)
    rig.run_until(lambda: bool(answers))
    assert isinstance(answers[0], Reading)
    return answers[0]


def swap(rig: Rig, *changes: Change, registry: Registry | None = None) -> Swap:
    answers: list[Swap] = []
    (registry or rig.registry).swap_later(changes, answers.append)
    rig.run_until(lambda: bool(answers))
    return answers[0]


def must_swap(rig: Rig, *changes: tuple[str, bytes | None, bytes | None]) -> int:
    answer = swap(rig, *(Change(*change) for change in changes))
    assert answer.outcome is Outcome.SWAPPED, answer
    return answer.revision


class Holder:
    """Someone who takes a lease."""

    def __init__(self, rig: Rig, ttl_s: float = SHORT_TTL_S) -> None:
        self.losses = 0
        answers: list[Lease | Unavailable] = []
        asked_s = rig.clock.now()
        rig.registry.grant_later(ttl_s, self._lost, answers.append)
        rig.run_until(lambda: bool(answers))
        assert not isinstance(answers[0], Unavailable)
        self.lease: Lease = answers[0]
        assert asked_s < self.lease.valid_until_s < rig.clock.now() + ttl_s

    def _lost(self) -> None:
        self.losses += 1


class Watcher:
    """Someone who watches, and what that shows: `state` is the range as the events tell it."""

    def __init__(self, rig: Rig, prefix: str, after: int | None = None, state: dict[str, bytes] | None = None) -> None:
        self.events: list[Event] = []
        self.state = dict(state or {})
        self._last = after or 0
        self.watch: Watch = rig.other.watch(prefix, self._changed, after)

    def _changed(self, event: Event) -> None:
        self.events.append(event)
        if event.is_reset:
            assert event.revision >= self._last
            self.state.clear()
        else:
            assert event.revision > self._last, "in order, each once"
        self._last = event.revision
        for key, value in event.changes:
            if value is None:
                del self.state[key]
            else:
                self.state[key] = value


class RegistryConformance:
    """Subclass it and give a `rig`."""

    # Swaps and reads

    def test_a_swap_changes_all_of_its_keys_or_none(self, rig: Rig) -> None:
        must_swap(rig, ("a", None, b"1"), ("b", None, b"2"))
        assert swap(rig, Change("a", b"1", b"3"), Change("b", b"wrong", b"4")).outcome is Outcome.LOST
        assert (read(rig, "a"), read(rig, "b")) == (b"1", b"2")
        must_swap(rig, ("a", b"1", None), ("b", b"2", b"5"), ("c", None, b"6"))
        assert [read(rig, key) for key in "abc"] == [None, b"5", b"6"]

    def test_absence_is_an_expectation_and_an_empty_value_is_not_absence(self, rig: Rig) -> None:
        must_swap(rig, ("a", None, b""))
        assert read(rig, "a") == b""
        assert swap(rig, Change("a", None, b"2")).outcome is Outcome.LOST
        assert swap(rig, Change("b", b"", b"2")).outcome is Outcome.LOST
        must_swap(rig, ("a", b"", b"2"), ("b", None, b"3"))
        must_swap(rig, ("a", b"2", b""), ("b", b"3", None))
        assert (read(rig, "a"), read(rig, "b")) == (b"", None)

    def test_what_one_swapped_the_other_reads(self, rig: Rig) -> None:
        must_swap(rig, ("a", None, b"1"))
        assert read(rig, "a", rig.other) == b"1"
        assert swap(rig, Change("a", b"1", b"2"), registry=rig.other).outcome is Outcome.SWAPPED
        assert read(rig, "a") == b"2"

    def test_a_range_has_what_begins_with_the_prefix_in_the_order_of_the_bytes(self, rig: Rig) -> None:
        keys = ["f/b", "f/a", "f", "f0", "g/a", "f/", "f/é", "f/\U0001f4be", "f/\uffff", "f/Z"]
        revision = must_swap(rig, *((key, None, key.encode()) for key in keys))
        found = read_range(rig, "f/")
        expected = sorted((key for key in keys if key.startswith("f/")), key=str.encode)
        assert found.items == tuple((key, key.encode()) for key in expected)
        assert found.revision == revision
        assert [key for key, _ in read_range(rig, "").items] == sorted(keys, key=str.encode)
        assert read_range(rig, "nothing/").items == ()

    def test_a_long_range_is_whole(self, rig: Rig) -> None:
        values = {f"long/{number:05}": random.Random(number).randbytes(8000) for number in range(1500)}
        items = list(values.items())
        for first in range(0, len(items), 60):
            must_swap(rig, *((key, None, value) for key, value in items[first : first + 60]))
        assert dict(read_range(rig, "long/").items) == values
        watcher = Watcher(rig, "long/")
        rig.run_until(lambda: bool(watcher.events))
        assert watcher.state == values

    def test_the_largest_value_passes_and_a_larger_one_is_refused_at_once(self, rig: Rig) -> None:
        value = random.Random(0).randbytes(MAX_SWAP_BYTES - 1)
        must_swap(rig, ("a", None, value))
        assert read(rig, "a") == value
        with pytest.raises(ValueError, match="at most"):
            rig.registry.swap_later([Change("a", None, value + b"more")], _never)

    @pytest.mark.parametrize("key", ["", "a\0b", VERSION_KEY, "x" * 513, "\ud800"])
    def test_a_key_that_no_registry_takes_is_refused_at_once(self, rig: Rig, key: str) -> None:
        with pytest.raises(ValueError):
            rig.registry.get_later(key, _never)
        with pytest.raises(ValueError):
            rig.registry.swap_later([Change(key, None, b"1")], _never)

    @pytest.mark.parametrize("prefix", ["\0", "x" * 513, "\ud800"])
    def test_a_prefix_that_no_registry_takes_is_refused_at_once(self, rig: Rig, prefix: str) -> None:
        with pytest.raises(ValueError):
            rig.registry.range_later(prefix, _never)
        with pytest.raises(ValueError):
            rig.registry.watch(prefix, _never)

    def test_of_many_who_swap_against_the_same_value_one_wins(self, rig: Rig) -> None:
        must_swap(rig, ("a", None, b"start"))
        answers: list[tuple[int, Swap]] = []
        for number in range(20):
            registry = rig.registry if number % 2 else rig.other
            change = Change("a", b"start", str(number).encode())
            registry.swap_later([change], lambda answer, number=number: answers.append((number, answer)))
        assert not answers, "no callback comes from inside a call"
        rig.run_until(lambda: len(answers) == 20)
        winners = [number for number, answer in answers if answer.outcome is Outcome.SWAPPED]
        assert len(winners) == 1
        assert all(answer.outcome is Outcome.LOST for number, answer in answers if number not in winners)
        assert read(rig, "a") == str(winners[0]).encode()

    def test_a_check_writes_nothing_and_decides(self, rig: Rig) -> None:
        revision = must_swap(rig, ("a", None, b"1"))
        watcher = Watcher(rig, "")
        rig.run_until(lambda: bool(watcher.events))
        assert swap(rig, Change("a", b"1", b"1"), Change("b", None, None)) == Swap(Outcome.SWAPPED, revision)
        assert swap(rig, Change("a", b"2", b"2"), Change("b", None, b"1")).outcome is Outcome.LOST
        assert swap(rig, Change("c", b"1", b"1"), Change("b", None, b"1")).outcome is Outcome.LOST
        must_swap(rig, ("a", b"1", b"1"), ("b", None, b"1"))
        rig.run_until(lambda: "b" in watcher.state)
        assert [event.changes for event in watcher.events] == [(("a", b"1"),), (("b", b"1"),)]

    def test_revisions_rise_with_every_swap(self, rig: Rig) -> None:
        revisions = [must_swap(rig, (f"k{number % 3}/{number}", None, b"")) for number in range(6)]
        assert revisions == sorted(set(revisions))
        assert read_range(rig, "").revision == revisions[-1]

    # Watches

    def test_a_watch_begins_with_the_range_as_it_is(self, rig: Rig) -> None:
        must_swap(rig, ("w/a", None, b"1"), ("w/b", None, b"2"), ("x", None, b"3"))
        watcher = Watcher(rig, "w/")
        assert not watcher.events, "no callback comes from inside a call"
        rig.run_until(lambda: bool(watcher.events))
        assert (watcher.events[0].is_reset, watcher.state) == (True, {"w/a": b"1", "w/b": b"2"})
        empty = Watcher(rig, "nothing/")
        rig.run_until(lambda: bool(empty.events))
        assert (empty.events[0].is_reset, empty.events[0].changes) == (True, ())

    def test_a_watcher_hears_every_swap_once_in_order_and_whole(self, rig: Rig) -> None:
        watcher = Watcher(rig, "w/")
        rig.run_until(lambda: bool(watcher.events))
        for number in range(10):
            old = str(number - 1).encode() if number else None
            changes = [("w/a", old, str(number).encode()), (f"w/{number}", None, b""), (f"x/{number}", None, b"")]
            must_swap(rig, *changes)
        must_swap(rig, ("w/a", b"9", None))
        rig.run_until(lambda: len(watcher.events) == 12)
        assert [sorted(event.changes) for event in watcher.events[1:11]] == [
            sorted([("w/a", str(number).encode()), (f"w/{number}", b"")]) for number in range(10)
        ]
        assert watcher.events[11].changes == (("w/a", None),)
        assert not any(event.is_reset for event in watcher.events[1:])

    def test_a_watch_after_a_revision_misses_nothing(self, rig: Rig) -> None:
        first = must_swap(rig, ("w/a", None, b"1"))
        must_swap(rig, ("w/a", b"1", b"2"))
        must_swap(rig, ("w/b", None, b"3"))
        last = must_swap(rig, ("w/c", None, b"4"))
        behind = Watcher(rig, "w/", after=first, state={"w/a": b"1"})
        state = {"w/a": b"2", "w/b": b"3", "w/c": b"4"}
        rig.run_until(lambda: behind.state == state)
        abreast = Watcher(rig, "w/", after=last, state=state)
        must_swap(rig, ("w/d", None, b"5"))
        rig.run_until(lambda: "w/d" in abreast.state and "w/d" in behind.state)
        assert abreast.state == behind.state == state | {"w/d": b"5"}

    def test_a_watch_after_a_revision_that_never_was_begins_with_the_range_as_it_is(self, rig: Rig) -> None:
        """What was remembered is of a registry that has been put back to an older state."""
        revision = must_swap(rig, ("w/a", None, b"1"))
        events: list[Event] = []
        rig.other.watch("w/", events.append, after=revision + 1000)
        rig.run_until(lambda: bool(events))
        assert (events[0].is_reset, events[0].changes) == (True, (("w/a", b"1"),))
        must_swap(rig, ("w/a", b"1", b"2"))
        rig.run_until(lambda: len(events) == 2)
        assert events[1].changes == (("w/a", b"2"),)

    def test_a_cancelled_watch_hears_nothing_more(self, rig: Rig) -> None:
        never = Watcher(rig, "w/")
        never.watch.cancel()
        watcher, witness = Watcher(rig, "w/"), Watcher(rig, "w/")
        rig.run_until(lambda: bool(watcher.events) and bool(witness.events))
        watcher.watch.cancel()
        watcher.watch.cancel()
        must_swap(rig, ("w/a", None, b"1"))
        rig.run_until(lambda: "w/a" in witness.state)
        assert (len(watcher.events), never.events) == (1, [])

    def test_who_cancels_inside_its_own_event_hears_nothing_more(self, rig: Rig) -> None:
        heard: list[Event] = []

        def hear(event: Event) -> None:
            heard.append(event)
            watch.cancel()

        watch = rig.other.watch("w/", hear)
        witness = Watcher(rig, "w/")
        rig.run_until(lambda: bool(heard) and bool(witness.events))
        must_swap(rig, ("w/a", None, b"1"))
        rig.run_until(lambda: "w/a" in witness.state)
        assert len(heard) == 1

    # Leases

    def test_a_lease_is_renewed_for_as_long_as_it_is_wanted(self, rig: Rig) -> None:
        holder = Holder(rig)
        assert swap(rig, Change("l/a", None, b"1", holder.lease.id)).outcome is Outcome.SWAPPED
        first_s = holder.lease.valid_until_s
        rig.run_for(SHORT_TTL_S * 1.6)
        assert rig.clock.now() < holder.lease.valid_until_s
        assert holder.lease.valid_until_s > first_s
        assert (read(rig, "l/a"), holder.losses) == (b"1", 0)

    def test_a_released_lease_takes_its_keys_with_it(self, rig: Rig) -> None:
        holder = Holder(rig, ttl_s=60)
        bound = [Change(f"l/{name}", None, b"", holder.lease.id) for name in "ab"]
        assert swap(rig, *bound, Change("l/c", None, b"")).outcome is Outcome.SWAPPED
        watcher = Watcher(rig, "l/")
        rig.run_until(lambda: len(watcher.state) == 3)
        holder.lease.release()
        holder.lease.release()
        assert holder.lease.valid_until_s == 0
        rig.run_until(lambda: list(watcher.state) == ["l/c"])
        assert swap(rig, Change("l/d", None, b"", holder.lease.id)).outcome is Outcome.NOT_DONE
        assert (read(rig, "l/a"), holder.losses) == (None, 0)

    def test_who_stands_still_past_the_lease_has_lost_it_and_knows(self, rig: Rig) -> None:
        holder = Holder(rig)
        assert swap(rig, Change("l/a", None, b"1", holder.lease.id)).outcome is Outcome.SWAPPED
        watcher = Watcher(rig, "l/")
        rig.run_until(lambda: bool(watcher.state))
        until_s = holder.lease.valid_until_s
        rig.stand_still(SHORT_TTL_S + 0.1)
        assert holder.lease.valid_until_s == until_s < rig.clock.now(), "known before anything was heard"
        rig.run_until(lambda: holder.losses > 0 and not watcher.state)
        assert (holder.losses, holder.lease.valid_until_s, read(rig, "l/a")) == (1, 0, None)
        assert swap(rig, Change("l/b", None, b"", holder.lease.id)).outcome is Outcome.NOT_DONE
        again = Holder(rig)
        assert swap(rig, Change("l/a", None, b"2", again.lease.id)).outcome is Outcome.SWAPPED
        rig.run_for(0.2)
        assert holder.losses == 1

    def test_a_key_that_is_written_without_the_lease_stays(self, rig: Rig) -> None:
        holder = Holder(rig, ttl_s=60)
        bound = [Change(f"l/{name}", None, b"1", holder.lease.id) for name in "abc"]
        assert swap(rig, *bound).outcome is Outcome.SWAPPED
        must_swap(rig, ("l/a", b"1", b"2"), ("l/b", b"1", b"1"))
        holder.lease.release()
        wait_until_gone(rig, "l/c")
        assert read_range(rig, "l/").items == (("l/a", b"2"),)

    def test_a_key_can_be_bound_without_being_changed(self, rig: Rig) -> None:
        must_swap(rig, ("l/a", None, b"1"))
        first, second = Holder(rig, ttl_s=60), Holder(rig, ttl_s=60)
        assert swap(rig, Change("l/a", b"1", b"1", first.lease.id)).outcome is Outcome.SWAPPED
        assert swap(rig, Change("l/a", b"1", b"1", second.lease.id)).outcome is Outcome.SWAPPED
        must_swap(rig, ("l/b", None, b"1"))
        first.lease.release()
        rig.run_for(0.2)
        assert read(rig, "l/a") == b"1"
        second.lease.release()
        wait_until_gone(rig, "l/a")

    def test_a_lease_that_no_registry_gives_is_refused_at_once(self, rig: Rig) -> None:
        for ttl_s in (0.0, 1.0, 1e9, float("nan")):
            with pytest.raises(ValueError, match="a lease lasts"):
                rig.registry.grant_later(ttl_s, _never, _never)

    # The end

    def test_a_closed_registry_answers_that_it_is_closed(self, rig: Rig) -> None:
        holder, watcher = Holder(rig), Watcher(rig, "")
        must_swap(rig, ("a", None, b"1"))
        rig.run_until(lambda: "a" in watcher.state)
        assert rig.registry.health().is_connected
        heard = len(watcher.events)
        rig.registry.close()
        rig.other.close()
        rig.registry.close()
        answers: list[object] = []
        rig.registry.get_later("a", answers.append)
        rig.registry.range_later("", answers.append)
        rig.registry.grant_later(10, _never, answers.append)
        rig.registry.swap_later([Change("a", b"1", b"2")], answers.append)
        rig.registry.watch("", _never)
        assert not answers, "no callback comes from inside a call"
        rig.run_until(lambda: len(answers) == 4)
        assert all(isinstance(answer, Unavailable) and "closed" in answer.reason for answer in answers[:3])
        assert isinstance(answers[3], Swap)
        assert answers[3].outcome is Outcome.NOT_DONE
        assert not rig.registry.health().is_connected
        rig.run_for(SHORT_TTL_S + 0.5)
        assert (len(watcher.events), holder.losses) == (heard, 0)

    # Everything at once

    @pytest.mark.parametrize("seed", range(3))
    def test_any_history_is_that_of_a_map(self, rig: Rig, seed: int) -> None:
        rng = random.Random(seed)
        model: dict[str, bytes] = {}
        watcher = Watcher(rig, "m/")
        for step in range(60):
            changes = [self._draw(rng, model, key, step) for key in rng.sample("abcdefgh", rng.randint(1, 4))]
            holds = all(model.get(change.key) == change.expected for change in changes)
            answer = swap(rig, *changes, registry=rng.choice([rig.registry, rig.other]))
            assert answer.outcome is (Outcome.SWAPPED if holds else Outcome.LOST)
            if holds:
                _apply(model, changes)
        assert dict(read_range(rig, "m/").items) == model
        rig.run_until(lambda: watcher.state == model)

    @staticmethod
    def _draw(rng: random.Random, model: dict[str, bytes], name: str, step: int) -> Change:
        key = f"m/{name}"
        expected = model.get(key) if rng.random() < 0.9 else rng.choice([None, b"", b"other"])
        new = rng.choice([None, b"", f"{step}".encode(), expected])
        return Change(key, expected, new)


def _apply(model: dict[str, bytes], changes: Sequence[Change]) -> None:
    for change in changes:
        if change.new is None:
            model.pop(change.key, None)
        else:
            model[change.key] = change.new


def _never(*_: object) -> None:
    raise AssertionError("this must not be called")
