"""Descriptors that a process is started with: which is what, and what is of no use is closed."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserver.node import inherited
from nbdserver.node.descriptors import CLIENT, LISTENING, LOCK, STATE
from nbdserver.node.inherited import take

FIRST = 700
"""Where this test's descriptors begin: those from 3 on are the test runner's."""

Give = Callable[..., dict[str, str]]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Iterator[Give]:
    monkeypatch.setattr(inherited, "FIRST_DESCRIPTOR", FIRST)
    given: list[int] = []

    def prepare(*named: tuple[str, socket.socket | int]) -> dict[str, str]:
        for number, (_, one) in enumerate(named, FIRST):
            os.dup2(one if isinstance(one, int) else one.fileno(), number)
            given.append(number)
        names = [name for name, _ in named]
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(named)), "LISTEN_FDNAMES": ":".join(names)}

    yield prepare
    for number in given:
        try:
            os.close(number)
        except OSError:
            pass  # closed, as it should be


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_names_tell_what_descriptors_are(give: Give) -> None:
    with listening() as ours, listening() as unit, socket.socket() as client:
        file = os.memfd_create("state")
        environment = give((LOCK, file), (STATE, file), (LISTENING, ours), (CLIENT, client), ("web.socket", unit))
        environment["OTHER"] = "stays"
        got = take(environment)
        port = unit.getsockname()[1]
        os.close(file)
    assert (got.lock, got.state, got.listening, got.clients) == (FIRST, FIRST + 1, [FIRST + 2], [FIRST + 3])
    assert got.activated == [(FIRST + 4, f"127.0.0.1:{port}")]
    assert environment == {"OTHER": "stays"}
    assert not any(os.get_inheritable(number) for number in range(FIRST, FIRST + 5))
    assert got.problems == []
    got.forget()
    assert [is_open(number) for number in range(FIRST, FIRST + 5)] == [True, False, False, False, True]


def test_what_is_meant_for_another_process_is_left_alone(give: Give) -> None:
    with listening() as one:
        environment = {**give(("web.socket", one)), "LISTEN_PID": str(os.getpid() + 1)}
        assert take(environment) == inherited.Inherited()
        assert is_open(FIRST)
        assert not environment


@pytest.mark.parametrize("environment", [{}, {"LISTEN_FDS": "3"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}])
def test_without_descriptors_there_are_none(environment: dict[str, str]) -> None:
    assert take(environment) == inherited.Inherited()


def test_sockets_without_names_are_served(give: Give) -> None:
    with listening() as one:
        environment = give(("", one))
        del environment["LISTEN_FDNAMES"]
        assert take(environment).activated == [(FIRST, f"127.0.0.1:{one.getsockname()[1]}")]


def test_addresses_are_written_as_settings_write_them(give: Give, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as local, socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
        local.bind(str(path))
        local.listen()
        got = take(give(("a", local), ("b", six)))
        assert [address for _, address in got.activated] == [f"unix:{path}", f"[::1]:{six.getsockname()[1]}"]


def test_what_cannot_be_served_is_closed_and_told(give: Give) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as idle:
        got = take(give(("datagrams", datagrams), ("idle", idle)))
    assert got.activated == []
    assert [problem.split()[2] for problem in got.problems] == ["datagrams", "idle"]
    assert not is_open(FIRST)
    assert not is_open(FIRST + 1)


@pytest.mark.parametrize("states", [0, 2])
def test_clients_without_one_state_are_closed_and_told(give: Give, states: int) -> None:
    file = os.memfd_create("state")
    with socket.socket() as client, listening() as ours:
        got = take(give((CLIENT, client), (LISTENING, ours), *[(STATE, file)] * states))
    os.close(file)
    assert (got.state, got.clients, got.listening) == (None, [], [])
    assert not any(is_open(number) for number in range(FIRST, FIRST + 2 + states))
    assert f"{states} states" in got.problems[0]


def test_a_socket_that_comes_from_systemd_and_from_the_program_before_is_taken_once(give: Give) -> None:
    file = os.memfd_create("state")
    with listening() as one, listening() as other:
        got = take(give((LISTENING, one), ("web.socket", one), (LISTENING, other), (STATE, file)))
    os.close(file)
    assert got.listening == [FIRST + 2]
    assert [number for number, _ in got.activated] == [FIRST + 1]
    assert not is_open(FIRST)
