"""A restart by systemd keeps the clients: a manager in this test plays its part.

It starts the program with NOTIFY_SOCKET, FDSTORE and, for socket activation, LISTEN_FDS; it keeps the descriptors that
come with FDSTORE=1 and drops them on FDSTOREREMOVE=1; it answers barriers; it gives what it keeps to the next process.
Like systemd it keeps its own copies open all the time.
"""

import array
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserver.cli.client import NodeClient
from protocol.nbd import Command
from tests.conftest import ROOT, Processes
from tests.durability import Judge
from tests.interop.test_upgrade import in_background
from tests.nbd_client import Client
from tests.serving import eventually

PATIENCE_S = 30.0
STORE_MAX = 64
FIRST_DESCRIPTOR = 3

# Does what systemd's executor does: descriptors from number 3 on, their variables with its own process id, then the
# program. The arguments are the descriptors and names, then the command.
LAUNCHER = """
import fcntl, os, sys
count = int(sys.argv[1])
given = [item.split("=") for item in sys.argv[2 : 2 + count]]
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 3 + count) for number, _ in given]
for place, number in enumerate(high):
    os.dup2(number, 3 + place)
os.closerange(3 + count, 4096)
if given:
    os.environ.update(
        LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=":".join(name for _, name in given)
    )
os.execv(sys.argv[2 + count], sys.argv[2 + count :])
"""


class Manager:
    """One service unit."""

    def __init__(self, processes: Processes, folder: Path, port: int) -> None:
        self._processes = processes
        self.folder = folder
        self.data = folder / "data"
        self.port = port
        self.store: list[tuple[str, int]] = []
        self.activated: list[tuple[str, socket.socket]] = []
        self.states: list[str] = []
        self.store_max = STORE_MAX
        self.answers_barriers = True
        self.process: subprocess.Popen[bytes] | None = None
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(folder / "notify"))

    def start(self, *arguments: str) -> None:
        """Start the service and wait for READY=1."""
        given = [(name, one.fileno()) for name, one in self.activated] + [(name, number) for name, number in self.store]
        command = [sys.executable, "-m", "nbdserver", "serve", "--data", str(self.data), "--create", "disk0=256M"]
        self.states.clear()
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-c", LAUNCHER, str(len(given)), *(f"{number}={name}" for name, number in given),
                    *command, *arguments,
                ],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                    "NOTIFY_SOCKET": str(self.folder / "notify"),
                    "FDSTORE": str(self.store_max),
                },
                pass_fds=[number for _, number in given],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._processes.started.append(self.process)
        self.serve_until(lambda: "READY=1" in self.states)

    def serve_until(self, holds: Callable[[], bool]) -> None:
        """Take notifications until something holds."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline_s, self.printed()
            if select.select([self.notified], [], [], 0.02)[0]:
                self._take()

    def stop(self) -> int:
        """SIGTERM, as `systemctl stop` and the first half of `systemctl restart` do."""
        process = self.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        self.serve_until(lambda: process.poll() is not None)
        return process.wait()

    def drop_store(self) -> None:
        """As after `systemctl stop`."""
        for _, number in self.store:
            os.close(number)
        self.store.clear()

    def printed(self) -> str:
        return (self.folder / "log").read_text()

    def close(self) -> None:
        self.drop_store()
        self.notified.close()
        for _, one in self.activated:
            one.close()

    def _take(self) -> None:
        message, control, _, _ = self.notified.recvmsg(4096, socket.CMSG_SPACE(256 * 4))
        numbers = array.array("i")
        for level, kind, data in control:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
        fields = dict(line.split("=", 1) for line in message.decode().splitlines())
        self.states.append(message.decode())
        if "FDSTORE" in fields:
            for number in numbers:
                if len(self.store) < self.store_max:
                    self.store.append((fields["FDNAME"], number))
                else:
                    os.close(number)
        elif "FDSTOREREMOVE" in fields:
            for entry in [entry for entry in self.store if entry[0] == fields["FDNAME"]]:
                os.close(entry[1])
                self.store.remove(entry)
        elif "BARRIER" in fields and not self.answers_barriers:
            return  # the descriptor stays open
        else:
            for number in numbers:
                os.close(number)


@pytest.fixture
def manager(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Manager]:
    made = Manager(processes, tmp_path, free_port())
    yield made
    made.close()


def attach(manager: Manager) -> Client:
    return Client(("127.0.0.1", manager.port), "disk0", PATIENCE_S)


def listen(manager: Manager) -> tuple[str, str]:
    return "--listen", f"127.0.0.1:{manager.port}"


def test_clients_live_through_restarts_and_are_in_the_store_only_between_them(manager: Manager) -> None:
    manager.start(*listen(manager))
    client = attach(manager)
    judge = Judge(2048, random.Random(5))
    over = False

    def write() -> None:
        while not over:
            judge.write_until(client, time.monotonic() + 0.2, finish=True)

    with in_background(write):
        try:
            for _ in range(3):
                written = judge.writes
                assert manager.stop() == 0
                names = [name for name, _ in manager.store]
                assert sorted(names) == ["nbdserver-client", "nbdserver-listen", "nbdserver-state"]
                waiting = socket.create_connection(("127.0.0.1", manager.port), PATIENCE_S)  # while nobody runs
                manager.start(*listen(manager))
                assert not manager.store
                assert waiting.recv(8) == b"NBDMAGIC"
                waiting.close()
                manager.serve_until(lambda least=written + 100: judge.writes > least)  # type: ignore[misc]
        finally:
            over = True
    judge.check(client, acknowledged_too=True)


def test_a_stop_answers_what_was_asked_and_the_dropped_store_closes_the_connections(manager: Manager) -> None:
    manager.start(*listen(manager))
    client = attach(manager)
    cookies = [client.send(Command.WRITE, 4096 * number, data=b"x" * 4096) for number in range(16)]
    first = client.receive()
    assert first.error == 0
    assert manager.stop() == 0
    manager.drop_store()
    answered = [first.cookie]
    try:
        while True:
            reply = client.receive()
            assert reply.error == 0
            answered.append(reply.cookie)
    except ConnectionError:
        pass  # the one way out: the connection was closed, between two replies
    assert not client._received, "a reply was cut off"
    assert set(answered) <= set(cookies)
    manager.start(*listen(manager))
    again = attach(manager)
    for cookie in answered:
        assert again.read(4096 * (cookie - cookies[0]), 4096) == b"x" * 4096


def test_a_client_that_has_gone_between_stop_and_start_is_left_out(manager: Manager) -> None:
    manager.start(*listen(manager))
    gone, stays = attach(manager), attach(manager)
    assert manager.stop() == 0
    gone.close()
    manager.start(*listen(manager))
    assert stays.read(0, 512) == bytes(512)
    eventually(lambda: len(NodeClient(manager.data).get("/v1/clients")) == 1, "one client is left")


def test_a_store_that_is_too_small_drops_the_clients_beyond_it_and_says_so(manager: Manager) -> None:
    manager.store_max = 4  # the state, one listening socket, two clients
    manager.start(*listen(manager))
    clients = [attach(manager) for _ in range(3)]
    assert manager.stop() == 0
    assert len(manager.store) == 4
    manager.start(*listen(manager))
    handover = NodeClient(manager.data).get("/v1/status")["handover"]
    assert (handover["clients"], handover["dropped"]) == (2, 1)
    assert clients[0].read(0, 512) == clients[1].read(0, 512) == bytes(512)
    with pytest.raises(ConnectionError):
        clients[2].read(0, 512)


def test_clients_that_the_manager_may_hand_out_again_are_dropped(manager: Manager) -> None:
    """Their state grows old with the first request: a later start must not get it once more."""
    manager.start(*listen(manager))
    client = attach(manager)
    assert manager.stop() == 0
    manager.answers_barriers = False
    manager.start(*listen(manager))
    assert "they have to connect again" in manager.printed()
    manager.drop_store()
    with pytest.raises(ConnectionError):
        client.read(0, 512)
    assert attach(manager).read(0, 512) == bytes(512)


def test_a_state_that_cannot_be_read_costs_the_clients_and_nothing_else(manager: Manager) -> None:
    manager.start(*listen(manager))
    client = attach(manager)
    assert client.request(Command.WRITE, 0, data=b"kept").error == 0
    assert manager.stop() == 0
    state = next(number for name, number in manager.store if name == "nbdserver-state")
    os.pwrite(state, b"\xff", os.fstat(state).st_size - 1)
    manager.start(*listen(manager))
    assert "no client was taken over: the state of the clients is damaged" in manager.printed()
    with pytest.raises(ConnectionError):
        client.read(0, 512)
    assert attach(manager).read(0, 4) == b"kept"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_sockets_of_a_socket_unit_are_served_through_restarts_upgrades_and_deaths(
    manager: Manager, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "unit.sock"
    if kind == "tcp":
        unit = socket.create_server(("127.0.0.1", manager.port))
        shown, address = f"127.0.0.1:{manager.port}", ("127.0.0.1", manager.port)
    else:
        unit = socket.socket(socket.AF_UNIX)
        unit.bind(str(path))
        unit.listen()
        shown, address = f"unix:{path}", str(path)
    manager.activated.append(("nbdserver.socket", unit))
    manager.start()
    node = NodeClient(manager.data)
    assert node.get("/v1/status")["listen"] == [shown], "the default address is served beside the unit's"
    client = Client(address, "disk0", PATIENCE_S)
    assert client.request(Command.WRITE, 0, data=b"kept").error == 0

    assert manager.stop() == 0
    manager.start()
    assert client.read(0, 4) == b"kept"

    begun = node.post("/v1/upgrade-in-place", {})
    manager.states.clear()
    manager.serve_until(lambda: "READY=1" in manager.states)
    status = NodeClient(manager.data).get("/v1/status")
    assert (status["handover"]["id"], status["listen"]) == (begun["id"], [shown])
    assert client.read(0, 4) == b"kept"

    os.kill(status["workers"][0]["pid"], signal.SIGKILL)
    with pytest.raises(ConnectionError):
        client.read(0, 4)
    assert Client(address, "disk0", PATIENCE_S).read(0, 4) == b"kept"
    assert manager.stop() == 0
    assert kind == "tcp" or path.exists(), "the file of the unit's socket is not ours to remove"
