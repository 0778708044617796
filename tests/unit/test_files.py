"""HostFiles: what it writes is there, what it cannot do it says, and its threads answer on the loop."""

import asyncio
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from metadata.seams import Files
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.files import IOVECS_PER_CALL, HostFiles


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def files(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> Iterator[HostFiles]:
    files = HostFiles(str(tmp_path), Completions(loop))
    seam: Files = files
    assert seam is files
    yield files
    files.shut_down()


def finished(loop: asyncio.AbstractEventLoop, ask: Callable[[Callable[..., None]], None]) -> tuple[Any, ...]:
    """What `ask(done)` was answered, on the loop's thread and not from inside the call."""
    answer: asyncio.Future[tuple[Any, ...]] = loop.create_future()
    asked_in = threading.get_ident()
    inside = True

    def done(*arguments: Any) -> None:
        assert threading.get_ident() == asked_in
        assert not inside
        answer.set_result(arguments)

    ask(done)
    inside = False
    return loop.run_until_complete(asyncio.wait_for(answer, 10))


def test_a_created_file_is_allocated_zeros(files: HostFiles, tmp_path: Path) -> None:
    handle = files.create("a", 1 << 20)
    assert files.size_bytes(handle) == 1 << 20
    assert (tmp_path / "a").stat().st_blocks * 512 >= 1 << 20
    assert files.read(handle, 4096, 4096) == bytes(4096)
    files.close(handle)


def opened(path: Path) -> int:
    """How many descriptors of this process are of that file."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
    return found


def test_a_file_that_is_created_in_a_thread_is_in_the_page_cache(
    files: HostFiles, loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    number, handle = finished(loop, lambda done: files.create_later("a", (2 << 20) + 5, done))
    assert number == 0
    assert finished(loop, lambda done: files.sync_directory_later("", done)) == (0,)
    cached = files.read_cached(handle, 2 << 20, 5)
    assert cached == bytes(2 << 20) or not files.answers_from_cache
    assert opened(tmp_path / "a") == 1
    files.close(handle)


def test_what_a_thread_cannot_create_it_says(files: HostFiles, loop: asyncio.AbstractEventLoop) -> None:
    assert finished(loop, lambda done: files.create_later("huge", 1 << 55, done))[1] == -1
    assert finished(loop, lambda done: files.create_later("nowhere/a", 1, done)) == (errno.ENOENT, -1)
    assert finished(loop, lambda done: files.sync_directory_later("nowhere", done)) == (errno.ENOENT,)
    assert files.list("") == []


def test_a_file_that_does_not_fit_leaves_nothing_behind(files: HostFiles) -> None:
    with pytest.raises(OSError) as caught:
        files.create("huge", 1 << 55)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert "huge" in str(caught.value)
    assert files.list("") == []


def test_an_append_of_more_buffers_than_one_call_takes_arrives_whole(files: HostFiles) -> None:
    handle = files.create("a", 1 << 16)
    buffers = [bytes([number % 251]) * (number % 7) for number in range(3 * IOVECS_PER_CALL + 5)]
    files.append(handle, buffers, 123)
    whole = b"".join(buffers)
    assert files.read(handle, len(whole), 123) == whole
    assert files.read(handle, 123, 0) == bytes(123)
    files.close(handle)


def test_an_append_that_the_kernel_cut_short_is_completed(files: HostFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = files.create("a", 1 << 16)
    real = os.pwritev

    def stingy(descriptor: int, buffers: Any, offset: int) -> int:
        return real(descriptor, [b"".join(buffers)[:5]], offset)

    monkeypatch.setattr(os, "pwritev", stingy)
    files.append(handle, [b"abc", bytearray(b"defgh"), memoryview(b"ijklmnop")], 10)
    assert files.read(handle, 16, 10) == b"abcdefghijklmnop"
    files.close(handle)


@pytest.mark.parametrize("length", [1, 512, 4096, 16384, 16385, 3 << 20])
def test_a_cached_read_gives_exactly_the_bytes_asked_for(files: HostFiles, length: int) -> None:
    handle = files.create("a", 4 << 20)
    data = os.urandom(4 << 20)
    files.append(handle, [data], 0)
    first = files.read_cached(handle, length, 77)
    if not files.answers_from_cache:
        pytest.skip("the file system of the temporary directory does not know RWF_NOWAIT")
    second = files.read_cached(handle, length, 500)
    assert first == data[77 : 77 + length]
    assert second == data[500 : 500 + length]
    files.close(handle)


def test_a_cached_read_past_the_end_is_none(files: HostFiles) -> None:
    handle = files.create("a", 5000)
    for length in (4096, 1 << 17):
        assert files.read_cached(handle, length, 4096) is None
    files.close(handle)


def test_a_cold_read_is_none_and_a_file_system_without_nowait_is_remembered(
    files: HostFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = files.create("a", 1 << 20)
    calls = []

    def fails_with(number: int) -> Callable[..., int]:
        def fail(*_: Any) -> int:
            calls.append(number)
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr(os, "preadv", fails_with(errno.EAGAIN))
    assert files.read_cached(handle, 4096, 0) is None
    assert files.answers_from_cache
    monkeypatch.setattr(os, "preadv", fails_with(errno.EOPNOTSUPP))
    assert files.read_cached(handle, 4096, 0) is None
    assert not files.answers_from_cache
    calls.clear()
    assert files.read_cached(handle, 4096, 0) is None
    assert files.read_cached(handle, 1 << 18, 0) is None
    assert calls == []
    files.close(handle)


def test_extents_that_are_fetched_are_in_the_page_cache(files: HostFiles, loop: asyncio.AbstractEventLoop) -> None:
    handle = files.create("a", 4 << 20)
    data = os.urandom(4 << 20)
    files.append(handle, [data], 0)
    extents = [(handle, 5000, 77), (handle, 4096, 1 << 20), (handle, 1 << 17, 3 << 20), (handle, 10, (4 << 20) + 5)]
    for number in range(1, len(extents) + 1):
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        assert finished(loop, lambda done, few=extents[:number]: files.fetch_later(few, done)) == ()
        if files.answers_from_cache:
            _, length, offset = extents[min(number, 3) - 1]
            assert files.read_cached(handle, length, offset) == data[offset : offset + length]
    files.close(handle)


def test_read_later_answers_each_extent_and_a_short_one_is_an_error(
    files: HostFiles, loop: asyncio.AbstractEventLoop
) -> None:
    handle = files.create("a", 10000)
    files.append(handle, [b"x" * 10, b"y" * 10], 0)
    assert finished(loop, lambda done: files.read_later(handle, [(10, 0), (5, 8)], done)) == (
        0,
        [b"x" * 10, b"xxyyy"],
    )
    assert finished(loop, lambda done: files.read_later(handle, [(10, 0), (10, 9995)], done)) == (errno.EIO, [])


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_read_from_the_device_has_what_was_written_at_any_offset_and_length(
    files: HostFiles, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, is_direct: bool
) -> None:
    content = random.Random(1).randbytes(3 * 4096)
    handle = files.create("a", 4 * 4096)
    files.append(handle, [content], 100)
    opened = os.open

    def no_direct(path: str, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return opened(path, flags, *arguments, **options)

    if not is_direct:
        monkeypatch.setattr(os, "open", no_direct)

    def read(offset: int, length: int) -> Any:
        return finished(loop, lambda done: files.read_device_later(handle, length, offset, done))

    whole = bytes(100) + content + bytes(4096)
    for offset, length in ((100, len(content)), (0, 101), (4095, 2), (4096, 4096), (5000, 1), (16383, 1)):
        assert read(offset, length) == (0, whole[offset : offset + length])
    assert read(16383, 2) == (errno.EIO, b"")
    files.close(handle)
    assert read(0, 1)[0] == errno.EBADF


def test_fdatasync_later_goes_in_order_and_stops_at_the_first_failure(
    files: HostFiles, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def sync(handle: int) -> None:
        synced.append(handle)
        if handle == 2:
            raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(os, "fdatasync", sync)
    assert finished(loop, lambda done: files.fdatasync_later([5, 4, 3], done)) == (0,)
    assert finished(loop, lambda done: files.fdatasync_later([1, 2, 3], done)) == (errno.EIO,)
    assert synced == [5, 4, 3, 1, 2]


def test_a_prepared_file_is_written_and_synced_with_its_directory(
    files: HostFiles, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.make_directory("segments")
    synced: list[bool] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    number, handle = finished(loop, lambda done: files.prepare_later("segments/1", (2 << 20) + 5, done))
    assert number == 0
    assert files.size_bytes(handle) == (2 << 20) + 5
    assert synced == [False, True]
    files.close(handle)


def test_a_prepared_file_that_fails_is_gone_and_says_why(
    files: HostFiles, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished(loop, lambda done: files.prepare_later("huge", 1 << 55, done))[1] == -1

    def sync(descriptor: int) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(os, "fsync", sync)
    assert finished(loop, lambda done: files.prepare_later("a", 4096, done)) == (errno.EIO, -1)
    assert files.list("") == []


def test_files_are_renamed_listed_and_unlinked(files: HostFiles, loop: asyncio.AbstractEventLoop) -> None:
    files.make_directory("segments")
    for name in ("b", "a"):
        files.close(files.create(f"segments/{name}", 0))
    files.rename("segments/a", "segments/c")
    files.sync_directory("segments")
    assert files.list("segments") == ["b", "c"]
    files.unlink("segments/b")
    assert finished(loop, lambda done: files.unlink_later("segments/c", done)) == (0,)
    assert finished(loop, lambda done: files.unlink_later("segments/c", done)) == (errno.ENOENT,)
    assert files.list("segments") == []
    assert files.free_bytes() > 0


def test_many_completions_wake_the_loop_once(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes: list[Any] = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda callback: wakes.append(callback))
    completions = Completions(loop)
    seen: list[int] = []
    for number in range(100):
        completions.post(seen.append, (number,))
    assert len(wakes) == 1
    wakes[0]()
    assert seen == list(range(100))
    completions.post(seen.append, (100,))
    assert len(wakes) == 2


def test_a_completion_that_fails_costs_the_others_nothing(loop: asyncio.AbstractEventLoop) -> None:
    completions = Completions(loop)
    reported: list[Any] = []
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    workers = Workers(completions, 1, "test")

    def broken() -> tuple[int]:
        raise ValueError("a defect")

    workers.run(lambda number: None, broken)
    assert finished(loop, lambda done: workers.run(done, lambda: (5,))) == (5,)
    assert [str(error) for error in reported] == ["a defect"]
    workers.close()
