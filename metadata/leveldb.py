"""The Store seam over LevelDB (plyvel): ordered keys and values that are opaque here.

Theory: maps and tables change in memory and reach LevelDB once a checkpoint, as one atomic, synced batch; reads are
ranges around a missing map page. Both wait for a device, so both have a form that runs in threads.

Rules of this file
- A directory with LevelDB files and no CURRENT is refused: LevelDB would begin anew and delete them.
- Batches are numbered, each by a key of its own (`_LINK`), of which the last LINKS_KEPT stay. A cut-off MANIFEST
  makes LevelDB forget whole tables without a word; then numbers are missing in the middle, and the store is refused.
  What it lost at its end only is a state that once was: replaying the log from there is right.
- Keys of callers begin with a byte above zero.
- Paranoid checks when opening, checksums verified on every read. Whatever LevelDB reports becomes an OSError: ENOSPC
  where its text says so, EIO otherwise, with its text.
- A store whose write failed refuses every later one. LevelDB itself does so after a failed sync, but not after every
  failed append, and a log with a hole in it would lose what follows.
- No Bloom filters: ranges do not ask them, and they take 1.25 bytes a key, in memory too while a table is open.
- Threads come from outside (`Offload`), so that families can share them; this file starts none.

Known weakness: LevelDB compacts in a thread of its own, at its own time, and its read-only state after an error ends
only by opening it anew.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import plyvel

from metadata.seams import Batch, Done
from protocol.invariant import InvariantError

Items = list[tuple[bytes, bytes]]

LINKS_KEPT = 1 << 16
"""More than the smallest batches that one of LevelDB's logs holds, so that some are left on both sides of a gap."""
_LINK = b"\x00link"


class Offload(Protocol):
    """Threads beside the loop: `work(*arguments)` runs in one of them, `done` gets the tuple it returns on the loop."""

    def run(self, done: Callable[..., None], work: Callable[..., tuple[Any, ...]], *arguments: Any) -> None: ...


class _NoThreads:
    """Of a store that is read and written on the caller's thread: nothing is handed to another."""

    def run(self, done: Callable[..., None], work: Callable[..., tuple[Any, ...]], *arguments: Any) -> None:
        raise InvariantError("this store has no threads")


NO_THREADS = _NoThreads()


@dataclass(frozen=True)
class LevelSettings:
    """How one LevelDB is opened."""

    block_cache_bytes: int = 8 * 1024 * 1024  # map pages have a cache of their own above it
    write_buffer_bytes: int = 16 * 1024 * 1024  # a checkpoint's batch should fit
    file_bytes: int = 8 * 1024 * 1024
    open_files: int = 500


class LevelStore:
    """One LevelDB directory, made if it is missing.

    `readers` may have several threads; `writer` must have one, which several stores may share. Raises OSError(EBUSY) if
    another process has it open, OSError(EIO) if it is damaged.
    """

    def __init__(self, path: str, readers: Offload, writer: Offload, settings: LevelSettings | None = None) -> None:
        settings = settings or LevelSettings()
        self.path = path
        self.bytes_written = 0
        """Size of the batches written since opening: what we asked for, not what compaction made of it."""
        self._readers = readers
        self._writer = writer
        self._failure: OSError | None = None
        self._in_flight = 0
        self._idle = threading.Condition()
        _refuse_remains(path)
        try:
            self._db = plyvel.DB(
                path,
                create_if_missing=True,
                paranoid_checks=True,
                lru_cache_size=settings.block_cache_bytes,
                write_buffer_size=settings.write_buffer_bytes,
                max_file_size=settings.file_bytes,
                max_open_files=settings.open_files,
            )
        except plyvel.Error as error:
            if "lock" in str(error).lower() and "CURRENT" not in str(error):
                raise OSError(errno.EBUSY, f"the store {path} is open in another process: {error}") from error
            _fail(error, f"opening the store {path}")
        try:
            self._last_link = self._check_links()
        except BaseException:
            self._db.close()
            raise

    def _check_links(self) -> int:
        """The number of the last batch; OSError(EIO) if one before it is missing."""
        first = last = 0
        for key, _ in self.range(_LINK, _LINK + b"\xff" * 9):
            number = int.from_bytes(key[len(_LINK) :], "big")
            if last and number != last + 1:
                raise OSError(
                    errno.EIO, f"the store {self.path} is damaged: it lost batches {last + 1} to {number - 1}"
                )
            first, last = first or number, number
        if first != max(min(last, 1), last - LINKS_KEPT + 1):
            raise OSError(errno.EIO, f"the store {self.path} is damaged: it lost the batches before {first}")
        return last

    def get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key, verify_checksums=True)
        except (plyvel.Error, RuntimeError) as error:
            _fail(error, f"reading the store {self.path}")
        return value

    def range(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Items with start <= key < stop, as of the call; they do not displace what the block cache holds."""
        try:
            items = self._db.iterator(start=start, stop=stop, verify_checksums=True, fill_cache=False)
        except (plyvel.Error, RuntimeError) as error:
            _fail(error, f"reading the store {self.path}")
        return self._walk(items)

    def _walk(self, items: Any) -> Iterator[tuple[bytes, bytes]]:
        try:
            yield from items
        except (plyvel.Error, RuntimeError) as error:
            _fail(error, f"reading the store {self.path}")
        finally:
            items.close()

    def ranges(self, ranges: Sequence[tuple[bytes, bytes]]) -> list[Items]:
        """The items of each range, waiting; cheapest when the ranges come in the order of keys."""
        try:
            return self._seek(ranges, 0, fill_cache=False)
        except (plyvel.Error, RuntimeError) as error:
            _fail(error, f"reading the store {self.path}")

    def range_later(
        self, ranges: Sequence[tuple[bytes, bytes]], done: Callable[[int, list[Items]], None], limit: int = 0
    ) -> None:
        """Read the items of each range, at most `limit` of each (0: all), in a thread; `done(errno, items of each)`."""
        self._start()
        self._readers.run(done, self._read_ranges, tuple(ranges), limit)

    def batch(self) -> Batch:
        batch: Batch = self._db.write_batch(sync=True)
        return batch

    def write(self, batch: Batch) -> None:
        """Apply and sync, waiting. OSError: what became of it is unknown until the store is opened anew."""
        if self._failure is not None:
            raise OSError(self._failure.errno, f"the store {self.path} failed earlier: {self._failure.strerror}")
        level_batch: Any = batch
        size_bytes = level_batch.approximate_size()
        number = self._last_link = self._last_link + 1
        try:
            level_batch.put(_link(number), b"")
            level_batch.delete(_link(max(0, number - LINKS_KEPT)))
            level_batch.write()
        except (plyvel.Error, RuntimeError) as error:
            try:
                _fail(error, f"writing to the store {self.path}")
            except OSError as failure:
                self._failure = failure
                raise
        self.bytes_written += size_bytes

    def write_later(self, batch: Batch, done: Done) -> None:
        """Apply and sync in the writer's thread; `done(errno)`."""
        self._start()
        self._writer.run(done, self._write_batch, batch)

    def close(self) -> None:
        """Wait for what is under way, then close. Idempotent."""
        with self._idle:
            self._idle.wait_for(lambda: self._in_flight == 0)
        self._db.close()

    # What the threads do. plyvel lets go of the GIL in every step of an iterator and for the whole of a write.

    def _read_ranges(self, ranges: tuple[tuple[bytes, bytes], ...], limit: int) -> tuple[int, list[Items]]:
        try:
            return (0, self._seek(ranges, limit, fill_cache=True))
        except (plyvel.Error, RuntimeError) as error:
            return (_errno(error), [])
        finally:
            self._finish()

    def _seek(self, ranges: Sequence[tuple[bytes, bytes]], limit: int, fill_cache: bool) -> list[Items]:
        """One iterator for all: to make one costs as much as to find a key with it."""
        found: list[Items] = []
        with self._db.iterator(verify_checksums=True, fill_cache=fill_cache) as items:
            for start, stop in ranges:
                items.seek(start)
                part: Items = []
                for item in items:
                    if item[0] >= stop:
                        break
                    part.append(item)
                    if len(part) == limit:
                        break
                found.append(part)
        return found

    def _write_batch(self, batch: Batch) -> tuple[int]:
        try:
            self.write(batch)
            return (0,)
        except OSError as error:
            return (error.errno or errno.EIO,)
        finally:
            self._finish()

    def _start(self) -> None:
        with self._idle:
            self._in_flight += 1

    def _finish(self) -> None:
        with self._idle:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.notify_all()


def _link(number: int) -> bytes:
    return _LINK + number.to_bytes(8, "big")


def _refuse_remains(path: str) -> None:
    """LevelDB takes a directory without CURRENT for an empty one and deletes what is in it: OSError(EIO) instead.

    A crash while LevelDB made the directory can leave a MANIFEST without CURRENT, but no log and no table.
    """
    names = os.listdir(path) if os.path.isdir(path) else []
    if "CURRENT" not in names and any(name.endswith((".ldb", ".sst", ".log")) for name in names):
        raise OSError(errno.EIO, f"the store {path} is damaged: its file CURRENT is missing, the others are there")


def _errno(error: Exception) -> int:
    return errno.ENOSPC if "No space left on device" in str(error) else errno.EIO


def _fail(error: Exception, doing: str) -> NoReturn:
    raise OSError(_errno(error), f"{doing}: {error}") from error
