"""The real Network over loopback and unix sockets."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from metadata.seams import Buffer, Connection, Receiver
from nbdserver.host.completions import Completions
from nbdserver.host.connection import SocketConnection
from nbdserver.host.listening import listening_sockets, socket_cookie
from nbdserver.host.network import SocketNetwork


class Echo:
    """A receiver that sends back what it gets, and notes what happens to it."""

    def __init__(self, connection: Connection, buffer_bytes: int = 65536) -> None:
        self.connection = connection
        self.received_bytes = 0
        self.drains = 0
        self.lost_reason = ""
        self.raises = False
        self.echoes = True
        self._buffer = bytearray(buffer_bytes)

    def buffer(self) -> memoryview:
        return memoryview(self._buffer)

    def received(self, size_bytes: int) -> None:
        self.received_bytes += size_bytes
        if self.raises:
            raise RuntimeError("a fault of the receiver")
        if self.echoes:
            self.connection.send([bytes(self._buffer[:size_bytes])])

    def drained(self) -> None:
        self.drains += 1

    def lost(self, reason: str) -> None:
        assert not self.lost_reason
        self.lost_reason = reason


class Loop:
    """A network on a loop in a thread; `echoes` are the receivers of the accepted connections."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.threads = Completions(self.loop)
        self.network = SocketNetwork(self.loop, self.threads)
        self.echoes: list[Echo] = []
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def accept(self, connection: Connection) -> Receiver | None:
        echo = Echo(connection)
        self.echoes.append(echo)
        return echo

    def call(self, action: Callable[[], object]) -> object:
        """Run it on the loop; what it raises is raised here."""

        async def run() -> object:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def listen(self, address: str, accept: Callable[[Connection], Receiver | None] | None = None) -> object:
        return self.call(lambda: self.network.listen(address, accept or self.accept))

    def wait(self, holds: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + 10
        while not self.call(holds):
            assert time.monotonic() < deadline_s, "it did not come to pass in 10 s"
            time.sleep(0.002)

    def end(self) -> None:
        def close() -> None:
            for echo in self.echoes:
                echo.connection.abort()
            self.network.close()

        self.call(close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.end()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


def dial(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(path)
    return client


def take(client: socket.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        piece = client.recv(1 << 20)
        assert piece, "closed too early"
        data += piece
    return data


def test_bytes_go_there_and_back_over_tcp_and_ipv6(loop: Loop, free_port: Callable[[], int]) -> None:
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")):
        port = free_port()
        try:
            loop.listen(f"{shown}:{port}")
        except OSError as error:
            assert shown == "[::1]"
            pytest.skip(f"this machine has no IPv6 loopback: {error}")
        with socket.create_connection((host, port), 10) as client:
            client.sendall(b"hello")
            assert take(client, 5) == b"hello"
            assert loop.echoes[-1].connection.peer_name == f"{shown}:{client.getsockname()[1]}"
        loop.wait(lambda: loop.echoes[-1].lost_reason)


def test_a_peer_on_a_unix_socket_is_named_by_its_process(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        assert take(client, 1) == b"x"
        assert loop.echoes[0].connection.peer_name == f"unix:pid={os.getpid()},uid={os.getuid()}"


def test_an_abandoned_socket_file_is_replaced_and_one_in_use_is_not(loop: Loop, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    stop = loop.listen(f"unix:{path}")
    with pytest.raises(OSError, match="in use"):
        loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        assert take(client, 1) == b"x"
    assert callable(stop)
    loop.call(stop)
    assert not os.path.exists(path)


def test_a_file_that_is_no_socket_is_left_alone(loop: Loop, path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(OSError, match="in use"):
        loop.listen(f"unix:{path}")
    assert Path(path).read_text() == "precious"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("unix:/" + "x" * 107, "choose a shorter one"),
        ("127.0.0.1", "give HOST:PORT"),
        ("127.0.0.1:port", "give HOST:PORT"),
        ("127.0.0.1:65536", "give HOST:PORT"),
        ("::1:10809", "give HOST:PORT"),
    ],
)
def test_an_address_that_cannot_be_is_refused_with_what_would_be_right(loop: Loop, address: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        loop.listen(address)


def test_a_taken_port_is_an_error_that_leaves_nothing_behind(loop: Loop, free_port: Callable[[], int]) -> None:
    port = free_port()
    stop = loop.listen(f"127.0.0.1:{port}")
    with pytest.raises(OSError, match="in use"):
        loop.listen(f"127.0.0.1:{port}")
    assert callable(stop)
    loop.call(stop)
    loop.listen(f"127.0.0.1:{port}")


def test_what_a_slow_peer_does_not_take_waits_in_order_and_drained_is_told_once(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        echo = loop.echoes[0]
        pieces = [index.to_bytes(4, "big") * 1000 for index in range(3000)]  # more than one sendmsg takes
        loop.call(lambda: echo.connection.send(pieces))
        loop.call(lambda: echo.connection.send([b"end"]))
        assert loop.call(lambda: echo.connection.unsent_bytes)
        expected = b"".join(pieces) + b"end"
        assert take(client, len(expected)) == expected
        loop.wait(lambda: echo.drains == 1 and echo.connection.unsent_bytes == 0)


def test_a_reply_that_is_too_long_for_one_turn_leaves_in_several(
    loop: Loop, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdserver.host.connection.AT_ONCE_BYTES", 3 << 20)
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        connection = cast(SocketConnection, loop.echoes[0].connection)
        given: list[int] = []

        def send_message(buffers: Sequence[Buffer]) -> int:
            given.append(sum(map(len, buffers)))
            return connection._socket.sendmsg(buffers)

        connection._send_message = send_message
        pieces = [bytes([index]) * (1 << 20) for index in range(16)]
        loop.call(lambda: connection.send(pieces))
        assert take(client, 16 << 20) == b"".join(pieces)
        assert max(given) <= 1 << 20
        assert len(given) >= 16
        given.clear()
        loop.call(lambda: connection.send(pieces[:3]))
        assert given[0] == 3 << 20  # at once
        assert take(client, 3 << 20) == b"".join(pieces[:3])


def test_memory_that_its_sender_uses_again_is_sent_as_it_was(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        memory = bytearray(b"a" * (8 << 20))

        def send_and_use_again() -> None:
            loop.echoes[0].connection.send([memoryview(memory)])
            memory[:] = b"b" * len(memory)

        loop.call(send_and_use_again)
        assert take(client, len(memory)) == b"a" * len(memory)


def test_what_is_sent_while_something_waits_goes_behind_it(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        connection = loop.echoes[0].connection

        def send_around_a_reader() -> int:
            connection.send([bytes(8 << 20)])
            taken_bytes = len(take(client, 100_000))  # now there is room in the socket, and the loop has not seen it
            connection.send([b"end"])
            return taken_bytes

        taken_bytes = loop.call(send_around_a_reader)
        assert isinstance(taken_bytes, int)
        rest = take(client, (8 << 20) + 3 - taken_bytes)
        assert rest == bytes(len(rest) - 3) + b"end"


def test_a_spin_ends_when_another_thread_has_something_for_the_loop(
    loop: Loop, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        for name in ("network.SPIN_S", "network.WAKE_S", "spinning.SPIN_S", "spinning.INTERRUPTED_S"):
            monkeypatch.setattr(f"nbdserver.host.{name}", 3.0)
        started_s = time.monotonic()
        for _ in range(10):
            client.sendall(b"x")
            take(client, 1)
            time.sleep(0.001)
            loop.call(lambda: None)
        assert time.monotonic() - started_s < 15.0  # spinning to the end would be 30 s


class AlwaysSpinning:
    """A policy that always wants to spin, and counts how often it was done."""

    wanted = True

    def __init__(self) -> None:
        self.spins = 0

    def woken(self, now_s: float) -> None:
        pass

    def batch_ended(self, now_s: float) -> None:
        pass

    def spun(self, now_s: float, found: bool) -> None:
        self.spins += 1


@pytest.mark.parametrize(("threads_work", "spins"), [(False, True), (True, True), (False, False)])
def test_it_spins_after_a_reply_that_had_to_wait_but_not_for_everybody_nor_beside_threads_that_have_work(
    loop: Loop, path: str, threads_work: bool, spins: bool
) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        spinning = AlwaysSpinning()
        loop.call(lambda: setattr(loop.network, "_spinning", spinning))
        loop.threads.under_way = int(threads_work)
        loop.call(lambda: setattr(loop.echoes[0].connection, "spins", spins))
        may_spin = spins and not threads_work
        for _ in range(10):
            loop.loop.call_soon_threadsafe(lambda: loop.echoes[0].connection.send([b"later"]))
            take(client, 5)
        deadline_s = time.monotonic() + (10.0 if may_spin else 0.2)
        while not spinning.spins and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert bool(spinning.spins) == may_spin


def test_a_paused_connection_is_not_read_until_it_is_resumed(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        echo = loop.echoes[0]
        loop.call(echo.connection.pause_reading)
        client.sendall(b"later")
        time.sleep(0.05)
        assert echo.received_bytes == 1
        loop.call(echo.connection.resume_reading)
        assert take(client, 5) == b"later"


def test_who_is_paused_in_the_round_in_which_its_data_was_found_is_not_lost(loop: Loop, path: str) -> None:
    """Replies wait for it, so its socket is still looked at."""

    class Pausing(Echo):
        def received(self, size_bytes: int) -> None:
            for each in loop.echoes:
                if each is not self:
                    each.connection.pause_reading()
            super().received(size_bytes)

    def accept(connection: Connection) -> Receiver:
        echo = Pausing(connection)
        loop.echoes.append(echo)
        return echo

    loop.listen(f"unix:{path}", accept)
    with dial(path) as first, dial(path) as second:
        loop.wait(lambda: len(loop.echoes) == 2)

        def both_ask() -> None:
            for echo, client in zip(loop.echoes, (first, second), strict=True):
                echo.connection.send([bytes(6 << 20)])
                assert echo.connection.unsent_bytes
                client.sendall(b"x")

        loop.call(both_ask)
        loop.wait(lambda: sum(echo.received_bytes for echo in loop.echoes))
        time.sleep(0.05)
        assert [echo.lost_reason for echo in loop.echoes] == ["", ""]
        assert sum(echo.received_bytes for echo in loop.echoes) == 1


def test_close_lets_what_was_sent_arrive_and_abort_does_not_wait(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as client:
        client.sendall(b"x")
        take(client, 1)
        connection = loop.echoes[0].connection

        def send_and_close() -> None:
            connection.send([bytes(8 << 20)])
            connection.close()

        loop.call(send_and_close)
        assert take(client, 8 << 20) == bytes(8 << 20)
        assert client.recv(1) == b""
        assert not loop.echoes[0].lost_reason


def test_a_receiver_that_raises_loses_its_own_connection_only(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as one, dial(path) as other:
        for client in (one, other):
            client.sendall(b"x")
            take(client, 1)
        loop.echoes[0].raises = True
        one.sendall(b"boom")
        assert one.recv(1) == b""
        loop.wait(lambda: loop.echoes[0].lost_reason == "an internal error of the server")
        other.sendall(b"still here")
        assert take(other, 10) == b"still here"


def test_a_peer_that_vanishes_while_it_is_sent_to_is_lost_once(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    client = dial(path)
    client.sendall(b"x")
    take(client, 1)
    echo = loop.echoes[0]
    loop.call(lambda: echo.connection.send([bytes(8 << 20)]))
    client.close()
    loop.wait(lambda: echo.lost_reason)


def test_a_refused_connection_is_closed(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}", lambda connection: None)
    with dial(path) as client:
        assert client.recv(1) == b""


def test_a_busy_peer_starves_neither_another_one_nor_the_loop(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as busy, dial(path) as other:
        for client in (busy, other):
            client.sendall(b"x")
            take(client, 1)
        loop.echoes[0].echoes = False
        over = threading.Event()

        def flood() -> None:
            while not over.is_set():
                busy.sendall(bytes(1 << 16))

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            started_s = time.monotonic()
            served = 0
            while served < 50 or loop.echoes[0].received_bytes <= 1 << 20:  # the flood may be slow to begin
                other.sendall(b"y")
                assert take(other, 1) == b"y"
                loop.call(lambda: None)
                served += 1
                assert time.monotonic() - started_s < 30
        finally:
            over.set()
            flooding.join()


def test_a_callback_of_the_loop_runs_between_two_rounds(loop: Loop, path: str) -> None:
    """A receiver that asks for a callback at every arrival has it called before the next one."""
    order: list[str] = []

    class Asking(Echo):
        def received(self, size_bytes: int) -> None:
            order.append("received")
            loop.loop.call_soon(order.append, "called back")
            super().received(size_bytes)

    def accept(connection: Connection) -> Receiver:
        echo = Asking(connection)
        loop.echoes.append(echo)
        return echo

    loop.listen(f"unix:{path}", accept)
    with dial(path) as client:
        for _ in range(200):
            client.sendall(b"x")
            take(client, 1)
    loop.wait(lambda: len(order) == 400)
    assert order == ["received", "called back"] * 200


def test_a_round_ends_when_everybody_whose_data_has_arrived_was_served(loop: Loop, path: str) -> None:
    order: list[str] = []

    class Joining(Echo):
        def received(self, size_bytes: int) -> None:
            order.append("received")
            self.connection.at_round_end(lambda: order.append("round ended"))

    def accept(connection: Connection) -> Receiver:
        echo = Joining(connection)
        loop.echoes.append(echo)
        return echo

    loop.listen(f"unix:{path}", accept)
    with dial(path) as first, dial(path) as second:
        loop.wait(lambda: len(loop.echoes) == 2)
        loop.call(lambda: [client.sendall(b"x") for client in (first, second)])
        loop.wait(lambda: len(order) == 4)
        assert order == ["received"] * 2 + ["round ended"] * 2
        order.clear()
        first.sendall(b"x")
        loop.wait(lambda: len(order) == 2)
        assert order == ["received", "round ended"]


def test_a_connection_is_detached_with_what_is_queued_and_goes_on_where_it_is_adopted(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    client = dial(path)
    client.sendall(b"a")
    assert take(client, 1) == b"a"
    connection = loop.echoes[0].connection
    data = bytes(8 << 20)
    loop.call(connection.pause_reading)
    loop.call(lambda: connection.send([data]))
    client.sendall(b"in the kernel")
    detached = loop.call(connection.detach)
    assert isinstance(detached, tuple)
    descriptor, cookie, unsent = detached
    assert loop.call(connection.detach) is None
    assert take(client, len(data) - len(unsent)) == bytes(len(data) - len(unsent))
    assert unsent

    def adopt() -> int:
        adopted = loop.network.adopt(descriptor)
        adopted.start(loop.accept(adopted))
        return socket_cookie(adopted._socket)

    assert loop.call(adopt) == cookie
    assert take(client, len(b"in the kernel")) == b"in the kernel"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_listening_socket_of_another_process_is_used_and_outlives_its_use_here(
    loop: Loop, path: str, free_port: Callable[[], int], kind: str
) -> None:
    port = free_port()
    address = f"unix:{path}" if kind == "unix" else f"localhost:{port}"
    (theirs, *_) = listening_sockets(address)
    loop.call(lambda: loop.network.inherit(address, os.dup(theirs.fileno())))
    stop = loop.listen(address)
    client = dial(path) if kind == "unix" else socket.create_connection(("127.0.0.1", port), 10)
    client.sendall(b"hello")
    assert take(client, 5) == b"hello"
    loop.call(stop)
    waiting = dial(path) if kind == "unix" else socket.create_connection(("127.0.0.1", port), 10)
    waiting.sendall(b"hello")
    loop.call(lambda: loop.network.inherit(address, os.dup(theirs.fileno())))
    loop.listen(address)
    assert take(waiting, 5) == b"hello"
    theirs.close()


def test_a_socket_whose_peer_has_gone_is_not_adopted(loop: Loop) -> None:
    never_connected = socket.socket()
    with pytest.raises(OSError):
        loop.call(lambda: loop.network.adopt(never_connected.detach()))


def test_when_one_connection_alone_is_served_is_known(loop: Loop, path: str) -> None:
    loop.listen(f"unix:{path}")
    with dial(path) as one, dial(path) as other:

        def serve(client: socket.socket) -> float:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            return float(loop.threads.alone_since_s)

        serve(one)
        serve(other)
        since_s = serve(one)
        assert [serve(one) for _ in range(5)] == [since_s] * 5
        assert serve(other) > since_s
