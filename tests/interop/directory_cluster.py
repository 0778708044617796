"""Five nodes of both kinds as processes on a network of their own, three etcd members, and what is done to them.

Theory: every node counts in a key of its own, one number after the other, each with `confirm=SITE`, all the time. A
*round* does something to the cluster, waits for what has to be possible meanwhile (mostly another master that
confirms), mends it, and then everybody must come to have all that was confirmed.

What a node has confirmed and not told yet when it is killed is not expected of anybody.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, Processes
from tests.etcd_cluster import QUICK, EtcdCluster
from tests.interop.site import HUB, HUB_ADDRESS, Site

KEY = "5a" * 32
TIMEOUT_S = 30.0
FAR = {"far-1": ("load/", "count/a"), "far-2": ("count/",)}
LIFE = 1_000_000  # counts that no life of a node gets to


class NodeProcess:
    """One node, and what it says."""

    def __init__(
        self,
        processes: Processes,
        path: Path,
        name: str,
        datagrams: str,
        streams: str,
        etcd: Sequence[str],
        prefixes: Sequence[str] = (),
        key: str = KEY,
        within: Sequence[str] = (),
    ) -> None:
        """Start it; what it keeps and says lies below `path`. With prefixes it is across a WAN."""
        self.name = name
        self.log = path / f"{name}.log"
        self.lives = 0
        self._processes = processes
        self._settings = {
            "name": name,
            "kind": "SECOND" if prefixes else "FIRST",
            "datagrams": datagrams,
            "streams": streams,
            "prefixes": prefixes,
            "path": str(path / name),
            "etcd": etcd,
            "cluster": "test",
            "key": key,
        }
        self._within = within
        self.start()

    def start(self) -> None:
        self.lives += 1
        with self.log.open("ab") as log:
            self.process = self._processes.start(
                [*self._within, sys.executable, "-m", "tests.interop.directory_process", json.dumps(self._settings)],
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

    def count(self) -> None:
        """Publish `count/NAME` again and again, higher each time, from now on."""
        self.ask(do="count", key=f"count/{self.name}", first=self.lives * LIFE)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self._processes.kill(self.process)


def wait(holds: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it takes too long"
        time.sleep(0.05)


def wait_active(*nodes: NodeProcess) -> None:
    wait(lambda: all(node.status()["active"] for node in nodes))


def master_of(nodes: Sequence[NodeProcess]) -> NodeProcess:
    wait(lambda: sum(node.status()["master"] for node in nodes) == 1)
    return next(node for node in nodes if node.status()["master"])


class DirectoryCluster:
    """The nodes a, b, c and two across a WAN, and three etcd members at the hub."""

    def __init__(
        self, processes: Processes, path: Path, free_port: Callable[[], int], loss_per_cent: int, rng: random.Random
    ) -> None:
        """NoNamespacesError if this machine lets us make none."""
        self.site = Site(processes)
        self.etcd = EtcdCluster(
            processes, path / "etcd", free_port, 3, QUICK, host=HUB_ADDRESS, within=self.site.within
        )  # fmt: skip
        self.near: list[NodeProcess] = []
        self.far: list[NodeProcess] = []
        self.confirmed: dict[str, int] = {}
        """By counting node, the highest number that it was told is confirmed."""
        self._processes = processes
        self._path = path
        self._rng = rng
        self.site.lose(loss_per_cent)
        for name in "abc":
            self.join(name)
        for name, prefixes in FAR.items():
            self.join(name, prefixes)
        self.settle()

    @property
    def nodes(self) -> list[NodeProcess]:
        return self.near + self.far

    def join(self, name: str, prefixes: tuple[str, ...] = ()) -> NodeProcess:
        """One more node; with prefixes it is across a WAN."""
        address = self.site.add(name)
        node = NodeProcess(
            self._processes,
            self._path,
            name,
            f"{address}:700",
            f"{address}:701",
            self.etcd.endpoints,
            prefixes,
            within=self.site.on(name),
        )
        (self.far if prefixes else self.near).append(node)
        node.count()
        return node

    def others(self, node: NodeProcess) -> list[NodeProcess]:
        """The first-kind nodes without this one."""
        return [one for one in self.near if one is not node]

    def note(self, nodes: Sequence[NodeProcess]) -> None:
        """Ask these what they were told is confirmed."""
        for node in nodes:
            self.confirmed[node.name] = max(self.confirmed.get(node.name, 0), node.status()["counted"])

    def goes_on(self, nodes: Sequence[NodeProcess]) -> None:
        """Wait until one of these nodes has got something new confirmed."""
        self.note(nodes)
        before = dict(self.confirmed)
        wait(lambda: any(node.status()["counted"] > before[node.name] for node in nodes))

    def settle(self) -> None:
        """Wait until all is well: one master, all are active, and have what was confirmed until now."""
        self.note(self.nodes)
        wait_active(*self.nodes)
        master_of(self.near)
        expected = {f"count/{name}": number for name, number in self.confirmed.items()}
        for node in self.nodes:
            wait(lambda node=node: self._has(node, expected))  # type: ignore[misc]
        self.goes_on(self.near)
        for node in self.nodes:
            status = node.status()
            assert (status["failure"], status["refused"]) == ("", 0), (node.name, status, node.log.read_text())

    @staticmethod
    def _has(node: NodeProcess, expected: dict[str, int]) -> bool:
        """Whether it has these counts or higher ones, of those that it gets: it must not have others."""
        found = node.range("count/")
        wanted = (*FAR.get(node.name, ("",)), f"count/{node.name}")
        assert all(key.startswith(wanted) for key in found), f"{node.name} subscribes to {wanted} and has {found}"
        return all(int(found.get(key, 0)) >= count for key, count in expected.items() if key.startswith(wanted))

    def _take_over(self, others: Sequence[NodeProcess], confirmed: Sequence[NodeProcess]) -> None:
        """The master is cut off: wait for another one, which confirms what some of the others publish; then mend."""
        wait(lambda: any(node.status()["master"] for node in others))
        self.goes_on(confirmed)
        self.site.mend()
        self.settle()

    # --- rounds ---

    def kill_master_and_registry_member(self, joiner: str = "") -> None:
        """kill -9 of both; a node joins meanwhile."""
        old = master_of(self.near)
        member = self.etcd.members[self._rng.randrange(3)]
        self.note(self.nodes)
        old.kill()
        member.kill()
        if joiner:
            self.join(joiner)
        left = self.others(old)
        master = master_of(left)
        assert self._has(master, {f"count/{name}": number for name, number in self.confirmed.items()})
        self.goes_on(left)
        member.start()
        old.start()
        old.count()
        self.settle()

    def stop_master(self) -> None:
        """SIGSTOP past its lease; when it wakes it finds another one."""
        old = master_of(self.near)
        old.signal(signal.SIGSTOP)
        others = self.others(old)
        newer = master_of(others)
        self.goes_on(others)
        old.signal(signal.SIGCONT)
        self.settle()
        assert newer.status()["master"] or not old.status()["master"]

    def cut_master_off(self) -> None:
        """It reaches nobody, the registry neither, and nobody reaches it."""
        old = master_of(self.near)
        others = self.others(old)
        rest = [*(node.name for node in others + self.far), HUB]
        self.site.part([old.name], rest)
        self._take_over(others, others)

    def bridge(self) -> None:
        """The master and another node do not hear each other, and it has lost the registry; the others hear both."""
        old = master_of(self.near)
        others = self.others(old)
        cut_off = [others[0].name, HUB]
        self.site.part([old.name], cut_off)
        self._take_over(others, others[:1])

    def deafen_master(self) -> None:
        """Nobody is heard by it: it gives up, and another one takes over."""
        old = master_of(self.near)
        others = self.others(old)
        self.site.cut([node.name for node in others + self.far], [old.name])
        self._take_over(others, others)

    def silence_master(self) -> None:
        """Nobody hears it, and it hears everybody: nothing is wrong, and all is well again afterwards."""
        old = master_of(self.near)
        self.site.cut([old.name], [node.name for node in self.others(old) + self.far])
        time.sleep(self._rng.uniform(1.0, 8.0))
        self.site.mend()
        self.settle()

    def kill_registry(self) -> None:
        """Two members of three are killed: without them the master goes on, and confirms."""
        members = self._rng.sample(self.etcd.members, 2)
        for member in members:
            member.kill()
        time.sleep(self._rng.uniform(0.5, 8.0))
        self.goes_on(self.near)
        for member in members:
            member.start()
        self.settle()

    def kill_some_node(self) -> None:
        """kill -9 of any node, which is started again."""
        node = self._rng.choice(self.nodes)
        self.note(self.nodes)
        node.kill()
        time.sleep(self._rng.uniform(0.0, 3.0))
        node.start()
        node.count()
        self.settle()
