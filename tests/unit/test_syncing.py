"""Where syncs are made: in a thread, or on the loop while one client alone is served and the device is quick."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserver.host import syncing
from nbdserver.host.completions import Completions
from nbdserver.host.syncing import ALONE_S, QUICK_S, QUICK_SYNCS, Syncer


class Rig:
    """A syncer on a loop, whose syncs take as long as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = asyncio.new_event_loop()
        self.completions = Completions(self.loop)
        self.completions.alone_since_s = time.monotonic() - 2 * ALONE_S
        self.syncer = Syncer(self.completions)
        self.took_s = 0.0
        self.errno = 0
        self.synced: list[int] = []
        self.begun: list[int] = []  # given to the device before the sync
        self.thread = threading.main_thread()
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)
        monkeypatch.setattr(syncing, "_sync_file_range", lambda handle, *_range: self.begun.append(handle))

    def _fdatasync(self, handle: int) -> None:
        self.thread = threading.current_thread()
        if self.errno:
            raise OSError(self.errno, "no")
        time.sleep(self.took_s)
        self.synced.append(handle)

    def sync(self, *handles: int) -> int:
        """The errno."""
        answer = self.loop.create_future()
        self.syncer.run(handles, answer.set_result)
        assert not answer.done(), "answered from inside the call"
        return int(self.loop.run_until_complete(answer))

    @property
    def was_on_loop(self) -> bool:
        return self.thread is threading.main_thread()

    def make_quick(self) -> None:
        deadline_s = time.monotonic() + 60
        while not self.was_on_loop or not self.synced:
            self.sync(1)
            assert time.monotonic() < deadline_s, "no sync was ever made on the loop"


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(monkeypatch)
    yield rig
    rig.syncer.close()
    rig.loop.close()


def test_the_first_syncs_are_made_in_a_thread(rig: Rig) -> None:
    for _ in range(QUICK_SYNCS):
        assert rig.sync(1) == 0
        assert not rig.was_on_loop


def test_a_lone_client_of_a_quick_device_has_its_syncs_on_the_loop(rig: Rig) -> None:
    rig.make_quick()
    rig.sync(3, 4)
    assert rig.synced[-2:] == [3, 4]


def test_the_device_is_given_the_data_before_the_loop_does_anything_else(rig: Rig) -> None:
    rig.make_quick()
    rig.synced, rig.begun = [], []
    answer = rig.loop.create_future()
    rig.syncer.run([3, 4], answer.set_result)
    assert rig.begun == [3, 4]
    assert rig.synced == []
    rig.loop.run_until_complete(answer)
    assert rig.synced == [3, 4]


def test_data_that_is_given_to_the_device_early_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"durable")
        assert syncing._sync_file_range(file.fileno(), 0, 0, syncing._SYNC_FILE_RANGE_WRITE) == 0
        os.fdatasync(file.fileno())
    assert path.read_bytes() == b"durable"


def test_beside_another_client_they_are_made_in_a_thread(rig: Rig) -> None:
    rig.make_quick()
    rig.completions.alone_since_s = time.monotonic() + 60
    rig.sync(1)
    assert not rig.was_on_loop


def test_after_a_slow_one_they_are_made_in_a_thread(rig: Rig) -> None:
    rig.make_quick()
    rig.took_s = 2 * QUICK_S
    rig.sync(1)
    rig.took_s = 0.0
    for _ in range(QUICK_SYNCS):
        rig.sync(1)
        assert not rig.was_on_loop


@pytest.mark.parametrize("prepare", [lambda rig: None, Rig.make_quick])
def test_the_first_failure_ends_a_sync(rig: Rig, prepare: Callable[[Rig], None]) -> None:
    prepare(rig)
    rig.errno, rig.synced = errno.EIO, []
    assert rig.sync(1, 2) == errno.EIO
    assert rig.synced == []
