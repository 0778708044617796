"""The data directory: one holder, and a file system that keeps promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserver.host import data_directory
from nbdserver.host.data_directory import DataDirectoryError, DataDirectoryLock, refuse_unfit_file_system


def test_a_second_lock_names_the_holders_pid(tmp_path: Path) -> None:
    program = (
        "import sys; from nbdserver.host.data_directory import DataDirectoryLock;"
        f"lock = DataDirectoryLock({str(tmp_path)!r}); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataDirectoryError, match=rf"in use by process {holder.pid}:"):
            DataDirectoryLock(str(tmp_path))
    finally:
        holder.kill()
        holder.communicate()
    DataDirectoryLock(str(tmp_path)).release()  # the kernel let go of it


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    DataDirectoryLock(str(tmp_path)).release()
    DataDirectoryLock(str(tmp_path)).release()


def test_a_file_system_in_memory_is_refused() -> None:
    if data_directory.file_system_type("/dev/shm") != 0x01021994:
        pytest.skip("/dev/shm is not tmpfs here")
    with pytest.raises(DataDirectoryError, match="tmpfs"):
        refuse_unfit_file_system("/dev/shm")


@pytest.mark.parametrize("magic", [0x6969, 0xFF534D42, 0x65735546])
def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: int) -> None:
    monkeypatch.setattr(data_directory, "file_system_type", lambda path: magic)
    with pytest.raises(DataDirectoryError, match="put the data directory on a local disk"):
        refuse_unfit_file_system(str(tmp_path))


def test_a_local_file_system_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data_directory, "file_system_type", lambda path: 0xEF53)
    refuse_unfit_file_system(str(tmp_path))


def test_a_missing_directory_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        data_directory.file_system_type(str(tmp_path / "nowhere"))
