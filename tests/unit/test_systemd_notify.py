"""What is told to systemd, and what is waited for."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver.node import systemd_notify


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_descriptors_are_stored_under_their_name(manager: socket.socket) -> None:
    with socket.socket() as one:
        systemd_notify.store("nbdserver-client", [one.fileno()] * 300)
        systemd_notify.remove("nbdserver-client")
    counts = []
    for _ in range(2):
        message, descriptors, _, _ = socket.recv_fds(manager, 1000, 300)
        assert message == b"FDSTORE=1\nFDNAME=nbdserver-client"
        counts.append(len(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
    assert sum(counts) == 300
    assert manager.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=nbdserver-client"


def test_nothing_is_sent_for_no_descriptors(manager: socket.socket) -> None:
    systemd_notify.store("nbdserver-client", [])
    systemd_notify.notify("READY=1")
    assert manager.recv(1000) == b"READY=1"


def test_a_barrier_waits_until_the_manager_lets_go(manager: socket.socket) -> None:
    passed: list[bool] = []
    waiting = threading.Thread(target=lambda: passed.append(systemd_notify.barrier()))
    waiting.start()
    message, descriptors, _, _ = socket.recv_fds(manager, 1000, 1)
    assert message == b"BARRIER=1"
    assert not passed
    os.close(descriptors[0])
    waiting.join(10)
    assert passed == [True]


def test_a_barrier_that_nobody_answers_is_told(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd_notify, "BARRIER_TIMEOUT_S", 0.05)
    assert not systemd_notify.barrier()
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    assert not systemd_notify.barrier()


@pytest.mark.parametrize(
    ("store", "notify", "size"), [("5", "/run/x", 5), ("", "/run/x", 0), ("5", "", 0), ("many", "/run/x", 0)]
)
def test_the_store_has_the_size_that_systemd_says(
    monkeypatch: pytest.MonkeyPatch, store: str, notify: str, size: int
) -> None:
    monkeypatch.setenv("FDSTORE", store)
    monkeypatch.setenv("NOTIFY_SOCKET", notify)
    assert systemd_notify.store_size() == size
