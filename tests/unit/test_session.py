"""NBD sessions over a device in memory: batches, errors, bounds, and what hostile clients cannot do to others."""

import errno
import gc
import random
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserver.block import DIRTY
from nbdserver.frontend.cold_reads import AT_ONCE, CREDIT_LIMIT, TRIED_AGAIN, TURNS
from nbdserver.frontend.deferred import OPERATION_LIMIT
from nbdserver.frontend.inline_reads import SLOTS
from nbdserver.frontend.receive_buffer import NORMAL_BYTES
from nbdserver.frontend.requests import ONE_TURN_BYTES
from nbdserver.frontend.session import HANDSHAKE_TIMEOUT_S
from nbdserver.frontend.transmission import BATCH_REQUESTS, SHRINK_DELAY_S
from nbdserver.volume.export import Export, ExportError
from protocol import nbd
from protocol.agreement import ReplyStyle
from protocol.nbd import Command, CommandFlag
from tests.unit.session_rig import SIZE_BYTES, Rig, Wire, make_rig

BLOCK = 4096
STYLES = list(ReplyStyle)
EXTENDED_PAYLOAD = nbd.BlockStatusPayload.build({"length": BLOCK, "context_ids": [1]})


@pytest.fixture(params=[False, True], ids=["inline", "deferring"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return make_rig(deferring=request.param)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("offset", "length"), [(0, BLOCK), (1, 1), (4095, 4098), (SIZE_BYTES - 7, 7), (0, SIZE_BYTES)])
def test_what_is_written_is_read(rig: Rig, style: ReplyStyle, offset: int, length: int) -> None:
    wire = rig.wire(style)
    data = random.Random(length).randbytes(length)
    assert wire.ask(Command.WRITE, offset, data=data).error == 0
    answer = wire.ask(Command.READ, offset, length)
    assert (answer.error, answer.done) == (0, True)
    assert answer.joined() == data
    assert wire.ask(Command.READ, offset, length, flags=CommandFlag.DF if style is not ReplyStyle.SIMPLE else 0).done


def conversation(wire: Wire) -> tuple[bytes, dict[int, tuple[int, bytes | None]]]:
    """Requests of every kind, and what each is answered with: (errno, data of a read)."""
    data = bytes(range(256)) * 16
    expected: dict[int, tuple[int, bytes | None]] = {}
    packed = b""

    def add(
        error: int,
        read: bytes | None,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        data: bytes = b"",
        flags: int = 0,
    ) -> None:
        nonlocal packed
        cookie, request = wire.request(command, offset, length, data, flags)
        expected[cookie] = (error, read)
        packed += request

    add(0, None, Command.WRITE, 0, data=data)
    add(0, None, Command.WRITE, 8192, data=data[:100], flags=CommandFlag.FUA)
    add(0, None, Command.FLUSH)
    add(errno.ENOSPC, None, Command.WRITE, SIZE_BYTES - 10, data=data)
    add(errno.EINVAL, None, Command.WRITE, 0, data=data, flags=CommandFlag.DF)
    add(errno.EINVAL, None, Command.READ, SIZE_BYTES, 1)
    add(0, None, Command.TRIM, 20480, 4096)
    add(0, None, Command.WRITE_ZEROES, 16384, 4096, flags=CommandFlag.FUA)
    add(0, None, Command.WRITE_ZEROES, 24576, 5000, flags=CommandFlag.NO_HOLE)
    add(errno.ENOTSUP, None, Command.WRITE_ZEROES, 0, 8192, flags=CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO)
    add(0, None, Command.CACHE, 0, 8192)
    add(errno.EINVAL, None, 99, 0, 1)
    add(0, bytes(4096), Command.READ, 40960, 4096)
    if wire.style is not ReplyStyle.SIMPLE:
        add(0, None, Command.BLOCK_STATUS, 0, SIZE_BYTES)
        add(0, None, Command.BLOCK_STATUS, 0, BLOCK, flags=CommandFlag.REQ_ONE)
    if wire.style is ReplyStyle.EXTENDED:
        add(0, None, Command.BLOCK_STATUS, 0, data=EXTENDED_PAYLOAD)
        add(errno.EINVAL, None, Command.TRIM, 0, data=b"what is this for")
    return packed, expected


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [1, SLOTS - 1, SLOTS, SLOTS + 3])
def test_block_reads_of_one_wake_leave_with_one_send_among_other_requests(style: ReplyStyle, count: int) -> None:
    rig = make_rig()
    rig.device.data[:] = random.Random(count).randbytes(SIZE_BYTES)
    content = bytes(rig.device.data)
    wire = rig.wire(style)
    offsets = [index % (SIZE_BYTES // BLOCK) * BLOCK for index in range(count)]
    asked = {}
    packed = b""
    for index, offset in enumerate(offsets):
        cookie, request = wire.request(Command.READ, offset, BLOCK)
        asked[cookie] = content[offset : offset + BLOCK]
        packed += request
        if index % 5 == 0:
            packed += wire.request(Command.READ, offset + 1, 77)[1]
    wrong, request = wire.request(Command.READ, SIZE_BYTES, BLOCK)
    sends = wire.connection.sends
    wire.feed(packed + request)
    assert wire.connection.sends == sends + 1
    answers = wire.answers()
    assert {cookie: answers[cookie].joined() for cookie in asked} == asked
    assert answers[wrong].error


AT_HAND, ODD, OUTSIDE, WITH_FLAG, FLUSH, CACHE, COLD = range(7)


@pytest.mark.parametrize("style", STYLES)
@given(
    batches=st.lists(
        st.lists(
            st.sampled_from([AT_HAND] * 40 + [ODD, OUTSIDE, WITH_FLAG, FLUSH, CACHE, COLD]), min_size=1, max_size=70
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=30)
def test_batches_of_reads_and_what_looks_like_them_are_answered_like_each_alone(
    style: ReplyStyle, batches: list[list[int]]
) -> None:
    rig = make_rig()
    rig.device.data[:] = random.Random(1).randbytes(SIZE_BYTES)
    wire = rig.wire(style)
    blocks = random.Random(2)
    for batch in batches:
        expected: dict[int, bytes | None] = {}
        packed = b""
        for kind in batch:
            offset = blocks.randrange(SIZE_BYTES // BLOCK) * BLOCK
            if kind == FLUSH:
                cookie, request = wire.request(Command.FLUSH)
                expected[cookie] = b""
            elif kind == CACHE:
                cookie, request = wire.request(Command.CACHE, offset, BLOCK)
                expected[cookie] = b""
            else:
                offset = {ODD: offset // 2 + 1, OUTSIDE: SIZE_BYTES}.get(kind, offset)
                flags = CommandFlag.DF if kind == WITH_FLAG and style is not ReplyStyle.SIMPLE else 0
                cookie, request = wire.request(Command.READ, offset, BLOCK, flags=flags)
                whole = bytes(rig.device.data[offset : offset + BLOCK])
                expected[cookie] = whole if kind != OUTSIDE else None
            packed += request
            rig.device.cold = {offset} if kind == COLD else rig.device.cold
        wire.feed(packed)
        rig.clock.run()
        answers = wire.answers()
        assert {cookie: None if told.error else told.joined() for cookie, told in answers.items()} == expected


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("piece_bytes", [1 << 30, 1, 29, 4096])
def test_a_conversation_is_answered_in_step_however_it_is_cut(rig: Rig, style: ReplyStyle, piece_bytes: int) -> None:
    wire = rig.wire(style)
    packed, expected = conversation(wire)
    wire.feed(packed, piece_bytes)
    rig.clock.run()
    answers = wire.answers()
    assert {cookie: answer.error for cookie, answer in answers.items()} == {
        cookie: error for cookie, (error, _) in expected.items()
    }
    assert all(answer.done for answer in answers.values())
    assert all(answers[cookie].joined() == data for cookie, (_, data) in expected.items() if data is not None)
    assert rig.device.data[: 256 * 16] == bytes(range(256)) * 16
    assert wire.session.info().in_flight == 0


def test_the_writes_of_one_wake_share_one_commit_and_one_send() -> None:
    rig = make_rig()
    wire = rig.wire()
    sends = wire.connection.sends
    requests = [wire.request(Command.WRITE, index * BLOCK, data=bytes([index]) * BLOCK) for index in range(16)]
    reads = [wire.request(Command.READ, index * BLOCK, BLOCK) for index in range(16)]
    wire.feed(b"".join(packed for _, packed in requests + reads))
    assert rig.device.events == ["commit 16"]
    assert wire.connection.sends == sends + 1
    assert len(wire.answers()) == 32
    assert rig.export.counters.batches == 1
    assert rig.export.counters.writes == rig.export.counters.reads == 16


def open_round(*wires: Wire) -> list[Callable[[], None]]:
    """Let the data of these connections arrive in one round, which ends when the callbacks are called."""
    round_end: list[Callable[[], None]] = []
    for wire in wires:
        wire.connection.round_end = round_end
    return round_end


@pytest.mark.parametrize("style", STYLES)
def test_what_several_connections_write_in_one_round_shares_one_commit(style: ReplyStyle) -> None:
    rig = make_rig()
    rig.device.data[-BLOCK:] = b"\x11" * BLOCK
    wires = [rig.wire(style) for _ in range(4)]
    round_end = open_round(*wires)
    old, read = wires[0].request(Command.READ, SIZE_BYTES - BLOCK, BLOCK)
    for index, wire in enumerate(wires):
        data = bytes([index + 1]) * BLOCK
        wire.feed(
            wire.request(Command.WRITE, 2 * index * BLOCK, data=data)[1]
            + wire.request(Command.WRITE, (2 * index + 1) * BLOCK, data=data, flags=CommandFlag.FUA)[1]
            + wire.request(Command.FLUSH)[1]
            + (read if not index else b"")
        )
    assert rig.device.events == []
    assert [len(wire.answers()) for wire in wires] == [1, 0, 0, 0], "a read waits for nobody"
    (end,) = round_end
    end()
    assert rig.device.events == ["commit 8"]
    assert [len(wire.answers()) for wire in wires] == [1, 1, 1, 1]
    rig.clock.run()
    assert [len(wire.answers()) for wire in wires] == [2, 2, 2, 2]
    assert old
    for index in range(8):
        assert rig.device.data[index * BLOCK : (index + 1) * BLOCK] == bytes([index // 2 + 1]) * BLOCK


def test_a_failed_commit_fails_the_changes_of_every_connection_of_the_round() -> None:
    rig = make_rig()
    wires = [rig.wire(), rig.wire()]
    round_end = open_round(*wires)
    for wire in wires:
        wire.feed(wire.request(Command.WRITE, 0, data=b"x" * BLOCK)[1])
    rig.device.commit_error = errno.EIO
    round_end[0]()
    for wire in wires:
        (answer,) = wire.answers().values()
        assert answer.error == errno.EIO
    open_round(*wires)
    wires[0].connection.round_end = None
    assert not wires[0].ask(Command.WRITE, 0, data=b"y" * BLOCK).error


def test_a_connection_that_is_lost_before_the_round_ends_takes_nobody_along() -> None:
    rig = make_rig()
    lost, stays = rig.wire(), rig.wire()
    round_end = open_round(lost, stays)
    for wire, data in ((lost, b"x"), (stays, b"y")):
        wire.feed(wire.request(Command.WRITE, 0, data=data * BLOCK)[1] + wire.request(Command.FLUSH)[1])
    lost.session.disconnect("a test")
    round_end[0]()
    rig.clock.run()
    assert len(stays.answers()) == 2
    assert rig.device.data[:BLOCK] == b"y" * BLOCK


@pytest.mark.parametrize("deferring", [False, True])
def test_an_export_counts_what_its_clients_do_and_keeps_it_when_they_leave(deferring: bool) -> None:
    rig = make_rig(deferring)
    for port in range(2):
        wire = rig.wire(peer_name=f"192.0.2.1:{port}")
        wire.ask(Command.WRITE, 0, data=bytes(1000))
        wire.ask(Command.READ, 0, 500)
        wire.ask(Command.READ, SIZE_BYTES, 500)
        assert (wire.session.info().requests, wire.session.info().write_bytes) == (3, 1000)
        if port:
            wire.session.lost("gone")
    counters = rig.export.counters
    assert (counters.writes, counters.write_bytes, counters.reads, counters.read_bytes) == (2, 2000, 2, 1000)
    assert (counters.errors, counters.requests, counters.batches) == (2, 6, 6)
    assert counters.deferred == (4 if deferring else 0)
    shown = counters.as_dict()
    assert shown["batch_requests_count"] == 6
    assert sum(shown["batch_requests"]) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("style", STYLES)
def test_a_failed_commit_fails_every_change_of_the_batch_and_no_read(style: ReplyStyle) -> None:
    rig = make_rig()
    wire = rig.wire(style)
    write, packed = wire.request(Command.WRITE, 0, data=b"x" * BLOCK)
    forced, packed_forced = wire.request(Command.WRITE, 0, data=b"y" * BLOCK, flags=CommandFlag.FUA)
    trim, packed_trim = wire.request(Command.TRIM, 0, BLOCK)
    read, packed_read = wire.request(Command.READ, 0, BLOCK)
    rig.device.commit_error = errno.ENOSPC
    wire.feed(packed + packed_forced + packed_trim + packed_read)
    rig.clock.run()
    answers = wire.answers()
    assert [answers[cookie].error for cookie in (write, forced, trim)] == [errno.ENOSPC] * 3
    assert answers[read].joined() == bytes(BLOCK)
    assert rig.device.flushes == 0


@pytest.mark.parametrize("command", [Command.FLUSH, Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_fua_and_flush_are_answered_after_a_flush_that_began_after_the_commit(rig: Rig, command: Command) -> None:
    wire = rig.wire()
    wire.ask(Command.WRITE, 0, data=b"a" * BLOCK)
    rig.device.events.clear()
    if command == Command.FLUSH:
        cookie, packed = wire.request(command)
    elif command == Command.WRITE:
        cookie, packed = wire.request(command, 0, data=b"b" * BLOCK, flags=CommandFlag.FUA)
    else:
        cookie, packed = wire.request(command, 0, BLOCK, flags=CommandFlag.FUA)
    wire.feed(packed)
    while "flushed" not in rig.device.events:
        assert cookie not in wire.answers()
        assert rig.clock.turn()
    rig.clock.run()
    assert wire.answers()[cookie].error == 0
    assert rig.device.events[-1] == "flushed"
    assert rig.device.flushes == 1


def test_a_failed_flush_is_told_to_all_who_asked(rig: Rig) -> None:
    wire = rig.wire()
    rig.device.flush_error = errno.EIO
    assert wire.ask(Command.FLUSH).error == errno.EIO
    rig.device.flush_error = errno.EIO
    assert wire.ask(Command.WRITE, 0, data=b"b" * BLOCK, flags=CommandFlag.FUA).error == errno.EIO


@pytest.mark.parametrize("command", [Command.READ, Command.TRIM, Command.BLOCK_STATUS, Command.CACHE])
def test_an_error_of_a_deferred_request_is_its_own(command: Command) -> None:
    rig = make_rig(deferring=True)
    wire = rig.wire()
    rig.device.later_error = errno.EIO
    assert wire.ask(command, 0, BLOCK).error == errno.EIO
    assert wire.ask(command, 0, BLOCK).error == 0


def test_big_reads_tell_holes_and_df_reads_do_not() -> None:
    rig = make_rig()
    wire = rig.wire()
    wire.ask(Command.WRITE, 65536, data=b"d" * 65536)
    sparse = wire.ask(Command.READ, 0, SIZE_BYTES)
    assert sparse.holes == {0: 65536, 131072: SIZE_BYTES - 131072}
    assert sparse.joined() == bytes(rig.device.data)
    whole = wire.ask(Command.READ, 0, SIZE_BYTES, flags=CommandFlag.DF)
    assert whole.holes == {}
    assert whole.data == {0: bytes(rig.device.data)}


@pytest.mark.parametrize("style", STYLES)
def test_what_is_too_much_for_one_turn_is_read_in_several_and_holes_cost_nothing(style: ReplyStyle) -> None:
    rig = make_rig(size_bytes=16 << 20)
    wire = rig.wire(style)
    data = random.Random(1).randbytes(ONE_TURN_BYTES)
    wire.ask(Command.WRITE, 4 << 20, data=data)
    answer = wire.ask(Command.READ, 4 << 20, ONE_TURN_BYTES)
    assert answer.joined() == data
    assert "later READ" not in rig.device.events
    answer = wire.ask(Command.READ, 0, 16 << 20)
    assert answer.joined() == bytes(rig.device.data)
    assert ("later READ" in rig.device.events) == (style is ReplyStyle.SIMPLE)  # the others are told of holes
    rig.device.events.clear()
    wire.ask(Command.WRITE, 0, data=b"d" * BLOCK)
    answer = wire.ask(Command.READ, 0, 16 << 20)
    assert answer.joined() == bytes(rig.device.data)
    assert "later READ" in rig.device.events


def test_block_status_tells_extents_one_of_them_if_asked(rig: Rig) -> None:
    for style in (ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED):
        wire = rig.wire(style)
        wire.ask(Command.WRITE, 8192, data=b"d" * 4096)
        assert wire.ask(Command.BLOCK_STATUS, 0, 16384).extents == [(8192, 3), (4096, 0), (4096, 3)]
        assert wire.ask(Command.BLOCK_STATUS, 0, 16384, flags=CommandFlag.REQ_ONE).extents == [(8192, 3)]
        assert wire.ask(Command.BLOCK_STATUS, 0, 4096, flags=CommandFlag.REQ_ONE).extents == [(4096, 3)]


def test_block_status_without_a_context_is_refused() -> None:
    rig = make_rig()
    wire = Wire(rig.exports, rig.clock, queries=())
    assert wire.ask(Command.BLOCK_STATUS, 0, BLOCK).error == errno.EINVAL


BASE, MONDAY, TUESDAY = "base:allocation", "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"


def with_bitmaps(rig: Rig) -> None:
    """Blocks 0 to 3 hold data since monday, of which block 1 was overwritten and block 2 trimmed since tuesday."""
    wire = rig.wire()
    rig.device.snapshot("monday")
    wire.ask(Command.WRITE, 0, data=b"m" * 4 * BLOCK)
    rig.device.snapshot("tuesday")
    wire.ask(Command.WRITE, BLOCK, data=b"t" * BLOCK)
    wire.ask(Command.TRIM, 2 * BLOCK, BLOCK)
    wire.session.disconnect("set up")


@pytest.mark.parametrize("style", [ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED])
def test_block_status_tells_each_context_that_was_selected(rig: Rig, style: ReplyStyle) -> None:
    with_bitmaps(rig)
    wire = rig.wire(style, queries=(TUESDAY, BASE, MONDAY))
    expected = {
        1: [(BLOCK, 0), (2 * BLOCK, DIRTY), (2 * BLOCK, 0)],
        2: [(2 * BLOCK, 0), (BLOCK, 3), (BLOCK, 0), (BLOCK, 3)],
        3: [(2 * BLOCK, DIRTY), (BLOCK, 0), (BLOCK, DIRTY), (BLOCK, 0)],
    }
    assert wire.ask(Command.BLOCK_STATUS, 0, 5 * BLOCK).statuses == expected
    one = wire.ask(Command.BLOCK_STATUS, 0, 5 * BLOCK, flags=CommandFlag.REQ_ONE).statuses
    assert one == {context: extents[:1] for context, extents in expected.items()}
    only = rig.wire(style, queries=(MONDAY,))
    assert only.ask(Command.BLOCK_STATUS, 100, BLOCK).extents == [(BLOCK, DIRTY)]
    if style is ReplyStyle.EXTENDED:
        payload = nbd.BlockStatusPayload.build({"length": 5 * BLOCK, "context_ids": [3, 1]})
        answer = wire.ask(Command.BLOCK_STATUS, 0, data=payload)
        assert answer.statuses == {context: expected[context] for context in (3, 1)}


def test_a_bitmap_whose_snapshot_is_deleted_is_an_error_even_if_another_has_its_name(rig: Rig) -> None:
    with_bitmaps(rig)
    wire = rig.wire(queries=(BASE, MONDAY))
    del rig.device.snapshots["monday"]
    rig.device.snapshot("monday")
    answer = wire.ask(Command.BLOCK_STATUS, 0, BLOCK)
    assert (answer.error, answer.statuses) == (errno.EINVAL, {})
    assert "deleted" in answer.message
    assert wire.ask(Command.READ, 0, 1).joined() == b"m"
    assert rig.wire(queries=(MONDAY,)).ask(Command.BLOCK_STATUS, 0, SIZE_BYTES).extents == [(SIZE_BYTES, 0)]


def test_of_the_questions_for_bitmaps_of_a_connection_one_is_worked_on_at_a_time(rig: Rig) -> None:
    with_bitmaps(rig)
    wire = rig.wire(queries=(MONDAY, TUESDAY))
    asked = [wire.request(Command.BLOCK_STATUS, 0, BLOCK) for _ in range(3)]
    rig.device.events.clear()
    wire.feed(b"".join(packed for _, packed in asked))
    most = 0
    while rig.clock.turn():
        changed = rig.device.events.count("changed since 1") + rig.device.events.count("changed since 2")
        rig.device.events.clear()
        most = max(most, changed)
    assert most == 1
    assert [answer.error for answer in wire.answers().values()] == [0, 0, 0]


def test_a_client_that_left_is_not_worked_for_any_more(rig: Rig) -> None:
    with_bitmaps(rig)
    wire = rig.wire(queries=(MONDAY, TUESDAY))
    wire.feed(b"".join(wire.request(Command.BLOCK_STATUS, 0, BLOCK)[1] for _ in range(5)))
    rig.device.events.clear()
    rig.clock.turn()
    wire.session.lost("gone")
    rig.clock.run()
    assert [event for event in rig.device.events if event.startswith("changed")] == ["changed since 1"]


def test_a_client_that_is_handed_over_keeps_its_contexts(rig: Rig) -> None:
    with_bitmaps(rig)
    wire = rig.wire(queries=(BASE, TUESDAY))
    before = wire.ask(Command.BLOCK_STATUS, 0, 5 * BLOCK).statuses
    wire.hand_over(rig.exports)
    assert wire.ask(Command.BLOCK_STATUS, 0, 5 * BLOCK).statuses == before


def test_zeroes_without_holes_are_written_in_bounded_pieces_while_others_are_served(rig: Rig) -> None:
    wire, other = rig.wire(), rig.wire(peer_name="192.0.2.1:2000")
    wire.ask(Command.WRITE, 0, data=b"x" * SIZE_BYTES)
    cookie, packed = wire.request(Command.WRITE_ZEROES, 100, SIZE_BYTES - 200, flags=CommandFlag.NO_HOLE)
    wire.feed(packed)
    assert other.ask(Command.READ, 0, 10).joined() == b"x" * 10
    rig.clock.run()
    assert wire.answers()[cookie].error == 0
    assert rig.device.data == b"x" * 100 + bytes(SIZE_BYTES - 200) + b"x" * 100
    assert all(rig.device.written)


def test_many_zeroings_of_one_client_take_one_piece_a_turn() -> None:
    rig = make_rig(size_bytes=4 << 20)
    wire = rig.wire()
    requests = [wire.request(Command.WRITE_ZEROES, 0, 4 << 20, flags=CommandFlag.NO_HOLE) for _ in range(20)]
    wire.feed(b"".join(packed for _, packed in requests))
    for _ in range(10):
        before = rig.device.commits
        rig.clock.turn()
        assert rig.device.commits <= before + 1
    rig.clock.run()
    assert len(wire.answers()) == 20


def test_a_fast_zero_that_cannot_be_done_at_once_is_refused() -> None:
    assert make_rig(True).wire().ask(Command.WRITE_ZEROES, 0, 9, flags=CommandFlag.FAST_ZERO).error == errno.ENOTSUP
    assert make_rig().wire().ask(Command.WRITE_ZEROES, 0, BLOCK, flags=CommandFlag.FAST_ZERO).error == 0


def test_a_read_over_the_payload_limit_is_refused_in_the_style_of_the_connection() -> None:
    rig = make_rig(size_bytes=64 << 20)
    assert rig.wire().ask(Command.READ, 0, (32 << 20) + 1).error == errno.EOVERFLOW
    assert rig.wire(ReplyStyle.SIMPLE).ask(Command.READ, 0, (32 << 20) + 1).error == errno.EINVAL
    assert len(rig.wire().ask(Command.READ, 0, 32 << 20).joined()) == 32 << 20


def test_a_write_over_the_payload_limit_is_skipped_and_the_stream_stays_in_step() -> None:
    rig = make_rig(size_bytes=64 << 20)
    wire = rig.wire()
    assert wire.ask(Command.WRITE, 0, data=bytes((32 << 20) + 1)).error == errno.EINVAL
    assert wire.ask(Command.READ, 0, 5).joined() == bytes(5)
    extended = rig.wire(ReplyStyle.EXTENDED)
    _, packed = extended.request(Command.WRITE, 0, data=bytes((32 << 20) + 1))
    extended.feed(packed)
    assert extended.connection.closed


def test_the_buffer_grows_for_a_big_write_and_shrinks_back(rig: Rig) -> None:
    wire = rig.wire()
    wire.ask(Command.WRITE, 0, data=b"z" * SIZE_BYTES)
    assert len(wire.session.buffer()) > NORMAL_BYTES
    rig.clock.advance(SHRINK_DELAY_S)
    assert len(wire.session.buffer()) == NORMAL_BYTES
    assert wire.ask(Command.READ, SIZE_BYTES - 1, 1).joined() == b"z"


def test_a_buffer_that_shrinks_in_the_middle_of_a_big_write_keeps_its_bytes() -> None:
    rig = make_rig()
    wire = rig.wire()
    data = random.Random(1).randbytes(SIZE_BYTES)
    cookie, packed = wire.request(Command.WRITE, 0, data=data)
    for start in range(0, len(packed), 200_000):
        wire.feed(packed[start : start + 200_000])
        rig.clock.advance(SHRINK_DELAY_S)
    assert wire.answers()[cookie].error == 0
    assert rig.device.data == data


def test_a_wrong_magic_closes_after_what_came_before_is_done(rig: Rig) -> None:
    wire = rig.wire()
    cookie, packed = wire.request(Command.WRITE, 0, data=b"last")
    wire.feed(packed + b"\0" * 64)
    rig.clock.run()
    assert wire.connection.closed
    assert wire.answers()[cookie].error == 0
    assert not rig.export.sessions
    assert rig.device.data[:4] == b"last"


def test_a_disconnect_waits_for_what_is_in_flight(rig: Rig) -> None:
    wire = rig.wire()
    write, packed = wire.request(Command.WRITE, 0, data=b"b" * BLOCK, flags=CommandFlag.FUA)
    _, bye = wire.request(Command.DISC)
    wire.feed(packed + bye)
    assert not wire.connection.closed
    rig.clock.run()
    assert wire.connection.closed
    assert not wire.connection.aborted
    assert wire.answers()[write].error == 0
    assert len(wire.gone) == 1


def test_a_lost_client_has_its_work_finished_and_its_replies_dropped(rig: Rig) -> None:
    wire = rig.wire()
    _, packed = wire.request(Command.WRITE, 0, data=b"b" * BLOCK, flags=CommandFlag.FUA)
    wire.feed(packed)
    wire.session.lost("gone")
    rig.clock.run()
    assert rig.device.data[:BLOCK] == b"b" * BLOCK
    assert wire.gone == ["gone"]
    assert not rig.export.sessions


def test_a_client_that_left_leaves_nothing_to_the_garbage_collector(rig: Rig) -> None:
    gc.collect()
    gc.disable()
    try:
        rig.device.snapshot("monday")
        wire = rig.wire(queries=(BASE, MONDAY))
        packed, _ = conversation(wire)
        wire.feed(packed)
        rig.clock.run()
        wire.feed(wire.request(Command.BLOCK_STATUS, 0, BLOCK)[1])
        session = weakref.ref(wire.session)
        transmission = weakref.ref(wire.session._transmission)
        wire.session.lost("gone")
        rig.clock.run()
        del wire
        assert rig.export.counters.batches
        rig.clock.advance(HANDSHAKE_TIMEOUT_S + 1)  # the loop's heap of timers holds a cancelled one
        assert session() is None
        assert transmission() is None
    finally:
        gc.enable()


def test_zeroing_for_a_client_that_left_stops(rig: Rig) -> None:
    wire = rig.wire()
    wire.ask(Command.WRITE, 0, data=b"x" * SIZE_BYTES)
    for _ in range(3):
        wire.feed(wire.request(Command.WRITE_ZEROES, 100, SIZE_BYTES - 100, flags=CommandFlag.NO_HOLE)[1])
    wire.session.lost("gone")
    rig.clock.run()
    assert rig.device.data == b"x" * SIZE_BYTES


@pytest.mark.parametrize("style", STYLES)
def test_reads_of_a_wake_that_are_not_at_hand_are_fetched_together_and_leave_with_one_send(style: ReplyStyle) -> None:
    rig = make_rig()
    rig.device.data[:] = random.Random(1).randbytes(SIZE_BYTES)
    wire = rig.wire(style)
    places = [(number * BLOCK, BLOCK) for number in range(20)] + [(40 * BLOCK, 8 * BLOCK), (60 * BLOCK, 2 * BLOCK)]
    rig.device.cold = {number * BLOCK for number in (3, 4, 19, 40)}
    rig.device.fetchable = set(rig.device.cold)
    asked = {}
    packed = b""
    for offset, length in places:
        cookie, request = wire.request(Command.READ, offset, length)
        asked[cookie] = bytes(rig.device.data[offset : offset + length])
        packed += request
    sends = wire.connection.sends
    wire.feed(packed)
    assert wire.session.info().in_flight == 4
    first = wire.answers()
    assert len(first) == 18
    rig.clock.run()
    assert rig.device.events == ["fetched 4"]
    assert wire.connection.sends == sends + 2
    assert wire.session.info().in_flight == 0
    assert {cookie: told.joined() for cookie, told in {**first, **wire.answers()}.items()} == asked
    assert rig.export.counters.reads == len(places)
    assert rig.export.counters.requests == len(places)
    assert rig.export.counters.read_bytes == sum(length for _, length in places)


@pytest.mark.parametrize("count", [1, 5])
def test_a_read_that_fetching_does_not_help_waits_for_itself(count: int) -> None:
    rig = make_rig()
    wire = rig.wire()
    rig.device.cold = {number * BLOCK for number in range(count)}
    rig.device.fetchable = {0} if count > 1 else set()
    requests = [wire.request(Command.READ, number * BLOCK, BLOCK) for number in range(count)]
    wire.feed(b"".join(packed for _, packed in requests))
    rig.clock.run()
    left = count - len(rig.device.fetchable)
    assert rig.device.events == [f"fetched {count}", f"fetched {left}"] + ["later READ"] * left
    assert len(wire.answers()) == count
    assert wire.session.info().in_flight == 0


def test_what_comes_unasked_is_not_fetched_and_where_nothing_does_that_is_found_out() -> None:
    rig = make_rig()
    wire = rig.wire()

    def ask(comes: set[int]) -> list[str]:
        rig.device.events.clear()
        rig.device.cold = {number * BLOCK for number in range(3)}
        rig.device.fetchable = set(rig.device.cold)
        wire.feed(b"".join(wire.request(Command.READ, number * BLOCK, BLOCK)[1] for number in range(3)))
        for number in sorted(comes):
            rig.device.cold.discard(number * BLOCK)
            rig.clock.turn()
        rig.clock.run()
        assert len(wire.answers()) == 3
        return list(rig.device.events)

    assert ask({0, 1, 2}) == []
    assert ask({0, 1}) == ["fetched 1"]
    for _ in range(2 * CREDIT_LIMIT):
        assert ask(set()) == ["fetched 3"]
    asked = [ask({0, 1, 2}) for _ in range(2 * TRIED_AGAIN)]
    assert asked[0] == ["fetched 3"], "it is not waited for any more"
    assert asked[-1] == [], "until it was tried again"


def test_of_many_reads_the_longest_missed_ones_are_tried_first() -> None:
    rig = make_rig()
    wire = rig.wire()
    count = 3 * AT_ONCE
    requests = [wire.request(Command.READ, number * BLOCK, BLOCK) for number in range(count)]
    rig.device.cold = {number * BLOCK for number in range(count)}
    wire.feed(b"".join(packed for _, packed in requests))
    rig.device.cold = {0}
    for turn in range(1, 4):
        rig.clock.turn()
        assert wire.session.info().in_flight == count - turn * (AT_ONCE - 1)
    rig.clock.turn()
    assert wire.session.info().in_flight == 1
    rig.device.fetchable = {0}
    rig.clock.run()
    assert rig.device.events == ["fetched 1"]
    assert len(wire.answers()) == count


@pytest.mark.parametrize("turns", [0, TURNS])
def test_fetched_reads_of_a_client_that_left_are_not_answered(turns: int) -> None:
    rig = make_rig()
    wire = rig.wire()
    rig.device.cold = rig.device.fetchable = {0}
    wire.feed(wire.request(Command.READ, 0, BLOCK)[1])
    for _ in range(turns):
        rig.clock.turn()
    wire.session.lost("gone")
    rig.clock.run()
    assert rig.device.events == (["fetched 1"] if turns else [])
    assert wire.answers() == {}


def test_a_disconnect_waits_for_reads_that_are_fetched() -> None:
    rig = make_rig()
    wire = rig.wire()
    rig.device.cold = rig.device.fetchable = {0}
    read, packed = wire.request(Command.READ, 0, BLOCK)
    wire.feed(packed + wire.request(Command.DISC)[1])
    assert not wire.connection.closed
    rig.clock.run()
    assert wire.connection.closed
    assert wire.answers()[read].done


def test_reads_that_are_fetched_are_bounded_and_the_rest_is_not_read() -> None:
    rig = make_rig()
    wire = rig.wire()
    rig.device.cold = {0}
    requests = [wire.request(Command.READ, 0, BLOCK) for _ in range(3 * OPERATION_LIMIT)]
    wire.feed(b"".join(packed for _, packed in requests))
    assert OPERATION_LIMIT - SLOTS < wire.session.info().in_flight <= OPERATION_LIMIT
    rig.clock.run()
    assert wire.connection.reading
    assert len(wire.answers()) == 3 * OPERATION_LIMIT


def test_requests_that_wait_are_bounded_and_the_rest_is_not_read() -> None:
    rig = make_rig(deferring=True)
    wire = rig.wire()
    requests = [wire.request(Command.READ, 0, 512) for _ in range(3 * OPERATION_LIMIT)]
    wire.feed(b"".join(packed for _, packed in requests))
    assert wire.session.info().in_flight == OPERATION_LIMIT
    assert not wire.connection.reading
    rig.clock.run()
    assert wire.connection.reading
    assert len(wire.answers()) == 3 * OPERATION_LIMIT
    assert wire.session.info().in_flight == 0


def test_a_client_that_takes_no_replies_is_not_read_until_it_does(rig: Rig) -> None:
    wire = rig.wire()
    wire.ask(Command.WRITE, 0, data=b"d" * SIZE_BYTES)
    wire.connection.taking = False
    requests = [wire.request(Command.READ, 0, SIZE_BYTES) for _ in range(64)]
    wire.feed(b"".join(packed for _, packed in requests))
    rig.clock.run()
    assert not wire.connection.reading
    assert wire.connection.unsent_bytes < (80 << 20 if rig.device.deferring else 12 << 20)
    for _ in range(64):
        wire.connection.take()
        wire.connection.taking = False
        wire.session.drained()
        rig.clock.run()
    wire.connection.take()
    assert len(wire.answers()) == 64
    assert wire.connection.reading


def test_a_flood_of_small_requests_lets_others_have_their_turn() -> None:
    rig = make_rig()
    wire = rig.wire()
    requests = [wire.request(Command.READ, 0, 1) for _ in range(3 * BATCH_REQUESTS)]
    wire.feed(b"".join(packed for _, packed in requests))
    assert len(wire.answers()) <= BATCH_REQUESTS
    rig.clock.run()
    assert len(wire.answers()) == 2 * BATCH_REQUESTS


def test_a_batch_of_reads_is_bounded_by_their_bytes() -> None:
    rig = make_rig()
    wire = rig.wire()
    wire.ask(Command.WRITE, 0, data=b"d" * SIZE_BYTES)
    requests = [wire.request(Command.READ, 0, 128 << 10) for _ in range(100)]
    wire.feed(b"".join(packed for _, packed in requests))
    assert len(wire.answers()) == 33
    rig.clock.run()
    assert len(wire.answers()) == 67


def test_a_client_that_floods_the_handshake_and_takes_no_replies_is_not_read() -> None:
    rig = make_rig()
    wire = Wire(rig.exports, rig.clock, name="nothing of this name")
    wire.connection.taking = False
    options = nbd.OptionHeader.build({"option": nbd.Option.LIST, "length": 0}) * 200
    for number in range(300):
        rig.exports.add(Export(f"export {number}", rig.device, description="d" * 4096))
    wire.feed(options)
    assert not wire.connection.reading
    assert wire.connection.unsent_bytes < 8 << 20
    for _ in range(500):
        if wire.connection.reading:
            break
        wire.connection.take()
        wire.connection.sent.clear()
        wire.connection.taking = False
        wire.session.drained()
    assert wire.connection.reading


def test_a_handshake_has_a_time_limit() -> None:
    rig = make_rig()
    entered = rig.wire()
    silent = Wire(rig.exports, rig.clock, name="nothing of this name")
    rig.clock.advance(HANDSHAKE_TIMEOUT_S + 1)
    assert silent.connection.aborted
    assert not entered.connection.closed


def test_a_second_host_is_refused_as_a_writer_unless_the_export_is_shared() -> None:
    rig = make_rig()
    first = rig.wire(peer_name="192.0.2.1:1")
    assert rig.wire(peer_name="192.0.2.1:2").entered
    second = rig.wire(peer_name="192.0.2.2:1")
    assert not second.entered
    assert b"192.0.2.1" in second.greeting
    rig.export.change(shared=True)
    assert rig.wire(peer_name="192.0.2.2:2").entered
    with pytest.raises(ExportError, match=r"192\.0\.2\.2"):
        rig.export.change(shared=False)
    assert first.entered


def test_a_host_may_write_when_the_other_has_left_and_the_local_host_has_many_addresses() -> None:
    rig = make_rig()
    first = rig.wire(peer_name="unix:pid=1,uid=0")
    assert rig.wire(peer_name="127.0.0.1:1").entered
    assert rig.wire(peer_name="[::1]:1").entered
    assert not rig.wire(peer_name="[::ffff:192.0.2.1]:1").entered
    for session in list(rig.export.sessions):
        session.disconnect("test")
    assert first.gone == ["test"]
    assert rig.wire(peer_name="[::ffff:192.0.2.1]:1").entered
    assert rig.wire(peer_name="192.0.2.1:9").entered


def test_clients_that_are_not_allowed_neither_see_nor_enter_and_leave_when_it_changes() -> None:
    rig = make_rig()
    wire = rig.wire(peer_name="192.0.2.1:1")
    rig.export.change(allowed=["192.0.2.0/25"])
    assert wire.entered
    rig.export.change(allowed=["198.51.100.0/24", "2001:db8::/64"])
    assert wire.gone
    assert not rig.wire(peer_name="192.0.2.1:1").entered
    assert rig.wire(peer_name="[2001:db8::5]:1").entered
    with pytest.raises(ExportError, match="no address or network"):
        rig.export.change(allowed=["192.0.2.1/24"])


def test_an_export_made_read_only_refuses_its_writers_next_write(rig: Rig) -> None:
    wire = rig.wire()
    assert wire.ask(Command.WRITE, 0, data=b"1").error == 0
    rig.export.change(read_only=True)
    assert wire.ask(Command.WRITE, 0, data=b"2").error == errno.EPERM
    assert wire.ask(Command.TRIM, 0, 1).error == errno.EPERM
    assert wire.ask(Command.READ, 0, 1).joined() == b"1"
    late = rig.wire(peer_name="192.0.2.9:1")
    rig.export.change(shared=True, read_only=False)
    assert wire.ask(Command.WRITE, 0, data=b"3").error == 0
    assert late.ask(Command.WRITE, 0, data=b"4").error == errno.EPERM, "it was told that the export is read-only"


def test_a_removed_export_disconnects_its_clients(rig: Rig) -> None:
    wire = rig.wire()
    rig.exports.remove("disk")
    assert wire.connection.aborted
    assert not rig.wire().entered


@pytest.mark.fuzz
@given(
    style=st.sampled_from(STYLES),
    deferring=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    piece_bytes=st.integers(16, 9000),
    noise=st.binary(max_size=80),
)
def test_mutated_requests_never_raise_never_hang_and_never_touch_another_session(
    style: ReplyStyle, deferring: bool, changes: list[tuple[int, int]], piece_bytes: int, noise: bytes
) -> None:
    rig = make_rig(deferring)
    other = rig.wire(peer_name="192.0.2.1:2")
    assert other.ask(Command.WRITE, SIZE_BYTES - 5, data=b"mine!").error == 0
    rig.device.snapshot("monday")
    wire = rig.wire(style, queries=(BASE, MONDAY))
    packed, _ = conversation(wire)
    mutated = bytearray(packed + noise)
    for position, value in changes:
        mutated[position % len(mutated)] = value
    for start in range(0, len(mutated), piece_bytes):
        wire.feed(bytes(mutated[start : start + piece_bytes]))
        rig.clock.run()
        if wire.connection.closed:
            break
    assert wire.connection.closed or wire.connection.reading
    assert other.ask(Command.READ, 0, 16).error == 0
    assert other.ask(Command.FLUSH).error == 0
    wire.session.lost("gone")
    rig.clock.run()
    assert len(rig.export.sessions) == 1
