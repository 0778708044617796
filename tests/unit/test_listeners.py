"""The listening sockets of a node: changed whole or not at all, kept while processes come and go, handed over."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserver.host.listening import descriptor_cookie
from nbdserver.node.errors import WrongInputError
from nbdserver.node.listeners import Listeners


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own.sock"


@pytest.fixture
def listeners(own: Path) -> Iterator[Listeners]:
    made = Listeners(own, [])
    yield made
    made.close()


def addresses(listeners: Listeners) -> set[str]:
    return {address for address, _ in listeners.sockets()}


def connect(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    one.connect(str(path))
    return one


def test_addresses_come_and_go_and_what_stays_is_the_same_socket(
    listeners: Listeners, own: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    first, second, tcp = f"unix:{tmp_path}/a", f"unix:{tmp_path}/b", f"127.0.0.1:{free_port()}"
    listeners.listen([first, tcp, tcp])
    assert addresses(listeners) == {first, tcp, f"unix:{own}"}
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    before = dict(listeners.sockets())
    listeners.listen([second, tcp])
    assert addresses(listeners) == {second, tcp, f"unix:{own}"}
    assert dict(listeners.sockets())[tcp] == before[tcp]
    assert not (tmp_path / "a").exists()
    connect(tmp_path / "b").close()
    listeners.close()
    assert list(tmp_path.iterdir()) == []


def test_a_change_that_is_refused_changes_nothing(
    listeners: Listeners, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    kept, new = f"unix:{tmp_path}/kept", f"unix:{tmp_path}/new"
    listeners.listen([kept])
    before = listeners.sockets()
    port = free_port()
    taken = rf"port {port} is taken by .*; choose another, for example --listen"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(WrongInputError, match=taken):
        listeners.listen([new, f"127.0.0.1:{port}"])
    assert listeners.sockets() == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(WrongInputError, match=r"another program listens there, or it is no socket; .* --socket"):
        listeners.listen([f"unix:{tmp_path}/file"])
    assert (tmp_path / "file").exists()


def test_the_next_program_gets_all_sockets_but_the_one_for_own_commands(
    listeners: Listeners, own: Path, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/nbd"
    listeners.listen([address])
    waiting = connect(tmp_path / "nbd")  # nobody accepts
    listeners.close_own()
    assert not own.exists()
    (told,), (descriptor,) = listeners.to_hand_over()
    assert (told.address, told.cookie) == (address, descriptor_cookie(descriptor))

    after = Listeners(own, [])
    after.inherit(address, os.dup(descriptor))
    after.listen([address])
    ((_, taken),) = [one for one in after.sockets() if one[0] == address]
    assert descriptor_cookie(taken) == told.cookie
    with socket.socket(fileno=os.dup(taken)) as listening:
        accepted, _ = listening.accept()
    accepted.sendall(b"hello")
    assert waiting.recv(5) == b"hello"
    after.close()


def test_an_inherited_socket_that_nobody_wants_is_closed_with_its_file(listeners: Listeners, tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left"))
    left.listen()
    listeners.inherit(f"unix:{tmp_path}/left", left.detach())
    listeners.listen([])
    assert not (tmp_path / "left").exists()


def test_the_file_of_a_socket_unit_stays(own: Path, tmp_path: Path) -> None:
    activated = socket.socket(socket.AF_UNIX)
    activated.bind(str(tmp_path / "unit"))
    activated.listen()
    address = f"unix:{tmp_path}/unit"
    listeners = Listeners(own, [(activated.fileno(), address)])
    listeners.listen([address])
    connect(tmp_path / "unit").close()
    listeners.close()
    connect(tmp_path / "unit").close()
    assert (tmp_path / "unit").exists()
