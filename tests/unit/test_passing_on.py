"""A client whose export is in another process: the handshake goes on there as if it had been there from the start."""

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.frontend.forwarding import BUFFER_BYTES, UNSENT_LIMIT_BYTES, Forwarding
from nbdserver.frontend.session import Session
from nbdserver.volume.admission import TlsMode
from nbdserver.volume.export import Elsewhere, Export, Exports
from protocol import nbd
from protocol.agreement import ReplyStyle
from protocol.contexts import Context
from protocol.handover import (
    HandoverError,
    HandshakingClient,
    decode,
    decode_handshaking,
    encode_handshaking,
)
from protocol.handshake import OPTION_LIMIT, GoElsewhere, HandshakeState
from protocol.nbd import Option
from tests.unit.memory_device import MemoryDevice
from tests.unit.session_rig import HELLO, HandClock, ListConnection, feed, named, option

PEER = "192.0.2.1:1000"
SIZE_BYTES = 1 << 20


class Two:
    """Two processes: `here` has the export "near", `there` has "far"; both know of both."""

    def __init__(self, allowed: tuple[str, ...] = ()) -> None:
        self.clock = HandClock()
        self.processes = [Exports(), Exports()]
        for worker, name in enumerate(("near", "far")):
            device = MemoryDevice(SIZE_BYTES << worker, self.clock.call_soon, False)
            self.processes[worker].add(Export(name, device, description=f"the {name} one", allowed=allowed))
            listing = Elsewhere(worker, name, f"the {name} one", allowed, TlsMode.INHERIT)
            self.processes[1 - worker].note_elsewhere(listing)
        self.moves: list[int] = []
        self.gone: list[str] = []

    def attach(self, worker: int = 0) -> "Client":
        return Client(self, worker)


class Client:
    """A connection that goes wherever its session goes."""

    def __init__(self, two: Two, worker: int) -> None:
        self._two = two
        self.connection = ListConnection(PEER)
        self._on_its_way: tuple[bytes, int] | None = None
        self.session = self._session(worker)

    def _session(self, worker: int, arrived: HandshakingClient | None = None) -> Session:
        return Session(
            1, self.connection, self._two.clock, self._two.processes[worker], lambda _, why: self._two.gone.append(why),
            arrived=arrived, leaves=self._leaves,
        )  # fmt: skip

    def _leaves(self, _session: object, connection: object, client: HandshakingClient, going: GoElsewhere) -> None:
        assert connection is self.connection
        assert not self.connection.unsent_bytes
        assert going.worker is not None
        self._two.moves.append(going.worker)
        self._on_its_way = encode_handshaking(client), going.worker

    def settle(self) -> None:
        """Let it arrive, wherever it has been sent."""
        while self._on_its_way is not None:
            (message, worker), self._on_its_way = self._on_its_way, None
            self.connection.reading = True
            self.session = self._session(worker, decode_handshaking(message))
            self.session.go_on()

    def feed(self, data: bytes, piece_bytes: int) -> bytes:
        """What is sent back."""
        for start in range(0, len(data), piece_bytes):
            feed(self.session, data[start : start + piece_bytes])
            self.settle()
        return bytes(self.connection.sent)


def contexts(name: str) -> bytes:
    body = {"name": name.encode(), "queries": [b"base:allocation"]}
    return option(Option.SET_META_CONTEXT, nbd.MetaContextRequest.build(body))


CONVERSATION = (
    HELLO
    + option(Option.LIST)
    + option(Option.STRUCTURED_REPLY)
    + named(Option.INFO, "near")
    + named(Option.INFO, "far")
    + contexts("near")
    + option(77)
    + contexts("far")
    + named(Option.GO, "far")
    + nbd.Request.build({"flags": 0, "command": nbd.Command.READ, "cookie": 5, "offset": 0, "length": 8})
)


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("worker", [0, 1])
def test_wherever_a_client_connects_it_is_told_the_same(piece_bytes: int, worker: int) -> None:
    alone = Exports()
    clock = HandClock()
    for name, size_bytes in (("near", SIZE_BYTES), ("far", 2 * SIZE_BYTES)):
        device = MemoryDevice(size_bytes, clock.call_soon, False)
        alone.add(Export(name, device, description=f"the {name} one"))
    one = Two()
    one.processes[0] = alone
    expected = one.attach().feed(CONVERSATION, piece_bytes)
    assert not one.moves

    two = Two()
    client = two.attach(worker)
    assert client.feed(CONVERSATION, piece_bytes) == expected
    assert two.moves == ([1, 0, 1] if worker == 0 else [0, 1, 0, 1])
    assert client.session.export is not None
    assert client.session.export.name == "far"
    assert not two.gone


def test_a_client_that_does_not_take_its_replies_is_taken_along_once_it_has() -> None:
    two = Two()
    client = two.attach()
    client.connection.taking = False
    client.feed(HELLO + option(Option.LIST) + named(Option.GO, "far"), 1 << 20)
    assert not two.moves
    assert not client.connection.reading
    client.connection.take()
    client.session.drained()
    client.settle()
    assert two.moves == [1]
    assert client.session.export is not None


def test_who_may_not_use_an_export_is_refused_where_it_connects() -> None:
    two = Two(allowed=("198.51.100.0/24",))
    sent = two.attach().feed(HELLO + named(Option.GO, "far"), 1 << 20)
    assert b"there is no export 'far'" in sent
    assert not two.moves


def test_the_only_volume_is_the_default_wherever_it_is() -> None:
    two = Two()
    two.processes[0].remove("near")
    two.processes[1].forget_elsewhere(0, "near")
    client = two.attach()
    client.feed(HELLO + option(Option.EXPORT_NAME, b""), 1 << 20)
    assert two.moves == [1]
    assert client.session.export is not None


def test_a_process_that_does_not_have_an_export_any_more_takes_nothing_from_the_one_that_has_it() -> None:
    exports = Exports()
    exports.note_elsewhere(Elsewhere(1, "moved", "", (), TlsMode.INHERIT))
    exports.forget_elsewhere(2, "moved")
    assert isinstance(exports.find("moved"), Elsewhere)
    exports.forget_elsewhere(1, "moved")
    assert exports.find("moved") is None


def test_processes_that_send_a_client_to_each_other_stop_at_some_time() -> None:
    two = Two()
    two.processes[1].remove("far")
    two.processes[1].note_elsewhere(Elsewhere(0, "far", "", (), TlsMode.INHERIT))
    client = two.attach()
    client.feed(HELLO + named(Option.GO, "far"), 1 << 20)
    assert len(two.moves) == OPTION_LIMIT
    assert two.gone == [f"more than {OPTION_LIMIT} options on one connection"]


STATES = st.builds(
    HandshakeState,
    no_zeroes=st.booleans(),
    options=st.integers(0, 1024),
    style=st.sampled_from(ReplyStyle),
    contexts=st.lists(st.builds(Context, st.integers(0, 9), st.text(), st.integers(0, 99)), max_size=3).map(tuple),
    contexts_export=st.text(max_size=50),
    received=st.binary(max_size=200),
)
CLIENTS = st.builds(
    HandshakingClient,
    id=st.integers(1, 1 << 40),
    since_s=st.floats(0, 1e9),
    peer_name=st.text(max_size=50),
    tls=st.text(max_size=20),
    certificate=st.text(max_size=20),
    handshake=STATES,
)


@given(CLIENTS)
def test_a_client_arrives_as_it_left(client: HandshakingClient) -> None:
    assert decode_handshaking(encode_handshaking(client)) == client


@given(CLIENTS, st.data())
def test_a_message_that_is_cut_off_or_changed_is_refused(client: HandshakingClient, data: st.DataObject) -> None:
    message = encode_handshaking(client)
    place = data.draw(st.integers(0, len(message) - 1))
    changed = bytearray(message)
    changed[place] ^= data.draw(st.integers(1, 255))
    for bad in (message[:place], bytes(changed)):
        if bad[12:16] != message[12:16] and len(bad) == len(message):
            continue  # where the head ends is not part of the sum
        with pytest.raises(HandoverError):
            decode_handshaking(bad)
    with pytest.raises(HandoverError, match="no state of clients"):
        decode(message)


# --- forwarding ---


class Ends:
    """A client's connection and the local one, with a Forwarding between them."""

    def __init__(self) -> None:
        self.client, self.server = ListConnection(PEER), ListConnection("unix:")
        self.over: list[Forwarding] = []
        self.forwarding = Forwarding(self.client, self.server, self.over.append)


def test_bytes_go_both_ways() -> None:
    ends = Ends()
    client_end, server_end = ends.forwarding.client_end, ends.forwarding.server_end
    feed(client_end, b"request")
    feed(server_end, b"reply")
    assert bytes(ends.server.sent) == b"request"
    assert bytes(ends.client.sent) == b"reply"


@pytest.mark.parametrize("slow", ["client", "server"])
def test_who_does_not_take_what_it_is_sent_stops_the_other_until_it_has(slow: str) -> None:
    ends = Ends()
    taker, giver = (ends.client, ends.server) if slow == "client" else (ends.server, ends.client)
    giving_end, taking_end = ends.forwarding.server_end, ends.forwarding.client_end
    if slow == "server":
        giving_end, taking_end = taking_end, giving_end
    taker.taking = False
    sent = b""
    for number in range(2 * UNSENT_LIMIT_BYTES // BUFFER_BYTES):
        if not giver.reading:
            break
        data = bytes([number % 251]) * BUFFER_BYTES
        feed(giving_end, data)
        sent += data
    assert UNSENT_LIMIT_BYTES < len(sent) <= UNSENT_LIMIT_BYTES + BUFFER_BYTES
    assert taker.reading, "the other direction is not its fault"
    taker.take()
    taking_end.drained()
    assert giver.reading
    assert bytes(taker.sent) == sent


@pytest.mark.parametrize("end", ["client_end", "server_end"])
def test_one_end_that_is_gone_closes_the_other_and_is_told_once(end: str) -> None:
    ends = Ends()
    getattr(ends.forwarding, end).lost("gone")
    other = ends.server if end == "client_end" else ends.client
    assert other.closed
    assert not other.aborted, "what was sent to it is still delivered"
    ends.forwarding.close()
    assert ends.over == [ends.forwarding]


def test_a_forwarding_that_is_over_leaves_nothing_to_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        ends = Ends()
        forwarding = weakref.ref(ends.forwarding)
        ends.forwarding.client_end.lost("gone")
        del ends
        assert forwarding() is None
    finally:
        gc.enable()
