"""The directory's bodies: what is encoded is decoded, and nothing that was damaged is taken for something else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import directory_control as control
from protocol.directory import (
    HEARTBEAT_HEAD,
    KEY_LIMIT_BYTES,
    MESSAGE_HEAD,
    PARTS_LIMIT,
    PAYLOAD_BYTES,
    POSITION_HEAD,
    POSITION_REPORT_HEAD,
    PREFIXES_LIMIT,
    RANGE_HEAD,
    REFUSAL_HEAD,
    REPORT_HEAD,
    REQUEST_HEAD,
    UPDATE_HEAD,
    UPDATES_HEAD,
    UPDATES_ROOM_BYTES,
    VALUE_LIMIT_BYTES,
    Action,
    Confirm,
    Heartbeat,
    HeartbeatHead,
    Kind,
    MalformedError,
    Message,
    MessageHead,
    NodeKind,
    Position,
    PositionHead,
    PositionReport,
    PositionReportHead,
    RangeHead,
    Reason,
    Refusal,
    RefusalHead,
    Report,
    ReportHead,
    Request,
    RequestHead,
    Update,
    UpdateHead,
    Updates,
    UpdatesHead,
    cut,
)
from protocol.directory_control import BODIES, Entry, SnapshotEntries, decode_body, pack_starts, unpack_starts
from protocol.sealed_frames import BODY_LIMIT_BYTES, FRAME_HEADER, FrameHeader

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
FROM_1 = st.integers(1, 2**64 - 1)
NAMES = st.text(max_size=20)
KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
POSITIONS = st.builds(Position, U32, U64)
UPDATES = st.builds(
    Update, st.sampled_from(Action), KEYS, st.binary(max_size=3000), st.booleans(), U32, U64, U64
)  # fmt: skip
PREFIXES = st.lists(NAMES, max_size=4).map(tuple)
REASONS = st.sampled_from(Reason)
RANGES = st.lists(st.tuples(FROM_1, st.integers(1, 65535)), min_size=1, max_size=5).map(tuple)
HISTORIES = st.lists(st.tuples(U32, U64), max_size=4).map(tuple).map(pack_starts)
ENTRIES = st.builds(Entry, POSITIONS, UPDATES)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    parts = draw(st.integers(1, PARTS_LIMIT))
    part = draw(st.integers(0, parts - 1))
    payload = draw(st.binary(min_size=1, max_size=PAYLOAD_BYTES))
    return Message(draw(U32), draw(st.integers(part + 1, 2**64 - 1)), part, parts, payload)


@st.composite
def heartbeats(draw: st.DrawFn) -> Heartbeat:
    epochs = sorted(draw(st.sets(U32, min_size=1, max_size=8)))
    firsts = sorted(draw(st.sets(FROM_1, min_size=len(epochs), max_size=len(epochs))))
    starts = tuple(zip(epochs, firsts, strict=True))
    return Heartbeat(epochs[-1], draw(U64), draw(U64), draw(U64), draw(st.booleans()), starts)


STRATEGIES: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.UPDATES: st.builds(Updates, U32, st.booleans(), st.lists(messages(), max_size=3).map(tuple)),
    Kind.HEARTBEAT: heartbeats(),
    Kind.REQUEST: st.builds(Request, U32, RANGES),
    Kind.REFUSAL: st.builds(Refusal, U32, REASONS, U64, RANGES),
    Kind.POSITION: st.builds(PositionReport, U32, POSITIONS),
    Kind.COLLECT: st.builds(control.Collect, U32),
    Kind.PROMISE: st.builds(control.Promise, U32, POSITIONS),
    Kind.REPORT: st.builds(Report, U32, st.sampled_from(Confirm), UPDATES.map(Update.encode)),
    Kind.JOIN: st.builds(control.Join, U64, st.sampled_from(NodeKind), NAMES, NAMES, NAMES, PREFIXES),
    Kind.JOIN_REFUSED: st.builds(control.JoinRefused, U64, U32, REASONS),
    Kind.DELEGATE: st.builds(control.Delegate, U64, U32, U64, NAMES),
    Kind.HOLD: st.builds(control.Hold, U64, U64, U32, POSITIONS),
    Kind.HELD: st.builds(control.Held, U64, U32, st.booleans()),
    Kind.READY: st.builds(control.Ready, U64, U32, POSITIONS),
    Kind.ACTIVE: st.builds(control.Active, U64, U32),
    Kind.SNAPSHOT_REQUEST: st.builds(control.SnapshotRequest, U64, U32, NAMES, POSITIONS, PREFIXES),
    Kind.SNAPSHOT_BEGIN: st.builds(
        control.SnapshotBegin,
        U64,
        U32,
        POSITIONS,
        st.lists(st.tuples(U32, U64), max_size=4).map(tuple).map(pack_starts),
    ),
    Kind.SNAPSHOT_ENTRIES: st.builds(SnapshotEntries, U64, st.lists(ENTRIES, max_size=4).map(tuple)),
    Kind.SNAPSHOT_END: st.builds(control.SnapshotEnd, U64, U32, POSITIONS),
    Kind.SNAPSHOT_REFUSED: st.builds(control.SnapshotRefused, U64, REASONS),
    Kind.SUBSCRIBE: st.builds(control.Subscribe, U32, POSITIONS, PREFIXES),
    Kind.SUBSCRIBED: st.builds(control.Subscribed, U32, HISTORIES),
    Kind.SUBSCRIBE_REFUSED: st.builds(control.SubscribeRefused, U32, REASONS),
}
ANY_BODY = st.one_of([st.tuples(st.just(kind), strategy) for kind, strategy in STRATEGIES.items()])


def test_every_kind_has_a_body_and_a_test() -> None:
    assert set(BODIES) == set(Kind) == set(STRATEGIES)


@pytest.mark.parametrize("kind", Kind)
def test_what_was_encoded_is_decoded(kind: Kind) -> None:
    @given(STRATEGIES[kind])
    def check(body: Any) -> None:
        assert decode_body(kind, body.encode()) == body

    check()


@pytest.mark.fuzz
@given(ANY_BODY, st.data())
def test_a_damaged_body_is_malformed_or_another_whole_one(kind_and_body: tuple[Kind, Any], data: st.DataObject) -> None:
    kind, body = kind_and_body
    damaged = bytearray(body.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(damaged)))
        match data.draw(st.sampled_from(["cut", "insert", "change"])):
            case "cut":
                del damaged[where:]
            case "insert":
                damaged[where:where] = data.draw(st.binary(min_size=1, max_size=9))
            case _:
                damaged[where : where + 1] = data.draw(st.binary(min_size=1, max_size=1))
    try:
        taken = decode_body(kind, bytes(damaged))
    except MalformedError:
        return
    assert decode_body(kind, taken.encode()) == taken


@pytest.mark.fuzz
@given(st.sampled_from(Kind), st.binary(max_size=200))
def test_random_bytes_are_malformed_or_a_whole_body(kind: Kind, body: bytes) -> None:
    try:
        taken = decode_body(kind, body)
    except MalformedError:
        return
    assert decode_body(kind, taken.encode()) == taken


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.REPORT, Kind.SNAPSHOT_BEGIN, Kind.SUBSCRIBED}))
def test_bytes_left_over_are_malformed(kind: Kind) -> None:
    @given(STRATEGIES[kind])
    def check(body: Any) -> None:
        with pytest.raises(MalformedError):
            decode_body(kind, body.encode() + b"\0")

    check()


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(MalformedError, match="kind 99"):
        decode_body(99, b"")


@given(UPDATES)
def test_a_cut_update_is_whole_again_when_its_parts_are_joined(update: Update) -> None:
    parts = cut(update.encode())
    assert all(0 < len(part) <= PAYLOAD_BYTES for part in parts)
    assert Update.decode(b"".join(parts)) == update


def test_the_largest_update_has_as_many_parts_as_a_message_can_count_and_fits_into_a_stream_frame() -> None:
    update = Update(Action.PUT, "k" * KEY_LIMIT_BYTES, bytes(VALUE_LIMIT_BYTES))
    assert len(cut(update.encode())) == PARTS_LIMIT < 1 << 16
    assert len(SnapshotEntries(1, (Entry(Position(1, 1), update),)).encode()) <= BODY_LIMIT_BYTES


def test_the_largest_message_fits_into_a_datagram() -> None:
    assert Message(1, 1, 0, 1, bytes(PAYLOAD_BYTES)).size_bytes <= UPDATES_ROOM_BYTES


@pytest.mark.parametrize(
    "message",
    [
        Message(1, 1, 1, 1, b"x"),  # the part after the last
        Message(1, 1, 0, 0, b"x"),
        Message(1, 1, 0, PARTS_LIMIT + 1, b"x"),
        Message(1, 0, 0, 1, b"x"),  # sequences begin at 1
        Message(1, 1, 1, 2, b"x"),  # its first part would be message 0
        Message(1, 1, 0, 1, b""),
        Message(1, 1, 0, 1, bytes(PAYLOAD_BYTES + 1)),
    ],
)
def test_a_message_with_impossible_numbers_is_malformed(message: Message) -> None:
    with pytest.raises(MalformedError):
        Updates.decode(Updates(1, False, (message,)).encode())


@pytest.mark.parametrize("history", [(), ((1, 0),), ((2, 1), (1, 5)), ((1, 5), (2, 5)), ((1, 1), (3, 9))])
def test_a_heartbeat_whose_history_cannot_be_is_malformed(history: Any) -> None:
    with pytest.raises(MalformedError):
        Heartbeat.decode(Heartbeat(2, 9, 9, 1, False, history).encode())


def test_more_prefixes_than_a_node_may_have_are_malformed() -> None:
    body = control.Subscribe(1, Position(1, 1), ("p",) * (PREFIXES_LIMIT + 1))
    with pytest.raises(MalformedError, match="more prefixes"):
        control.Subscribe.decode(body.encode())


def test_a_history_that_is_cut_off_is_malformed() -> None:
    with pytest.raises(MalformedError):
        unpack_starts(pack_starts(((1, 1),))[:-1])


@pytest.mark.parametrize(
    ("packer", "declaration"),
    [
        (FRAME_HEADER, FrameHeader),
        (UPDATE_HEAD, UpdateHead),
        (MESSAGE_HEAD, MessageHead),
        (POSITION_HEAD, PositionHead),
        (UPDATES_HEAD, UpdatesHead),
        (HEARTBEAT_HEAD, HeartbeatHead),
        (REQUEST_HEAD, RequestHead),
        (REFUSAL_HEAD, RefusalHead),
        (RANGE_HEAD, RangeHead),
        (POSITION_REPORT_HEAD, PositionReportHead),
        (REPORT_HEAD, ReportHead),
    ],
    ids=lambda value: getattr(value, "format", ""),
)
def test_derived_packers_agree_with_their_declarations(packer: Any, declaration: Any) -> None:
    @given(st.binary(min_size=packer.size, max_size=packer.size))
    def check(data: bytes) -> None:
        if declaration is FrameHeader:
            data = b"nbdD" + data[4:]
        values = packer.unpack(data)
        parsed = declaration.parse(data)
        assert tuple(parsed[field.name] for field in declaration.subcons) == values
        assert declaration.build(parsed) == packer.pack(*values) == data

    check()
