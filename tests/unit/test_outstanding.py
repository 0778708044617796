"""Requests are kept until they are answered: none twice, none lost, none that overlaps a change before its answer."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.frontend.outstanding import KEPT_LIMIT, KEPT_LIMIT_BYTES, OutOfStepError, Outstanding
from nbdserver.frontend.receive_buffer import ReceiveBuffer
from protocol import nbd
from protocol.agreement import ReplyStyle
from protocol.nbd import Command, CommandFlag
from protocol.transmission import replies_of

CHANGES = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)

Asked = tuple[Command, int, int]  # command, offset, length

ASKED = st.lists(
    st.tuples(
        st.sampled_from([each for each in Command if each != Command.DISC]), st.integers(0, 40), st.integers(0, 9)
    ),
    max_size=12,
)


def request(style: ReplyStyle, cookie: int, command: int, offset: int = 0, length: int = 0) -> bytes:
    flags, payload = 0, b""
    if command == Command.WRITE:
        payload = bytes([cookie % 251]) * length
        flags = CommandFlag.PAYLOAD_LEN if style is ReplyStyle.EXTENDED else 0
    declaration = nbd.ExtendedRequest if style is ReplyStyle.EXTENDED else nbd.Request
    fields = {"flags": flags, "command": command, "cookie": cookie, "offset": offset, "length": length}
    return bytes(declaration.build(fields)) + payload


def reply(style: ReplyStyle, cookie: int, asked: Asked, fails: bool) -> bytes:
    """What our servers answer."""
    command, offset, length = asked
    replies = replies_of(style)
    if fails:
        return replies.error(cookie, offset, 5)
    if command == Command.READ:
        data = bytes([cookie % 251]) * length
        if style is ReplyStyle.SIMPLE or length < 2:
            return replies.data(cookie, offset, offset, length, True) + data
        hole = replies.hole(cookie, offset, offset, 1, False)
        return hole + replies.data(cookie, offset, offset + 1, length - 1, True) + data[1:]
    if command == Command.BLOCK_STATUS and style is not ReplyStyle.SIMPLE:
        return replies.block_status(cookie, offset, [(1, [(length, 0)]), (2, [(length, 3)])])
    return replies.success(cookie, offset)


class Carrier:
    """Feeds an Outstanding in pieces, and has what it lets through."""

    def __init__(self, style: ReplyStyle) -> None:
        self.outstanding = Outstanding(style)
        self.sent = bytearray()
        self.passed = bytearray()
        self._requests, self._replies = ReceiveBuffer(64), ReceiveBuffer(64)

    def ask(self, data: bytes) -> None:
        self._requests.put(data)
        position = self.outstanding.take(self._requests)
        self.sent += self._requests.view[self._requests.start : position]
        self._requests.used(position)

    def answer(self, data: bytes) -> None:
        self._replies.put(data)
        position = self.outstanding.answer(self._replies)
        self.passed += self._replies.view[self._replies.start : position]
        self._replies.used(position)


def pieces(data: bytes, size_bytes: int) -> list[bytes]:
    return [data[start : start + size_bytes] for start in range(0, len(data), size_bytes)]


@given(ASKED, st.sampled_from(ReplyStyle), st.integers(1, 70), st.data())
def test_requests_and_replies_pass_whole_and_what_is_left_is_what_was_not_answered(
    asked: list[Asked], style: ReplyStyle, piece_bytes: int, data: st.DataObject
) -> None:
    carrier = Carrier(style)
    requests = [request(style, number, *each) for number, each in enumerate(asked)]
    for piece in pieces(b"".join(requests), piece_bytes):
        carrier.ask(piece)
    answered: list[int] = []
    expected = bytearray()
    while len(answered) < len(asked):
        waiting = list(carrier.outstanding.again())
        held = sum(map(len, requests)) - len(carrier.sent)
        assert waiting == [
            requests[number] for number in range(len(asked) - _count(requests, held)) if number not in answered
        ]
        changed = sorted(
            (offset, offset + length)
            for number, (command, offset, length) in enumerate(asked)
            if requests[number] in waiting and command in CHANGES and length
        )
        assert all(before[1] <= after[0] for before, after in pairwise(changed)), "they overlap"
        number = data.draw(st.sampled_from([requests.index(each) for each in waiting]))
        said = reply(style, number, asked[number], data.draw(st.booleans()))
        for piece in pieces(said, piece_bytes)[:-1]:
            carrier.answer(piece)
            assert carrier.passed == expected, "half a reply is passed on"
        carrier.answer(pieces(said, piece_bytes)[-1])
        expected += said
        answered.append(number)
        assert carrier.passed == expected
        carrier.ask(b"")
    assert carrier.sent == b"".join(requests)
    assert carrier.outstanding.again() == []
    assert carrier.outstanding.answered == len(asked)


def _count(requests: list[bytes], held_bytes: int) -> int:
    """How many of the last requests have so many bytes together."""
    count = 0
    while held_bytes:
        count += 1
        held_bytes -= len(requests[-count])
    return count


def test_a_cookie_that_is_in_use_waits() -> None:
    carrier = Carrier(ReplyStyle.SIMPLE)
    read = request(ReplyStyle.SIMPLE, 7, Command.READ, 0, 4)
    carrier.ask(read + read)
    assert carrier.sent == read
    assert carrier.outstanding.is_held
    carrier.answer(reply(ReplyStyle.SIMPLE, 7, (Command.READ, 0, 4), fails=False))
    carrier.ask(b"")
    assert carrier.sent == read + read


def test_what_is_kept_is_bounded() -> None:
    carrier = Carrier(ReplyStyle.SIMPLE)
    for cookie in range(KEPT_LIMIT + 5):
        carrier.ask(request(ReplyStyle.SIMPLE, cookie, Command.READ, 0, 512))
    assert len(carrier.outstanding) == KEPT_LIMIT
    carrier = Carrier(ReplyStyle.SIMPLE)
    size_bytes = 1 << 20
    for cookie in range(2 * KEPT_LIMIT_BYTES // size_bytes):
        carrier.ask(request(ReplyStyle.SIMPLE, cookie, Command.WRITE, cookie * size_bytes, size_bytes))
    assert KEPT_LIMIT_BYTES <= sum(map(len, carrier.outstanding.again())) < KEPT_LIMIT_BYTES + 2 * size_bytes


def test_the_end_is_asked_for_again_behind_everything_else() -> None:
    carrier = Carrier(ReplyStyle.SIMPLE)
    read, end = (request(ReplyStyle.SIMPLE, 1, command, 0, 4) for command in (Command.READ, Command.DISC))
    carrier.ask(read + end + b"anything")
    assert carrier.outstanding.is_ending
    assert carrier.sent == read + end == b"".join(carrier.outstanding.again())


@pytest.mark.parametrize("style", ReplyStyle)
def test_what_cannot_be_followed_is_refused(style: ReplyStyle) -> None:
    good = request(style, 1, Command.READ, 0, 4)
    with pytest.raises(OutOfStepError, match="out of step"):
        Carrier(style).ask(b"\0" * 40)
    long = request(style, 1, Command.WRITE, 0, 33 << 20)
    with pytest.raises(OutOfStepError, match="over the limit"):
        Carrier(style).ask(long[:40])
    for bad in (b"\0" * 40, reply(style, 2, (Command.READ, 0, 4), fails=False)):
        carrier = Carrier(style)
        carrier.ask(good)
        with pytest.raises(OutOfStepError):
            carrier.answer(bad)
