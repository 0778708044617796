"""What requests may ask, and how replies look."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import nbd
from protocol.agreement import Agreement, Offer, ReplyStyle
from protocol.contexts import Context
from protocol.nbd import Chunk, Command, CommandFlag, ReplyError
from protocol.transmission import parse_status_payload, payload_bytes, refuse, replies_of, reply_error, shortened

SIZE_BYTES = 1 << 44
STATUS_PAYLOAD = int(nbd.TransmissionFlag.BLOCK_STATUS_PAYLOAD)
OVER = nbd.MAXIMUM_PAYLOAD_BYTES + 1


def agreement(style: ReplyStyle = ReplyStyle.STRUCTURED, contexts: tuple[int, ...] = (1,)) -> Agreement:
    flags = STATUS_PAYLOAD if style is ReplyStyle.EXTENDED and contexts else 0
    selected = tuple(Context(context_id, "base:allocation") for context_id in contexts)
    return Agreement(Offer("a", SIZE_BYTES, False), style, selected, flags)


REQUESTS = [
    # flags, command, offset, length, errno
    (0, Command.READ, 0, 1, 0),
    (0, Command.READ, SIZE_BYTES - 1, 1, 0),
    (0, Command.READ, SIZE_BYTES - 1, 2, errno.EINVAL),
    (0, Command.READ, SIZE_BYTES, 1, errno.EINVAL),
    (0, Command.READ, 0, 0, errno.EINVAL),
    (0, Command.READ, 0, OVER - 1, 0),
    (0, Command.READ, 0, OVER, errno.EOVERFLOW),
    (CommandFlag.DF, Command.READ, 0, 1, 0),
    (CommandFlag.FUA, Command.READ, 0, 1, 0),
    (CommandFlag.NO_HOLE, Command.READ, 0, 1, errno.EINVAL),
    (0, Command.WRITE, 0, 1, 0),
    (CommandFlag.FUA, Command.WRITE, 0, 1, 0),
    (0, Command.WRITE, SIZE_BYTES, 1, errno.ENOSPC),
    (0, Command.WRITE, 0, OVER, errno.EINVAL),
    (CommandFlag.PAYLOAD_LEN, Command.WRITE, 0, 1, errno.EINVAL),
    (0, Command.FLUSH, 0, 0, 0),
    (0, Command.FLUSH, 1, 0, errno.EINVAL),
    (0, Command.TRIM, 0, (1 << 32) - 1, 0),
    (0, Command.TRIM, SIZE_BYTES, 1, errno.EINVAL),
    (CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO, Command.WRITE_ZEROES, 0, 1, 0),
    (0, Command.WRITE_ZEROES, SIZE_BYTES, 1, errno.ENOSPC),
    (CommandFlag.DF, Command.WRITE_ZEROES, 0, 1, errno.EINVAL),
    (0, Command.CACHE, 0, 1, 0),
    (CommandFlag.REQ_ONE, Command.BLOCK_STATUS, 0, 1, 0),
    (0, Command.BLOCK_STATUS, SIZE_BYTES, 1, errno.EINVAL),
    (0, 8, 0, 1, errno.EINVAL),
    (0, 0xFFFF, 0, 1, errno.EINVAL),
    (1 << 9, Command.READ, 0, 1, errno.EINVAL),
]


@pytest.mark.parametrize(("flags", "command", "offset", "length", "expected"), REQUESTS)
def test_a_request_is_refused_with_the_errno_of_the_specification(
    flags: int, command: int, offset: int, length: int, expected: int
) -> None:
    assert refuse(agreement(), SIZE_BYTES, False, (int(flags), int(command), offset, length)) == expected


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_changes_of_a_read_only_export_are_not_permitted(command: Command) -> None:
    assert refuse(agreement(), SIZE_BYTES, True, (0, command, 0, 1)) == errno.EPERM


def test_simple_replies_allow_neither_df_nor_block_status_nor_long_reads() -> None:
    simple = agreement(ReplyStyle.SIMPLE, ())
    assert refuse(simple, SIZE_BYTES, False, (CommandFlag.DF, Command.READ, 0, 1)) == errno.EINVAL
    assert refuse(simple, SIZE_BYTES, False, (0, Command.BLOCK_STATUS, 0, 1)) == errno.EINVAL
    assert refuse(simple, SIZE_BYTES, False, (0, Command.READ, 0, OVER)) == errno.EINVAL


def test_an_extended_write_needs_its_payload_flag_and_block_status_may_have_one() -> None:
    extended = agreement(ReplyStyle.EXTENDED)
    payload = int(CommandFlag.PAYLOAD_LEN)
    assert refuse(extended, SIZE_BYTES, False, (0, Command.WRITE, 0, 1)) == errno.EINVAL
    assert refuse(extended, SIZE_BYTES, False, (payload, Command.WRITE, 0, 1)) == 0
    assert refuse(extended, SIZE_BYTES, False, (payload, Command.BLOCK_STATUS, 0, 12)) == 0
    assert refuse(extended, SIZE_BYTES, False, (payload, Command.TRIM, 0, 12)) == errno.EINVAL
    without = agreement(ReplyStyle.EXTENDED, ())
    assert refuse(without, SIZE_BYTES, False, (payload, Command.BLOCK_STATUS, 0, 12)) == errno.EINVAL


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"length": 5, "context_ids": [1]}, (5, (1,))),
        ({"length": 5, "context_ids": []}, (5, ())),
        ({"length": 0, "context_ids": [1]}, None),
        ({"length": 5, "context_ids": [2]}, None),
        ({"length": 5, "context_ids": [1, 1]}, None),
    ],
)
def test_a_block_status_payload_names_contexts_that_were_agreed(
    payload: dict[str, object], expected: tuple[int, tuple[int, ...]] | None
) -> None:
    assert parse_status_payload(agreement(), nbd.BlockStatusPayload.build(payload)) == expected


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_block_status_payload_that_is_cut_off_is_refused(cut: int) -> None:
    packed = nbd.BlockStatusPayload.build({"length": 5, "context_ids": [1]})
    parsed = parse_status_payload(agreement(), packed[:-cut])
    assert parsed is None or cut == 4


def test_only_a_write_has_a_payload_unless_headers_are_extended() -> None:
    payload = int(CommandFlag.PAYLOAD_LEN)
    assert payload_bytes(False, 0, Command.WRITE, 7) == 7
    assert payload_bytes(False, payload, Command.TRIM, 7) == 0
    assert payload_bytes(True, 0, Command.WRITE, 7) == 0
    assert payload_bytes(True, payload, Command.TRIM, 7) == 7


@pytest.mark.parametrize("style", ReplyStyle)
@given(
    cookie=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**63),
    length=st.integers(1, 1 << 25),
    error=st.sampled_from(list(ReplyError)),
    extents=st.lists(st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 3)), min_size=1, max_size=5),
    done=st.booleans(),
)
def test_replies_parse_back_to_what_was_told(
    style: ReplyStyle, cookie: int, offset: int, length: int, error: int, extents: list[tuple[int, int]], done: bool
) -> None:
    replies = replies_of(style)
    success = replies.success(cookie, offset)
    assert replies.unpack_success(success) == (cookie, offset if style is ReplyStyle.EXTENDED else 0)
    failure = replies.error(cookie, offset, int(error))
    data = replies.data(cookie, offset, offset + 5, length, done)
    if style is ReplyStyle.SIMPLE:
        assert nbd.SimpleReply.parse(failure).error == error
        assert nbd.SimpleReply.parse(data).error == 0
        return
    header = nbd.StructuredReply if style is ReplyStyle.STRUCTURED else nbd.ExtendedReply
    size_bytes = header.sizeof()
    told = header.parse(failure)
    assert (told.type, told.flags, told.cookie, told.length) == (Chunk.ERROR, 1, cookie, len(failure) - size_bytes)
    assert nbd.Error.parse(failure[size_bytes:]).error == error
    told = header.parse(data)
    assert (told.type, told.flags, told.length) == (Chunk.OFFSET_DATA, int(done), length + 8)
    assert nbd.OffsetData.parse(data[size_bytes:]).offset == offset + 5
    hole = replies.hole(cookie, offset, offset + 5, length, done)
    assert header.parse(hole).length == 12
    assert nbd.OffsetHole.parse(hole[size_bytes:]).hole_bytes == length
    status = replies.block_status(cookie, offset, [(7, extents), (9, extents[:1])])
    frame = nbd.BlockStatus if style is ReplyStyle.STRUCTURED else nbd.BlockStatusExt
    for context_id, expected, flags in ((7, extents, 0), (9, extents[:1], 1)):
        told = header.parse(status)
        assert (told.flags, told.cookie) == (flags, cookie)
        parsed = frame.parse(status[size_bytes : size_bytes + told.length])
        assert parsed.context_id == context_id
        assert [(extent.length, extent.flags) for extent in parsed.extents] == expected
        status = status[size_bytes + told.length :]
    assert not status


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (100, 9, [(40, 1), (60, 0)]),
        (40, 9, [(40, 1)]),
        (41, 9, [(40, 1), (1, 0)]),
        (39, 9, [(39, 1)]),
        (100, 1, [(40, 1)]),
        (300, 9, [(40, 1), (200, 0)]),
    ],
)
def test_extents_are_shortened_to_what_was_asked_for(length: int, limit: int, expected: list[tuple[int, int]]) -> None:
    assert shortened([(40, 1), (200, 0)], length, limit) == expected


@pytest.mark.parametrize("style", [ReplyStyle.STRUCTURED, ReplyStyle.EXTENDED])
def test_a_bitmap_whose_snapshot_is_gone_is_an_invalid_request_that_says_so(style: ReplyStyle) -> None:
    header = nbd.StructuredReply if style is ReplyStyle.STRUCTURED else nbd.ExtendedReply
    told = nbd.Error.parse(replies_of(style).error(1, 2, errno.ESTALE)[header.sizeof() :])
    assert told.error == errno.EINVAL
    assert b"snapshot" in told.message


@given(st.integers(1, 200))
def test_a_reply_carries_only_the_errnos_of_the_protocol(error: int) -> None:
    assert reply_error(error) in set(ReplyError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EFBIG, errno.ENOSPC),
        (errno.EROFS, errno.EPERM),
        (errno.ENXIO, errno.EIO),
        (errno.ESTALE, errno.EINVAL),
    ],
)
def test_other_errnos_are_translated(error: int, expected: int) -> None:
    assert reply_error(error) == expected
