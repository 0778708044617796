"""What a watcher on etcd hears when responses come in fragments, twice, or end in the middle."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from metadata.etcd_grpc import rpc
from metadata.etcd_watch import EtcdWatch
from metadata.registry_calls import Event, Reading
from nbdserver.host.clock import HostClock

NAMESPACE = "test/"


class Stream:
    """One watch stream: sends what the script says, then ends."""

    def __init__(self, script: "Script") -> None:
        self._script = script

    async def write(self, request: Any) -> None:
        self._script.asked_from.append(request.create_request.start_revision)

    async def __aiter__(self) -> AsyncIterator[Any]:
        for response in self._script.streams.pop(0) if self._script.streams else ():
            yield response
        if not self._script.streams:
            self._script.has_ended.set()
            await asyncio.sleep(60)

    def cancel(self) -> None:
        pass


class Script:
    """An etcd connection whose watch streams are written down beforehand."""

    def __init__(self, *streams: list[Any], revision: int = 1) -> None:
        self.streams = list(streams)
        self.revision = revision
        self.readings = 0
        self.asked_from: list[int] = []
        self.notes: list[str] = []
        self.has_ended = asyncio.Event()
        self.settings = SimpleNamespace(namespace=NAMESPACE, user=None, backoff_max_s=1.0)
        self.version_key = b"test/registry-version"
        self.life = 0

    async def link(self, deadline: float | None) -> Any:
        return SimpleNamespace(watch=SimpleNamespace(Watch=lambda metadata: Stream(self)), metadata=())

    async def call(self, *_: object) -> Any:
        return SimpleNamespace(header=SimpleNamespace(revision=1000))

    async def read_range(self, prefix: str) -> Reading:
        self.readings += 1
        return Reading(self.revision, ((f"{prefix}there", b"already"),))

    async def pause(self, failures: int) -> None:
        await asyncio.sleep(0)

    def deadline(self) -> float:
        return 0.0

    def note(self, error: str) -> None:
        self.notes.append(error)

    async def run(self, after: int | None = None) -> list[Event]:
        """Return what a watcher of "w/" hears until the last stream is at its end."""
        heard: list[Event] = []
        loop = asyncio.get_running_loop()
        connection: Any = self
        watch = EtcdWatch(connection, HostClock(loop), loop, self.read_range, "w/", heard.append, after)
        await asyncio.wait_for(self.has_ended.wait(), 10)
        await asyncio.sleep(0)
        watch.cancel()
        return heard


def put(revision: int, name: str, value: bytes = b"") -> Any:
    return rpc.Event(type="PUT", kv=rpc.KeyValue(key=f"{NAMESPACE}{name}".encode(), value=value, mod_revision=revision))


def delete(revision: int, name: str) -> Any:
    return rpc.Event(type="DELETE", kv=rpc.KeyValue(key=f"{NAMESPACE}{name}".encode(), mod_revision=revision))


def response(*events: Any, revision: int = 0, **fields: Any) -> Any:
    header = rpc.ResponseHeader(revision=revision or max((event.kv.mod_revision for event in events), default=0))
    return rpc.WatchResponse(header=header, events=events, **fields)


CREATED = response(created=True)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_a_stream_that_ended_goes_on_one_revision_later(loop: asyncio.AbstractEventLoop) -> None:
    async def check() -> None:
        script = Script([CREATED, response(put(2, "w/a"), put(3, "w/b"))], [CREATED, response(delete(4, "w/a"))])
        heard = await script.run()
        assert [(event.revision, event.is_reset) for event in heard] == [(1, True), (2, False), (3, False), (4, False)]
        assert heard[3].changes == (("w/a", None),)
        assert (script.asked_from, script.readings) == ([2, 4], 1)

    loop.run_until_complete(check())


def test_a_registry_that_was_made_anew_is_read_anew_however_far_it_is(loop: asyncio.AbstractEventLoop) -> None:
    class Recovered(Script):
        async def pause(self, failures: int) -> None:
            self.life = 1

    async def check() -> None:
        script = Recovered([CREATED, response(put(2, "w/a"))], [CREATED])
        assert [event.is_reset for event in await script.run()] == [True, False, True]
        assert script.readings == 2

    loop.run_until_complete(check())


def test_what_comes_twice_is_heard_once(loop: asyncio.AbstractEventLoop) -> None:
    async def check() -> None:
        again = response(put(2, "w/a"), put(2, "w/b"), put(3, "w/a"))
        script = Script([CREATED, again, again], [CREATED, again, response(put(3, "w/a"), put(4, "w/a"))])
        assert [event.revision for event in (await script.run())[1:]] == [2, 3, 4]

    loop.run_until_complete(check())


def test_fragments_are_put_together_before_any_of_them_is_heard(loop: asyncio.AbstractEventLoop) -> None:
    async def check() -> None:
        first, second = response(put(2, "w/a"), fragment=True), response(put(2, "w/b"), put(3, "w/c"))
        whole = Script([CREATED, first, second])
        assert [len(event.changes) for event in (await whole.run())[1:]] == [2, 1]
        torn = Script([CREATED, first], [CREATED, first, second])
        assert [len(event.changes) for event in (await torn.run())[1:]] == [2, 1]
        assert torn.asked_from == [2, 2]

    loop.run_until_complete(check())


def test_progress_moves_the_revision_on_though_nothing_is_heard(loop: asyncio.AbstractEventLoop) -> None:
    async def check() -> None:
        script = Script([CREATED, response(revision=40)], [CREATED])
        assert len(await script.run(after=7)) == 0
        assert script.asked_from == [8, 41]

    loop.run_until_complete(check())


def test_a_compacted_revision_is_a_reset_and_any_other_end_is_not(loop: asyncio.AbstractEventLoop) -> None:
    async def check() -> None:
        script = Script(
            [CREATED, response(put(2, "w/a"))],
            [response(created=True, canceled=True, cancel_reason="permission denied")],
            [CREATED, response(canceled=True, compact_revision=9)],
            [CREATED],
            revision=20,
        )
        heard = await script.run(after=1)
        assert [(event.revision, event.is_reset) for event in heard] == [(2, False), (20, True)]
        assert script.asked_from == [2, 3, 3, 21]
        assert "permission denied" in " ".join(script.notes)

    loop.run_until_complete(check())


def test_the_registrys_own_key_is_not_heard_of(loop: asyncio.AbstractEventLoop) -> None:
    async def check() -> None:
        script = Script([CREATED, response(put(2, "registry-version")), response(put(3, "w/a"))])
        assert [event.revision for event in (await script.run())[1:]] == [3]

    loop.run_until_complete(check())


@pytest.mark.parametrize("seed", range(50))
def test_however_streams_are_cut_every_revision_is_heard_once_and_whole(
    loop: asyncio.AbstractEventLoop, seed: int
) -> None:
    async def check() -> None:
        rng = random.Random(seed)
        history = [put(revision, f"w/{key}") for revision in range(2, 30) for key in range(rng.randint(1, 3))]
        streams = []
        reached = 2
        while reached < 30:
            start = rng.randint(max(2, reached - 3), reached)
            rest = [event for event in history if event.kv.mod_revision >= start]
            stop = rng.randint(1, len(rest))
            parts, stream = rest[:stop], [CREATED]
            while parts:
                size = rng.randint(1, len(parts))
                is_cut = size < len(parts) and parts[size].kv.mod_revision == parts[size - 1].kv.mod_revision
                stream.append(response(*parts[:size], fragment=is_cut or (size == len(parts) and stop < len(rest))))
                parts = parts[size:]
            whole = [part for part in stream if not part.fragment and part.events]
            reached = max(reached, *(part.events[-1].kv.mod_revision + 1 for part in whole)) if whole else reached
            streams.append(stream)
        heard = (await Script(*streams).run())[1:]
        assert [event.revision for event in heard] == list(range(2, 30))
        assert sum(len(event.changes) for event in heard) == len(history)

    loop.run_until_complete(check())
