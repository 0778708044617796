"""`nbdserver serve` as tests start, kill and restart it."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from tests.conftest import ROOT, Processes

READY_TIMEOUT_S = 120.0
GONE_TIMEOUT_S = 10.0
PATIENCE_S = 30.0
PROGRAM = (sys.executable, "-m", "nbdserver")


def eventually(holds: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait until something holds; AssertionError that says `what` if it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


class Server:
    """One data directory and the node that serves it, on a TCP port of loopback. Restarting keeps both."""

    def __init__(
        self,
        processes: Processes,
        data: Path,
        port: int,
        volumes: dict[str, str],
        arguments: Sequence[str] = (),
        program: Sequence[str] = PROGRAM,
        cwd: Path | None = None,
    ) -> None:
        """Start a node that makes `volumes` (name: size). `program` is the command before `serve`."""
        self._processes = processes
        self._program = program
        self._cwd = cwd
        self.data = data
        self.port = port
        self._arguments = [
            "--data", str(data), "--listen", f"127.0.0.1:{port}",
            *(part for name, size in volumes.items() for part in ("--create", f"{name}={size}")),
            *arguments,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.printed = ""
        self.start()

    def uri(self, name: str = "") -> str:
        return f"nbd://127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start and wait for the `ready:` line. AssertionError with what it printed if there is none."""
        process = self._processes.start(
            [*self._program, "serve", *self._arguments],
            cwd=self._cwd,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.process = process
        assert process.stdout is not None
        printed = b""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not any(line.startswith(b"ready:") for line in printed.split(b"\n")[:-1]):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
                raise AssertionError(f"not ready in {READY_TIMEOUT_S:.0f} s; it printed: {printed.decode()}")
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                raise AssertionError(f"ended with {process.wait()}; it printed: {printed.decode()}")
            printed += data
        self.printed = printed.decode()

    def command(self, *arguments: str) -> str:
        """Run another command of the program on this node and return what it prints. CalledProcessError."""
        return subprocess.run(
            [*self._program, "--data", str(self.data), *arguments],
            cwd=self._cwd,
            env={**os.environ, **self._environment()},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def api(self, timeout_s: float = 60.0) -> httpx.Client:
        """A client of the node's API by its unix socket, to be closed."""
        transport = httpx.HTTPTransport(uds=str(self.data / "api.sock"))
        return httpx.Client(transport=transport, base_url="http://node", timeout=timeout_s)

    def _environment(self) -> dict[str, str]:
        """Only the program that runs from the source tree has to be told where it lies."""
        if self._program is not PROGRAM:
            return {}
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}

    def kill9(self) -> None:
        """kill -9, then wait until its data process has died with it."""
        assert self.process is not None
        family = descendants(self.process.pid)
        self._processes.kill(self.process, signal.SIGKILL)
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while any(is_alive(pid) for pid in family):
            assert time.monotonic() < deadline, "the data process outlived its parent"
            time.sleep(0.01)

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        assert self.process is not None
        return self._processes.kill(self.process, signal.SIGTERM)


def descendants(pid: int) -> list[int]:
    """The pids of a process's children and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    """False for a zombie too: its descriptors, and so its locks and ports, are gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def resident_bytes(pid: int) -> int:
    """What a process has in memory, now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"process {pid} has no memory")
