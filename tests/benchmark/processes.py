"""A server's processes: started, waited for until they greet, accounted, ended.

CPU time is that of the root process and all its descendants, children that ended and were waited for included
(`nbd-server` forks one for each connection), from /proc/PID/stat. Known weakness: it counts in clock ticks (10 ms),
which is 0.5 % of a two-second measurement, and a descendant that nobody waited for is lost.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 60.0  # our own server may have a log to replay
STOP_TIMEOUT_S = 30.0


PORTS = range(12_000, 20_000)  # below those that outgoing connections are given, and apart from those of the tests


def end_in_order_when_told() -> None:
    """SIGTERM ends this program as Ctrl-C does, so that the servers which it started are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class BenchmarkError(Exception):
    """Says in one line what is wrong and what to do."""


def last_line(said: str) -> str:
    """Of what a program has said, for an error of one line."""
    lines = said.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def free_ports(count: int) -> int:
    """The first of so many neighbouring TCP ports on 127.0.0.1 that nobody listens at.

    They are looked for in random order: two benchmarks that start at the same time shall not find the same ones.
    """
    bases = list(range(PORTS.start, PORTS.stop - count, count))
    random.shuffle(bases)
    for base in bases:
        if all(_is_free(port) for port in range(base, base + count)):
            return base
    raise BenchmarkError(f"there are no {count} free ports from {PORTS.start} to {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def descendants(root_pid: int) -> list[int]:
    """`root_pid` and every living process below it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat(int(entry))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry))
    found = [root_pid]
    for pid in found:
        found += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from `state` on (the name before it may hold anything), or [] if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def cpu_s(root_pid: int) -> float:
    """User and system seconds that the process, its descendants and its ended children have used."""
    ticks = 0
    for pid in descendants(root_pid):
        ticks += sum(int(field) for field in _stat(pid)[11:15])
    return ticks / TICKS_PER_S


def resident_bytes(pid: int) -> dict[str, int]:
    """Its RssAnon, RssShmem and RssFile; nothing if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}


def greets(socket_path: Path) -> bool:
    """True if an NBD server answers there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(socket_path))
            return probe.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


class Server:
    """A running server: a child of ours, or a daemon that wrote its pid into `pid_file`."""

    def __init__(self, command: list[str], socket_path: Path, log_path: Path, pid_file: Path | None = None) -> None:
        socket_path.unlink(missing_ok=True)
        if pid_file:
            pid_file.unlink(missing_ok=True)
        self.log_path = log_path
        self._pid_file = pid_file
        with log_path.open("wb") as log:
            # A session of its own: Ctrl-C goes to the benchmark, which then stops the server in order.
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self._child.pid
        try:
            self._wait_until_it_greets(socket_path)
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_greets(self, socket_path: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            ended = self._child.poll()
            if ended is not None and (self._pid_file is None or ended != 0):
                break
            if self._pid_file is not None and self._pid_file.exists() and self._pid_file.read_text().strip():
                self.pid = int(self._pid_file.read_text())
            if (self._pid_file is None or self.pid != self._child.pid) and greets(socket_path):
                return
            time.sleep(0.02)
        said = self.log_path.read_text(errors="replace")
        raise BenchmarkError(f"{self.log_path.stem} did not start: {last_line(said)}")

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def cpu_ticks_by_pid(self) -> dict[int, int]:
        """CPU of each living process of the server by itself."""
        return {pid: sum(int(field) for field in _stat(pid)[11:13]) for pid in descendants(self.pid)}

    def stop(self) -> None:
        """End it by SIGTERM, after STOP_TIMEOUT_S by SIGKILL; only processes that this object started."""
        try:
            os.kill(self.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            self._child.poll()
            if not is_running(self.pid):
                self._child.wait()
                return
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        self._child.wait()
