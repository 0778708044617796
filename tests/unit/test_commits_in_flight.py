"""A device that acknowledges later: what its clients hear, and when."""

import errno

import pytest

from nbdserver.block import BLOCK_BYTES as BLOCK
from nbdserver.frontend.receive_buffer import NORMAL_BYTES
from nbdserver.frontend.transmission import SHRINK_DELAY_S, UNSENT_LIMIT_BYTES
from protocol.nbd import Command, CommandFlag
from tests.unit.session_rig import Rig, make_rig

DF = int(CommandFlag.DF)


@pytest.fixture
def rig() -> Rig:
    rig = make_rig()
    rig.device.in_flight = True
    return rig


def test_a_write_is_answered_when_it_is_acknowledged(rig: Rig) -> None:
    wire = rig.wire()
    cookie, packed = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)
    wire.feed(packed)
    rig.clock.run()
    assert wire.answers() == {}
    assert wire.session.info().in_flight == 1
    rig.device.acknowledge()
    assert wire.answers()[cookie].error == 0
    assert wire.session.info().in_flight == 0
    assert wire.connection.reading


def test_reads_of_the_same_batch_do_not_wait(rig: Rig) -> None:
    wire = rig.wire()
    read, packed_read = wire.request(Command.READ, 8 * BLOCK, BLOCK)
    write, packed_write = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)
    wire.feed(packed_read + packed_write)
    assert list(wire.answers()) == [read]
    rig.device.acknowledge()
    assert list(wire.answers()) == [write]


def test_nothing_more_of_the_connection_is_done_meanwhile_and_all_of_it_then(rig: Rig) -> None:
    wire, other = rig.wire(), rig.wire(peer_name="192.0.2.1:1001")
    wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1])
    other.feed(other.request(Command.WRITE, BLOCK, data=b"y" * BLOCK)[1])
    wire.feed(wire.request(Command.WRITE, 0, data=b"z" * BLOCK)[1])
    assert rig.device.events == ["commit 1", "commit 1"]
    rig.device.acknowledge()
    assert len(wire.answers()) == len(other.answers()) == 1
    assert rig.device.events == ["commit 1", "commit 1", "commit 1"]
    rig.device.acknowledge()
    assert len(wire.answers()) == 1


def test_what_comes_meanwhile_is_the_next_batch_and_a_connection_without_room_for_more_is_paused(rig: Rig) -> None:
    wire = rig.wire()
    a_buffer = NORMAL_BYTES // (BLOCK + 28)
    for requests in (a_buffer, 1):  # the first buffer is free again when its writes are in flight
        wire.feed(b"".join(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1] for _ in range(requests)))
        assert wire.connection.reading
    wire.feed(b"".join(wire.request(Command.WRITE, 0, data=b"y" * BLOCK)[1] for _ in range(a_buffer - 1)))
    assert not wire.connection.reading
    rig.device.acknowledge()
    assert wire.connection.reading
    rig.device.acknowledge()
    assert len(wire.answers()) == 2 * a_buffer
    assert rig.device.events == [f"commit {a_buffer}"] * 2


def test_a_connection_whose_peer_takes_no_replies_is_not_read_when_its_batch_was_acknowledged(rig: Rig) -> None:
    """What comes meanwhile has room while the batch is in flight, and would have none in the end."""
    wire = rig.wire()
    reads = b"".join(wire.request(Command.READ, 0, 512 << 10, flags=DF)[1] for _ in range(6))
    wire.connection.taking = False
    wire.feed(reads)
    wire.feed(reads + wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1])
    assert wire.connection.unsent_bytes > UNSENT_LIMIT_BYTES
    rig.device.acknowledge()
    assert not wire.connection.reading
    wire.connection.take()
    wire.session.drained()
    assert wire.connection.reading


def test_a_large_batch_costs_no_memory_when_it_was_acknowledged(rig: Rig) -> None:
    wire = rig.wire()
    buffer = wire.session._buffer
    wire.feed(wire.request(Command.WRITE, 0, data=bytes(1 << 20))[1])
    assert len(buffer.aside) > 1 << 20
    rig.device.acknowledge()
    assert not buffer.aside
    rig.clock.advance(SHRINK_DELAY_S)
    rig.clock.advance(SHRINK_DELAY_S)
    assert (buffer.capacity_bytes, buffer._spare) == (NORMAL_BYTES, None)


def test_what_came_with_the_batch_and_has_no_room_in_it_follows(rig: Rig) -> None:
    wire = rig.wire()
    requests = [wire.request(Command.WRITE, 0, data=bytes([1]) * BLOCK) for _ in range(3)]
    whole = b"".join(packed for _, packed in requests)
    wire.feed(whole[:-100])
    rig.device.acknowledge()
    assert len(wire.answers()) == 2
    wire.feed(whole[-100:])
    rig.device.acknowledge()
    assert len(wire.answers()) == 1


def test_an_error_that_comes_later_is_every_changes(rig: Rig) -> None:
    wire = rig.wire()
    write, packed = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)
    forced, packed_forced = wire.request(Command.WRITE, 0, data=b"x" * BLOCK, flags=CommandFlag.FUA)
    wire.feed(packed + packed_forced)
    rig.device.acknowledge(errno.EIO)
    rig.clock.run()
    answers = wire.answers()
    assert [answers[cookie].error for cookie in (write, forced)] == [errno.EIO] * 2
    assert rig.device.flushes == 0


def test_the_flush_of_a_batch_begins_when_it_is_acknowledged(rig: Rig) -> None:
    wire = rig.wire()
    write, packed = wire.request(Command.WRITE, 0, data=b"x" * BLOCK, flags=CommandFlag.FUA)
    wire.feed(packed)
    rig.clock.run()
    assert rig.device.flushes == 0
    rig.device.acknowledge()
    rig.clock.run()
    assert rig.device.flushes == 1
    assert wire.answers()[write].error == 0


def test_a_disconnect_waits_for_what_is_in_flight(rig: Rig) -> None:
    wire = rig.wire()
    wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1] + wire.request(Command.DISC)[1])
    rig.clock.run()
    assert not wire.gone
    rig.device.acknowledge()
    rig.clock.run()
    assert len(wire.answers()) == 1
    assert wire.gone


def test_a_connection_that_is_lost_meanwhile_hears_nothing_and_takes_nobody_along(rig: Rig) -> None:
    wire, other = rig.wire(), rig.wire(peer_name="192.0.2.1:1001")
    wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1])
    other.feed(other.request(Command.WRITE, 0, data=b"y" * BLOCK)[1])
    wire.session.lost("gone")
    rig.device.acknowledge()
    assert wire.answers() == {}
    assert len(other.answers()) == 1


def test_a_client_is_handed_over_when_its_batch_is_acknowledged(rig: Rig) -> None:
    wire = rig.wire()
    wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1])
    frozen: list[bool] = []
    wire.session.freeze(lambda: frozen.append(True))
    rig.clock.run()
    assert not frozen
    rig.device.acknowledge()
    rig.clock.run()
    assert frozen == [True]
    assert len(wire.answers()) == 1


def test_zeros_that_are_written_piece_by_piece_wait_for_each_piece(rig: Rig) -> None:
    wire = rig.wire()
    rig.device.data[:] = b"x" * len(rig.device.data)
    cookie, packed = wire.request(Command.WRITE_ZEROES, 0, 512 << 10, flags=CommandFlag.NO_HOLE)
    wire.feed(packed)
    for _ in range(20):
        rig.clock.run()
        if not rig.device.unacknowledged:
            break
        assert cookie not in wire.answers()
        rig.device.acknowledge()
    rig.clock.run()
    assert wire.answers()[cookie].error == 0
    assert not any(rig.device.data[: 512 << 10])
