"""LevelStore: batches are all or none and stay, damage is an OSError, failure is remembered."""

import asyncio
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plyvel
import pytest

from metadata.leveldb import NO_THREADS, LevelSettings, LevelStore
from metadata.seams import Store
from nbdserver.host.completions import Completions, Workers


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def workers(loop: asyncio.AbstractEventLoop) -> Iterator[Workers]:
    workers = Workers(Completions(loop), 1, "test")
    yield workers
    workers.close()


def finished(loop: asyncio.AbstractEventLoop, ask: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
    answer: asyncio.Future[tuple[Any, ...]] = loop.create_future()
    ask(lambda *arguments: answer.set_result(arguments))
    return loop.run_until_complete(asyncio.wait_for(answer, 10))


def filled(path: Path, workers: Workers, items: int = 100) -> LevelStore:
    store = LevelStore(str(path), workers, workers)
    batch = store.batch()
    for number in range(items):
        batch.put(b"%05d" % number, b"v%d" % number)
    store.write(batch)
    return store


def test_what_a_batch_wrote_is_there_after_reopening(tmp_path: Path, workers: Workers) -> None:
    filled(tmp_path / "db", workers).close()
    store: Store = LevelStore(str(tmp_path / "db"), workers, workers)
    assert store.get(b"00007") == b"v7"
    assert store.get(b"x") is None
    assert [key for key, _ in store.range(b"00003", b"00006")] == [b"00003", b"00004", b"00005"]
    store.close()


def test_a_range_shows_the_store_as_of_the_call(tmp_path: Path, workers: Workers) -> None:
    store = filled(tmp_path / "db", workers, 3)
    items = store.range(b"0", b"z")
    batch = store.batch()
    batch.delete(b"00001")
    batch.put(b"00009", b"new")
    store.write(batch)
    assert [key for key, _ in items] == [b"00000", b"00001", b"00002"]
    assert [key for key, _ in store.range(b"0", b"z")] == [b"00000", b"00002", b"00009"]
    store.close()


def test_many_ranges_are_read_at_once_in_any_order(tmp_path: Path, workers: Workers) -> None:
    store = filled(tmp_path / "db", workers, 5)
    found = store.ranges([(b"00003", b"z"), (b"00001", b"00001"), (b"00002", b"00001"), (b"x", b"y"), (b"0", b"00002")])
    keys = [[key for key, _ in items] for items in found]
    assert keys == [[b"00003", b"00004"], [], [], [], [b"00000", b"00001"]]
    assert store.ranges([]) == []
    store.close()
    with pytest.raises(OSError):
        store.ranges([(b"0", b"1")])


def test_later_forms_answer_on_the_loop(tmp_path: Path, workers: Workers, loop: asyncio.AbstractEventLoop) -> None:
    store = filled(tmp_path / "db", workers, 3)
    batch = store.batch()
    batch.put(b"a", b"1")
    written = store.bytes_written
    assert finished(loop, lambda done: store.write_later(batch, done)) == (0,)
    assert store.bytes_written > written
    answer = finished(loop, lambda done: store.range_later([(b"a", b"b"), (b"00001", b"00002"), (b"x", b"y")], done))
    assert answer == (0, [[(b"a", b"1")], [(b"00001", b"v1")], []])
    limited = finished(loop, lambda done: store.range_later([(b"0", b"1"), (b"a", b"b")], done, limit=2))
    assert limited == (0, [[(b"00000", b"v0"), (b"00001", b"v1")], [(b"a", b"1")]])
    store.close()


def test_a_store_that_is_open_elsewhere_says_so(tmp_path: Path, workers: Workers) -> None:
    store = filled(tmp_path / "db", workers)
    with pytest.raises(OSError, match="open in another process") as caught:
        LevelStore(str(tmp_path / "db"), workers, workers)
    assert caught.value.errno == errno.EBUSY
    store.close()


def _tables(path: Path) -> list[Path]:
    return sorted([*path.glob("*.ldb"), *path.glob("*.sst")])


def test_a_damaged_table_is_an_error_in_every_kind_of_read(
    tmp_path: Path, workers: Workers, loop: asyncio.AbstractEventLoop
) -> None:
    path = tmp_path / "db"
    store = LevelStore(str(path), workers, workers)
    batch = store.batch()
    for number in range(20000):
        batch.put(b"%05d" % number, b"value %d" % (number * 7919))
    store.write(batch)
    store.close()
    database = plyvel.DB(str(path))
    database.compact_range()
    database.close()
    for table in _tables(path):
        content = bytearray(table.read_bytes())
        for offset in range(len(content) // 4, len(content) // 2, 2048):
            content[offset + 100] ^= 0x40
        table.write_bytes(content)
    store = LevelStore(str(path), workers, workers)
    with pytest.raises(OSError, match="orrupt") as caught:
        store.get(b"07000")
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="orrupt"):
        list(store.range(b"", b"z"))
    assert finished(loop, lambda done: store.range_later([(b"", b"z")], done)) == (errno.EIO, [])
    store.close()


def test_a_damaged_manifest_is_a_clear_error(tmp_path: Path, workers: Workers) -> None:
    path = tmp_path / "db"
    filled(path, workers).close()
    (path / "CURRENT").write_text("nonsense\n")
    with pytest.raises(OSError, match="opening the store") as caught:
        LevelStore(str(path), workers, workers)
    assert caught.value.errno == errno.EIO


class _FailingBatch:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def put(self, key: bytes, value: bytes) -> None: ...

    def delete(self, key: bytes) -> None: ...

    def approximate_size(self) -> int:
        return 12

    def write(self) -> None:
        raise self.error


def test_a_store_whose_write_failed_refuses_every_later_one(
    tmp_path: Path, workers: Workers, loop: asyncio.AbstractEventLoop
) -> None:
    store = filled(tmp_path / "db", workers)
    failing = _FailingBatch(plyvel.IOError("IO error: 000005.log: No space left on device"))
    assert finished(loop, lambda done: store.write_later(failing, done)) == (errno.ENOSPC,)
    with pytest.raises(OSError, match="failed earlier"):
        store.write(store.batch())
    assert store.get(b"00001") == b"v1"
    store.close()


def test_a_closed_store_is_an_error_not_a_crash(tmp_path: Path, workers: Workers) -> None:
    store = filled(tmp_path / "db", workers)
    store.close()
    store.close()
    with pytest.raises(OSError):
        store.get(b"a")
    with pytest.raises(OSError):
        store.range(b"", b"z")


def test_a_directory_that_lost_its_current_is_refused_and_kept(tmp_path: Path) -> None:
    store = LevelStore(str(tmp_path / "db"), NO_THREADS, NO_THREADS)
    batch = store.batch()
    batch.put(b"key", b"value")
    store.write(batch)
    store.close()
    (tmp_path / "db" / "CURRENT").unlink()
    before = sorted(path.name for path in (tmp_path / "db").iterdir())
    with pytest.raises(OSError, match="CURRENT is missing"):
        LevelStore(str(tmp_path / "db"), NO_THREADS, NO_THREADS)
    assert sorted(path.name for path in (tmp_path / "db").iterdir()) == before


def test_a_crash_while_leveldb_made_its_directory_does_not_stop_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "MANIFEST-000001").write_bytes(b"half")
    LevelStore(str(tmp_path / "db"), NO_THREADS, NO_THREADS).close()


def test_a_manifest_cut_off_anywhere_is_refused_or_leaves_a_state_that_once_was(tmp_path: Path) -> None:
    """LevelDB forgets the tables that it no longer reads of, and goes on with what its log has.

    When it writes tables is its own thread's affair, so a store whose manifest cannot lose one is made anew.
    """
    outcomes: set[str] = set()
    for attempt in range(10):
        outcomes |= _outcomes_of_cutting_the_manifest(tmp_path / str(attempt))
        if "lost" in outcomes:
            return
    pytest.fail(f"no cut lost a table; outcomes were {outcomes}")


def _outcomes_of_cutting_the_manifest(directory: Path) -> set[str]:
    settings = LevelSettings(write_buffer_bytes=64 << 10)
    kept, copy = directory / "kept", directory / "copy"
    directory.mkdir()
    for numbers in (range(4), range(4, 14)):  # the second life fills one table, too few for a compaction
        store = LevelStore(str(kept), NO_THREADS, NO_THREADS, settings)
        tables = len(list(kept.glob("*.ldb")))
        for number in numbers:
            batch = store.batch()
            batch.put(b"k%03d" % number, bytes(10_000))
            store.write(batch)
        deadline_s = time.monotonic() + 10
        while len(numbers) > 4 and len(list(kept.glob("*.ldb"))) == tables and time.monotonic() < deadline_s:
            time.sleep(0.001)  # its thread fills a table
        store.close()
    manifest = max(path.name for path in kept.glob("MANIFEST*"))
    outcomes = set()
    for length in range((kept / manifest).stat().st_size):
        shutil.copytree(kept, copy)
        os.truncate(copy / manifest, length)
        try:
            store = LevelStore(str(copy), NO_THREADS, NO_THREADS, settings)
        except OSError as error:
            outcomes.add("lost" if "it lost" in str(error) else "refused")
        else:
            keys = [key for key, _ in store.range(b"k", b"l")]
            store.close()
            assert keys == [b"k%03d" % number for number in range(len(keys))]
        shutil.rmtree(copy)
    return outcomes


def test_only_the_last_links_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metadata.leveldb.LINKS_KEPT", 5)
    for _ in range(3):
        store = LevelStore(str(tmp_path), NO_THREADS, NO_THREADS)
        for _ in range(4):
            store.write(store.batch())
        assert len(list(store.range(b"\0", b"\1"))) <= 5
        store.close()
