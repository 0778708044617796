"""The handshake: every conversation is fed whole, byte by byte, and with what comes behind it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import nbd
from protocol.agreement import Offer, OptionRefusedError, ReplyStyle
from protocol.contexts import LISTED_LIMIT, Context
from protocol.handshake import (
    OPTION_LIMIT,
    OPTION_LIMIT_BYTES,
    TRANSITIONS,
    Close,
    Enter,
    Event,
    Handshake,
    Move,
    Reply,
    StartTls,
    State,
    state_diagram,
)
from protocol.nbd import Info, Option, OptionReply, TransmissionFlag

SIZE_BYTES = 1 << 40
BITMAPS = {"monday": 3, "tuesday": 5}  # of "a"
MONDAY, TUESDAY = (f"qemu:dirty-bitmap:{name}" for name in BITMAPS)


class Shop:
    """Offers: "a" is free, "ro" is read-only, "taken" cannot be entered; "" is "a"."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def list(self) -> Iterator[tuple[str, str]]:
        return iter([("a", "the first"), ("ro", "")])

    def offer(self, name: str) -> Offer:
        if name not in ("", "a", "ro", "taken"):
            raise OptionRefusedError(OptionReply.ERR_UNKNOWN, "no such export")
        return Offer(name or "a", SIZE_BYTES, name == "ro", "the first" if name in ("", "a") else "")

    def bitmaps(self, name: str) -> dict[str, int]:
        return BITMAPS if name == "a" else {}

    def enter(self, name: str) -> Offer:
        if name == "taken":
            raise OptionRefusedError(OptionReply.ERR_POLICY, "in use by 192.0.2.1")
        self.entered.append(name)
        return self.offer(name)


def option(kind: int, data: bytes = b"") -> bytes:
    header: bytes = nbd.OptionHeader.build({"option": kind, "length": len(data)})
    return header + data


def info(kind: int, name: str = "a", wanted: tuple[int, ...] = ()) -> bytes:
    return option(kind, nbd.InfoRequest.build({"name": name.encode(), "wanted": wanted}))


def contexts(kind: int, *queries: str, name: str = "a") -> bytes:
    body = {"name": name.encode(), "queries": [query.encode() for query in queries]}
    return option(kind, nbd.MetaContextRequest.build(body))


@dataclass
class Outcome:
    """What a conversation led to."""

    replies: list[tuple[int, int, bytes]] = field(default_factory=list)  # option, type, payload
    last: Event | None = None
    events: list[Event] = field(default_factory=list)
    handshake: Handshake = field(default_factory=lambda: Handshake(Shop()))

    def types(self) -> list[int]:
        return [kind for _, kind, _ in self.replies]


def converse(
    data: bytes, piece_bytes: int = 0, flags: int = 3, tls_offered: bool = False, tls_required: bool = False
) -> Outcome:
    handshake = Handshake(Shop(), tls_offered, tls_required)
    assert nbd.Greeting.parse(handshake.greeting()).flags == 3
    outcome = Outcome(handshake=handshake)
    data = nbd.ClientFlags.build({"flags": flags}) + data
    step = piece_bytes or len(data)
    for start in range(0, len(data), step):
        if handshake.state in (State.TRANSMISSION, State.CLOSED):
            break
        handshake.receive(data[start : start + step])
        while (event := handshake.next_event()) is not None:
            outcome.events.append(event)
            outcome.last = event
    sent = b"".join(event.data for event in outcome.events)
    is_export_name = isinstance(outcome.last, Enter) and len(outcome.last.data) in (10, 134)
    if is_export_name:
        sent = sent[: -len(outcome.last.data)]  # type: ignore[union-attr]
    while sent:
        header = nbd.OptionReplyHeader.parse(sent)
        start = nbd.OptionReplyHeader.sizeof()
        outcome.replies.append((header.option, header.type, sent[start : start + header.length]))
        sent = sent[start + header.length :]
    return outcome


ACK, INFO, CONTEXT = OptionReply.ACK, OptionReply.INFO, OptionReply.META_CONTEXT
STRUCTURED = option(Option.STRUCTURED_REPLY)
CONVERSATIONS: dict[str, tuple[bytes, list[int]]] = {
    "go": (info(Option.GO), [INFO, INFO, ACK]),
    "go by the empty name tells the name": (info(Option.GO, ""), [INFO, INFO, INFO, ACK]),
    "name and description are told when asked for": (
        info(Option.INFO, "a", (Info.NAME, Info.DESCRIPTION, 77)), [INFO, INFO, INFO, INFO, ACK]),
    "go to an unknown export": (info(Option.GO, "b"), [OptionReply.ERR_UNKNOWN]),
    "go to an export in use": (info(Option.GO, "taken"), [OptionReply.ERR_POLICY]),
    "list": (option(Option.LIST), [OptionReply.SERVER, OptionReply.SERVER, ACK]),
    "list with data": (option(Option.LIST, b"x"), [OptionReply.ERR_INVALID]),
    "an unknown option": (option(99, b"data"), [OptionReply.ERR_UNSUP]),
    "peek export": (option(Option.PEEK_EXPORT), [OptionReply.ERR_UNSUP]),
    "starttls without tls": (option(Option.STARTTLS), [OptionReply.ERR_POLICY]),
    "abort": (option(Option.ABORT, b"bye"), [ACK]),
    "too long an option is skipped": (
        option(Option.INFO, bytes(OPTION_LIMIT_BYTES + 1)) + info(Option.INFO),
        [OptionReply.ERR_TOO_BIG, INFO, INFO, ACK]),
    "too long a name": (info(Option.INFO, "n" * 4097), [OptionReply.ERR_TOO_BIG]),
    "a name that is not UTF-8": (option(Option.INFO, b"\0\0\0\1\xff\0\0"), [OptionReply.ERR_INVALID]),
    "a name with a zero byte": (info(Option.INFO, "a\0"), [OptionReply.ERR_INVALID]),
    "a name longer than the option": (option(Option.INFO, b"\0\0\0\7a\0\0"), [OptionReply.ERR_INVALID]),
    "bytes behind the information requests": (
        option(Option.INFO, b"\0\0\0\1a\0\0x"), [OptionReply.ERR_INVALID]),
    "structured replies": (STRUCTURED, [ACK]),
    "structured replies after extended headers": (
        option(Option.EXTENDED_HEADERS) + STRUCTURED, [ACK, OptionReply.ERR_EXT_HEADER_REQD]),
    "contexts before structured replies": (
        contexts(Option.SET_META_CONTEXT, "base:allocation"), [OptionReply.ERR_INVALID]),
    "all contexts": (STRUCTURED + contexts(Option.LIST_META_CONTEXT), [ACK, CONTEXT, CONTEXT, CONTEXT, ACK]),
    "all contexts of an export without bitmaps": (
        STRUCTURED + contexts(Option.LIST_META_CONTEXT, name="ro"), [ACK, CONTEXT, ACK]),
    "contexts by wildcard": (
        STRUCTURED + contexts(Option.LIST_META_CONTEXT, "base:"), [ACK, CONTEXT, ACK]),
    "no context of another namespace": (STRUCTURED + contexts(Option.LIST_META_CONTEXT, "x-a:"), [ACK, ACK]),
    "bitmaps by wildcard": (
        STRUCTURED + contexts(Option.LIST_META_CONTEXT, "qemu:", "qemu:dirty-bitmap:"), [ACK, CONTEXT, CONTEXT, ACK]),
    "a bitmap by its name, which is known or not": (
        STRUCTURED + contexts(Option.LIST_META_CONTEXT, TUESDAY, TUESDAY, "qemu:dirty-bitmap:sunday", "qemu:x"),
        [ACK, CONTEXT, ACK]),
    "contexts are selected together, each once": (
        STRUCTURED + contexts(
            Option.SET_META_CONTEXT, TUESDAY, "base:allocation", MONDAY, TUESDAY, "qemu:dirty-bitmap:no"),
        [ACK, CONTEXT, CONTEXT, CONTEXT, ACK]),
    "no wildcard selects bitmaps": (
        STRUCTURED + contexts(Option.SET_META_CONTEXT, "qemu:", "qemu:dirty-bitmap:", "qemu:dirty-bitmap"), [ACK, ACK]),
    "a wildcard selects nothing": (STRUCTURED + contexts(Option.SET_META_CONTEXT, "base:"), [ACK, ACK]),
    "a context is selected": (
        STRUCTURED + contexts(Option.SET_META_CONTEXT, "x-a:b", "base:allocation"),
        [ACK, CONTEXT, ACK]),
    "too many queries": (
        STRUCTURED + contexts(Option.SET_META_CONTEXT, *["x-a:b"] * 65), [ACK, OptionReply.ERR_TOO_BIG]),
    "contexts of an unknown export": (
        STRUCTURED + contexts(Option.SET_META_CONTEXT, name="b"), [ACK, OptionReply.ERR_UNKNOWN]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("piece_bytes", [0, 1, 7])
def test_a_conversation_gets_its_replies_however_it_is_cut(name: str, piece_bytes: int) -> None:
    data, expected = CONVERSATIONS[name]
    outcome = converse(data, piece_bytes if len(data) < 10_000 else piece_bytes * 1000)
    assert outcome.types() == expected
    assert outcome.handshake.state in (State.OPTION, State.TRANSMISSION, State.CLOSED)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_bytes_behind_a_conversation_are_answered_in_step_or_left_over(name: str) -> None:
    data, expected = CONVERSATIONS[name]
    outcome = converse(data + option(98))
    if isinstance(outcome.last, Enter):
        assert outcome.handshake.leftover() == option(98)
    elif isinstance(outcome.last, Close):
        assert outcome.types() == expected
    else:
        assert outcome.types() == [*expected, OptionReply.ERR_UNSUP]


@pytest.mark.parametrize("piece_bytes", [0, 1])
@pytest.mark.parametrize(("flags", "size_bytes"), [(1, 134), (3, 10), (0, 134)])
def test_export_name_is_answered_with_zeroes_unless_agreed_otherwise(
    flags: int, size_bytes: int, piece_bytes: int
) -> None:
    outcome = converse(option(Option.EXPORT_NAME, b"a"), piece_bytes, flags)
    assert isinstance(outcome.last, Enter)
    assert len(outcome.last.data) == size_bytes
    assert nbd.ExportNameReply.parse(outcome.last.data).size_bytes == SIZE_BYTES


VIOLATIONS = {
    "an unknown client flag": (4, b""),
    "an option without its magic": (3, b"X" * 16),
    "export name of no export": (3, option(Option.EXPORT_NAME, b"b")),
    "export name of an export in use": (3, option(Option.EXPORT_NAME, b"taken")),
    "export name after extended headers": (3, option(Option.EXTENDED_HEADERS) + option(Option.EXPORT_NAME, b"a")),
    "export name over the bound": (3, option(Option.EXPORT_NAME, bytes(OPTION_LIMIT_BYTES + 1))),
    "too many options": (3, option(Option.STRUCTURED_REPLY) * (OPTION_LIMIT + 1)),
}


@pytest.mark.parametrize("name", VIOLATIONS)
@pytest.mark.parametrize("piece_bytes", [0, 13])
def test_a_violation_closes_the_connection(name: str, piece_bytes: int) -> None:
    flags, data = VIOLATIONS[name]
    outcome = converse(data, piece_bytes, flags)
    assert isinstance(outcome.last, Close)
    assert outcome.handshake.state is State.CLOSED


def context_replies(outcome: Outcome) -> list[tuple[int, str]]:
    parsed = [nbd.MetaContextReply.parse(payload) for _, kind, payload in outcome.replies if kind == CONTEXT]
    return [(reply.context_id, reply.name.decode()) for reply in parsed]


def test_contexts_are_listed_without_and_selected_with_numbers_of_their_own() -> None:
    outcome = converse(STRUCTURED + contexts(Option.LIST_META_CONTEXT))
    assert context_replies(outcome) == [(0, "base:allocation"), (0, MONDAY), (0, TUESDAY)]
    chosen = contexts(Option.SET_META_CONTEXT, TUESDAY, "base:allocation", MONDAY)
    outcome = converse(STRUCTURED + chosen + info(Option.GO))
    assert context_replies(outcome) == [(1, TUESDAY), (2, "base:allocation"), (3, MONDAY)]
    assert isinstance(outcome.last, Enter)
    agreed = outcome.last.agreement.contexts
    assert agreed == (Context(1, TUESDAY, 5), Context(2, "base:allocation"), Context(3, MONDAY, 3))
    assert [context.is_bitmap for context in agreed] == [True, False, True]


def test_more_bitmaps_than_an_answer_holds_are_told_by_the_wildcard_and_still_selected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bitmaps = {f"snapshot{number}": number for number in range(LISTED_LIMIT + 1)}
    monkeypatch.setattr(Shop, "bitmaps", lambda _, name: bitmaps)
    for query in ("qemu:", "qemu:dirty-bitmap:"):
        outcome = converse(STRUCTURED + contexts(Option.LIST_META_CONTEXT, query))
        assert context_replies(outcome) == [(0, "qemu:dirty-bitmap:")]
    last = f"qemu:dirty-bitmap:snapshot{LISTED_LIMIT}"
    assert context_replies(converse(STRUCTURED + contexts(Option.LIST_META_CONTEXT, last))) == [(0, last)]
    assert context_replies(converse(STRUCTURED + contexts(Option.SET_META_CONTEXT, last))) == [(1, last)]
    del bitmaps["snapshot7"]
    outcome = converse(STRUCTURED + contexts(Option.LIST_META_CONTEXT, "qemu:"))
    assert len(context_replies(outcome)) == LISTED_LIMIT


def test_the_agreement_tells_what_was_negotiated() -> None:
    data = STRUCTURED + contexts(Option.SET_META_CONTEXT, "base:allocation") + info(Option.GO)
    outcome = converse(data)
    assert isinstance(outcome.last, Enter)
    agreement = outcome.last.agreement
    assert agreement.style is ReplyStyle.STRUCTURED
    assert agreement.context_ids == (1,)
    assert agreement.flags & TransmissionFlag.SEND_DF
    assert not agreement.flags & (TransmissionFlag.READ_ONLY | TransmissionFlag.BLOCK_STATUS_PAYLOAD)


@pytest.mark.parametrize(
    "middle",
    [
        contexts(Option.SET_META_CONTEXT),
        contexts(Option.SET_META_CONTEXT, "base:allocation", name="ro"),
        contexts(Option.SET_META_CONTEXT, "base:allocation", name="no such export"),
        option(Option.SET_META_CONTEXT, b"malformed"),
        option(Option.SET_META_CONTEXT, bytes(OPTION_LIMIT_BYTES + 1)),
    ],
)
def test_contexts_count_only_if_selected_last_and_for_the_export_that_is_entered(middle: bytes) -> None:
    data = STRUCTURED + contexts(Option.SET_META_CONTEXT, "base:allocation") + middle + info(Option.GO)
    outcome = converse(data)
    assert isinstance(outcome.last, Enter)
    assert outcome.last.agreement.context_ids == ()


def test_a_read_only_export_offers_no_changes() -> None:
    outcome = converse(info(Option.GO, "ro"))
    assert isinstance(outcome.last, Enter)
    flags = outcome.last.agreement.flags
    assert flags & TransmissionFlag.READ_ONLY
    assert not flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)
    assert not flags & TransmissionFlag.SEND_DF


def test_extended_headers_with_a_context_offer_the_payload_of_block_status() -> None:
    data = option(Option.EXTENDED_HEADERS) + contexts(Option.SET_META_CONTEXT, "base:allocation") + info(Option.GO)
    outcome = converse(data)
    assert isinstance(outcome.last, Enter)
    assert outcome.last.agreement.style is ReplyStyle.EXTENDED
    assert outcome.last.agreement.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD


def test_tls_forgets_what_was_negotiated_before_it() -> None:
    outcome = converse(STRUCTURED + option(Option.STARTTLS), tls_offered=True)
    assert isinstance(outcome.last, StartTls)
    handshake = outcome.handshake
    handshake.tls_established()
    handshake.receive(option(Option.STARTTLS) + info(Option.GO))
    refused, entered = handshake.next_event(), handshake.next_event()
    assert isinstance(refused, Reply)
    assert nbd.OptionReplyHeader.parse(refused.data).type == OptionReply.ERR_INVALID
    assert isinstance(entered, Enter)
    assert entered.agreement.style is ReplyStyle.SIMPLE


def test_clear_text_behind_starttls_is_an_attack() -> None:
    outcome = converse(option(Option.STARTTLS) + info(Option.GO), tls_offered=True)
    assert isinstance(outcome.last, Close)
    assert not outcome.types()


TLS_REQUIRED = OptionReply.ERR_TLS_REQD
BEFORE_TLS: dict[str, tuple[bytes, list[int]]] = {
    "go": (info(Option.GO), [TLS_REQUIRED]),
    "info on no export": (info(Option.INFO, "b"), [TLS_REQUIRED]),
    "list": (option(Option.LIST), [TLS_REQUIRED]),
    "structured replies": (STRUCTURED, [TLS_REQUIRED]),
    "extended headers": (option(Option.EXTENDED_HEADERS), [TLS_REQUIRED]),
    "contexts": (contexts(Option.SET_META_CONTEXT, "base:allocation"), [TLS_REQUIRED]),
    "an unknown option": (option(99, b"data"), [TLS_REQUIRED]),
    "too long an option": (option(Option.INFO, bytes(OPTION_LIMIT_BYTES + 1)) + STRUCTURED, [TLS_REQUIRED] * 2),
    "malformed": (option(Option.INFO, b"malformed"), [TLS_REQUIRED]),
    "starttls with data": (option(Option.STARTTLS, b"x") + STRUCTURED, [OptionReply.ERR_INVALID, TLS_REQUIRED]),
    "abort": (option(Option.ABORT), [ACK]),
    "export name": (option(Option.EXPORT_NAME, b"a"), []),
    "starttls": (option(Option.STARTTLS), [ACK]),
}


@pytest.mark.parametrize("name", BEFORE_TLS)
@pytest.mark.parametrize("piece_bytes", [0, 1, 7])
def test_where_tls_is_required_nothing_but_starttls_and_abort_is_done_before_it(name: str, piece_bytes: int) -> None:
    data, expected = BEFORE_TLS[name]
    piece_bytes = piece_bytes if len(data) < 10_000 else piece_bytes * 1000
    outcome = converse(data, piece_bytes, tls_offered=True, tls_required=True)
    assert outcome.types() == expected
    assert isinstance(outcome.last, Close) == (name in ("abort", "export name"))
    assert isinstance(outcome.last, StartTls) == (name == "starttls")


def test_after_tls_everything_is_as_usual_where_tls_is_required() -> None:
    outcome = converse(option(Option.STARTTLS), tls_offered=True, tls_required=True)
    handshake = outcome.handshake
    handshake.tls_established()
    for data, expected in CONVERSATIONS.values():
        handshake.receive(data)
        events = []
        while (event := handshake.next_event()) is not None:
            events.append(event)
        assert events or not expected
        assert b"used over TLS only" not in b"".join(event.data for event in events)
        if handshake.state in (State.TRANSMISSION, State.CLOSED):
            handshake = converse(option(Option.STARTTLS), tls_offered=True, tls_required=True).handshake
            handshake.tls_established()


def test_where_tls_is_required_and_there_is_none_nobody_enters() -> None:
    outcome = converse(option(Option.STARTTLS) + info(Option.GO), tls_required=True)
    assert outcome.types() == [OptionReply.ERR_POLICY, TLS_REQUIRED]


def test_clear_text_that_was_cut_off_by_starttls_is_not_taken_either() -> None:
    """Only what arrived whole counts: one byte behind STARTTLS is enough to close."""
    outcome = converse(option(Option.STARTTLS), tls_offered=True)
    assert isinstance(outcome.last, StartTls)
    outcome = converse(option(Option.STARTTLS) + b"I", tls_offered=True)
    assert isinstance(outcome.last, Close)
    assert outcome.handshake.state is State.CLOSED


def test_every_state_is_reachable_and_every_move_is_used() -> None:
    reached, todo = set(), [State.CLIENT_FLAGS]
    while todo:
        state = todo.pop()
        reached.add(state)
        todo += [target for target in TRANSITIONS[state].values() if target not in reached]
    assert reached == set(State)
    assert {move for moves in TRANSITIONS.values() for move in moves} == set(Move)


def test_the_diagram_in_the_documents_is_the_table() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "wire-formats.md"
    assert state_diagram() in page.read_text()


@pytest.mark.fuzz
@given(
    parts=st.lists(st.sampled_from([data for data, _ in CONVERSATIONS.values() if len(data) < 1000]), max_size=5),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    piece_bytes=st.integers(1, 4000),
    noise=st.binary(max_size=64),
)
def test_mutated_bytes_never_raise_and_always_leave_a_state_of_the_table(
    parts: list[bytes], changes: list[tuple[int, int]], piece_bytes: int, noise: bytes
) -> None:
    data = bytearray(b"\0\0\0\3" + b"".join(parts) + noise)
    for position, value in changes:
        data[position % len(data)] = value
    handshake = Handshake(Shop())
    for start in range(0, len(data), piece_bytes):
        if handshake.state in (State.TRANSMISSION, State.CLOSED):
            break
        handshake.receive(bytes(data[start : start + piece_bytes]))
        while handshake.next_event() is not None:
            pass
    assert handshake.state in TRANSITIONS
