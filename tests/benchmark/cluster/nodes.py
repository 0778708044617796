"""Three nodes and an etcd, as a user has them, with one volume of three replicas, attached at the node that owns it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from nbdserver.cli.client import NodeClient
from nbdserver.node.errors import NodeError
from tests.local_cluster import PROGRAM, etcd_command

from ..processes import BenchmarkError, descendants, free_ports, is_running, last_line
from ..targets import EXPORT, Nbdserver, nbd_engine
from .systems import System, end, run, wait_until

NODES = ("n1", "n2", "n3")


class Nodes(System):
    """See above."""

    name = "nodes"
    title = "nbdserver"
    programs = ("etcd",)
    data_tls = False  # as Ceph's

    def __init__(self, directory: Path, size_bytes: int) -> None:
        super().__init__(directory, size_bytes)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = 0

    def version(self) -> str:
        etcd = run(["etcd", "--version"]).splitlines()[0]
        return f"{Nbdserver.version()}; {etcd}"

    def start(self) -> None:
        self.directory.mkdir(parents=True)
        self._port = free_ports(2 + 2 * len(NODES))
        self._spawn("etcd", etcd_command(self.directory / "etcd", self._port, self._port + 1))
        token = ""
        for number, node in enumerate(NODES):
            token = self._make(number, node, token)
            self._serve(node)
        wait_until(self._is_cluster, "the nodes do not know each other")
        volume = ["volume", "create", EXPORT, "--size", f"{self.size_bytes >> 20}M", "--replicas", str(len(NODES))]
        run([*PROGRAM, "--data", str(self._data(NODES[0])), *volume])
        self.wait_until_whole()

    def _make(self, number: int, node: str, token: str) -> str:
        """The settings of a node, of the first one the cluster too; a token to join with."""
        port = self._port + 2 + 2 * number
        config = self._config(node)
        config.parent.mkdir()
        config.write_text(f"data: {self._data(node)}\nlisten: []\nsocket: {self._socket(node)}\n")
        words = ["join", token] if token else ["init", "bench", "--etcd", f"127.0.0.1:{self._port}"]
        who = ["--config", str(config), "--node", node, "--address", f"127.0.0.1:{port}", "--json"]
        made = json.loads(run([*PROGRAM, "cluster", *words, *who]))
        more = f"cluster:\n  data_address: 127.0.0.1:{port + 1}\n  data_tls: {str(self.data_tls).lower()}\n"
        config.write_text(config.read_text().replace("cluster:\n", more, 1))
        return token or str(made["token"])

    def _config(self, node: str) -> Path:
        return self.directory / node / "node.yaml"

    def _data(self, node: str) -> Path:
        return self.directory / node / "data"

    def _socket(self, node: str) -> Path:
        return self.directory / node / "nbd.sock"

    def _serve(self, node: str) -> None:
        self._spawn(node, [*PROGRAM, "serve", "--config", str(self._config(node))])
        wait_until(lambda: bool(self._ask(node, "/v1/cluster").get("is_active")), f"{node} is not active")

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _ask(self, node: str, path: str) -> dict[str, Any]:
        """What its API answers; {} while it does not. BenchmarkError if the node has ended."""
        if self._processes[node].poll() is not None:
            words = (self.directory / f"{node}.log").read_text(errors="replace")
            raise BenchmarkError(f"{node} has ended: {last_line(words)}")
        try:
            return dict(NodeClient(self._data(node)).get(path))
        except NodeError:
            return {}

    def _is_cluster(self) -> bool:
        for node in NODES:
            nodes = self._ask(node, "/v1/cluster").get("nodes", [])
            if sum(each["state"] == "up" for each in nodes) < len(NODES):
                return False
            found = NodeClient(self._data(node)).get("/v1/nodes")
            if not all(row["data_addresses"] for row in found):
                return False
        return True

    def stop(self) -> None:
        for names in (NODES, ("etcd",)):
            end([self._processes[name].pid for name in names if name in self._processes])
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def fio_arguments(self) -> list[str]:
        return nbd_engine(f"nbd+unix:///{EXPORT}?socket={self._socket(NODES[0])}")

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values() if process.poll() is None]

    def kill_replica(self) -> None:
        process = self._processes[NODES[-1]]
        family = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while any(map(is_running, family)):  # a data process dies with its parent
            time.sleep(0.01)

    def start_replica(self) -> int:
        self._serve(NODES[-1])
        return self._processes[NODES[-1]].pid

    def is_whole(self) -> bool:
        replicas = self._ask(NODES[0], f"/v1/volumes/{EXPORT}").get("replicas", {})
        return bool(replicas.get("in_sync") == len(NODES))


class NodesWithTls(Nodes):
    """The same with TLS between the data processes."""

    name = "nodes-tls"
    title = "nbdserver, TLS between nodes"
    data_tls = True
