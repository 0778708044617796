"""The server over connections that are lists: limits, lists, disconnecting, draining."""

from collections.abc import Callable
from typing import cast

from metadata.seams import Connection, Network, Receiver
from nbdserver.frontend.server import Server
from protocol import nbd
from protocol.nbd import Command, Option
from tests.unit.session_rig import HELLO, ListConnection, Rig, feed, make_rig, named


class Doors:
    """The part of a Network that a server uses; its clients are let in by hand."""

    def __init__(self) -> None:
        self.accepts: dict[str, Callable[[Connection], Receiver | None]] = {}

    def listen(self, address: str, accept: Callable[[Connection], Receiver | None]) -> Callable[[], None]:
        self.accepts[address] = accept

        def stop() -> None:
            del self.accepts[address]

        return stop

    def enter(self, peer_name: str = "192.0.2.1:1") -> tuple[ListConnection, Receiver | None]:
        connection = ListConnection(peer_name)
        return connection, self.accepts["127.0.0.1:10809"](connection)


class House:
    """A server with its rig and doors."""

    def __init__(self, rig: Rig, client_limit: int = 3) -> None:
        self.rig = rig
        self.doors = Doors()
        self.events: list[str] = []
        self.server = Server(
            cast(Network, self.doors),
            rig.clock,
            rig.exports,
            lambda kind, fields: self.events.append(kind),
            client_limit,
        )
        self.server.listen("127.0.0.1:10809")
        self.server.listen("unix:/run/nbd")
        self.drained = 0

    def client(self) -> tuple[ListConnection, Receiver]:
        """A client that entered the export."""
        connection, receiver = self.doors.enter()
        assert receiver is not None
        feed(receiver, HELLO + named(Option.GO, "disk"))
        return connection, receiver

    def drain(self) -> None:
        def done() -> None:
            self.drained += 1

        self.server.drain(5.0, done)


def flush_request() -> bytes:
    packed: bytes = nbd.Request.build({"flags": 0, "command": Command.FLUSH, "cookie": 7, "offset": 0, "length": 0})
    return packed


def test_one_client_too_many_is_refused_and_may_come_when_another_has_left() -> None:
    house = House(make_rig())
    receivers = [house.client()[1] for _ in range(3)]
    assert house.doors.enter()[1] is None
    assert house.events[-1] == "client-refused"
    receivers[0].lost("gone")
    assert house.doors.enter()[1] is not None


def test_clients_are_listed_and_disconnected_by_id() -> None:
    house = House(make_rig())
    first, _ = house.client()
    house.doors.enter("unix:pid=5,uid=0")
    one, two = house.server.clients()
    assert (one.export, one.peer.name, two.export, two.peer.name) == ("disk", "192.0.2.1:1", "", "unix:pid=5,uid=0")
    assert house.server.disconnect(one.id)
    assert first.aborted
    assert not house.server.disconnect(one.id)
    assert [client.id for client in house.server.clients()] == [two.id]


def test_draining_finishes_what_is_in_flight_and_closes_what_is_not_finished_in_time() -> None:
    house = House(make_rig())
    idle, _ = house.client()
    busy, receiver = house.client()
    stuck, stuck_receiver = house.client()
    feed(receiver, flush_request())
    house.rig.device.flush = lambda done: None  # type: ignore[method-assign]
    feed(stuck_receiver, flush_request())
    house.drain()
    assert house.doors.accepts == {}
    assert idle.closed
    assert not busy.closed
    house.rig.clock.run()
    assert busy.closed
    assert not busy.aborted
    assert bytes(busy.sent[-16:]) == nbd.SimpleReply.build({"error": 0, "cookie": 7})
    assert not stuck.closed
    assert house.drained == 0
    house.rig.clock.advance(5.0)
    assert stuck.aborted
    assert house.drained == 1
    assert house.server.clients() == []


def test_draining_an_empty_server_is_done_on_the_next_turn() -> None:
    house = House(make_rig())
    house.drain()
    assert house.drained == 0
    house.rig.clock.run()
    house.rig.clock.advance(10)
    assert house.drained == 1
