"""What is compared: a system of three replicas on loopback, started and ended by exactly its processes."""

import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from .. import processes
from ..processes import BenchmarkError, is_running, last_line

WAIT_S = 60.0
LOOK_S = 0.1
ENDED_S = 20.0


class System(ABC):
    """One replicated disk of `size_bytes`, its files below `directory`. It is what fio's measurements call a server."""

    name = ""
    title = ""
    programs: tuple[str, ...] = ()

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.directory = directory / self.name
        self.size_bytes = size_bytes

    @classmethod
    def missing(cls) -> list[str]:
        """Programs that are not installed."""
        return [program for program in cls.programs if shutil.which(program) is None]

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def start(self) -> None:
        """Make the empty disk and serve it; all replicas are in sync."""

    @abstractmethod
    def stop(self) -> None:
        """End all of it; idempotent."""

    @abstractmethod
    def fio_arguments(self) -> list[str]:
        """Engine and target."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Of every daemon, whatever it is for."""

    @abstractmethod
    def kill_replica(self) -> None:
        """As kill -9 does: one that the client is not attached to."""

    @abstractmethod
    def start_replica(self) -> int:
        """Start it again; its process."""

    def forget_log(self) -> None:
        """What comes back from now on is not brought along by what was logged, but by regions."""
        raise BenchmarkError(f"{self.title} cannot be told to forget its log")

    @abstractmethod
    def is_whole(self) -> bool:
        """Whether all replicas are in sync."""

    @property
    def server(self) -> "System":
        return self

    def cpu_s(self) -> float:
        """User and system seconds of all daemons."""
        return sum(map(processes.cpu_s, self.pids()))

    def wait_until_whole(self, limit_s: float = WAIT_S) -> None:
        wait_until(self.is_whole, f"{self.title} is not whole", limit_s)


def wait_until(holds: Callable[[], bool], otherwise: str, limit_s: float = WAIT_S) -> None:
    """BenchmarkError when it does not hold in time."""
    deadline_s = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise BenchmarkError(f"{otherwise} after {limit_s:.0f} s")
        time.sleep(LOOK_S)


def run(command: list[str]) -> str:
    """What it prints; BenchmarkError with its last words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{' '.join(command)} hangs for {WAIT_S:.0f} s") from None
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def end(pids: list[int]) -> None:
    """SIGTERM to all, and to those that are there after ENDED_S SIGKILL."""
    for wanted, limit_s in ((signal.SIGTERM, ENDED_S), (signal.SIGKILL, ENDED_S)):
        for pid in pids:
            try:
                os.kill(pid, wanted)
            except ProcessLookupError:
                continue
        deadline_s = time.monotonic() + limit_s
        while pids and time.monotonic() < deadline_s:
            pids = [pid for pid in pids if is_running(pid)]
            time.sleep(0.05)
