"""The embedded registry keeps every registry's promises, and those that only a registry on a disk can break."""

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata.embedded_registry import EmbeddedRegistry
from metadata.leveldb import NO_THREADS, LevelStore
from metadata.registry_calls import Change, Event, Outcome, Unavailable
from metadata.registry_table import RegistryTable
from tests.registry_conformance import Holder, RegistryConformance, Watcher, must_swap, read, read_range, swap
from tests.simulation.world import SimulatedClock, World


class EmbeddedRig:
    """A registry in a directory, in virtual time; it can be closed and opened again, or left open by a crash."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._world = World(0)
        self._store: LevelStore | None = None
        self.open()

    def open(self) -> None:
        """Begin a new life of the process: the timers of the former one are gone."""
        self.end()
        self._store = LevelStore(str(self._directory / "registry"), NO_THREADS, NO_THREADS)
        self.clock = SimulatedClock(self._world)
        self.table = RegistryTable(self._store)
        self.registry = self.other = EmbeddedRegistry(self.table, self.clock)

    def end(self) -> None:
        if self._store:
            self._store.close()

    def run_until(self, holds: Callable[[], bool]) -> None:
        assert self.clock.run_until(holds)

    def run_for(self, duration_s: float) -> None:
        self.clock.run(duration_s)

    def stand_still(self, duration_s: float) -> None:
        self._world.now_s += duration_s


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EmbeddedRig]:
    rig = EmbeddedRig(tmp_path)
    yield rig
    rig.end()


class TestEmbeddedRegistry(RegistryConformance):
    """The sentences of tests/registry_conformance.py."""


def test_a_new_life_has_what_was_swapped_but_no_lease(rig: EmbeddedRig) -> None:
    holder = Holder(rig, ttl_s=60)
    must_swap(rig, ("a", None, b"1"))
    assert swap(rig, Change("l/a", None, b"", holder.lease.id)).outcome is Outcome.SWAPPED
    last = swap(rig, Change("l/b", None, b"", holder.lease.id), Change("b", None, b"2")).revision
    rig.open()
    found = read_range(rig, "")
    assert found.items == (("a", b"1"), ("b", b"2"))
    assert found.revision > last, "who watched hears that the keys went"
    watcher = Watcher(rig, "", after=last)
    rig.run_until(lambda: bool(watcher.events))
    assert watcher.state == dict(found.items)
    rig.open()
    assert read_range(rig, "") == found


def test_who_changes_the_table_at_once_is_heard_by_watchers(rig: EmbeddedRig) -> None:
    watcher = Watcher(rig, "f/")
    assert asyncio.run(rig.table.compare_and_swap([("f/a", None, b"1"), ("g", None, b"2")]))
    rig.run_until(lambda: watcher.state == {"f/a": b"1"})


def test_a_damaged_value_is_an_answer_without_a_value(rig: EmbeddedRig) -> None:
    must_swap(rig, ("a", None, b"1"), ("b", None, b"2"))
    store = rig._store
    assert store
    batch = store.batch()
    batch.put(b"a", random.Random(0).randbytes(20))
    store.write(batch)
    answers: list[object] = []
    rig.registry.get_later("a", answers.append)
    rig.registry.range_later("", answers.append)
    rig.run_until(lambda: len(answers) == 2)
    assert all(isinstance(answer, Unavailable) and "damaged" in answer.reason for answer in answers)
    assert swap(rig, Change("a", b"1", b"3")).outcome is Outcome.UNKNOWN
    with pytest.raises(OSError, match="damaged"):
        rig.registry.watch("", answers.append)
    assert "damaged" in rig.registry.health().last_error
    assert read(rig, "b") == b"2"


def test_a_write_that_failed_is_unknown_and_settled_by_a_new_life(
    rig: EmbeddedRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    must_swap(rig, ("a", None, b"1"))
    heard: list[Event] = []
    rig.registry.watch("", heard.append)
    store = rig._store
    assert store
    write = store.write

    def write_and_fail(batch: object) -> None:
        write(batch)  # type: ignore[arg-type]
        raise OSError(5, "the device is gone")

    monkeypatch.setattr(store, "write", write_and_fail)
    answer = swap(rig, Change("a", b"1", b"2"))
    assert (answer.outcome, "device is gone" in answer.reason) == (Outcome.UNKNOWN, True)
    rig.open()
    assert swap(rig, Change("a", b"1", b"2")).outcome is Outcome.LOST
    assert read(rig, "a") == b"2"


def test_the_keys_of_a_lost_lease_go_when_the_store_takes_writes_again(
    rig: EmbeddedRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder(rig)
    assert swap(rig, Change("l/a", None, b"", holder.lease.id)).outcome is Outcome.SWAPPED
    failures = [OSError(28, "no room"), OSError(28, "no room")]
    remove = rig.table.remove

    def fail_at_first(keys: list[str]) -> None:
        if failures:
            raise failures.pop()
        remove(keys)

    monkeypatch.setattr(rig.table, "remove", fail_at_first)
    rig.stand_still(3)
    rig.run_for(1.5)
    assert (read(rig, "l/a"), holder.losses) == (b"", 1)
    rig.run_for(2)
    assert read(rig, "l/a") is None
