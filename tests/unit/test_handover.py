"""The state of clients that one process hands to the next: what was written is read, and nothing else is believed."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.agreement import Agreement, Offer, ReplyStyle
from protocol.checksum import crc32c
from protocol.contexts import Context
from protocol.handover import (
    MAGIC,
    READABLE,
    VERSION,
    ClientState,
    Handover,
    HandoverError,
    Listening,
    Preamble,
    decode,
    encode,
)

NUMBERS = st.integers(0, (1 << 64) - 1)
TEXTS = st.text(max_size=40)
TIMES = st.floats(0, 1e9)
OFFERS = st.builds(Offer, TEXTS, NUMBERS, st.booleans(), TEXTS)
CONTEXTS = st.builds(Context, NUMBERS, TEXTS, NUMBERS)
AGREEMENTS = st.builds(
    Agreement, OFFERS, st.sampled_from(ReplyStyle), st.lists(CONTEXTS, max_size=3).map(tuple), st.integers(0, 65535)
)
CLIENTS = st.builds(ClientState, NUMBERS, NUMBERS, TIMES, AGREEMENTS, NUMBERS, st.binary(), st.binary())
LISTENING = st.builds(Listening, NUMBERS, TEXTS)
HANDOVERS = st.builds(Handover, TEXTS, TIMES, NUMBERS, st.lists(LISTENING, max_size=3), st.lists(CLIENTS, max_size=4))

CLIENT = ClientState(
    7, 1, 2.5, Agreement(Offer("disk", 1 << 20, False, ""), ReplyStyle.SIMPLE, (), 3), 0, b"request", b"reply"
)
HANDOVER = Handover("a", 1.5, 0, [Listening(9, "127.0.0.1:10809")], [CLIENT, CLIENT])


@given(HANDOVERS)
def test_what_was_written_is_read(handover: Handover) -> None:
    assert decode(b"".join(encode(handover))) == handover


def test_the_version_written_can_be_read() -> None:
    assert VERSION in READABLE


def test_a_newer_version_is_refused_with_its_number() -> None:
    data = b"".join(encode(HANDOVER))
    newer = Preamble.build({**Preamble.parse(data), "version": VERSION + 1}) + data[Preamble.sizeof() :]
    with pytest.raises(HandoverError, match=f"version {VERSION + 1}"):
        decode(newer)


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[: Preamble.sizeof()], lambda data: data[:-1], lambda data: data + b"\0"],
)
def test_a_part_of_it_is_refused(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(HandoverError):
        decode(damage(b"".join(encode(HANDOVER))))


@given(st.integers(0, len(b"".join(encode(HANDOVER))) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_wherever_it_is(position: int, change: int) -> None:
    data = bytearray(b"".join(encode(HANDOVER)))
    data[position] ^= change
    with pytest.raises(HandoverError):
        decode(bytes(data))


@pytest.mark.parametrize("head", [b"{}", b"[]", b"nothing", b'{"id":"a","frozen_s":1,"dropped":0,"clients":[{}]}'])
def test_a_head_that_makes_no_sense_is_refused(head: bytes) -> None:
    preamble = Preamble.build({"magic": MAGIC, "version": VERSION, "head_bytes": len(head), "crc": crc32c(head)})
    with pytest.raises(HandoverError, match="makes no sense"):
        decode(preamble + head)
