"""The data directory: its version, its lock, and what it refuses without a change."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nbdserver.node import directory as directory_module
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError, WrongInputError
from tests.conftest import ROOT

HOLD = "import sys; from pathlib import Path; from nbdserver.node.directory import DataDirectory\n"


def test_a_first_start_writes_the_version_and_later_ones_read_it(tmp_path: Path) -> None:
    first = DataDirectory(tmp_path / "a" / "b")
    first.open()
    assert (first.path / "format").read_text() == "nbdserver data directory, version 4\n"
    assert first.path.stat().st_mode & 0o777 == 0o700
    first.release()
    second = DataDirectory(first.path)
    second.open()
    assert second.version() == 4
    second.release()


def test_a_directory_of_an_older_version_is_taken_and_marked(tmp_path: Path) -> None:
    (tmp_path / "format").write_text("nbdserver data directory, version 1\n")
    directory = DataDirectory(tmp_path)
    directory.require()
    assert directory.version() == 1, "looking changes nothing"
    directory.open()
    assert directory.version() == 4
    directory.release()


@pytest.mark.parametrize("text", ["", "nbdserver data directory, version x\n", "something else\n"])
def test_a_foreign_format_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "format").write_text(text)
    with pytest.raises(WrongInputError, match="not a format file of ours"):
        DataDirectory(tmp_path).open()
    assert [entry.name for entry in tmp_path.iterdir()] == ["format"]


def test_what_a_first_start_left_when_it_was_killed_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("123\n")
    (tmp_path / "format.new").write_text("nbdser")
    directory = DataDirectory(tmp_path)
    directory.open()
    assert directory.version() == 4
    directory.release()


def test_a_living_holder_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "ORPHAN_TIMEOUT_S", 120.0)
    program = HOLD + "DataDirectory(Path(sys.argv[1])).open(); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    started_s = time.monotonic()
    with pytest.raises(NodeError, match=f"in use by process {holder.pid}:"):
        DataDirectory(tmp_path).open()
    assert time.monotonic() - started_s < directory_module.ORPHAN_TIMEOUT_S / 2
    holder.communicate(b"")


def test_what_a_dead_holder_left_behind_is_waited_for(tmp_path: Path) -> None:
    # The child inherits the locked descriptor and outlives its parent, as a data process in its last fsync does.
    program = HOLD + (
        "import subprocess; d = DataDirectory(Path(sys.argv[1])); d.open()\n"
        "p = subprocess.Popen(['sleep', '1'], pass_fds=[d.lock_descriptor], stdout=subprocess.DEVNULL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    directory = DataDirectory(tmp_path)
    waiting = threading.Thread(target=directory.open)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    waiting.join(directory_module.ORPHAN_TIMEOUT_S)
    assert not waiting.is_alive()
    directory.release()
