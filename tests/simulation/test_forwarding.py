"""Clients of three simulated nodes, of which one serves the volume: each of them takes the client, whatever fails."""

import gc
import weakref

import pytest

from nbdserver.frontend.away_client import ATTACH_S, Nobody
from nbdserver.frontend.forwarding import UNSENT_LIMIT_BYTES
from nbdserver.replication.grants import BEAT_S, FORWARD_S
from nbdserver.volume.export import Export
from protocol.nbd import Command, Option
from tests.simulation.forwarding_stage import CLIENT_LIMIT, SIZE_BYTES, Client, Stage
from tests.unit.memory_device import MemoryDevice
from tests.unit.session_rig import HELLO, named, option


def told(client: Client) -> str:
    return bytes(client.received_bytes).decode(errors="replace")


def test_whichever_node_a_client_comes_to_it_reads_what_others_have_written() -> None:
    stage = Stage()
    clients = [stage.attach(name) for name in ("node-1", "node-2", "node-3")]
    clients[1].write(4096, b"written by way of node-2")
    stage.until(lambda: len(clients[1].received_bytes) == 16)
    for client in clients:
        assert stage.read(client, 4096, 512).startswith(b"written by way of node-2")
    shown = stage.node("node-1").server.clients()
    assert [client.peer.via for client in shown] == ["", "node-2", "node-3"]
    assert len({client.peer.host for client in shown}) == 1, "it is not the client's address that is shown"
    assert stage.sessions("node-2") == stage.sessions("node-3") == 0
    (away,) = stage.node("node-2").server.away()
    assert (away.export, away.forwarded_to, away.peer.host) == ("disk", "node-1", shown[1].peer.host)
    assert stage.node("node-2").server.disconnect(away.id)
    stage.until(lambda: bool(clients[1].lost_because) and stage.sessions("node-1") == 2)
    assert not stage.node("node-2").server.disconnect(away.id)


def test_it_is_told_the_same_by_every_node() -> None:
    stage = Stage()
    conversation = HELLO + option(Option.STRUCTURED_REPLY) + named(Option.INFO, "disk") + named(Option.GO, "disk")
    answers = []
    for name in ("node-1", "node-2"):
        client = stage.connect(name)
        client.send(conversation)
        stage.until(lambda client=client: client.has_entered)  # type: ignore[misc]
        answers.append(bytes(client.received_bytes))
    assert answers[0] == answers[1]


def test_a_node_that_is_asked_to_serve_it_itself_does() -> None:
    stage = Stage(owner="node-2")
    stage.node("node-2").exports.remove("disk")
    client = stage.connect("node-2")
    client.go()
    stage.node("node-2").serve()
    stage.until(lambda: client.has_entered)
    assert stage.sessions("node-2") == 1


def test_a_client_hears_why_its_volume_cannot_be_served_and_may_ask_for_another() -> None:
    stage = Stage()
    stage.answers = [Nobody("all of node-1, node-3 are away")]
    stage.node("node-2").exports.add(Export("near", MemoryDevice(SIZE_BYTES, lambda _: None)))
    client = stage.connect("node-2")
    client.go()
    stage.until(lambda: "disk cannot be served now: all of node-1, node-3 are away" in told(client))
    client.send(named(Option.GO, "near"))
    stage.until(lambda: client.has_entered)


def test_a_node_that_does_not_take_it_is_named_when_it_is_asked_again_until_the_time_is_over() -> None:
    stage = Stage()
    stage.node("node-1").exports.remove("disk")
    client = stage.connect("node-2")
    begun_s = stage.cluster.now_s
    client.go()
    stage.until(lambda: "disk cannot be served now: node-1: it does not serve disk" in told(client), ATTACH_S + 1.0)
    assert stage.asked[:3] == [("node-2", ()), ("node-2", ("node-1",)), ("node-2", ("node-1", "node-1"))]
    assert ATTACH_S <= stage.cluster.now_s - begun_s < ATTACH_S + 0.5


def test_a_client_waits_while_its_volume_moves() -> None:
    stage = Stage()
    stage.cluster.machines["node-1"].end(power=True)
    client = stage.connect("node-2")
    client.go()
    stage.cluster.run(2.0)
    stage.move("node-3")
    stage.until(lambda: client.has_entered, 6.0)
    assert not client.lost_because


def test_a_client_that_has_waited_has_the_time_of_every_handshake_once_its_volume_is_there() -> None:
    stage = Stage()
    stage.node("node-1").exports.remove("disk")
    client = stage.connect("node-2")
    client.send(HELLO + named(Option.INFO, "disk"))
    stage.cluster.run(ATTACH_S - 5.0)
    stage.node("node-1").serve()
    stage.cluster.run(6.0)
    assert "cannot be served" not in told(client)
    client.send(named(Option.GO, "disk"))
    stage.until(lambda: client.has_entered)


def test_who_asks_at_the_same_time_asks_once() -> None:
    stage = Stage()
    clients = [stage.connect("node-2") for _ in range(3)]
    for client in clients:
        client.go()
    stage.until(lambda: all(client.has_entered for client in clients))
    assert stage.asked == [("node-2", ())]


def test_clients_that_are_forwarded_count_at_both_nodes() -> None:
    stage = Stage()
    clients = [stage.attach("node-2") for _ in range(CLIENT_LIMIT)]
    assert stage.connect("node-2").lost_because
    other = stage.connect("node-3")
    other.go()
    stage.until(lambda: "node-1: it takes no more clients" in told(other), ATTACH_S + 1.0)
    clients[0].hang_up()
    stage.until(lambda: stage.sessions("node-1") == CLIENT_LIMIT - 1)
    assert not stage.connect("node-2").lost_because


def test_what_a_client_sends_before_it_hangs_up_is_done() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    client.write(0, b"last words")
    client.hang_up()
    stage.until(lambda: not stage.sessions("node-1"))
    assert stage.device.data.startswith(b"last words")
    assert stage.node("node-2").gone() == ["the client closed the connection"]


def test_an_owner_that_hears_nothing_from_a_forwarder_drops_its_clients_and_no_others() -> None:
    stage = Stage()
    stage.attach("node-2")
    kept = stage.attach("node-3")
    stage.cluster.isolate("node-2")
    stage.until(lambda: stage.sessions("node-1") == 1, FORWARD_S + 3 * BEAT_S)
    assert stage.node("node-1").gone() == ["the node that it had come to is silent"]
    stage.cluster.run(5.0)
    assert not kept.lost_because
    assert stage.read(kept, 0, 512)
    assert [client.peer.via for client in stage.node("node-1").server.clients()] == ["node-3"]


def test_what_a_client_has_left_behind_is_not_done_after_what_it_asks_for_when_it_comes_again() -> None:
    stage = Stage()
    first = stage.attach_with_a_write_that_waits("node-2")
    first.hang_up()
    second = stage.attach("node-2")
    second.write(512, b"new")
    stage.cluster.run(0.01)
    stage.acknowledge()
    stage.until(lambda: len(second.received_bytes) == 16, 0.05)
    stage.cluster.run(5.0)
    assert stage.device.data[512:].startswith(b"new")
    (reason,) = stage.node("node-1").gone()
    assert reason in ("the client closed the connection", "node-2 has it no more, and its host has come again")


def test_what_it_has_left_behind_at_one_node_is_not_done_after_it_has_come_to_another() -> None:
    stage = Stage()
    first = stage.attach_with_a_write_that_waits("node-2")
    first.hang_up()
    stage.cluster.run(0.01)
    second = stage.attach("node-3")
    second.write(512, b"new")
    stage.cluster.run(0.01)
    stage.acknowledge()
    stage.until(lambda: len(second.received_bytes) == 16, 0.05)
    stage.cluster.run(5.0)
    assert stage.device.data[512:].startswith(b"new")


@pytest.mark.parametrize("way", ["node-1", "node-3"])
def test_a_write_that_is_held_up_between_two_nodes_is_not_done_after_its_retry_by_another_way(way: str) -> None:
    """Nobody has told the owner yet that the client has left node-2: node-2 is cut off."""
    stage = Stage()
    first = stage.attach("node-2")
    stage.cluster.run(1.0)
    mend = stage.cluster.wires.block(["node-2"], ["node-1"], both=True)
    first.write(0, b"old")
    stage.cluster.run(0.05)
    first.hang_up()
    stage.cluster.run(0.05)
    second = stage.connect(way)
    second.go()
    stage.cluster.run(0.3)
    assert not second.has_entered, "it is served although the first one may still be there"
    stage.until(lambda: second.has_entered, FORWARD_S + 2 * BEAT_S)
    second.received_bytes.clear()
    second.write(0, b"new")
    stage.until(lambda: len(second.received_bytes) == 16)
    mend()
    stage.cluster.run(5.0)
    assert stage.device.data.startswith(b"new")


@pytest.mark.parametrize("way", ["node-1", "node-3"])
def test_a_host_may_have_connections_by_several_ways_and_waits_for_none_of_them(way: str) -> None:
    stage = Stage()
    stage.attach("node-2")
    begun_s = stage.cluster.now_s
    stage.attach(way)
    assert stage.cluster.now_s - begun_s < 0.5 * BEAT_S
    assert stage.sessions("node-1") == 2


def test_a_snapshot_is_entered_directly_by_a_host_whose_volume_is_forwarded() -> None:
    stage = Stage()
    stage.node("node-1").exports.add(Export("disk@monday", stage.device, read_only=True))
    stage.attach("node-2")
    client = stage.connect("node-1")
    client.go("disk@monday")
    stage.until(lambda: client.has_entered, 0.5 * BEAT_S)
    assert stage.asked == [("node-2", ()), ("node-1", ())]


def test_a_client_that_comes_directly_while_the_other_way_is_dead_waits_until_that_is_certain() -> None:
    stage = Stage()
    first = stage.attach("node-2")
    stage.cluster.machines["node-2"].end(power=True)
    begun_s = stage.cluster.now_s
    second = stage.connect("node-1")
    second.go()
    stage.until(lambda: second.has_entered, FORWARD_S + 2 * BEAT_S)
    assert stage.cluster.now_s - begun_s > 0.5 * FORWARD_S
    assert stage.node("node-1").gone() == ["the node that it had come to is silent"]
    assert not first.lost_because, "a machine without power says nothing"


def test_a_client_that_hangs_up_while_the_owner_takes_nothing_is_dropped_with_what_waits() -> None:
    stage = Stage()
    stage.device.in_flight = True
    client = stage.attach("node-2")
    for _ in range(12):
        client.request(Command.WRITE, 0, data=bytes(SIZE_BYTES))
    stage.cluster.run(5.0)
    assert client.connection is not None
    client.connection.abort()
    stage.until(lambda: not stage.sessions("node-1"), 1.0)
    assert stage.node("node-2").gone() == ["it has hung up while what it had asked for waited"]


def test_a_client_that_is_forwarded_is_not_handed_over_to_the_next_process() -> None:
    stage = Stage()
    clients = [stage.attach("node-2"), stage.attach("node-3")]
    server = stage.node("node-1").server
    frozen: list[bool] = []
    server.freeze(1.0, lambda: frozen.append(True))
    stage.until(lambda: bool(frozen))
    assert server.hand_over(10, lambda export: True) == []
    stage.until(lambda: server.clients() == [])
    stage.cluster.run(5.0)
    assert not any(client.lost_because for client in clients), "the nodes that they have come to bring them again"


def test_a_client_that_has_gone_leaves_nothing_to_the_garbage_collector() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    gc.collect()
    gc.disable()
    try:
        attaching = stage.node("node-2").attaching
        away = weakref.ref(next(iter(attaching._keeping.values())).clients[1])
        client.hang_up()
        stage.cluster.run(ATTACH_S + 1.0)  # timers that were cancelled
        assert away() is None
    finally:
        gc.enable()


def test_what_neither_end_takes_is_bounded_and_nothing_of_it_is_lost() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    assert client.connection is not None
    client.connection.pause_reading()
    wanted = 40
    for _ in range(wanted):
        client.request(Command.READ, 0, SIZE_BYTES)
    stage.cluster.run(5.0)

    def waiting(name: str) -> int:
        lives = stage.cluster.machines[name].life
        return sum(each.unsent_bytes for each in stage.cluster.wires.connections if each.life is lives)

    assert 0 < waiting("node-2") < UNSENT_LIMIT_BYTES + (1 << 20)
    assert waiting("node-1") < UNSENT_LIMIT_BYTES + 4 * SIZE_BYTES
    client.connection.resume_reading()
    stage.until(lambda: len(client.received_bytes) == wanted * (16 + SIZE_BYTES), 60.0)


def test_a_node_that_stops_lets_its_clients_have_their_answers_and_does_not_wait_for_them() -> None:
    stage = Stage()
    client, waiting = stage.attach("node-2"), stage.connect("node-2")
    stage.answers = []
    client.request(Command.FLUSH)
    waiting.go()
    stage.cluster.run(0.005)
    drained: list[float] = []
    stage.node("node-2").server.drain(10.0, lambda: drained.append(stage.cluster.now_s))
    begun_s = stage.cluster.now_s
    stage.until(lambda: bool(drained), 1.0)
    assert len(client.received_bytes) == 16
    assert drained[0] - begun_s < 1.0
    stage.until(lambda: bool(client.lost_because and waiting.lost_because), 0.1)


def test_a_host_that_comes_by_another_way_is_asked_about_once_whatever_is_said_meanwhile() -> None:
    """The answer to an older question counts for what it was asked about, although a newer one is under way."""
    stage = Stage()
    stage.attach("node-2")
    for _ in range(4):
        begun = [stage.connect("node-3") for _ in range(3)]
        for client in begun:
            stage.cluster.run(0.00015)
            client.go()
        stage.until(lambda begun=begun: all(client.has_entered for client in begun), BEAT_S)  # type: ignore[misc]
        stage.cluster.run(0.3 * BEAT_S)
        for client in begun:
            client.hang_up()
    asked = stage.node("node-1").forwarded._looks
    stage.cluster.run(5.0)
    assert asked < 50
    assert stage.node("node-1").forwarded._looks == asked, "they are asked for ever"
