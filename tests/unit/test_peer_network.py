"""What nodes use of the real Network: outgoing connections and datagrams, over loopback and unix sockets."""

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata.seams import DATAGRAM_LIMIT_BYTES, Connection, Datagrams, Receiver
from nbdserver.host.addresses import address_name, numeric_address
from nbdserver.host.datagrams import DATAGRAMS_A_ROUND
from protocol.invariant import InvariantError
from tests.unit.test_network import Echo, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.end()


class Attempt:
    """What came of a connect."""

    def __init__(self, loop: Loop, address: str, timeout_s: float = 5.0) -> None:
        self.echo: Echo | None = None
        self.reason = ""
        self.answers = 0
        self.takes = True
        self.give_up = loop.call(lambda: loop.network.connect(address, self._connected, self._failed, timeout_s))

    def _connected(self, connection: Connection) -> Receiver | None:
        self.answers += 1
        self.echo = Echo(connection)
        self.echo.echoes = False
        return self.echo if self.takes else None

    def _failed(self, reason: str) -> None:
        self.answers += 1
        self.reason = reason


class Box:
    """Datagrams that arrived."""

    def __init__(self, loop: Loop, address: str = "127.0.0.1:0") -> None:
        self.arrived: list[tuple[str, bytes]] = []
        opened = loop.call(lambda: loop.network.open_datagrams(address, self._received))
        self.datagrams: Datagrams = opened  # type: ignore[assignment]  # `call` gives any object
        self.raises = False

    def _received(self, peer: str, payload: bytes) -> None:
        self.arrived.append((peer, payload))
        if self.raises:
            raise RuntimeError("a fault of the receiver")


def test_a_connection_that_was_asked_for_carries_bytes_both_ways(
    loop: Loop, free_port: Callable[[], int], tmp_path: Path
) -> None:
    addresses = [f"127.0.0.1:{free_port()}", f"[::1]:{free_port()}", f"unix:{tmp_path}/socket"]
    for address in addresses:
        loop.listen(address)
        attempt = Attempt(loop, address)
        loop.wait(lambda attempt=attempt: attempt.echo)
        ours = attempt.echo
        assert ours is not None
        if not address.startswith("unix:"):
            assert ours.connection.peer_name == address
        loop.call(lambda ours=ours: ours.connection.send([b"hel", b"lo"]))
        loop.wait(lambda ours=ours: ours.received_bytes == 5)
        loop.call(ours.connection.close)
        loop.wait(lambda: loop.echoes[-1].lost_reason)
        assert attempt.answers == 1


def test_a_connection_nobody_listens_for_fails_with_its_reason_once(
    loop: Loop, free_port: Callable[[], int], tmp_path: Path
) -> None:
    for address, reason in (
        (f"127.0.0.1:{free_port()}", "Connection refused"),
        (f"unix:{tmp_path}/absent", "No such file or directory"),
    ):
        attempt = Attempt(loop, address)
        assert callable(attempt.give_up)
        loop.wait(lambda attempt=attempt: attempt.reason)
        assert attempt.reason == reason
        loop.call(attempt.give_up)
        assert attempt.answers == 1


def test_a_peer_that_does_not_answer_in_time_is_given_up(loop: Loop) -> None:
    # A backlog that is full drops what comes: the only peer of loopback that answers nothing.
    with socket.socket() as deaf, socket.socket() as first:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = address_name(deaf.getsockname())
        first.connect(deaf.getsockname())
        attempts = [Attempt(loop, address, timeout_s=0.2) for _ in range(2)]
        loop.wait(lambda: attempts[-1].answers)
        assert attempts[-1].reason == "no answer in 0.2 s"


def test_what_was_given_up_is_not_answered_any_more(loop: Loop, free_port: Callable[[], int]) -> None:
    port = free_port()
    loop.listen(f"127.0.0.1:{port}")
    attempt = Attempt.__new__(Attempt)
    attempt.answers = 0

    def connect_and_give_up() -> None:
        for address in (f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}", "unix:/absent"):
            give_up = loop.network.connect(address, attempt._connected, attempt._failed)
            give_up()
            give_up()

    loop.call(connect_and_give_up)
    later = Attempt(loop, f"127.0.0.1:{port}")
    loop.wait(lambda: later.echo)
    assert not attempt.answers


def test_a_connection_that_is_not_taken_is_closed(loop: Loop, free_port: Callable[[], int]) -> None:
    port = free_port()
    loop.listen(f"127.0.0.1:{port}")
    attempt = Attempt.__new__(Attempt)
    attempt.answers, attempt.takes = 0, False
    loop.call(lambda: loop.network.connect(f"127.0.0.1:{port}", attempt._connected, attempt._failed))
    loop.wait(lambda: loop.echoes and loop.echoes[-1].lost_reason)
    assert attempt.answers == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_datagrams_arrive_with_an_address_that_answers_reach(loop: Loop, host: str) -> None:
    one, other = Box(loop, f"{host}:0"), Box(loop, f"{host}:0")
    for size_bytes in (0, 1, 1400, 60_000):
        loop.call(lambda size_bytes=size_bytes: one.datagrams.send(other.datagrams.address, b"x" * size_bytes))
    loop.wait(lambda: len(other.arrived) == 4)
    assert [len(payload) for _, payload in other.arrived] == [0, 1, 1400, 60_000]
    peer = other.arrived[0][0]
    assert peer == one.datagrams.address
    loop.call(lambda: other.datagrams.send(peer, b"answer"))
    loop.wait(lambda: one.arrived == [(other.datagrams.address, b"answer")])
    for box in (one, other):
        loop.call(box.datagrams.close)
        loop.call(box.datagrams.close)
        loop.call(lambda box=box: box.datagrams.send(peer, b"nobody sends this"))


def test_a_burst_longer_than_a_round_arrives_whole(loop: Loop) -> None:
    one, other = Box(loop), Box(loop)

    def burst() -> None:
        for number in range(3 * DATAGRAMS_A_ROUND):
            one.datagrams.send(other.datagrams.address, number.to_bytes(2, "big"))

    loop.call(burst)
    loop.wait(lambda: len(other.arrived) == 3 * DATAGRAMS_A_ROUND)
    assert [int.from_bytes(payload, "big") for _, payload in other.arrived] == list(range(3 * DATAGRAMS_A_ROUND))
    for box in (one, other):
        loop.call(box.datagrams.close)


def test_a_receiver_that_raises_loses_the_datagram_only(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    one, other = Box(loop), Box(loop)
    other.raises = True
    with caplog.at_level(logging.ERROR):
        loop.call(lambda: one.datagrams.send(other.datagrams.address, b"1"))
        loop.wait(lambda: len(other.arrived) == 1)
    assert "could not be handled" in caplog.text
    other.raises = False
    loop.call(lambda: one.datagrams.send(other.datagrams.address, b"2"))
    loop.wait(lambda: len(other.arrived) == 2)


def test_what_cannot_be_sent_is_lost_and_said_once(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    one = Box(loop)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            loop.call(lambda: one.datagrams.send("255.255.255.255:9", b"broadcast is not allowed"))
    assert caplog.text.count("cannot send datagrams") == 1
    with pytest.raises(InvariantError):
        loop.call(lambda: one.datagrams.send(one.datagrams.address, bytes(DATAGRAM_LIMIT_BYTES + 1)))
    with pytest.raises(ValueError, match="IPv4"):
        loop.call(lambda: one.datagrams.send("[::1]:9", b"x"))


def test_a_taken_datagram_address_is_an_error(loop: Loop) -> None:
    one = Box(loop)
    with pytest.raises(OSError, match="in use"):
        Box(loop, one.datagrams.address)
    loop.call(one.datagrams.close)
    Box(loop, one.datagrams.address)


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1", "node-1:5", "::1:5", "[127.0.0.1]:5", "127.0.0.1:65536", "[::1]:x"]
)
def test_an_address_that_is_not_numeric_is_refused_with_what_would_be_right(loop: Loop, address: str) -> None:
    for call in (
        lambda: loop.network.open_datagrams(address, lambda peer, payload: None),
        lambda: loop.network.connect(address, lambda connection: None, lambda reason: None),
    ):
        with pytest.raises(ValueError, match="give HOST:PORT"):
            loop.call(call)


def test_a_path_that_is_too_long_is_refused(loop: Loop) -> None:
    with pytest.raises(ValueError, match="too long"):
        loop.call(lambda: loop.network.connect("unix:/" + "x" * 107, lambda connection: None, lambda reason: None))


def test_an_address_and_its_text_are_one() -> None:
    for text in ("192.0.2.1:80", "[2001:db8::1]:65535", "[fe80::1%1]:7"):
        _, address = numeric_address(text, socket.SOCK_STREAM)
        assert address_name(address) == text


def test_a_peer_that_closes_while_it_is_not_read_is_noticed_by_who_asks(
    loop: Loop, free_port: Callable[[], int], tmp_path: Path
) -> None:
    for address in (f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/socket"):
        loop.listen(address)
        attempt = Attempt(loop, address)
        loop.wait(lambda attempt=attempt: attempt.echo)
        ours, theirs = attempt.echo, loop.echoes[-1]
        assert ours is not None
        loop.call(theirs.connection.pause_reading)
        assert not loop.call(theirs.connection.has_hung_up)
        loop.call(lambda ours=ours: ours.connection.send([b"what is not read"]))
        loop.call(ours.connection.close)
        loop.wait(theirs.connection.has_hung_up)
        assert not theirs.lost_reason
        loop.call(theirs.connection.resume_reading)
        loop.wait(lambda theirs=theirs: theirs.lost_reason)
        assert theirs.received_bytes == len(b"what is not read")
