"""The directory on real processes: sockets, LevelDB, etcd, and signals."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Processes
from tests.etcd_rig import MakeCluster

KEY = "5a" * 32
TIMEOUT_S = 30.0


class NodeProcess:
    """One node, and what it says."""

    def __init__(self, processes: Processes, settings: dict[str, Any], log: Path) -> None:
        self.name: str = settings["name"]
        self.log = log
        self._processes = processes
        self._settings = settings
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = self._processes.start(
                [sys.executable, "-m", "tests.interop.directory_process", json.dumps(self._settings)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._answer() == "ready", self.log.read_text()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def publish(self, key: str, value: str | None, confirm: str = "SITE", **more: Any) -> str:
        answer: str = self.ask(do="publish", key=key, value=value, confirm=confirm, **more)
        return answer

    def range(self, prefix: str = "") -> dict[str, str]:
        found: dict[str, str] = self.ask(do="range", prefix=prefix)
        return found

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(do="status")
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self._processes.kill(self.process)


MakeNode = Callable[..., NodeProcess]


@pytest.fixture
def make_node(processes: Processes, tmp_path: Path, free_port: Callable[[], int], make_etcd: MakeCluster) -> MakeNode:
    etcd = make_etcd()
    etcd.wait_ready()

    def make(name: str, kind: str = "FIRST", prefixes: tuple[str, ...] = (), **changes: Any) -> NodeProcess:
        settings = {
            "name": name,
            "kind": kind,
            "datagrams": f"127.0.0.1:{free_port()}",
            "streams": f"127.0.0.1:{free_port()}",
            "prefixes": prefixes,
            "path": str(tmp_path / name),
            "etcd": etcd.endpoints,
            "cluster": "test",
            "key": KEY,
            **changes,
        }
        return NodeProcess(processes, settings, tmp_path / f"{name}.log")

    return make


def wait(holds: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it takes too long"
        time.sleep(0.05)


def wait_active(*nodes: NodeProcess) -> None:
    wait(lambda: all(node.status()["active"] for node in nodes))


def master_of(nodes: list[NodeProcess]) -> NodeProcess:
    wait(lambda: sum(node.status()["master"] for node in nodes) == 1)
    return next(node for node in nodes if node.status()["master"])


def test_five_nodes_of_both_kinds_keep_what_was_confirmed_when_masters_are_killed_and_stopped(
    make_node: MakeNode,
) -> None:
    near = [make_node("a"), make_node("b"), make_node("c")]
    far = [make_node("far-1", "SECOND", ("load/",)), make_node("far-2", "SECOND", ("once/",))]
    nodes = near + far
    wait_active(*nodes)

    # Every node publishes, a value larger than a datagram among them; each copy ends with exactly its keys.
    assert [node.publish(f"once/{node.name}", node.name) for node in nodes] == ["confirmed"] * 5
    assert far[0].publish("load/far-1", "x" * 200_000) == "confirmed"
    assert near[1].publish("once/kept", "kept", "REGISTRY") == "confirmed"
    everything = {f"once/{node.name}": node.name for node in nodes} | {"once/kept": "kept"}
    for node in (*near, far[1]):
        wait(lambda node=node: node.range("once/") == everything)  # type: ignore[misc]
    wait(lambda: all(node.range("load/") == {"load/far-1": "x" * 200_000} for node in (*near, far[0])))
    assert far[1].range("load/") == {}

    # The master is killed: another one has everything, and goes on.
    old = master_of(near)
    epoch = old.status()["epoch"]
    old.kill()
    left = [node for node in near if node is not old]
    master = master_of(left)
    assert master.status()["epoch"] > epoch
    assert master.range("once/") == everything
    assert left[0].publish("once/after", "after") == "confirmed"
    everything["once/after"] = "after"
    old.start()
    wait_active(*nodes)
    wait(lambda: old.range("once/") == everything)

    # The master stands still past its lease, and finds another one when it wakes. A node joins meanwhile.
    master.signal(signal.SIGSTOP)
    others = [node for node in near if node is not master]
    newer = master_of(others)
    joined = make_node("d")
    wait_active(joined)
    assert newer.publish("once/while-away", "yes") == "confirmed"
    everything["once/while-away"] = "yes"
    master.signal(signal.SIGCONT)
    wait_active(*nodes, joined)
    assert not master.status()["master"]
    for node in (*near, joined, far[1]):
        wait(lambda node=node: node.range("once/") == everything)  # type: ignore[misc]
    assert not any(node.status()["failure"] or node.status()["refused"] for node in (*nodes, joined))


def test_a_node_with_another_key_is_refused_with_a_line_that_says_so_and_disturbs_nobody(make_node: MakeNode) -> None:
    node = make_node("a")
    wait_active(node)
    stranger = make_node("stranger", key="77" * 32)
    wait(lambda: node.status()["refused"] > 0)
    assert "a key that this cluster does not use" in node.log.read_text()
    assert not stranger.status()["active"]
    assert node.status()["members"] == ["a"]
    assert node.publish("once/a", "a") == "confirmed"
