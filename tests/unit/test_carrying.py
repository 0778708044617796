"""A client that is carried from one server to the next: what it hears is what one server would have said."""

import pytest

from nbdserver.frontend.carrying import Carried
from nbdserver.frontend.receive_buffer import NORMAL_BYTES
from nbdserver.frontend.unanswered import Entered
from protocol import nbd
from protocol.agreement import Agreement, Offer, ReplyStyle
from protocol.handshake import HandshakeState
from protocol.nbd import Command, Info, Option, OptionReply
from tests.unit.session_rig import HandClock, ListConnection, feed, named

FLAGS = int(nbd.TransmissionFlag.HAS_FLAGS | nbd.TransmissionFlag.SEND_FLUSH)
BLOCK = bytes(range(256)) * 2


def said(kind: OptionReply, body: bytes = b"") -> bytes:
    return nbd.OPTION_REPLY_HEADER.pack(nbd.OPTION_REPLY_MAGIC, Option.GO, kind, len(body)) + body


def told(size_bytes: int = 1 << 20) -> bytes:
    body = nbd.InfoExport.build({"type": int(Info.EXPORT), "size_bytes": size_bytes, "flags": FLAGS})
    return said(OptionReply.INFO, body) + said(OptionReply.ACK)


def read(cookie: int) -> bytes:
    return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, Command.READ, cookie, 512 * cookie, 512)


def reply(cookie: int) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie) + BLOCK


class Rig:
    """A client in its handshake, and servers one after the other."""

    def __init__(self, said: bytes = named(Option.GO, "disk") + read(1)) -> None:
        self.clock = HandClock()
        self.client = ListConnection("192.0.2.1:1000")
        self.events: list[str] = []
        state = HandshakeState(True, 0, ReplyStyle.SIMPLE, (), "", said)
        self.carried = Carried(self.clock, self.client, state, self)
        self.state = self.carried.state()

    def begin(self, brought: bytes = b"") -> ListConnection:
        server = ListConnection("192.0.2.2:10810")
        self.carried.begin(server, brought)
        return server

    def hear(self, server: ListConnection, data: bytes) -> None:
        assert server.receiver is not None
        feed(server.receiver, data)

    def entered(self) -> None:
        self.events.append("entered")

    def server_lost(self, reason: str) -> None:
        self.events.append(f"lost: {reason}")

    def ended(self, reason: str) -> None:
        self.events.append(f"ended: {reason}")


def test_a_request_that_came_with_the_handshake_waits_for_its_end() -> None:
    rig = Rig()
    assert rig.state.received == named(Option.GO, "disk")
    server = rig.begin()
    assert not server.sent
    rig.hear(server, told())
    assert bytes(server.sent) == read(1)
    assert bytes(rig.client.sent) == told()
    assert rig.events == ["entered"]


@pytest.mark.parametrize("part_bytes", [1, 15, 16, 17, 527])
def test_a_reply_of_which_one_server_has_said_a_part_is_said_whole_by_the_next(part_bytes: int) -> None:
    rig = Rig()
    server = rig.begin()
    rig.hear(server, told())
    feed(rig.carried, read(2))
    rig.client.sent.clear()
    rig.hear(server, reply(1) + reply(2)[:part_bytes])
    assert bytes(rig.client.sent) == reply(1)
    rig.carried.leave()
    assert server.aborted
    feed(rig.carried, read(3))
    again = rig.begin()
    assert not again.sent
    rig.hear(again, told(2 << 20)[:-1])
    assert not again.sent, "requests are sent before the handshake has ended"
    rig.hear(again, told(2 << 20)[-1:])
    assert bytes(again.sent) == read(2) + read(3)
    rig.hear(again, reply(3) + reply(2))
    assert bytes(rig.client.sent) == reply(1) + reply(3) + reply(2), "the second handshake is none of its business"
    rig.hear(server, reply(2))
    assert bytes(rig.client.sent) == reply(1) + reply(3) + reply(2), "what is left is heard no more"


@pytest.mark.parametrize("piece_bytes", [1, 7, 100])
def test_a_client_that_had_its_session_here_is_told_nothing_and_asks_again(piece_bytes: int) -> None:
    client, events, clock = ListConnection("192.0.2.1:1000"), Rig(), HandClock()
    agreement = Agreement(Offer("disk", 1 << 20, False), ReplyStyle.SIMPLE, (), FLAGS)
    entered = Entered(agreement, 7, read(1) + read(2)[:10], 0)
    carried = Carried(clock, client, HandshakeState.before(agreement), events, entered)
    clock.run()
    server = ListConnection("192.0.2.2:10810")
    assert carried.state().received == named(Option.GO, "disk")
    carried.begin(server, b"")
    rest = read(2)[10:] + read(3)
    for at in range(0, len(rest), piece_bytes):
        feed(carried, rest[at : at + piece_bytes])
    assert not server.sent
    assert server.receiver is not None
    feed(server.receiver, told() + reply(1))
    assert bytes(server.sent) == read(1) + read(2) + read(3)
    assert bytes(client.sent) == reply(1)
    assert events.events == ["entered"]


@pytest.mark.parametrize("piece_bytes", [1, 7, 100])
def test_the_rest_of_a_payload_that_was_refused_before_is_skipped(piece_bytes: int) -> None:
    client, events, clock = ListConnection("192.0.2.1:1000"), Rig(), HandClock()
    agreement = Agreement(Offer("disk", 1 << 20, False), ReplyStyle.SIMPLE, (), FLAGS)
    carried = Carried(clock, client, HandshakeState.before(agreement), events, Entered(agreement, 7, read(1), 40))
    rest = b"x" * 40 + read(2)
    for at in range(0, len(rest), piece_bytes):
        feed(carried, rest[at : at + piece_bytes])
    server = ListConnection("192.0.2.2:10810")
    carried.begin(server, told())
    clock.run()
    assert bytes(server.sent) == read(1) + read(2)


def test_there_is_room_for_more_at_once_however_much_was_brought() -> None:
    """Room for nothing is taken for the end of the connection."""
    client, events = ListConnection("192.0.2.1:1000"), Rig()
    agreement = Agreement(Offer("disk", 1 << 20, False), ReplyStyle.SIMPLE, (), FLAGS)
    received = read(1) * (2 * NORMAL_BYTES // 28)
    carried = Carried(HandClock(), client, HandshakeState.before(agreement), events, Entered(agreement, 7, received, 0))
    assert len(carried.buffer()) >= NORMAL_BYTES


def test_a_server_that_tells_something_else_gets_no_request() -> None:
    rig = Rig()
    rig.hear(rig.begin(), told())
    rig.carried.leave()
    again = rig.begin()
    rig.hear(again, told(1 << 19))
    assert not again.sent
    assert rig.events == ["entered", "ended: what it was told of the volume does not hold any more"]
    assert rig.client.closed


@pytest.mark.parametrize(
    ("refusal", "event"),
    [(OptionReply.ERR_UNKNOWN, "lost: not here"), (OptionReply.ERR_POLICY, "ended: not here")],
)
def test_a_server_that_refuses_it_is_left_or_ends_it(refusal: OptionReply, event: str) -> None:
    rig = Rig()
    rig.hear(rig.begin(), told())
    rig.carried.leave()
    rig.hear(rig.begin(), said(refusal, b"not here"))
    assert rig.events == ["entered", event]


def test_a_client_that_was_refused_first_is_not_asked_for_that_again() -> None:
    rig = Rig(named(Option.GO, "other"))
    server = rig.begin()
    rig.hear(server, said(OptionReply.ERR_UNKNOWN, b"not here"))
    feed(rig.carried, named(Option.GO, "disk") + read(1))
    rig.hear(server, told())
    rig.carried.leave()
    assert rig.carried.state().received == named(Option.GO, "disk")
    again = rig.begin()
    rig.hear(again, told())
    assert bytes(again.sent) == read(1)
    assert rig.events == ["entered", "entered"]


def test_what_the_next_server_says_with_its_first_word_is_heard() -> None:
    rig = Rig()
    rig.hear(rig.begin(), told())
    rig.carried.leave()
    again = rig.begin(told())
    rig.clock.run()
    assert bytes(again.sent) == read(1)


def test_nonsense_from_a_server_loses_it_and_nonsense_from_a_client_ends_it() -> None:
    rig = Rig()
    server = rig.begin()
    rig.hear(server, told())
    rig.hear(server, b"nonsense" * 4)
    assert "lost: what it says cannot be followed" in rig.events[-1]
    feed(rig.carried, b"nonsense" * 4)
    assert "ended: a request starts with" in rig.events[-1]
