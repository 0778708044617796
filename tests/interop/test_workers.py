"""A node with two data processes: any client reaches any export, and one process costs nothing but its own clients.

With four volumes each process has two: `disk0` and `disk2` are those of worker 0 (placement.py), but which process
accepts a connection is left to chance, so what needs a client that is handed over makes many.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli.client import NodeClient
from nbdserver.node.errors import WrongInputError
from protocol.agreement import ReplyStyle
from protocol.nbd import Command
from tests.certificates import Certificates, make_certificates
from tests.conftest import Processes
from tests.durability import Judge
from tests.nbd_client import Client, RefusedError
from tests.serving import Server, eventually

VOLUMES = [f"disk{number}" for number in range(4)]
PATIENCE_S = 30.0
CLIENTS_EACH = 4
JUDGED_BLOCKS = 512

Needs = Callable[[str, str], str]


class Node:
    """A node with `workers: 2`, TLS and a unix socket."""

    def __init__(self, processes: Processes, directory: Path, port: int, workers: int = 2) -> None:
        self.certificates: Certificates = make_certificates(directory)
        self.file = directory / "node.yaml"
        self.write_settings(workers)
        self.socket = directory / "nbd.sock"
        options = ["--config", str(self.file), "--socket", str(self.socket)]
        self.server = Server(processes, directory / "data", port, dict.fromkeys(VOLUMES, "64M"), options)
        self.api = NodeClient(self.server.data)

    def write_settings(self, workers: int, *more: str) -> None:
        files = [f"  {key}: {path}" for key, path in self.certificates.settings.items()]
        self.file.write_text(
            "\n".join([f"workers: {workers}", "segment: 4M", *more, "tls:", "  mode: allowed", *files])
        )

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.server.port

    def attach(self, name: str, tls: bool = False) -> Client:
        context = self.certificates.client_context("web1") if tls else None
        return Client(self.address, name, PATIENCE_S, tls=context)

    def attach_again(self, name: str) -> Client:
        """As soon as that is possible."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.attach(name)
            except OSError:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)

    def workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.api.get("/v1/status")["workers"]
        return workers

    def clients(self) -> list[dict[str, Any]]:
        clients: list[dict[str, Any]] = self.api.get("/v1/clients")
        return clients

    def upgrade(self) -> dict[str, Any]:
        done: dict[str, Any] = json.loads(self.server.command("upgrade-in-place", "--json"))
        return done


@pytest.fixture(scope="module")
def node(module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Node:
    """One for all tests, each of which leaves it with two processes, and no client of its own."""
    return Node(module_processes, tmp_path_factory.mktemp("workers"), free_port())


@pytest.fixture(autouse=True)
def alone(node: Node) -> Iterator[None]:
    """Clients and data that a test leaves are gone before the next one looks."""
    yield
    for left in node.clients():
        with contextlib.suppress(WrongInputError):  # it has gone meanwhile
            node.api.delete(f"/v1/clients/{left['id']}")
    for name in VOLUMES:
        client = node.attach_again(name)
        assert client.request(Command.TRIM, 0, 64 << 20).error == 0
        client.close()


def metrics(node: Node) -> list[str]:
    with node.server.api() as api:
        return api.get("/metrics").text.splitlines()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_any_client_reaches_any_export_whichever_process_accepts_it(node: Node, needs: Needs) -> None:
    assert [worker["volumes"] for worker in node.workers()] == [["disk0", "disk2"], ["disk1", "disk3"]]
    content = {name: random.Random(name).randbytes(4096) for name in VOLUMES}
    clients = []
    for name in VOLUMES:
        writer = node.attach(name)
        assert writer.request(Command.WRITE, 8192, data=content[name]).error == 0
        clients += [writer, *(node.attach(name, tls) for _ in range(CLIENTS_EACH) for tls in (False, True))]
        clients.append(Client(str(node.socket), name, PATIENCE_S))
        assert all(client.read(8192, 4096) == content[name] for client in clients[-2 * CLIENTS_EACH - 2 :])
    shown = node.clients()
    assert len(shown) == len({client["id"] for client in shown}) == len(clients)
    assert {(client["volume"], client["worker"]) for client in shown} == {
        (name, number % 2) for number, name in enumerate(VOLUMES)
    }
    over_tls = [client for client in shown if client["tls"]]
    assert len(over_tls) == len(VOLUMES) * CLIENTS_EACH
    assert all(client["certificate"] == "web1" and client["peer"].startswith("127.0.0.1:") for client in over_tls)

    gone = next(client["id"] for client in shown if client["volume"] == "disk3")
    node.api.delete(f"/v1/clients/{gone}")
    assert gone not in [client["id"] for client in node.clients()]
    told = metrics(node)
    assert f"nbdserver_connections {float(len(clients) - 1)}" in told
    for worker in range(2):
        there = sum(client["worker"] == worker for client in node.clients())
        assert f'nbdserver_worker_connections{{worker="{worker}"}} {float(there)}' in told
    listed = subprocess.run(
        [needs("nbdinfo", "libnbd-bin"), "--json", "--list", node.server.uri()], capture_output=True, check=True
    )
    exports = json.loads(listed.stdout)["exports"]
    assert [(export["export-name"], export["export-size"]) for export in exports] == [(n, 64 << 20) for n in VOLUMES]


def test_a_process_that_is_busy_keeps_nobody_from_the_volumes_of_another(node: Node) -> None:
    busy = node.workers()[0]["pid"]
    with stopped(busy):
        for _ in range(2 * CLIENTS_EACH):
            client = node.attach("disk1")
            assert client.read(0, 4096) == bytes(4096)
            client.close()


def test_changes_are_known_wherever_a_client_connects_once_they_are_answered(node: Node) -> None:
    def everywhere(name: str, expected: type[Exception] | None) -> None:
        for _ in range(2 * CLIENTS_EACH):
            if expected is None:
                node.attach(name).close()
            else:
                with pytest.raises(expected):
                    node.attach(name)

    node.api.post("/v1/volumes", {"name": "new", "size_bytes": 1 << 24})
    everywhere("new", None)
    node.api.post("/v1/snapshots", {"volume": "new", "name": "monday"})
    everywhere("new@monday", None)
    node.api.post("/v1/clones", {"volume": "new", "snapshot": "monday", "name": "clone"})
    everywhere("clone", None)
    family = [worker["worker"] for worker in node.workers() if {"new", "clone"} & set(worker["volumes"])]
    assert len(family) == 1, "a family is in two processes"
    node.api.post("/v1/volumes/new/rename", {"name": "newer"})
    everywhere("new", RefusedError)
    everywhere("newer@monday", None)
    node.api.patch("/v1/volumes/newer", {"allowed-clients": "192.0.2.0/24"})
    everywhere("newer", RefusedError)
    node.api.delete("/v1/volumes/clone")
    everywhere("clone", RefusedError)


def test_one_process_killed_is_started_again_alone_and_the_others_clients_notice_nothing(node: Node) -> None:
    there, lost = node.attach("disk0"), node.attach("disk1")
    kept, checked = Judge(JUDGED_BLOCKS, random.Random(1)), Judge(JUDGED_BLOCKS, random.Random(2))
    checked.write_until(lost, time.monotonic() + 0.3, finish=True)
    workers = node.workers()
    os.kill(workers[1]["pid"], signal.SIGKILL)
    kept.write_until(there, time.monotonic() + 0.5, finish=True)
    again = node.attach_again("disk1")
    checked.check(again, acknowledged_too=True)
    kept.check(there, acknowledged_too=True)
    now = node.workers()
    assert now[0]["pid"] == workers[0]["pid"]
    assert now[1]["pid"] not in (None, workers[1]["pid"])
    for name in VOLUMES:
        for _ in range(CLIENTS_EACH):
            node.attach(name).close()


def test_an_upgrade_takes_the_clients_of_all_processes_along_however_many_there_are_then(node: Node) -> None:
    clients = {name: node.attach(name) for name in VOLUMES}
    judges = {name: Judge(JUDGED_BLOCKS, random.Random(name)) for name in VOLUMES}
    for workers in (1, 2):
        tls = node.attach("disk3", tls=True)
        for name, judge in judges.items():
            judge.write_until(clients[name], time.monotonic() + 0.1, finish=True)
        node.write_settings(workers)
        done = node.upgrade()
        assert (done["clients"], done["dropped"], done["failure"]) == (4, 1, "")
        assert len(node.workers()) == workers
        for name, judge in judges.items():
            judge.write_until(clients[name], time.monotonic() + 0.1, finish=True)
            judge.check(clients[name], acknowledged_too=True)
        with pytest.raises((ConnectionError, AssertionError)):
            tls.read(0, 4096)
        again = node.attach("disk3", tls=True)
        assert len(again.read(0, 4096)) == 4096
        again.close()


def test_a_reply_of_many_megabytes_goes_through_to_a_slow_client_over_tls(node: Node) -> None:
    """Of every connection some are forwarded between the processes: nothing is lost where one of them has to wait."""
    size_bytes = 16 << 20
    content = random.Random(3).randbytes(size_bytes)
    writer = node.attach("disk1")
    assert writer.request(Command.WRITE, 0, data=content).error == 0
    for _ in range(2 * CLIENTS_EACH):
        client = node.attach("disk1", tls=True)
        asked = [client.send(Command.READ, 0, size_bytes) for _ in range(2)]
        time.sleep(0.05)
        assert [client.receive().data == content for _ in asked] == [True, True]
        assert client.request(Command.WRITE, 0, data=content).error == 0
        client.close()


def allocated_bytes(node: Node) -> int:
    return int(node.api.get("/v1/status")["capacity"]["allocated_bytes"])


def test_limits_hold_for_all_processes_together(node: Node) -> None:
    node.write_settings(2, "max_connections: 6", "max_data: 192M")
    assert node.server.stop() == 0
    node.server.start()
    clients = [node.attach_again(name) for name in (*VOLUMES, *VOLUMES[:2])]
    for _ in range(CLIENTS_EACH):
        with pytest.raises(OSError):
            node.attach("disk2")
    eventually(lambda: allocated_bytes(node) <= 192 << 20, "files that are too many are gone")  # others left them
    filled = dict.fromkeys(VOLUMES, 0)
    for client, name in zip(clients, VOLUMES, strict=False):
        for offset in range(0, 64 << 20, 1 << 20):
            if client.request(Command.WRITE, offset, data=random.Random(offset).randbytes(1 << 20)).error:
                break
            filled[name] += 1
    assert allocated_bytes(node) <= (192 + 2 * 4) << 20
    assert 0 < sum(filled.values()) < 4 * 64
    clients[0].close()
    node.attach_again("disk3").close()
    node.write_settings(2)
    assert node.server.stop() == 0
    node.server.start()


@pytest.mark.parametrize("style", list(ReplyStyle))
def test_what_was_negotiated_before_a_client_is_handed_over_counts_afterwards(node: Node, style: ReplyStyle) -> None:
    for _ in range(CLIENTS_EACH):
        client = Client(node.address, "disk1", PATIENCE_S, style)
        assert client.read(0, 8192) == bytes(8192)
        client.close()
