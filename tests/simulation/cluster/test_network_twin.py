"""The network twin does what the real network does, and breaks only what a network may break."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from metadata.seams import Connection, Network, Receiver
from nbdserver.host.network import SocketNetwork
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.paths import SILENCE_LIMIT_S, Latency
from tests.simulation.cluster.scheduler import Life, Scheduler
from tests.simulation.cluster.simulated_network import Wires

WaitUntil = Callable[[Callable[[], object]], None]
Host = tuple[Network, str, Callable[[], str], WaitUntil]
LATENCY = Latency(0.0001, 0.0002)


class End:
    """One end of a stream, which keeps what it gets."""

    def __init__(self, connection: Connection, buffer_bytes: int = 1000) -> None:
        self.connection = connection
        self.data = bytearray()
        self.drains = 0
        self.reason = ""
        self._buffer = bytearray(buffer_bytes)

    def buffer(self) -> memoryview:
        assert not self.reason
        return memoryview(self._buffer)

    def received(self, size_bytes: int) -> None:
        assert not self.reason
        self.data += self._buffer[:size_bytes]

    def drained(self) -> None:
        self.drains += 1

    def lost(self, reason: str) -> None:
        assert not self.reason
        self.reason = reason


class Pair:
    """A connection and both of its ends."""

    def __init__(self, server: Network, client: Network, address: str) -> None:
        self.ours: End | None = None
        self.theirs: End | None = None
        self.failure = ""
        self.stop = server.listen(address, self._accept)
        self.give_up = client.connect(address, self._connect, self._fail)

    def _accept(self, connection: Connection) -> Receiver:
        self.theirs = End(connection)
        return self.theirs

    def _connect(self, connection: Connection) -> Receiver:
        self.ours = End(connection)
        return self.ours

    def _fail(self, reason: str) -> None:
        self.failure = reason

    def ends(self) -> tuple[End, End]:
        assert self.ours is not None
        assert self.theirs is not None
        return self.ours, self.theirs


@pytest.fixture
def real() -> Iterator[Host]:
    loop = asyncio.new_event_loop()
    network = SocketNetwork(loop)
    box = network.open_datagrams("127.0.0.1:0", lambda peer, payload: None)

    def address() -> str:
        probe = network.open_datagrams("127.0.0.1:0", lambda peer, payload: None)
        probe.close()
        return probe.address

    def wait_until(holds: Callable[[], object]) -> None:
        async def wait() -> None:
            async with asyncio.timeout(10):
                while not holds():
                    await asyncio.sleep(0.001)

        loop.run_until_complete(wait())

    yield network, "127.0.0.1", address, wait_until
    box.close()
    network.close()
    loop.close()


class Twin:
    """Two machines and what is between them."""

    def __init__(self, seed: int = 1, mix: Mix | None = None) -> None:
        self.scheduler = Scheduler(seed)
        self.hits: Counter[str] = Counter()
        self.wires = Wires(self.scheduler, mix or Mix(), self.hits, LATENCY, LATENCY)
        self.lives = {name: Life(name) for name in ("one", "two")}
        self.powered = {"one": True, "two": True}
        self.wires.watch_power(self.powered.__getitem__)
        self.wires.add("one", "10.0.0.1", "site-1")
        self.wires.add("two", "10.0.0.2", "site-1")
        self._port = 1000

    def network(self, name: str) -> Network:
        return self.wires.network_of(f"10.0.0.{1 if name == 'one' else 2}", self.lives[name])

    def pair(self) -> Pair:
        self._port += 1
        pair = Pair(self.network("two"), self.network("one"), f"10.0.0.2:{self._port}")
        self.run(6.0)
        return pair

    def run(self, duration_s: float) -> None:
        until_s = self.scheduler.now_s + duration_s
        while self.scheduler.step(until_s):
            pass
        self.scheduler.now_s = until_s

    def end(self, name: str, power: bool) -> None:
        self.lives[name].alive = False
        self.wires.ended(self.lives[name], power)
        self.powered[name] = not power


@pytest.fixture
def twin() -> Host:
    machines = Twin()

    def address() -> str:
        return f"10.0.0.1:{machines.wires.ephemeral_port()}"

    def wait_until(holds: Callable[[], object]) -> None:
        until_s = machines.scheduler.now_s + 100.0
        while not holds():
            assert machines.scheduler.step(until_s), "it did not come to pass"

    return machines.network("one"), "10.0.0.1", address, wait_until


def _tell(network: Network, host: str, address: Callable[[], str], wait_until: WaitUntil) -> list[object]:
    said: list[object] = []
    # Streams.
    pair = Pair(network, network, address())
    assert pair.ours is None  # not from inside the call
    wait_until(lambda: pair.ours and pair.theirs)
    ours, theirs = pair.ends()
    said.append(theirs.connection.peer_name.rpartition(":")[0] == host)
    ours.connection.send([b"a" * 700, bytearray(b"b" * 700), memoryview(b"c")])
    wait_until(lambda: len(theirs.data) == 1401)
    said.append(bytes(theirs.data) == b"a" * 700 + b"b" * 700 + b"c")
    big = bytes(range(256)) * (1 << 16)
    theirs.connection.pause_reading()
    ours.connection.send([big])
    said.append(ours.connection.unsent_bytes > 0)
    theirs.connection.resume_reading()
    wait_until(lambda: ours.drains and len(theirs.data) == 1401 + len(big))
    said += [ours.drains, ours.connection.unsent_bytes, bytes(theirs.data[1401:]) == big]
    theirs.connection.send([b"last words"])
    theirs.connection.close()
    theirs.connection.close()
    wait_until(lambda: ours.reason)
    said += [bytes(ours.data), ours.reason, theirs.reason]
    ours.connection.abort()
    pair.stop()
    # Nobody there, given up, taken twice, no address.
    reasons: list[str] = []
    network.connect(address(), lambda connection: None, reasons.append)
    wait_until(lambda: reasons)
    said += reasons
    give_up = network.connect(address(), lambda connection: None, reasons.append)
    give_up()
    taken = address()
    stop = network.listen(taken, lambda connection: None)
    said.append(_errno(lambda: network.listen(taken, lambda connection: None)))
    stop()
    said.append(_says(lambda: network.connect("node-1", lambda connection: None, reasons.append)))
    said.append(_says(lambda: network.open_datagrams("10.0.0.1", lambda peer, payload: None)))
    # Datagrams.
    got: list[tuple[str, bytes]] = []
    one = network.open_datagrams(f"{host}:0", lambda peer, payload: got.append((peer, payload)))
    other = network.open_datagrams(address(), lambda peer, payload: other.send(peer, payload[::-1]))
    for payload in (b"", b"abc", bytes(1000) + b"x"):
        one.send(other.address, payload)
    wait_until(lambda: len(got) == 3)
    said += [{peer == other.address for peer, _ in got}, sorted(payload for _, payload in got)]
    said.append(_errno(lambda: network.open_datagrams(other.address, lambda peer, payload: None)))
    for box in (one, other, other):
        box.close()
    one.send(other.address, b"nobody sends this")
    said.append(len(reasons))
    return said


def _errno(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


def _says(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def test_the_network_twin_answers_like_the_real_one(real: Host, twin: Host) -> None:
    assert _tell(*twin) == _tell(*real)


def test_a_stream_keeps_its_bytes_in_order_or_breaks() -> None:
    data = bytes(range(256)) * 2000
    broken = 0
    for seed in range(40):
        machines = Twin(seed, Mix({"loss": 0.3, "stream reset": 0.05 if seed % 2 else 0.0}))
        pair = machines.pair()
        ours, theirs = pair.ours, pair.theirs
        if theirs is None or ours is None:
            assert pair.failure
            continue
        path = machines.wires.path("one", "two")
        sent = 0
        while sent < len(data):
            size_bytes = machines.scheduler.random.randrange(1, 60_000)
            ours.connection.send([data[sent : sent + size_bytes]])
            sent += size_bytes
            if machines.scheduler.random.random() < 0.3:
                path.block()
                machines.run(3.0)
                path.unblock()
            machines.run(0.01)
        machines.run(30.0)
        assert data.startswith(theirs.data)
        assert bytes(theirs.data) == data or (ours.reason and seed % 2)
        broken += bool(ours.reason)
    assert 5 < broken <= 20


def test_a_killed_process_resets_its_streams_and_a_power_cut_says_nothing() -> None:
    machines = Twin()
    ours, _ = machines.pair().ends()
    machines.end("two", power=False)
    machines.run(1.0)
    assert ours.reason == "Connection reset by peer"

    machines = Twin()
    ours, _ = machines.pair().ends()
    machines.end("two", power=True)
    ours.connection.send([b"is anybody there?"])
    machines.run(SILENCE_LIMIT_S - 5.0)
    assert not ours.reason
    machines.powered["two"] = True
    ours.connection.send([b"and now?"])
    machines.run(1.0)
    assert ours.reason == "Connection reset by peer"

    machines = Twin()
    ours, _ = machines.pair().ends()
    machines.end("two", power=True)
    machines.run(SILENCE_LIMIT_S + 5.0)
    assert ours.reason == "Connection timed out"


def test_a_long_partition_ends_streams_on_both_sides_and_a_short_one_does_not() -> None:
    for duration_s, reason in ((SILENCE_LIMIT_S - 10.0, ""), (SILENCE_LIMIT_S + 10.0, "Connection timed out")):
        machines = Twin()
        ours, theirs = machines.pair().ends()
        machines.wires.path("two", "one").block()
        machines.run(duration_s)
        machines.wires.path("two", "one").unblock()
        machines.run(20.0)
        assert (ours.reason, theirs.reason) == (reason, reason)


def test_nobody_answers_a_connect_over_a_blocked_path_until_it_is_open_again() -> None:
    for duration_s, failure in ((1.0, ""), (20.0, "no answer in 5 s")):
        machines = Twin()
        machines.wires.path("two", "one").block()
        pair = Pair(machines.network("two"), machines.network("one"), "10.0.0.2:900")
        machines.run(duration_s)
        machines.wires.path("two", "one").unblock()
        machines.run(5.0)
        assert pair.failure == failure
        assert (pair.ours is None) == bool(failure)


def test_a_paused_process_finds_what_came_when_it_goes_on() -> None:
    machines = Twin()
    got: list[bytes] = []
    box = machines.network("two").open_datagrams("10.0.0.2:700", lambda peer, payload: got.append(payload))
    sender = machines.network("one").open_datagrams("10.0.0.1:700", lambda peer, payload: None)
    machines.lives["two"].paused = True
    for number in range(10):
        sender.send(box.address, b"%d" % number)
        machines.run(0.1)
    assert got == []
    machines.scheduler.resume(machines.lives["two"])
    machines.run(0.0)
    assert got == [b"%d" % number for number in range(10)]


def test_what_a_path_does_to_datagrams_is_what_the_mix_says() -> None:
    for name, holds in {
        "loss": lambda got: 500 < len(got) < 900,
        "duplication": lambda got: 1100 < len(got) < 1500 and len(set(got)) == 1000,
        "reordering": lambda got: len(got) == 1000 and got != sorted(got),
        "corruption": lambda got: len(got) == 1000 and 100 < sum(each >= 1000 for each in got) < 500,
    }.items():
        machines = Twin(3, Mix({name: 0.3}))
        got: list[int] = []
        machines.network("two").open_datagrams(
            "10.0.0.2:700", lambda peer, payload, got=got: got.append(int.from_bytes(payload, "big"))
        )
        sender = machines.network("one").open_datagrams("10.0.0.1:700", lambda peer, payload: None)
        for number in range(1000):
            sender.send("10.0.0.2:700", number.to_bytes(8, "big"))
            machines.run(0.0005)
        machines.run(5.0)
        assert holds(got), name
        assert 200 < machines.hits[name] < 400
