"""A handshake that is overheard: where it ends, and what the client was told, whatever it asks and however it comes."""

from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import nbd
from protocol.agreement import Agreement, Offer, OptionRefusedError, ReplyStyle
from protocol.contexts import Context
from protocol.handshake import Close, Enter, Handshake, HandshakeState
from protocol.nbd import Option, OptionReply
from protocol.overheard import OPTIONS_LIMIT_BYTES, Overheard, OverheardError, Told
from tests.unit.session_rig import named, option

SIZE_BYTES = 1 << 20
REQUESTS = b"whatever comes behind the handshake"


class Shop:
    """Offers "disk", and refuses all else."""

    def list(self) -> Iterable[tuple[str, str]]:
        return [("disk", "the only one")]

    def offer(self, name: str) -> Offer:
        if name == "in use":
            raise OptionRefusedError(OptionReply.ERR_POLICY, "in use is in use")
        if name != "disk":
            raise OptionRefusedError(OptionReply.ERR_UNKNOWN, f"there is no {name}")
        return Offer("disk", SIZE_BYTES, False, "the only one")

    def bitmaps(self, name: str) -> Mapping[str, int]:
        return {"monday": 5}

    def enter(self, name: str) -> Offer:
        return self.offer(name)


def contexts(name: str, *queries: str, kind: Option = Option.SET_META_CONTEXT) -> bytes:
    body = {"name": name.encode(), "queries": [query.encode() for query in queries]}
    return option(kind, nbd.MetaContextRequest.build(body))


REFUSED = named(Option.GO, "other")
OPTIONS = st.sampled_from(
    [
        option(Option.LIST),
        option(Option.STRUCTURED_REPLY),
        option(Option.EXTENDED_HEADERS),
        option(77, b"unknown"),
        named(Option.INFO, "disk"),
        named(Option.INFO, "other"),
        REFUSED,
        contexts("disk", "base:allocation", "qemu:dirty-bitmap:monday"),
        contexts("disk", "qemu:dirty-bitmap:monday"),
        contexts("other", "base:allocation"),
        contexts("disk", kind=Option.LIST_META_CONTEXT),
        option(Option.INFO, bytes(70_000)),  # too long
    ]
)
ENDS = st.sampled_from([named(Option.GO, "disk"), option(Option.EXPORT_NAME, b"disk")])
STATES = st.builds(
    HandshakeState,
    no_zeroes=st.booleans(),
    options=st.just(3),
    style=st.sampled_from(ReplyStyle),
    contexts=st.sampled_from([(), (Context(1, "base:allocation"),)]),
    contexts_export=st.just("disk"),
    received=st.just(b""),
)


class Conversation:
    """A real handshake at one end, and one that overhears it in between."""

    def __init__(self, state: HandshakeState, piece_bytes: int) -> None:
        self.handshake = Handshake.resume(Shop(), state, False, False)
        self.overheard = Overheard(state)
        self.agreement: Agreement | None = None
        self.behind = b""
        self._piece_bytes = piece_bytes
        self._over = False

    def say(self, data: bytes) -> bytes:
        """The client says all of this; what is not passed on is returned."""
        held = memoryview(b"")
        for start in range(0, len(data), self._piece_bytes):
            held = memoryview(bytes(held) + data[start : start + self._piece_bytes])
            while taken := self.overheard.ask(held):
                self._answer(bytes(held[:taken]))
                held = held[taken:]
        return bytes(held)

    def _answer(self, data: bytes) -> None:
        self.handshake.receive(memoryview(data))
        while not self._over and (event := self.handshake.next_event()) is not None:
            said = event.data
            if isinstance(event, Enter):
                self.agreement = event.agreement
                said += b"the first reply"
            self._over = isinstance(event, Enter | Close)
            for start in range(0, len(said), self._piece_bytes):
                self.behind += self.overheard.answer(said[start : start + self._piece_bytes])


@given(STATES, st.lists(OPTIONS, max_size=5), ENDS, st.integers(1, 5000))
def test_what_is_overheard_is_what_was_agreed_on(
    state: HandshakeState, options: list[bytes], end: bytes, piece_bytes: int
) -> None:
    conversation = Conversation(state, piece_bytes)
    asked = b"".join(options) + end
    held = conversation.say(asked + REQUESTS)
    agreement, told = conversation.agreement, conversation.overheard.told
    if agreement is None:  # EXPORT_NAME does not go with extended headers
        assert told is None
        return
    assert told is not None
    assert held == REQUESTS
    assert conversation.behind == b"the first reply"
    assert conversation.overheard.options == b"".join(each for each in options if each != REFUSED) + end
    assert (told.style, told.size_bytes, told.flags) == (agreement.style, agreement.offer.size_bytes, agreement.flags)
    if agreement.contexts:
        assert told.contexts == tuple((context.id, context.name) for context in agreement.contexts)


@pytest.mark.parametrize(("name", "for_good"), [("other", False), ("in use", True)])
def test_an_export_that_is_refused_is_heard_of(name: str, for_good: bool) -> None:
    conversation = Conversation(HandshakeState(True, 0, ReplyStyle.SIMPLE, (), "", b""), 7)
    conversation.say(named(Option.GO, name))
    assert conversation.overheard.told is None
    assert name in conversation.overheard.refusal
    assert conversation.overheard.is_refused_for_good is for_good


def test_what_was_told_holds_for_a_volume_that_has_grown_or_is_read_only_now() -> None:
    writable = int(nbd.TransmissionFlag.HAS_FLAGS | nbd.TransmissionFlag.SEND_TRIM | nbd.TransmissionFlag.SEND_FLUSH)
    read_only = int(nbd.TransmissionFlag.HAS_FLAGS | nbd.TransmissionFlag.READ_ONLY | nbd.TransmissionFlag.SEND_FLUSH)
    told = Told(ReplyStyle.SIMPLE, 100, writable, ())
    assert told.holds(told)
    assert told.holds(Told(ReplyStyle.SIMPLE, 200, writable, ()))
    assert told.holds(Told(ReplyStyle.SIMPLE, 100, read_only, ()))
    for other in (
        Told(ReplyStyle.SIMPLE, 99, writable, ()),
        Told(ReplyStyle.STRUCTURED, 100, writable, ()),
        Told(ReplyStyle.SIMPLE, 100, writable | int(nbd.TransmissionFlag.SEND_DF), ()),
        Told(ReplyStyle.SIMPLE, 100, writable, ((1, "base:allocation"),)),
    ):
        assert not told.holds(other)


def test_what_is_no_handshake_is_refused() -> None:
    state = HandshakeState(True, 0, ReplyStyle.SIMPLE, (), "", b"")
    with pytest.raises(OverheardError, match="an option starts with"):
        Overheard(state).ask(memoryview(b"nonsense" * 2))
    with pytest.raises(OverheardError, match="nobody has asked for"):
        Overheard(state).answer(b"x")
    overheard = Overheard(state)
    for _ in range(OPTIONS_LIMIT_BYTES // 60_000):
        overheard.ask(memoryview(option(Option.INFO, bytes(60_000))))
    with pytest.raises(OverheardError, match="longer than"):
        overheard.ask(memoryview(option(Option.INFO, bytes(60_000))))
