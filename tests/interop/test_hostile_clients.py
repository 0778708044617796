"""Clients that leave without reading, send half a frame, or noise: a real server goes on serving the others."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from protocol import nbd
from protocol.nbd import Command
from tests.conftest import ROOT, Processes
from tests.nbd_client import Client
from tests.serving import resident_bytes

SIZE_BYTES = 32 << 20
MEMORY_LIMIT_BYTES = 300 << 20
SEED = int(os.environ.get("HOSTILE_SEED", "0")) or random.SystemRandom().randrange(1 << 32)


class Victim:
    """A server in a process of its own."""

    def __init__(self, processes: Processes, path: str, port: int) -> None:
        self.path = path
        self.port = port
        self.process = processes.start(
            [sys.executable, "-m", "tests.interop.serve_memory", str(SIZE_BYTES), "inline",
             f"unix:{path}", f"127.0.0.1:{port}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready:\n"

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def serves(self) -> None:
        """It answers a well-behaved client, soon."""
        client = Client(self.path, "disk", timeout_s=5)
        assert client.request(Command.WRITE, 4096, data=b"good").error == 0
        assert client.read(4096, 4) == b"good"
        client.close()


@pytest.fixture(scope="module")
def victim(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Victim:
    return Victim(module_processes, str(tmp_path_factory.mktemp("hostile") / "socket"), free_port())


@pytest.fixture(autouse=True)
def goes_on(victim: Victim) -> Iterator[None]:
    """After every test the server serves, has closed what was left, and has not grown."""
    victim.serves()
    before = victim.descriptors()
    yield
    victim.serves()
    deadline_s = time.monotonic() + 15
    while victim.descriptors() > before:
        assert time.monotonic() < deadline_s, "connections of clients that left are still open"
        time.sleep(0.05)
    assert victim.process.poll() is None
    assert resident_bytes(victim.process.pid) < MEMORY_LIMIT_BYTES


def entered(victim: Victim) -> socket.socket:
    """The socket of a client in the transmission phase."""
    return Client(victim.path, "disk").socket


def read_request(length: int, cookie: int = 1) -> bytes:
    packed: bytes = nbd.Request.build(
        {"flags": 0, "command": Command.READ, "cookie": cookie, "offset": 0, "length": length}
    )
    return packed


def test_clients_that_ask_for_much_and_take_nothing_cost_bounded_memory(victim: Victim) -> None:
    sockets = [entered(victim) for _ in range(4)]
    for client in sockets:
        client.setblocking(False)
        try:
            for cookie in range(2000):
                client.send(read_request(1 << 20, cookie))
        except BlockingIOError:
            pass
    time.sleep(0.3)
    victim.serves()
    assert resident_bytes(victim.process.pid) < MEMORY_LIMIT_BYTES
    for client in sockets:
        client.close()


@pytest.mark.parametrize("size_bytes", [1, 27, 28, 1000])
def test_clients_that_leave_in_the_middle_of_a_write_change_nothing(victim: Victim, size_bytes: int) -> None:
    client = entered(victim)
    packed = nbd.Request.build({"flags": 0, "command": Command.WRITE, "cookie": 1, "offset": 0, "length": 4096})
    client.sendall((packed + b"\xff" * 4096)[:size_bytes])
    client.close()
    check = Client(victim.path, "disk")
    assert check.read(0, 4096) == bytes(4096)
    check.close()


def test_clients_that_reset_their_connection_are_forgotten(victim: Victim) -> None:
    for _ in range(20):
        client = socket.create_connection(("127.0.0.1", victim.port), 5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close() sends RST
        client.sendall(b"\0\0\0\3IHAVEOPT")
        client.close()


def test_noise_in_place_of_a_handshake_or_of_requests_disturbs_nobody(victim: Victim) -> None:
    print(f"HOSTILE_SEED={SEED}")
    generator = random.Random(SEED)
    for round_number in range(60):
        client = entered(victim) if round_number % 2 else socket.socket(socket.AF_UNIX)
        if not round_number % 2:
            client.connect(victim.path)
        client.settimeout(1)
        noise = generator.randbytes(generator.randrange(1, 5000))
        if generator.random() < 0.5:
            noise = (read_request(generator.randrange(1 << 16)) if round_number % 2 else b"\0\0\0\3IHAVEOPT") + noise
        try:
            client.sendall(noise)
            if generator.random() < 0.5:
                client.recv(1 << 16)
        except OSError:
            pass  # it hung up, as it may
        client.close()


def test_a_hundred_silent_connections_leave_room_for_others(victim: Victim) -> None:
    silent = []
    for _ in range(100):
        client = socket.socket(socket.AF_UNIX)
        client.connect(victim.path)
        silent.append(client)
    victim.serves()
    for client in silent:
        client.close()
