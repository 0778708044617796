"""The registry as a data process has it: asked over the channel, told of what it watches, and nothing else."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from metadata.embedded_registry import EmbeddedRegistry
from metadata.leveldb import NO_THREADS, LevelStore
from metadata.registry_calls import Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.registry_table import RegistryTable
from metadata.replica_set import Member, ReplicaSet
from nbdserver.host.clock import HostClock
from nbdserver.node.channel import Channel
from nbdserver.node.channel_registry import EVENT, ChannelRegistry, RegistryDesk, RegistryVisit
from tests.data_rig import KeptInMemory

KEY, OTHER = "replicas/aa", "replicas/bb"


class End:
    """A data process's end of the channel, and the visit that answers it."""

    def __init__(self, desk: RegistryDesk) -> None:
        self._desk = desk
        self.visit: RegistryVisit
        self.registry: ChannelRegistry
        self._channels: list[Channel] = []

    async def open(self) -> "End":
        control, data = socket.socketpair()

        async def nothing(name: str, arguments: dict[str, Any]) -> Any:
            raise AssertionError("the control process asks nothing here")

        def note(kind: str, fields: dict[str, Any]) -> None:
            assert kind == EVENT
            self.registry.heard(fields)

        async def answer(name: str, arguments: dict[str, Any]) -> Any:
            return await self.visit.answer(name, arguments)

        self._channels = [
            await Channel.connect(control, answer, lambda kind, fields: None, lambda: None),
            await Channel.connect(data, nothing, note, lambda: None),
        ]
        self.visit = self._desk.visit(self._channels[0].notify)
        self.registry = ChannelRegistry(self._channels[1].call)
        return self

    async def get(self, key: str) -> Reading | Unavailable:
        told: asyncio.Future[Reading | Unavailable] = asyncio.get_running_loop().create_future()
        self.registry.get_later(key, told.set_result)
        return await asyncio.wait_for(told, 5)

    async def swap(self, *changes: Change) -> Swap:
        told: asyncio.Future[Swap] = asyncio.get_running_loop().create_future()
        self.registry.swap_later(changes, told.set_result)
        return await asyncio.wait_for(told, 5)

    async def close(self) -> None:
        self.visit.close()
        for channel in self._channels:
            await channel.close()


class Rig:
    def __init__(self, directory: Path) -> None:
        store = LevelStore(str(directory / "registry"), NO_THREADS, NO_THREADS)
        self.registry = EmbeddedRegistry(RegistryTable(store), HostClock(asyncio.get_running_loop()))
        self.kept = KeptInMemory()
        self.desk = RegistryDesk(self.registry, self.kept)
        self.ends: list[End] = []

    async def end(self) -> End:
        self.ends.append(await End(self.desk).open())
        return self.ends[-1]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        for end in self.ends:
            await end.close()
        self.desk.close()
        self.registry.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Rig], Coroutine[Any, Any, None]]], None]:
    def tell(story: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            rig = Rig(tmp_path)
            await story(rig)
            await rig.close()

        asyncio.run(whole())

    return tell


Run = Callable[[Callable[[Rig], Coroutine[Any, Any, None]]], None]


def test_what_is_swapped_is_read_whatever_bytes_it_has(run: Run) -> None:
    async def story(rig: Rig) -> None:
        end = await rig.end()
        value = bytes(range(256))
        assert (await end.swap(Change(KEY, None, value))).outcome is Outcome.SWAPPED
        reading = await end.get(KEY)
        assert isinstance(reading, Reading)
        assert reading.items == ((KEY, value),)
        assert (await end.swap(Change(KEY, b"another", b"new"))).outcome is Outcome.LOST
        assert (await end.swap(Change(KEY, value, None))).outcome is Outcome.SWAPPED
        reading = await end.get(KEY)
        assert isinstance(reading, Reading)
        assert reading.items == ()

    run(story)


def test_what_a_data_process_acts_on_is_kept_first_and_what_is_older_than_that_is_no_answer(run: Run) -> None:
    async def story(rig: Rig) -> None:
        end = await rig.end()
        old = ReplicaSet(1, "n1", (Member("n1", 1),), ("n1", "n2"), number=7)
        new = old.changed(epoch=2)
        await end.swap(Change(KEY, None, old.encode()))
        await end.swap(Change(KEY, old.encode(), new.encode()))
        assert rig.kept.sets == {"aa": new}
        assert isinstance(await end.get(KEY), Reading)
        rig.registry.swap_later([Change(KEY, new.encode(), old.encode())], lambda swap: None)  # it was put back
        answer = await end.get(KEY)
        assert isinstance(answer, Unavailable)
        assert "earlier state" in answer.reason
        assert rig.kept.sets == {"aa": new}

    run(story)


def test_what_adds_a_member_is_noted_before_it_is_asked_for_and_nothing_else_is(run: Run) -> None:
    async def story(rig: Rig) -> None:
        end = await rig.end()
        one = ReplicaSet(1, "n1", (Member("n1", 1),), ("n1", "n2"), number=7)
        two, moved = one.with_member(Member("n2", 5)), one.with_member(Member("n1", 2))
        await end.swap(Change(KEY, None, one.encode()))
        await end.swap(Change(KEY, one.encode(), moved.encode()))
        assert rig.kept.asked == {}
        assert (await end.swap(Change(KEY, one.encode(), two.encode()))).outcome is Outcome.LOST
        assert rig.kept.asked == {"aa": two}
        assert rig.kept.sets == {"aa": moved}

    run(story)


def test_nobody_acts_on_an_answer_that_was_on_its_way_when_what_is_kept_was_told(run: Run) -> None:
    async def story(rig: Rig) -> None:
        end = await rig.end()
        old = ReplicaSet(1, "n1", (Member("n1", 1),), ("n1",), number=7)
        await end.swap(Change(KEY, None, old.encode()))
        honest = rig.kept.keep_set

        async def keep_slowly(family_id: str, value: bytes) -> bool:
            rig.desk.has_told()
            return await honest(family_id, value)

        rig.kept.keep_set = keep_slowly  # type: ignore[method-assign]
        assert (await end.swap(Change(KEY, old.encode(), old.changed().encode()))).outcome is Outcome.UNKNOWN
        assert isinstance(await end.get(KEY), Unavailable)
        rig.kept.keep_set = honest  # type: ignore[method-assign]
        assert isinstance(await end.get(KEY), Reading)

    run(story)


def test_a_watch_hears_what_is_there_and_what_changes_below_its_prefix(run: Run) -> None:
    async def story(rig: Rig) -> None:
        one, other = await rig.end(), await rig.end()
        await one.swap(Change(KEY, None, b"1"))
        heard: list[Event] = []
        watch = other.registry.watch(KEY, heard.append)
        await rig.until(lambda: bool(heard))
        assert heard[0].is_reset
        assert heard[0].changes == ((KEY, b"1"),)
        await one.swap(Change(KEY, b"1", b"2"), Change(OTHER, None, b"x"))
        await one.swap(Change(OTHER, b"x", b"y"))
        await one.swap(Change(KEY, b"2", None))
        await rig.until(lambda: len(heard) > 2)
        assert [event.changes for event in heard[1:]] == [((KEY, b"2"),), ((KEY, None),)]
        watch.cancel()
        watch.cancel()
        await one.swap(Change(KEY, None, b"3"))
        await other.get(KEY)
        assert len(heard) == 3

    run(story)


def test_without_the_control_process_a_swap_is_unknown_and_a_read_unavailable(run: Run) -> None:
    async def story(rig: Rig) -> None:
        end = await rig.end()
        await end.close()
        assert (await end.swap(Change(KEY, None, b"1"))).outcome is Outcome.UNKNOWN
        assert isinstance(await end.get(KEY), Unavailable)

    run(story)


def test_what_a_registry_does_not_take_is_told_and_changes_nothing(run: Run) -> None:
    async def story(rig: Rig) -> None:
        end = await rig.end()
        swap = await end.swap(Change(KEY, None, b"1"), Change(KEY, None, b"2"))
        assert swap.outcome is Outcome.UNKNOWN
        assert "twice" in swap.reason
        reading = await end.get(KEY)
        assert isinstance(reading, Reading)
        assert reading.items == ()
        with pytest.raises(ValueError, match="watches replica sets"):
            await end.visit.answer("registry_watch", {"watch": 1, "prefix": "family/"})

    run(story)


def test_a_registry_that_is_closed_does_not_answer(run: Run) -> None:
    async def story(rig: Rig) -> None:
        end = await rig.end()
        rig.registry.close()
        assert isinstance(await end.get(KEY), Unavailable)
        assert (await end.swap(Change(KEY, None, b"1"))).outcome is Outcome.NOT_DONE

    run(story)
