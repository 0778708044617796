"""The twins do what the real ones do: one story, told to both."""

import asyncio
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metadata.leveldb import LevelStore
from metadata.seams import Files, Store
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.files import HostFiles
from tests.simulation.faults import FaultMix
from tests.simulation.simulated_files import SimulatedDrive, SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import SimulatedClock, World

Ask = Callable[[Callable[..., None]], None]
Finished = Callable[[Ask], tuple[Any, ...]]
Host = tuple[Files, Store, Finished]


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Host]:
    loop = asyncio.new_event_loop()
    completions = Completions(loop)
    (tmp_path / "files").mkdir()
    files = HostFiles(str(tmp_path / "files"), completions)
    workers = Workers(completions, 1, "test")
    store = LevelStore(str(tmp_path / "maps"), workers, workers)

    def finished(ask: Ask) -> tuple[Any, ...]:
        answer: asyncio.Future[tuple[Any, ...]] = loop.create_future()
        ask(lambda *arguments: answer.set_result(arguments))
        return loop.run_until_complete(asyncio.wait_for(answer, 10))

    yield files, store, finished
    store.close()
    workers.close()
    files.shut_down()
    loop.close()


@pytest.fixture
def twin() -> Host:
    world = World(1)
    clock = SimulatedClock(world)
    files = SimulatedFiles(SimulatedDrive(world, 1 << 30), clock, FaultMix(cold_read=0.0))
    store = SimulatedStore(SimulatedTable(world), clock, files.mix, files.world_ends)

    def finished(ask: Ask) -> tuple[Any, ...]:
        answers: list[tuple[Any, ...]] = []
        ask(lambda *arguments: answers.append(arguments))
        assert clock.run_until(lambda: bool(answers))
        return answers[0]

    return files, store, finished


def _errno(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


def _tell_files(files: Files, finished: Finished) -> list[object]:
    said: list[object] = []
    files.make_directory("segments")
    files.sync_directory(".")
    handle = files.create("segments/1", 10000)
    said.append(_errno(lambda: files.create("segments/1", 5)))
    said.append(_errno(lambda: files.create("nowhere/1", 5)))
    said.append(_errno(lambda: files.open("segments/2")))
    said.append(_errno(lambda: files.unlink("segments/2")))
    said.append(_errno(lambda: files.list("nowhere")))
    files.append(handle, [b"abc", bytearray(b""), memoryview(b"def")], 9000)
    said.append(files.read(handle, 2000, 8998))
    said.append(files.read(handle, 10, 20000))
    said.append(files.read_cached(handle, 6, 9000))
    said.append(files.read_cached(handle, 6, 9996))
    files.append(handle, [b"grown"], 9998)
    said.append(files.size_bytes(handle))
    said.append(finished(lambda done: files.read_later(handle, [(3, 9000), (5, 9998)], done)))
    said.append(finished(lambda done: files.read_later(handle, [(3, 9000), (6, 9998)], done)))
    said.append(finished(lambda done: files.read_device_later(handle, 5, 9998, done)))
    said.append(finished(lambda done: files.read_device_later(handle, 6, 9998, done)))
    said.append(finished(lambda done: files.fdatasync_later([handle], done)))
    files.fdatasync([handle])
    number, prepared = finished(lambda done: files.prepare_later("segments/2", 5000, done))
    said += [number, files.size_bytes(prepared), files.read(prepared, 5000, 0) == bytes(5000)]
    said.append(finished(lambda done: files.prepare_later("segments/2", 5000, done)))
    number, made = finished(lambda done: files.create_later("segments/4", 5000, done))
    said += [number, files.size_bytes(made), files.read(made, 5000, 0) == bytes(5000)]
    files.close(made)
    said.append(finished(lambda done: files.create_later("segments/4", 5000, done)))
    said.append(finished(lambda done: files.sync_directory_later("segments", done)))
    files.rename("segments/1", "segments/3")
    said += [files.list("segments"), files.list(""), files.list(".")]
    files.unlink("segments/3")
    said.append(files.read(handle, 6, 9000))  # it lives as long as its handle
    said.append(finished(lambda done: files.unlink_later("segments/2", done)))
    said.append(finished(lambda done: files.unlink_later("segments/2", done)))
    said.append(files.list("segments"))
    files.close(handle)
    files.close(prepared)
    said.append(files.free_bytes() > 0)
    return said


def test_the_file_twin_answers_like_the_real_one(real: Host, twin: Host) -> None:
    answers = _tell_files(real[0], real[2])
    if answers[7] is None:
        pytest.skip("the file system of the temporary directory does not know RWF_NOWAIT")
    assert answers == _tell_files(twin[0], twin[2])
    assert errno.EEXIST in answers
    assert answers.count(errno.ENOENT) == 4  # the fifth came from a thread


def _tell_store(store: Store, finished: Finished) -> list[object]:
    said: list[object] = []
    batch = store.batch()
    for number in (3, 1, 2, 5):
        batch.put(b"k%d" % number, b"v%d" % number)
    batch.put(b"k1", b"again")
    batch.delete(b"k5")
    batch.delete(b"never there")
    store.write(batch)
    items = store.range(b"k1", b"k3")
    second = store.batch()
    second.delete(b"k2")
    second.put(b"k2", b"deleted and put")
    said.append(finished(lambda done: store.write_later(second, done)))
    said.append(list(items))  # as of the call
    said += [store.get(b"k2"), store.get(b"k5")]
    said.append(finished(lambda done: store.range_later([(b"k", b"z"), (b"k2", b"k2"), (b"x", b"y")], done)))
    said.append(finished(lambda done: store.range_later([(b"k", b"z"), (b"k2", b"z")], done, limit=1)))
    said.append(list(store.range(b"k3", b"k1")))
    said.append(store.ranges([(b"k2", b"z"), (b"k", b"k2"), (b"k3", b"k1")]))
    return said


def test_the_store_twin_answers_like_the_real_one(real: Host, twin: Host) -> None:
    assert _tell_store(real[1], real[2]) == _tell_store(twin[1], twin[2])
