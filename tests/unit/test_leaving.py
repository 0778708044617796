"""Sessions whose export is served by another node from now on: what they have not answered is answered there, once, and
nothing is done twice that was answered here."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.frontend.receive_buffer import NORMAL_BYTES
from nbdserver.frontend.session import Session
from nbdserver.frontend.unanswered import Entered, Request, asked_again, flush_of, read_of
from nbdserver.volume.export import Export, ExportError
from protocol import nbd
from protocol.agreement import ReplyStyle
from protocol.nbd import Command, CommandFlag
from protocol.overheard import Overheard
from tests.unit.session_rig import Answer, ListConnection, Rig, Wire, make_rig

BLOCK = 512
PAGE = 4096
DF, FUA = int(CommandFlag.DF), int(CommandFlag.FUA)

MODES: dict[str, Callable[[Rig], object]] = {
    "at hand": lambda rig: None,
    "in flight": lambda rig: setattr(rig.device, "in_flight", True),
    "deferring": lambda rig: setattr(rig.device, "deferring", True),
    "cold": lambda rig: rig.device.cold.update(range(0, 1 << 20, PAGE)),
}


def rig_in(mode: str) -> Rig:
    rig = make_rig()
    rig.export.lineage = 7
    rig.device.written[:] = b"\1" * len(rig.device.written)
    MODES[mode](rig)
    return rig


def go_on(wire: Wire, there: Rig) -> Entered:
    """Let the session leave, and one of the other node go on with its client."""
    left = wire.session.leave()
    assert left is not None
    _, client, entered = left
    asked = Overheard.agreed(entered.agreement)
    client = replace(client, handshake=replace(client.handshake, received=asked.options))
    sent = wire.connection.sent
    wire.connection = ListConnection(wire.connection.peer_name)
    wire.session = Session(2, wire.connection, there.clock, there.exports, lambda _, why: None, arrived=client)
    wire.session.go_on()
    again = Overheard(client.handshake)
    again.ask(memoryview(asked.options))
    assert again.answer(bytes(wire.connection.sent)) == b""
    assert asked.told is not None
    assert again.told is not None
    assert asked.told.holds(again.told)
    wire.connection.sent = sent
    wire.feed(entered.received)
    return entered


def settle(rig: Rig) -> None:
    for _ in range(4):
        rig.clock.run()
        rig.device.acknowledge()
    rig.clock.run()


def sixteen(wire: Wire) -> list[tuple[int, bytes]]:
    """Writes, some forced, of a block each, with reads and flushes between them."""
    asked = []
    for number in range(16):
        if number % 5 == 3:
            asked.append(wire.request(Command.READ, 0, PAGE))
        elif number % 5 == 4:
            asked.append(wire.request(Command.FLUSH))
        else:
            flags = FUA if number % 3 == 0 else 0
            asked.append(wire.request(Command.WRITE, PAGE * number, data=bytes([number + 1]) * BLOCK, flags=flags))
    return asked


@pytest.mark.parametrize("style", list(ReplyStyle))
@pytest.mark.parametrize("mode", list(MODES))
def test_requests_are_answered_by_either_node_and_by_one_only(style: ReplyStyle, mode: str) -> None:
    """After every possible number of bytes, of turns of the loop, and with or without an acknowledgement."""
    stream_bytes = sum(len(packed) for _, packed in sixteen(rig_in(mode).wire(style)))
    for cut, turns, acknowledged in itertools.product(range(0, stream_bytes + 1, 149), range(3), (False, True)):
        here, there = rig_in(mode), rig_in("at hand")
        wire = here.wire(style)
        asked = sixteen(wire)
        stream = b"".join(packed for _, packed in asked)
        wire.feed(stream[:cut])
        for _ in range(turns):
            here.clock.turn()
        if acknowledged:
            here.device.acknowledge()
        there.device.data[:] = here.device.data
        go_on(wire, there)
        here_at = len(wire.connection.sent)
        wire.feed(stream[cut:])
        settle(here)
        assert len(wire.connection.sent) >= here_at
        settle(there)
        answers = wire.answers()
        assert set(answers) == {cookie for cookie, _ in asked}
        assert not any(answer.error for answer in answers.values())
        for number in (number for number in range(16) if number % 5 < 3):
            assert there.device.data[PAGE * number : PAGE * number + BLOCK] == bytes([number + 1]) * BLOCK


REQUESTS: list[tuple[int, dict[str, int], Sequence[ReplyStyle]]] = [
    (Command.TRIM, {"length": PAGE}, list(ReplyStyle)),
    (Command.WRITE_ZEROES, {"length": PAGE, "flags": int(CommandFlag.NO_HOLE) | FUA}, list(ReplyStyle)),
    (Command.WRITE_ZEROES, {"length": PAGE}, list(ReplyStyle)),
    (Command.CACHE, {"length": PAGE}, list(ReplyStyle)),
    (Command.READ, {"length": 3 * BLOCK}, list(ReplyStyle)),
    (Command.BLOCK_STATUS, {"length": PAGE}, [ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED]),
]


@pytest.mark.parametrize(
    ("command", "fields", "style"),
    [(command, fields, style) for command, fields, styles in REQUESTS for style in styles],
)
def test_what_waits_for_the_device_is_asked_for_as_it_came(
    command: int, fields: dict[str, int], style: ReplyStyle
) -> None:
    plain, here, there = rig_in("deferring"), rig_in("deferring"), rig_in("deferring")
    expected = plain.wire(style).ask(command, PAGE, **fields)
    wire = here.wire(style)
    cookie, packed = wire.request(command, PAGE, **fields)
    wire.feed(packed)
    entered = go_on(wire, there)
    assert entered.received[4 + 2 :] == packed[4 + 2 :]
    here.clock.run()
    assert not wire.connection.sent
    there.clock.run()
    answer: Answer = wire.answers()[cookie]
    assert answer == expected


@pytest.mark.parametrize("style", list(ReplyStyle))
@pytest.mark.parametrize("mode", ["in flight", "deferring"])
def test_a_forced_change_that_waits_for_its_flush_is_not_done_again_but_flushed(style: ReplyStyle, mode: str) -> None:
    here, there = rig_in(mode), rig_in("at hand")
    wire = here.wire(style)
    cookie, packed = wire.request(Command.WRITE, PAGE, data=b"x" * BLOCK, flags=FUA)
    wire.feed(packed)
    while not here.device.flushes:
        here.clock.turn()
        here.device.acknowledge()
    there.device.data[PAGE : PAGE + BLOCK] = b"newer".ljust(BLOCK)
    go_on(wire, there)
    here.clock.run()
    there.clock.run()
    assert there.device.flushes == 1
    assert there.device.data[PAGE : PAGE + 5] == b"newer"
    if style is ReplyStyle.EXTENDED:
        assert nbd.ExtendedReply.parse(bytes(wire.connection.sent)).offset == PAGE
    assert wire.answers() == {cookie: Answer(done=True)}


def test_what_was_answered_in_this_turn_of_the_loop_is_told() -> None:
    here, there = rig_in("deferring"), rig_in("at hand")
    wire = here.wire()
    first, packed = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)
    packed_second = wire.request(Command.WRITE, PAGE, data=b"y" * BLOCK)[1]
    wire.feed(packed)
    here.clock.turn()  # it is asked for
    wire.feed(packed_second)
    while not here.device.events:
        here.clock.turn()
    entered = go_on(wire, there)
    assert (first in wire.answers()) == (packed not in entered.received)
    there.clock.run()


def test_a_batch_that_was_not_committed_is_asked_for_again() -> None:
    """Another connection's data in the same round of the loop tells that the volume has moved."""
    here, there = rig_in("at hand"), rig_in("at hand")
    wire = here.wire()
    wire.connection.round_end = []
    read, packed_read = wire.request(Command.READ, 0, BLOCK)
    write, packed = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)
    wire.feed(packed_read + packed)
    commit = wire.connection.round_end
    go_on(wire, there)
    here.device.deferring = True  # what is committed from now on is nobody's
    for callback in commit:
        callback()
    answers = wire.answers()
    assert set(answers) == {read, write}
    assert there.device.data.startswith(b"x" * BLOCK)


def test_what_its_session_had_to_do_yet_does_not_keep_a_client_from_being_read() -> None:
    here = rig_in("in flight")
    wire = here.wire()
    reads = [wire.request(Command.READ, 0, 512 << 10, flags=DF)[1] for _ in range(12)]
    wire.feed(b"".join(reads))  # the last ones are left to another turn of the loop
    write = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1]
    wire.feed(write)
    wire.feed(write * (NORMAL_BYTES // len(write)))
    assert not wire.connection.reading
    assert wire.session.leave() is not None
    wire.connection.resume_reading()
    here.clock.run()
    assert wire.connection.reading


def test_the_rest_of_a_refused_payload_is_what_comes_next() -> None:
    here = rig_in("in flight")
    wire = here.wire()
    packed_write = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1]
    _, packed = wire.request(Command.WRITE, 0, data=bytes(10_000), flags=1 << 10)
    wire.feed(packed_write + packed[:-9_000])
    wire.feed(bytes(4_000))
    left = wire.session.leave()
    assert left is not None
    entered = left[2]
    assert (entered.received, entered.skip_bytes) == (packed_write, 5_000)
    (refused,) = wire.answers().values()
    assert refused.error


@pytest.mark.parametrize("ends", ["goodbye", "shut down", "no lineage", "gone"])
def test_who_ends_does_not_go_on(ends: str) -> None:
    rig = rig_in("in flight")
    wire = rig.wire()
    wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1])
    match ends:
        case "goodbye":
            wire.feed(wire.request(Command.DISC)[1])
            rig.device.acknowledge()
        case "shut down":
            wire.session.shut_down()
        case "no lineage":
            rig.export.lineage = 0
        case "gone":
            wire.session.disconnect("")
    assert wire.session.leave() is None
    wire.session.moved("it has moved")
    assert wire.connection.aborted or ends == "goodbye"


def test_an_export_that_has_moved_asks_its_sessions_to_go_on() -> None:
    rig = rig_in("at hand")
    wires = [rig.wire(), rig.wire(peer_name="192.0.2.1:1001")]
    rig.exports.remove("disk", "it has moved", has_moved=True)
    assert [wire.gone for wire in wires] == [["it has moved"]] * 2, "without a node to go to they end"
    with pytest.raises(ExportError):
        rig.exports.remove("disk")
    rig.exports.add(Export("disk", rig.device))


# --- the pure part ---

KINDS = st.sampled_from([Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM])


@given(
    style=st.sampled_from(list(ReplyStyle)),
    kinds=st.lists(st.tuples(KINDS, st.sampled_from(["answered", "acknowledged", "deferred"])), max_size=12),
    before=st.integers(0, 3),
)
def test_the_clients_order_is_kept(style: ReplyStyle, kinds: list[tuple[Command, str]], before: int) -> None:
    def packed(number: int, kind: Command) -> tuple[Request, bytes]:
        payload = bytes([number]) * BLOCK if kind is Command.WRITE else b""
        flags = int(CommandFlag.PAYLOAD_LEN) if payload and style is ReplyStyle.EXTENDED else 0
        offset = 0 if kind is Command.FLUSH else PAGE * number
        request = Request(flags, int(kind), number, offset, len(payload) or PAGE, payload)
        header, magic = nbd.REQUEST, nbd.REQUEST_MAGIC
        if style is ReplyStyle.EXTENDED:
            header, magic = nbd.EXTENDED_REQUEST, nbd.EXTENDED_REQUEST_MAGIC
        return request, header.pack(magic, *request[:-1]) + payload

    older = [packed(100 + number, Command.TRIM) for number in range(before)]
    batch = [packed(number, kind) for number, (kind, _) in enumerate(kinds)]
    by = {
        how: [number for number, (_, each) in enumerate(kinds) if each == how] for how in ("acknowledged", "deferred")
    }
    waiting = [request for request, _ in older] + [batch[number][0] for number in reversed(by["deferred"])]
    again = asked_again(style, waiting, memoryview(b"".join(raw for _, raw in batch)), set(by["acknowledged"]))
    wanted = sorted(by["acknowledged"] + by["deferred"])
    assert [bytes(each) for each in again] == [raw for _, raw in older] + [batch[number][1] for number in wanted]


def test_reads_are_asked_for_in_one_chunk_where_there_are_chunks_and_flushes_under_the_changes_cookie() -> None:
    for style, flags in ((ReplyStyle.SIMPLE, 0), (ReplyStyle.STRUCTURED, int(CommandFlag.DF))):
        read, flush = asked_again(style, [read_of(1, PAGE, BLOCK), flush_of(2, PAGE)], memoryview(b""), ())
        assert bytes(read) == nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, int(Command.READ), 1, PAGE, BLOCK)
        assert bytes(flush) == nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, int(Command.FLUSH), 2, 0, 0)
