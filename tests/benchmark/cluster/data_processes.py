"""Three data processes with one replicated family and no nodes around them: the replicated path by itself.

They are `replica_process.py`; the first one owns the family. What a node has besides, its control process and etcd, is
not on that path and is not counted here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from metadata.replica_set import Member, ReplicaSet

from ..processes import BenchmarkError, free_ports, last_line
from ..targets import EXPORT, Nbdserver, nbd_engine
from .systems import System, end

NODES = ("node-1", "node-2", "node-3")


class DataProcesses(System):
    """See above."""

    name = "data-processes"
    title = "nbdserver, data processes alone"
    programs = (sys.executable,)

    def __init__(self, directory: Path, size_bytes: int) -> None:
        super().__init__(directory, size_bytes)
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._port = 0

    def version(self) -> str:
        return Nbdserver.version()

    attached_at = NODES[0]

    @property
    def client_socket(self) -> Path:
        """Where clients are served."""
        return self._socket(self.attached_at)

    def _socket(self, node: str) -> Path:
        return self.directory / f"{node}.sock"

    def start(self) -> None:
        self.directory.mkdir(parents=True)
        self._port = free_ports(len(NODES))
        members = tuple(Member(node, self._start(node)) for node in NODES)
        value = ReplicaSet(0, NODES[0], members, NODES)
        self._say(NODES[0], f"own {value.encode().decode()}")
        self._heard(NODES[0], "owner")
        for node in NODES[1:]:
            self._say(node, f"forward {NODES[0]}")
        self.wait_until_whole()

    def _start(self, node: str) -> int:
        """Its incarnation."""
        addresses = {each: f"127.0.0.1:{self._port + number}" for number, each in enumerate(NODES)}
        peers = ",".join(f"{each}={address}" for each, address in addresses.items())
        arguments = [str(self.directory / node), node, addresses[node], peers, f"unix:{self._socket(node)}"]
        with (self.directory / f"{node}.log").open("ab") as log:
            self._processes[node] = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmark.cluster.replica_process", *arguments, str(self.size_bytes)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        return int(self._heard(node, "replica"))

    def _say(self, node: str, line: str) -> None:
        there = self._processes[node].stdin
        assert there is not None
        there.write(f"{line}\n")
        there.flush()

    def _heard(self, node: str, word: str) -> str:
        """Wait for a line that begins with the word; what follows it."""
        output = self._processes[node].stdout
        assert output is not None
        line = output.readline().strip()
        if not line.startswith(word):
            log = (self.directory / f"{node}.log").read_text(errors="replace")
            raise BenchmarkError(f"{node} says {line!r} instead of {word}; its log: {last_line(log)}")
        return line.removeprefix(word).strip()

    def stop(self) -> None:
        end(self.pids())
        for process in self._processes.values():
            process.wait()

    def remove(self) -> None:
        """Stop it, and leave nothing behind; idempotent."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def fio_arguments(self) -> list[str]:
        return nbd_engine(f"nbd+unix:///{EXPORT}?socket={self.client_socket}")

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values() if process.poll() is None]

    def kill_replica(self) -> None:
        process = self._processes[NODES[-1]]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def start_replica(self) -> int:
        self._start(NODES[-1])
        return self._processes[NODES[-1]].pid

    def empty_replica(self) -> None:
        """What was killed has lost its disk."""
        shutil.rmtree(self.directory / NODES[-1])

    def forget_log(self) -> None:
        """The owner's log goes back no further than to this moment."""
        self._say(NODES[0], "forget")
        self._heard(NODES[0], "forgotten")

    def copied(self) -> dict[str, int]:
        """Regions, and bytes that travelled and did not have to, of the replica that is killed and started."""
        self._say(NODES[0], "figures")
        return dict(json.loads(self._heard(NODES[0], "figures"))[NODES[-1]])

    @property
    def owner_pid(self) -> int:
        return self._processes[NODES[0]].pid

    def is_whole(self) -> bool:
        value = json.loads((self.directory / NODES[0] / "replica-set.json").read_text())
        return {member["node"] for member in value["in_sync"]} == set(NODES)


class Forwarded(DataProcesses):
    """What it costs to be attached at another node than the owner."""

    name = "forwarded"
    title = "nbdserver, data processes alone, by way of another node"
    attached_at = NODES[1]
