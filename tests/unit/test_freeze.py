"""Sessions that are frozen and go on elsewhere: nothing is lost or doubled, wherever the stream of requests was cut."""

import errno
import itertools

import pytest

from nbdserver.frontend.transmission import UNSENT_LIMIT_BYTES
from nbdserver.volume.export import Exports
from nbdserver.volume.limits import Limits
from protocol.agreement import OptionRefusedError, ReplyStyle
from protocol.nbd import Command, CommandFlag
from tests.unit.session_rig import SIZE_BYTES, Answer, Rig, Wire, make_rig

BLOCK = 16


@pytest.fixture
def rig() -> Rig:
    """Its first MiB is written, so that reads are answered with data."""
    made = make_rig()
    made.device.written[:] = b"\1" * len(made.device.written)
    return made


def conversation(wire: Wire) -> list[tuple[int, bytes]]:
    """(cookie, bytes) of requests of every kind, refused ones with a payload too."""
    asked = [
        wire.request(Command.WRITE, 0, data=bytes(range(BLOCK))),
        wire.request(Command.READ, 0, BLOCK),
        wire.request(Command.WRITE, 4096, data=b"a" * BLOCK, flags=int(CommandFlag.FUA)),
        wire.request(Command.WRITE, SIZE_BYTES, data=b"refused" * 3),
        wire.request(Command.FLUSH),
        wire.request(Command.READ, SIZE_BYTES, BLOCK),
        wire.request(Command.WRITE, 8192, data=b"b" * BLOCK),
        wire.request(Command.WRITE_ZEROES, 8192, 4096, flags=int(CommandFlag.NO_HOLE)),
        wire.request(Command.TRIM, 0, 4096),
        wire.request(Command.WRITE, 12288, data=b"c" * BLOCK),
        wire.request(Command.READ, 12288, BLOCK),
    ]
    if wire.style is not ReplyStyle.SIMPLE:
        asked.append(wire.request(Command.BLOCK_STATUS, 0, 16384))
    return asked


def told(wire: Wire) -> dict[int, Answer]:
    wire.clock.run()
    return wire.answers()


@pytest.mark.parametrize("style", list(ReplyStyle))
@pytest.mark.parametrize("deferring", [False, True])
def test_a_stream_that_is_handed_over_at_any_byte_is_answered_as_one_that_is_not(
    style: ReplyStyle, deferring: bool
) -> None:
    plain = make_rig(deferring)
    wire = plain.wire(style)
    for _, packed in conversation(wire):
        wire.feed(packed)
        plain.clock.run()
    expected = wire.answers()
    stream_bytes = sum(len(packed) for _, packed in conversation(plain.wire(style)))
    for cut in range(stream_bytes + 1):
        rig = make_rig(deferring)
        wire = rig.wire(style)
        asked = conversation(wire)
        # A client does not change what it has in flight: each request waits for those before it.
        position = 0
        for _, packed in asked:
            inside = cut - position
            if 0 <= inside < len(packed):
                wire.feed(packed[:inside])
                wire.hand_over(rig.exports)
                wire.feed(packed[inside:])
            else:
                wire.feed(packed)
            rig.clock.run()
            position += len(packed)
        if cut == stream_bytes:
            wire.hand_over(rig.exports)
        assert told(wire) == expected, f"cut at byte {cut}"
        assert rig.device.data == plain.device.data
        assert not wire.gone


@pytest.mark.parametrize("style", list(ReplyStyle))
@pytest.mark.parametrize("deferring", [False, True])
def test_requests_in_flight_are_answered_by_either_process_and_by_one_only(style: ReplyStyle, deferring: bool) -> None:
    """Sixteen requests at once, handed over after every possible number of bytes and of turns of the loop."""
    for cut, turns in itertools.product(range(0, 16 * (28 + BLOCK), 37), range(3)):
        rig = make_rig(deferring)
        wire = rig.wire(style)
        asked = [wire.request(Command.WRITE, 4096 * number, data=bytes([number + 1]) * BLOCK) for number in range(16)]
        stream = b"".join(packed for _, packed in asked)
        wire.feed(stream[:cut])
        for _ in range(turns):
            rig.clock.turn()
        wire.hand_over(rig.exports)
        wire.feed(stream[cut:])
        answers = told(wire)
        assert set(answers) == {cookie for cookie, _ in asked}
        assert not any(answer.error for answer in answers.values())
        for number in range(16):
            assert rig.device.data[4096 * number : 4096 * number + BLOCK] == bytes([number + 1]) * BLOCK


def test_the_rest_of_a_refused_payload_is_skipped_by_the_next_process() -> None:
    rig = make_rig()
    wire = rig.wire()
    cookie, packed = wire.request(Command.WRITE, 0, data=bytes(1 << 20), flags=1 << 10)
    wire.feed(packed[:100_000])
    wire.hand_over(rig.exports)
    wire.feed(packed[100_000:])
    assert told(wire)[cookie].error == errno.EINVAL
    assert wire.ask(Command.READ, 0, BLOCK).joined() == bytes(BLOCK)


def test_a_big_write_of_which_half_was_received_is_done_by_the_next_process() -> None:
    rig = make_rig(size_bytes=8 << 20)
    wire = rig.wire()
    data = bytes(range(256)) * (4 << 12)
    cookie, packed = wire.request(Command.WRITE, 0, data=data)
    wire.feed(packed[: len(packed) // 2])
    wire.hand_over(rig.exports)
    wire.feed(packed[len(packed) // 2 :])
    assert not told(wire)[cookie].error
    assert rig.device.data[: len(data)] == data
    rig.clock.advance(2.0)
    assert wire.ask(Command.READ, 0, BLOCK).joined() == data[:BLOCK]


def test_replies_that_the_client_did_not_take_are_sent_by_the_next_process(rig: Rig) -> None:
    wire = rig.wire()
    wire.connection.taking = False
    asked = [wire.request(Command.READ, 0, 1 << 20) for _ in range(3)]
    wire.feed(b"".join(packed for _, packed in asked))
    wire.hand_over(rig.exports)
    assert wire.connection.unsent_bytes > 3 << 20
    wire.connection.take()
    wire.session.drained()
    answers = told(wire)
    assert [len(answers[cookie].joined()) for cookie, _ in asked] == [1 << 20] * 3


def test_a_client_that_takes_nothing_is_not_read_by_the_next_process_either(rig: Rig) -> None:
    wire = rig.wire()
    wire.connection.taking = False
    while wire.connection.unsent_bytes <= UNSENT_LIMIT_BYTES:
        wire.feed(wire.request(Command.READ, 0, 1 << 20)[1])
    wire.hand_over(rig.exports)
    assert not wire.connection.reading
    wire.connection.take()
    wire.session.drained()
    assert wire.connection.reading
    wire.answers()
    assert wire.ask(Command.READ, 0, BLOCK).joined() == bytes(BLOCK)


def test_a_client_that_said_goodbye_is_not_handed_over() -> None:
    rig = make_rig(deferring=True)
    wire = rig.wire()
    wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1] + wire.request(Command.DISC)[1])
    frozen: list[bool] = []
    wire.session.freeze(lambda: frozen.append(True))
    rig.clock.run()
    assert wire.gone == ["the client disconnected"]
    assert not frozen
    assert wire.session.hand_over() is None


def test_a_client_in_the_handshake_is_closed(rig: Rig) -> None:
    wire = Wire(rig.exports, rig.clock, name="no such export")
    assert not wire.entered
    wire.session.freeze(lambda: None)
    assert wire.connection.closed
    assert len(wire.gone) == 1


def test_replies_that_leave_while_it_freezes_do_not_start_the_reading_again(rig: Rig) -> None:
    """The peer takes what was queued while a request still waits for the device."""
    wire = rig.wire()
    wire.connection.taking = False
    wire.feed(wire.request(Command.READ, 0, 1 << 20)[1])
    rig.device.deferring = True
    wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1])
    wire.session.freeze(lambda: None)
    assert wire.session.info().in_flight
    wire.connection.take()
    wire.session.drained()
    assert not wire.connection.reading


def test_an_export_that_is_gone_takes_no_client_over(rig: Rig) -> None:
    wire = rig.wire()
    with pytest.raises(OptionRefusedError):
        wire.hand_over(Exports())


def test_an_export_knows_the_clients_that_were_taken_over(rig: Rig) -> None:
    wire = rig.wire(peer_name="192.0.2.1:1000")
    wire.hand_over(rig.exports)
    assert rig.export.hosts() == {"192.0.2.1"}
    assert not rig.wire(peer_name="192.0.2.2:1000").entered
    wire.feed(wire.request(Command.DISC)[1])
    assert rig.wire(peer_name="192.0.2.2:1000").entered


def test_a_client_that_waits_for_its_volumes_limits_goes_on_in_the_next_process(rig: Rig) -> None:
    rig.export.limit(Limits(iops=1), rig.clock)
    wire = rig.wire()
    asked = [wire.request(Command.WRITE, 4096 * number, data=bytes([number + 1]) * BLOCK) for number in range(4)]
    wire.feed(b"".join(packed for _, packed in asked))
    rig.clock.run()
    assert not wire.connection.reading, "the limits hold nothing up"
    wire.hand_over(rig.exports)
    for _ in range(10):
        rig.clock.advance(1.0)
    answers = told(wire)
    assert [answers[cookie].error for cookie, _ in asked] == [0] * 4
    assert wire.connection.reading
    assert bytes(rig.device.data[4096 * number] for number in range(4)) == bytes([1, 2, 3, 4])
