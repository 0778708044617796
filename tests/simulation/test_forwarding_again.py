"""Clients that are forwarded, when the node that serves their volume is lost: they are carried on at the next one."""

import pytest

from nbdserver.frontend.away_client import AGAIN_S, TRIES, There
from nbdserver.frontend.outstanding import KEPT_LIMIT_BYTES
from nbdserver.replication.grants import BEAT_S, FORWARD_S
from nbdserver.volume.export import Export
from protocol import nbd
from protocol.nbd import Command, CommandFlag, Option
from tests.simulation.forwarding_stage import SIZE_BYTES, Stage
from tests.unit.memory_device import MemoryDevice
from tests.unit.session_rig import HELLO, named, option


def lose_owner(stage: Stage, to: str) -> None:
    """The owner's machine dies, and some time later another node serves the volume."""
    stage.cluster.machines[stage.owner].end(power=True)
    stage.cluster.run(1.5)
    stage.move(to)


@pytest.mark.parametrize("to", ["node-2", "node-3"])
def test_a_client_lives_through_the_death_of_the_node_that_serves_it(to: str) -> None:
    stage = Stage()
    stage.device.in_flight = True
    client = stage.attach("node-2")
    client.write(512, b"under way")
    stage.cluster.run(0.05)
    lose_owner(stage, to)
    stage.device.in_flight = False
    client.write(1024, b"asked meanwhile")
    stage.until(lambda: len(client.received_bytes) == 32)
    assert stage.read(client, 512, 1024).replace(b" ", b"") == b"underwayaskedmeanwhile"
    assert not client.lost_because
    assert [each["node"] for each in stage.node("node-2").heard("client-goes-on")] == [to]
    assert stage.sessions(to) == 1
    (away,) = stage.node("node-2").server.away()
    assert away.forwarded_to == to


def test_it_lives_through_one_owner_after_the_other() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    for turn, to in enumerate(("node-3", "node-2", "node-1", "node-3", "node-1")):
        client.received_bytes.clear()
        client.write(0, f"turn {turn}".encode())
        stage.move(to)
        stage.until(lambda: len(client.received_bytes) == 16)
        assert stage.read(client, 0, 512).startswith(f"turn {turn}".encode())
        assert stage.sessions(to) == 1


def test_an_owner_that_hangs_is_left_in_time_and_what_it_was_asked_for_is_not_done_by_it_later() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    stage.cluster.run(1.0)
    stage.cluster.machines["node-1"].pause()
    client.write(0, b"old")
    paused_s = stage.cluster.now_s
    stage.until(lambda: bool(stage.node("node-2").heard("client-waits")))
    assert FORWARD_S - BEAT_S < stage.cluster.now_s - paused_s <= FORWARD_S + 2 * BEAT_S
    stage.cluster.run(0.01)
    assert stage.asked[-1] == ("node-2", ("node-1",)), "it is not offered again"
    stage.owner = "node-3"
    stage.node("node-3").serve()
    stage.until(lambda: len(client.received_bytes) == 16)
    client.write(0, b"new")
    stage.until(lambda: len(client.received_bytes) == 32)
    stage.cluster.machines["node-1"].resume()
    stage.cluster.run(5.0)
    assert stage.device.data.startswith(b"new")
    assert stage.sessions("node-1") == 0
    assert not client.lost_because


def test_a_stream_between_the_nodes_that_breaks_costs_nobody_anything() -> None:
    stage = Stage()
    clients = [stage.attach("node-2"), stage.attach("node-2")]
    for stream in [each for each in stage.cluster.wires.connections if each.peer_name == stage.peer_address("node-1")]:
        for number, client in enumerate(clients):
            client.received_bytes.clear()
            client.write(512 * number, b"x")
        stream.lose("reset")
        stage.until(lambda: all(len(client.received_bytes) == 16 for client in clients))
        stage.cluster.run(1.0)
        assert stage.sessions("node-1") == 2
    assert not any(client.lost_because for client in clients)


def test_what_waits_at_an_owner_in_a_stream_that_broke_is_not_done_after_what_is_asked_for_again() -> None:
    stage = Stage()
    client = stage.attach_with_a_write_that_waits("node-2")
    wires = stage.cluster.wires.connections
    ends = [each for each in wires if each.peer_name == stage.peer_address("node-1")]
    mend = stage.cluster.wires.block(["node-2"], ["node-1"], both=True)
    for end in ends:
        end.lose("reset")  # the owner does not hear of it
    mend()
    stage.cluster.run(0.5)
    stage.acknowledge()
    stage.until(lambda: len(client.received_bytes) == 32)
    client.write(512, b"new")
    stage.until(lambda: len(client.received_bytes) == 48)
    stage.cluster.run(5.0)
    assert stage.device.data[512:].startswith(b"new")


@pytest.mark.parametrize("style", [None, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
def test_a_reply_that_was_half_there_is_given_whole_by_the_next_owner(style: Option | None) -> None:
    stage = Stage()
    content = bytes(range(1, 251)) * 2048
    stage.device.data[: len(content)] = content
    stage.device.written[:] = b"\1" * len(stage.device.written)
    client = stage.connect("node-2")
    client.send(HELLO + (option(style) if style else b"") + named(Option.GO, "disk"))
    stage.until(lambda: client.has_entered)
    client.received_bytes.clear()
    header = {"flags": 0, "command": Command.READ, "offset": 0, "length": len(content)}
    declaration = nbd.ExtendedRequest if style == Option.EXTENDED_HEADERS else nbd.Request
    for cookie in (1, 2):
        client.send(declaration.build({**header, "cookie": cookie}))
    until_s = stage.cluster.now_s + 0.0006
    while stage.cluster.now_s < until_s:
        stage.cluster.run(0.0001)
    lose_owner(stage, "node-3")
    stage.until(lambda: bytes(client.received_bytes).count(content) == 2)
    heads = bytes(client.received_bytes).replace(content, b"")
    assert len(heads) == 2 * (
        nbd.SIMPLE_REPLY.size
        if style is None
        else (nbd.EXTENDED_DATA if style == Option.EXTENDED_HEADERS else nbd.STRUCTURED_DATA).size
    )


def test_a_write_waits_for_one_that_it_overlaps_so_that_what_was_answered_is_not_undone() -> None:
    """The first is done, and its answer waits for a flush, when the owner dies: it is done again at the next one."""
    stage = Stage()
    client = stage.attach("node-2")
    flush_done = stage.hold_flushes()
    fields = {"command": Command.WRITE, "offset": 0, "length": 512}
    client.send(nbd.Request.build({**fields, "flags": CommandFlag.FUA, "cookie": 901}) + b"old".ljust(512))
    client.send(nbd.Request.build({**fields, "flags": 0, "cookie": 902}) + b"new".ljust(512))
    stage.cluster.run(0.1)
    assert not client.received_bytes, "the second is answered before the first"
    flush_done()
    lose_owner(stage, "node-3")
    stage.until(lambda: len(client.received_bytes) == 32)
    assert stage.device.data.startswith(b"new")


def test_a_client_that_goes_while_there_is_no_owner_has_nothing_done_later() -> None:
    stage = Stage()
    stage.device.in_flight = True
    client = stage.attach("node-2")
    client.write(0, b"old")
    stage.cluster.run(0.01)
    stage.cluster.machines["node-1"].end(power=True)
    stage.device.data[:3] = bytes(3)  # the others did not have it
    client.write(0, b"and")
    stage.cluster.run(0.5)
    client.hang_up()
    stage.cluster.run(0.5)
    stage.move("node-3")
    stage.device.in_flight = False
    again = stage.attach("node-3")
    stage.cluster.run(3.0)
    assert stage.read(again, 0, 3) == bytes(3)
    assert stage.sessions("node-3") == 1
    assert stage.node("node-2").server.away() == []


def test_it_is_disconnected_when_acknowledged_writes_may_be_gone() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    stage.lineage = 8
    lose_owner(stage, "node-3")
    stage.until(lambda: bool(client.lost_because))
    (reason,) = stage.node("node-2").gone()
    assert "acknowledged writes may be gone" in str(reason)


def test_it_is_disconnected_when_another_host_has_used_the_volume_meanwhile() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    mend = stage.cluster.isolate("node-2")
    stage.move("node-3")
    stage.cluster.run(FORWARD_S + 1.0)
    other = stage.attach("node-3", host="other")
    other.write(0, b"of the other")
    stage.cluster.run(0.1)
    other.hang_up()
    stage.cluster.run(0.5)
    mend()
    stage.until(lambda: bool(client.lost_because))
    (reason,) = stage.node("node-2").gone()
    assert "was used by" in str(reason)


def test_a_volume_that_has_grown_meanwhile_is_gone_on_with_and_one_that_has_shrunk_is_not() -> None:
    for size_bytes, goes_on in ((2 * SIZE_BYTES, True), (SIZE_BYTES // 2, False)):
        stage = Stage()
        client = stage.attach("node-2")
        stage.cluster.machines["node-1"].end(power=False)
        stage.owner = "node-3"
        device = MemoryDevice(size_bytes, lambda callback: callback())
        stage.node("node-3").exports.add(Export("disk", device, lineage=stage.lineage))
        stage.cluster.run(1.0)
        assert bool(client.lost_because) is not goes_on
        if not goes_on:
            assert stage.node("node-2").gone() == ["what it was told of the volume does not hold any more"]


@pytest.mark.parametrize("before", [[], ["node-3"]])
def test_the_operator_disconnects_it_for_good_at_the_owner(before: list[str]) -> None:
    stage = Stage()
    client = stage.attach("node-2")
    stage.answers = [There(name, stage.peer_address(name)) for name in (*before, "node-1")]  # node-3 does not serve it
    (session,) = stage.node("node-1").server.clients()
    assert stage.node("node-1").server.disconnect(session.id)
    stage.until(lambda: bool(client.lost_because))
    assert stage.node("node-2").gone() == ["disconnected by the operator"]
    assert stage.sessions("node-1") == 0


def test_an_owner_of_a_version_before_loses_its_clients_as_it_always_did() -> None:
    stage = Stage()
    stage.lineage = 0
    stage.node("node-1").exports.remove("disk")
    stage.node("node-1").serve()
    client = stage.attach("node-2")
    stage.cluster.machines["node-1"].end(power=False)
    stage.until(lambda: bool(client.lost_because), 1.0)


def test_it_waits_for_a_node_that_serves_it_for_some_time_and_then_hears_of_it() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    stage.cluster.machines["node-1"].end(power=True)
    stage.cluster.run(AGAIN_S - 5.0)
    assert not client.lost_because
    stage.until(lambda: bool(client.lost_because), 10.0)
    (reason,) = stage.node("node-2").gone()
    assert f"no node has served disk for {AGAIN_S:.0f} s: node-1: " in str(reason)


def test_a_request_that_ends_every_node_that_does_it_does_not_go_round_for_ever() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    lost = 0
    stage.device.in_flight = True
    client.write(0, b"poison")
    for _ in range(10 * TRIES):
        stage.cluster.run(0.5)
        if client.lost_because:
            break
        lost += 1
        for end in list(stage.cluster.wires.connections):
            if end.peer_name == stage.peer_address("node-1"):
                end.lose("reset")
    assert lost == TRIES + 1 or lost == TRIES, lost
    (reason,) = stage.node("node-2").gone()
    assert f"was sent {TRIES} times, and never answered" in str(reason)


def test_what_is_kept_for_a_client_without_an_owner_is_bounded_and_all_of_it_is_done() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    stage.cluster.machines["node-1"].end(power=True)
    wanted = 2 * KEPT_LIMIT_BYTES // SIZE_BYTES
    for number in range(wanted):
        client.request(Command.WRITE, data=bytes([number]) * SIZE_BYTES)
    stage.cluster.run(2.0)
    (away,) = stage.node("node-2").server.away()
    assert away.in_flight == 1, "they overlap"
    stage.move("node-3")
    stage.until(lambda: len(client.received_bytes) == 16 * wanted, 60.0)
    assert stage.device.data == bytes([wanted - 1]) * SIZE_BYTES


def test_a_client_that_is_still_in_its_handshake_when_the_owner_dies_is_disconnected() -> None:
    stage = Stage()
    client = stage.connect("node-2")
    client.send(HELLO + named(Option.INFO, "disk"))
    stage.until(lambda: len(client.received_bytes) > 100)
    stage.cluster.machines["node-1"].end(power=False)
    stage.until(lambda: bool(client.lost_because), 1.0)


def test_a_client_whose_end_was_lost_on_its_way_from_the_owner_is_told_of_by_the_next_beats() -> None:
    stage = Stage()
    stage.device.in_flight = True
    client = stage.attach("node-2")
    client.write(0, b"asked before")
    stage.cluster.run(0.01)
    mend = stage.cluster.wires.block(["node-1"], ["node-2"])
    node = stage.node("node-1")
    node.exports.remove("disk")
    stage.cluster.run(0.4)
    mend()
    stage.device.in_flight = False
    node.serve()
    stage.until(lambda: len(client.received_bytes) == 16, 8 * BEAT_S)
    assert stage.node("node-2").gone() == []


def test_an_owner_whose_program_is_replaced_is_waited_for_and_not_for_longer_once_it_serves_again() -> None:
    stage = Stage()
    client = stage.attach("node-2")
    stage.cluster.run(1.0)
    node = stage.node("node-1")
    node.exports.remove("disk")
    node.server.leaving()  # type: ignore[misc]
    attaching, address = stage.node("node-2").attaching, stage.peer_address("node-1")
    stage.cluster.run(3.0)
    assert attaching.returns(address)
    assert not client.lost_because
    node.serve()
    assert stage.read(client, 0, 512)
    assert not attaching.returns(address)
