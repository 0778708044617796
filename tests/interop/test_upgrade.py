"""The server becomes a new program under its clients: no error, no byte lost or doubled, and no way to lose a write.

Every client here keeps its one connection over all upgrades: one that was dropped fails its test.
"""

import json
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli.client import NodeClient
from nbdserver.node.errors import NodeError
from protocol.agreement import ReplyStyle
from protocol.nbd import Command
from tests.conftest import Processes
from tests.durability import Judge
from tests.nbd_client import Client
from tests.serving import Server, eventually, is_alive

UPGRADES = 3
JUDGED_BLOCKS = 4096
PATIENCE_S = 30.0
SETTINGS = "segment: 4M\n"

StartServer = Callable[..., Server]


@pytest.fixture
def start_server(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> StartServer:
    def start(*arguments: str, volumes: dict[str, str] | None = None) -> Server:
        (tmp_path / "node.yaml").write_text(SETTINGS)
        options = ["--config", str(tmp_path / "node.yaml"), *arguments]
        return Server(processes, tmp_path / "data", free_port(), volumes or {"disk0": "1G", "disk1": "256M"}, options)

    return start


def attach(server: Server, style: ReplyStyle = ReplyStyle.SIMPLE, name: str = "disk0") -> Client:
    return Client(("127.0.0.1", server.port), name, PATIENCE_S, style)


def upgrade(server: Server) -> Any:
    return json.loads(server.command("upgrade-in-place", "--json"))


def status(server: Server) -> Any:
    return NodeClient(server.data).get("/v1/status")


def clients_of(server: Server) -> Any:
    return NodeClient(server.data).get("/v1/clients")


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[threading.Event]:
    """Run `work` in a thread beside the block; what it raises is raised at the end of the block."""
    failures: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        over.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield over
    finally:
        thread.join()
    if failures:
        raise failures[0]


# --- clients see a pause --------------------------------------------------------------------------------------------


def test_clients_with_sixteen_requests_in_flight_see_no_error_over_several_upgrades(start_server: StartServer) -> None:
    """One of each style of replies, each on a volume of its own."""
    styles = {style.name.lower(): style for style in ReplyStyle}
    server = start_server(volumes=dict.fromkeys(styles, "256M"))
    pid = status(server)["pid"]
    clients = {name: attach(server, style, name) for name, style in styles.items()}
    judges = {name: Judge(JUDGED_BLOCKS, random.Random(7)) for name in styles}
    upgraded = threading.Event()

    def write(name: str) -> None:
        while not upgraded.is_set():
            judges[name].write_until(clients[name], time.monotonic() + 0.2, finish=True)

    with ExitStack() as writing:
        for name in styles:
            writing.enter_context(in_background(partial(write, name)))
        writing.callback(upgraded.set)
        for _ in range(UPGRADES):
            written = {name: judge.writes for name, judge in judges.items()}
            done = upgrade(server)
            assert (done["clients"], done["dropped"], done["failure"]) == (len(styles), 0, "")
            eventually(
                lambda written=written: all(judges[name].writes >= count + 100 for name, count in written.items()),
                "every client goes on",
            )
    assert status(server)["pid"] == pid
    for name, judge in judges.items():
        judge.check(clients[name], acknowledged_too=True)
    assert server.stop() == 0
    server.start()
    for name, judge in judges.items():
        judge.check(attach(server, name=name), acknowledged_too=True)


def test_fio_verifies_what_it_wrote_over_several_upgrades(
    start_server: StartServer, processes: Processes, needs: Callable[[str, str], str], tmp_path: Path
) -> None:
    server = start_server()
    server.command("volume", "set", "disk0", "iops=100")  # so that it is not over before the upgrades are
    arguments = ["--name=job", "--ioengine=nbd", f"--uri={server.uri('disk0')}", "--size=64M", "--rw=randwrite"]
    arguments += ["--bs=4k", "--iodepth=16", "--verify=crc32c", "--output-format=json"]
    load = processes.start([needs("fio", "fio"), *arguments], cwd=tmp_path, stdout=subprocess.PIPE)
    eventually(lambda: any(client["requests"] for client in clients_of(server)), "fio writes")
    for _ in range(UPGRADES):
        assert upgrade(server)["clients"] == 1
    assert load.poll() is None, "fio was over before the upgrades were"
    server.command("volume", "set", "disk0", "iops=none")
    printed, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    job = json.loads(printed[printed.index(b"{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] == job["read"]["total_ios"] == 16384


def test_a_request_of_which_half_was_sent_is_done_after_the_upgrade(start_server: StartServer) -> None:
    """Cut in its header, at the header's end, in its payload, and one byte before its end; in each style of replies."""
    server = start_server()
    cut_off: list[tuple[Client, bytes, int, bytes]] = []
    for style in ReplyStyle:
        for place in range(4):
            client = attach(server, style)
            offset, data = len(cut_off) << 20, random.Random(len(cut_off)).randbytes(100_000)
            packed = client.pack(99, Command.WRITE, offset, 0, data)
            cut = (3, len(packed) - len(data), len(packed) // 2, len(packed) - 1)[place]
            client.socket.sendall(packed[:cut])
            cut_off.append((client, packed[cut:], offset, data))
    assert upgrade(server)["clients"] == len(cut_off)
    for client, rest, offset, data in cut_off:
        client.socket.sendall(rest)
        reply = client.receive()
        assert (reply.cookie, reply.error) == (99, 0)
        assert client.read(offset, len(data)) == data


def test_replies_that_a_client_has_not_taken_are_not_lost_and_hold_up_nobody(start_server: StartServer) -> None:
    server = start_server()
    slow, quick = attach(server), attach(server)
    data = random.Random(2).randbytes(1 << 20)
    assert quick.request(Command.WRITE, 0, data=data).error == 0
    cookies = [slow.send(Command.READ, 0, len(data)) for _ in range(24)]  # takes none of the replies
    time.sleep(0.3)
    done = upgrade(server)
    assert (done["clients"], done["dropped"]) == (2, 0)  # who holds up the others is dropped
    assert quick.read(0, 512) == data[:512]
    for cookie in cookies:
        reply = slow.receive()
        assert (reply.cookie, reply.error) == (cookie, 0)
        assert reply.data == data


def test_who_connects_while_the_program_changes_waits_and_is_served(start_server: StartServer, tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    server = start_server("--socket", path)
    done = threading.Event()
    served = 0

    def connect() -> None:
        nonlocal served
        while not done.is_set():
            for address in (("127.0.0.1", server.port), path):
                try:
                    client = Client(address, "disk1", PATIENCE_S)
                except ConnectionError:
                    continue  # in the handshake when the clients were handed over: the one thing that is closed
                assert client.read(0, 512) == bytes(512)
                client.close()
                served += 1
            time.sleep(0.01)

    with in_background(connect):
        try:
            for _ in range(UPGRADES):
                before = served
                upgrade(server)
                assert served > before
        finally:
            done.set()
    assert Path(path).exists()
    assert server.stop() == 0
    assert not Path(path).exists()


def test_a_client_keeps_its_number_and_its_age_and_one_in_the_handshake_is_closed(start_server: StartServer) -> None:
    server = start_server()
    first = attach(server)
    before = clients_of(server)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as greeted:
        greeted.recv(8)
        done = upgrade(server)
        assert (done["clients"], done["dropped"]) == (1, 1)
        while greeted.recv(4096):
            pass
    after = clients_of(server)
    assert [client["id"] for client in after] == [client["id"] for client in before if client["volume"]]
    assert after[0]["connected_s"] > before[0]["connected_s"]
    second = attach(server)
    assert second.size_bytes == first.size_bytes
    ids = [client["id"] for client in clients_of(server)]
    assert len(set(ids)) == 2
    assert NodeClient(server.data).delete(f"/v1/clients/{ids[0]}") is None
    with pytest.raises(ConnectionError):
        first.read(0, 512)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_program_that_would_not_start_changes_nothing(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server()
    client = attach(server)
    (tmp_path / "node.yaml").write_text(SETTINGS + "colour: blue\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        upgrade(server)
    assert failed.value.returncode == 2
    assert "this one goes on" in failed.value.stderr
    assert "unknown key" in failed.value.stderr
    assert len(failed.value.stderr.splitlines()) == 1
    assert client.read(0, 512) == bytes(512)
    assert status(server)["handover"] is None
    (tmp_path / "node.yaml").write_text(SETTINGS)
    assert upgrade(server)["clients"] == 1
    assert client.read(0, 512) == bytes(512)


def test_two_upgrades_at_a_time_are_refused(start_server: StartServer) -> None:
    server = start_server()
    results: list[str] = []

    def ask() -> None:
        try:
            results.append(NodeClient(server.data).post("/v1/upgrade-in-place", {})["id"])
        except NodeError as error:
            results.append(str(error))

    with in_background(ask), in_background(ask):
        pass
    refused = [result for result in results if "already" in result]
    assert len(refused) == 1
    read_until(server, b"ready:")
    assert [status(server)["handover"]["id"]] == [result for result in results if result not in refused]


def test_a_data_process_that_dies_while_it_hands_over_costs_connections_and_no_write(
    start_server: StartServer,
) -> None:
    """It is stopped before, so that it does not answer, and killed while the control process waits for it."""
    server = start_server()
    client = attach(server)
    judge = Judge(JUDGED_BLOCKS, random.Random(3))
    judge.write_until(client, time.monotonic() + 0.5, finish=True)
    data = int(status(server)["workers"][0]["pid"])
    os.kill(data, signal.SIGSTOP)
    begun = NodeClient(server.data).post("/v1/upgrade-in-place", {})
    read_until(server, b"upgrade: preparing")
    eventually(lambda: not (server.data / "api.sock").exists(), "the API ends, before the data process is asked")
    time.sleep(0.2)
    os.kill(data, signal.SIGKILL)
    read_until(server, b"upgrade failed, this program goes on")
    deadline_s = time.monotonic() + PATIENCE_S
    again = None
    while again is None:
        assert time.monotonic() < deadline_s, "nobody is served any more"
        try:
            again = attach(server)
        except ConnectionRefusedError:
            time.sleep(0.05)
    judge.check(again, acknowledged_too=True)
    now = status(server)
    assert now["handover"]["id"] == begun["id"]
    assert now["handover"]["failure"]
    assert now["workers"][0]["pid"] != data
    assert upgrade(server)["clients"] == 1
    judge.check(again, acknowledged_too=True)


STEPS = [
    b"upgrade: preparing",
    b"handing over: clients wait",
    b"volumes closed in",
    b"upgrade: starting",
    b"taken over",
    b"ready:",
]
LONG_STEPS = STEPS[1:4]


@pytest.mark.parametrize(
    ("step", "delay_s"),
    [*((step, 0.0) for step in STEPS), *((step, 0.1) for step in LONG_STEPS)],
    ids=lambda value: value.decode().strip(":") if isinstance(value, bytes) else value,
)
def test_kill_9_at_any_step_loses_nothing_acknowledged(start_server: StartServer, step: bytes, delay_s: float) -> None:
    server = start_server()
    client = attach(server)
    judge = Judge(JUDGED_BLOCKS, random.Random(4))

    def write() -> None:
        try:
            judge.write_until(client, time.monotonic() + PATIENCE_S)
        except OSError:
            pass  # the kill

    with in_background(write):
        eventually(lambda: judge.writes >= 200, "the client writes")
        NodeClient(server.data).post("/v1/upgrade-in-place", {})
        read_until(server, step)
        time.sleep(delay_s)
        server.kill9()
    server.start()
    judge.check(attach(server), acknowledged_too=True)


def test_sigterm_during_an_upgrade_stops_the_new_program_cleanly(start_server: StartServer) -> None:
    server = start_server()
    client = attach(server)
    assert client.request(Command.WRITE, 0, data=b"kept" * 1024).error == 0
    NodeClient(server.data).post("/v1/upgrade-in-place", {})
    read_until(server, b"handing over: clients wait")
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE_S) == 0
    assert not is_alive(server.process.pid)
    server.start()
    assert attach(server).read(0, 4096) == b"kept" * 1024


def read_until(server: Server, wanted: bytes) -> bytes:
    """Read what the server prints until a line with `wanted`."""
    assert server.process is not None
    assert server.process.stdout is not None
    printed = b""
    deadline_s = time.monotonic() + PATIENCE_S
    while not any(wanted in line for line in printed.split(b"\n")[:-1]):
        left_s = deadline_s - time.monotonic()
        assert left_s > 0, f"it never said {wanted!r}: {printed!r}"
        if select.select([server.process.stdout], [], [], left_s)[0]:
            data = os.read(server.process.stdout.fileno(), 65536)
            assert data, f"it ended without {wanted!r}: {printed!r}"
            printed += data
    return printed
