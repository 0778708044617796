"""Several data processes' clients become one handover, and that one becomes a part for each of the next ones."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdserver.host.listening import descriptor_cookie
from nbdserver.node import handover
from nbdserver.node.data_process import DataProcessError
from nbdserver.node.inherited import Inherited
from nbdserver.node.listeners import Listeners
from nbdserver.node.succession import Succession, joined
from protocol.agreement import Agreement, Offer, ReplyStyle
from protocol.handover import ClientState, Handover, Listening


@pytest.fixture
def sockets() -> Iterator[list[int]]:
    """Descriptors of sockets; those that are still open are closed afterwards."""
    made = [socket.socket(socket.AF_UNIX).detach() for _ in range(6)]
    yield made
    for descriptor in made:
        if is_open(descriptor):
            os.close(descriptor)


def is_open(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").exists()


def client(descriptor: int, export: str) -> ClientState:
    agreement = Agreement(Offer(export, 4096, False), ReplyStyle.SIMPLE, (), 1)
    return ClientState(descriptor_cookie(descriptor), descriptor, 1.0, agreement, 0, b"half", b"")


def test_what_several_hand_over_is_one_and_what_has_no_room_is_dropped(sockets: list[int]) -> None:
    first = Handover("id", 7.0, 1, [], [client(descriptor, "a") for descriptor in sockets[:3]])
    second = Handover("id", 6.0, 2, [], [client(descriptor, "b@monday") for descriptor in sockets[3:]])
    told = [Listening(5, "unix:/x")]
    state, descriptors = joined([(first, sockets[2::-1]), (second, sockets[3:])], told, 5)
    assert (state.id, state.frozen_s, state.dropped, state.listening) == ("id", 6.0, 4, told)
    assert [one.cookie for one in state.clients] == [descriptor_cookie(descriptor) for descriptor in descriptors]
    assert descriptors == sockets[:5]
    assert not is_open(sockets[5]), "its connection would stay open with nobody to serve it"


class Process:
    """A data process of the next program."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.taken: list[str] = []
        self._sent: list[int] = []

    def send_descriptors(self, descriptors: list[int]) -> None:
        self._sent = [os.dup(descriptor) for descriptor in descriptors]

    async def call(self, name: str, clients: int) -> dict[str, Any]:
        assert name == "take_over"
        state, *descriptors = self._sent
        part = handover.read_state(state)
        assert [one.cookie for one in part.clients] == [descriptor_cookie(descriptor) for descriptor in descriptors]
        for descriptor in descriptors:
            os.close(descriptor)
        if self.fails:
            raise DataProcessError("gone")
        self.taken = [one.agreement.offer.name for one in part.clients]
        return {"clients": clients, "pause_s": float(clients)}


def test_each_client_goes_to_the_process_that_has_its_export_by_then(
    sockets: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    exports = ["a", "b", "a@monday", "gone", "c"]
    states = [client(descriptor, export) for descriptor, export in zip(sockets, exports, strict=False)]
    file = handover.write_state(Handover("id", 1.0, 1, [], states))
    inherited = Inherited(state=file, clients=sockets[:4])  # the last one's socket did not come
    processes = {"a": Process(), "a@monday": Process(), "b": Process(fails=True), "c": Process()}
    processes["a@monday"] = processes["a"]
    said: list[str] = []
    succession = Succession(inherited, said.append, lambda kind, fields: None)
    listeners = Listeners(tmp_path / "own", [])
    taken = asyncio.run(succession.give_to(processes.get, listeners))  # type: ignore[arg-type]
    assert taken == {"failure": "", "id": "id", "clients": 2, "dropped": 4, "pause_s": 2.0}
    assert processes["a"].taken == ["a", "a@monday"]
    assert any("1 clients were not taken over: gone" in line for line in said)
    assert not any(map(is_open, sockets[:4])), "a copy that stays would keep a connection open"
    assert asyncio.run(succession.give_to(processes.get, listeners)) is None, "a state is used once"  # type: ignore[arg-type]


def test_a_state_that_cannot_be_read_costs_the_connections_alone(
    sockets: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    file = os.memfd_create("state")
    os.write(file, b"rubbish" * 10)
    said: list[str] = []
    succession = Succession(Inherited(state=file, clients=sockets), said.append, lambda kind, fields: None)
    assert asyncio.run(succession.give_to(lambda export: None, Listeners(tmp_path / "own", []))) is None
    assert any("no client was taken over: this is no state of clients" in line for line in said)
    assert not any(map(is_open, sockets))
