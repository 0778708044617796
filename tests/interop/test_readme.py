"""README.md is true, and what docs/operations.md says of volumes: their blocks are run as they stand there.

A block opened by "```sh serve" is run in the background until Ctrl-C, one opened by "```sh test" must succeed while
it runs. The only things that are changed are the ports, because somebody may use these, and the folder: a copy of the
checkout with this environment.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Processes
from tests.serving import descendants, is_alive

COPIED = ("Makefile", "README.md", "pyproject.toml", "metadata", "nbdserver", "protocol")
README_ADDRESS = "127.0.0.1:10809"
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


def blocks(mark: str, page: str = "README.md") -> list[str]:
    found = re.findall(rf"^```sh {mark}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no block marked {mark}"
    return found


class Newcomer:
    """Somebody in a checkout with `make run` in one terminal."""

    def __init__(self, processes: Processes, checkout: Path, port: int, http_port: int) -> None:
        self._processes = processes
        self._checkout = checkout
        self._address = f"127.0.0.1:{port}"
        self.page = f"127.0.0.1:{http_port}"
        self.printed = ""

    def serve(self) -> None:
        (block,) = blocks("serve")
        self._terminal = self._processes.start(
            ["bash", "-c", f"exec {block.strip()} LISTEN={self._address} HTTP={self.page}"],
            cwd=self._checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.printed = ""
        self._read(lambda: "ready:" in self.printed, READY_TIMEOUT_S)
        assert "ready:" in self.printed, self.printed

    def press_ctrl_c(self) -> None:
        """What a terminal does: SIGINT to every process in the foreground."""
        self._family = descendants(self._terminal.pid)
        os.killpg(self._terminal.pid, signal.SIGINT)
        self._read(lambda: False, STOP_TIMEOUT_S)
        self._terminal.wait(STOP_TIMEOUT_S)
        assert not [pid for pid in self._family if is_alive(pid)]

    def run(self, block: str) -> str:
        script = block.replace(README_ADDRESS, self._address)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=self._checkout, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"exit code {done.returncode} of\n{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _read(self, enough: Callable[[], bool], timeout_s: float) -> None:
        """Read what is printed until it is enough or ends."""
        assert self._terminal.stdout is not None
        deadline = time.monotonic() + timeout_s
        while not enough():
            ready = select.select([self._terminal.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"nothing more after {timeout_s:.0f} s; it printed:\n{self.printed}"
            data = os.read(self._terminal.stdout.fileno(), 65536)
            if not data:
                break
            self.printed += data.decode()


@pytest.fixture
def newcomer(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> Newcomer:
    environment = Path(sys.prefix)
    if not (environment / "installed").exists():
        pytest.skip(f"{environment} was not made by `make test`: run it once")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, checkout / name)
    (checkout / ".venv").symlink_to(environment)
    return Newcomer(processes, checkout, free_port(), free_port())


def test_what_the_readme_says_to_type_works_and_ctrl_c_stops_it_cleanly(
    newcomer: Newcomer, needs: Callable[[str, str], str]
) -> None:
    for program, package in (("nbdinfo", "libnbd-bin"), ("nbdcopy", "libnbd-bin"), ("qemu-io", "qemu-utils")):
        needs(program, package)
    newcomer.serve()
    assert f"status page: http://{newcomer.page}/" in newcomer.printed
    newcomer.run(f"curl --fail --silent http://{newcomer.page}/v1/overview | grep '\"disk0\"'")
    for block in blocks("test"):
        newcomer.run(block)
    for mark in ("volumes", "snapshots", "clones"):
        for block in blocks(mark, "docs/operations.md"):
            newcomer.run("export PATH=$PWD/.venv/bin:$PATH NBDSERVER_DATA=$PWD/var\n" + block)
    newcomer.press_ctrl_c()
    assert "***" not in newcomer.printed
    assert "Traceback" not in newcomer.printed, newcomer.printed
    newcomer.serve()
    newcomer.run(f"qemu-io -f raw -c 'read -P 7 0 1M' nbd://{README_ADDRESS}/disk0")
    newcomer.press_ctrl_c()
