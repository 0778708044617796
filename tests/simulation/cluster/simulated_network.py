"""The twin of SocketNetwork: datagrams and streams between the machines of a cluster.

Theory: `Wires` is the one network of a run, with its faults; a `SimulatedNetwork` is what one life of a process sees of
it. Addresses are `HOST:PORT`, one host a machine. A datagram is lost, doubled, held up, damaged, recorded to be sent
again, or delivered; streams are in `simulated_streams`.

Rules of this file
- A datagram larger than a packet travels in fragments: it is lost if one of them is.
- A process that is over has no sockets; a paused one has, and the kernel keeps what arrives up to SOCKET_DATAGRAMS.
- Everything is drawn from the run's generator, in the order of the events.
"""

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from zlib import crc32

from metadata.seams import CONNECT_TIMEOUT_S, DATAGRAM_LIMIT_BYTES, Connection, Receiver
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.paths import Latency, Path
from tests.simulation.cluster.scheduler import Life, Scheduler
from tests.simulation.cluster.simulated_connecting import SimulatedConnecting
from tests.simulation.cluster.simulated_streams import RETRANSMISSION_S, SimulatedConnection

PACKET_BYTES = 1472
SOCKET_DATAGRAMS = 1000  # that wait in a kernel for a process
RECORDED = 64  # datagrams that may be sent again
FIRST_EPHEMERAL_PORT = 32768
WAKE_S = 0.00005  # at most, from the arrival of bytes until their process runs


class SimulatedDatagrams:
    """A bound datagram socket of one life."""

    def __init__(self, wires: "Wires", life: Life, address: str, received: Callable[[str, bytes], None]) -> None:
        self.address = address
        self.life = life
        self.waiting = 0
        self.received = received
        self._wires = wires
        self._closed = False

    def send(self, peer: str, payload: bytes) -> None:
        assert len(payload) <= DATAGRAM_LIMIT_BYTES
        assert type(payload) is bytes
        if not self._closed and self.life.alive:
            self._wires.send_datagram(self.address, self.life.machine_name, peer, payload)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._wires.boxes.pop(self.address, None)

    def deliver(self, peer: str, payload: bytes) -> None:
        self.waiting -= 1
        if not self._closed:
            self._wires.delivered(payload)
            self.received(peer, payload)


class SimulatedNetwork:
    """The Network seam of one life."""

    def __init__(self, wires: "Wires", life: Life, host: str) -> None:
        self._wires = wires
        self._life = life
        self._host = host

    def listen(self, address: str, accept: Callable[[Connection], Receiver | None]) -> Callable[[], None]:
        address = self._own(address)
        if address in self._wires.doors:
            raise OSError(errno.EADDRINUSE, "address already in use", address)
        door = self._wires.doors[address] = (self._life, accept)

        def stop() -> None:
            if self._wires.doors.get(address) is door:
                del self._wires.doors[address]

        return stop

    def connect(
        self,
        address: str,
        connected: Callable[[Connection], Receiver | None],
        failed: Callable[[str], None],
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Callable[[], None]:
        _split(address)
        source = f"{self._host}:{self._wires.ephemeral_port()}"
        return SimulatedConnecting(self._wires, self._life, source, address, connected, failed, timeout_s).give_up

    def open_datagrams(self, address: str, received: Callable[[str, bytes], None]) -> SimulatedDatagrams:
        address = self._own(address)
        if address in self._wires.boxes:
            raise OSError(errno.EADDRINUSE, "address already in use", address)
        box = self._wires.boxes[address] = SimulatedDatagrams(self._wires, self._life, address, received)
        return box

    def _own(self, address: str) -> str:
        host, port = _split(address)
        if host not in (self._host, "0.0.0.0"):
            raise OSError(errno.EADDRNOTAVAIL, "cannot assign requested address", address)
        return f"{self._host}:{port or self._wires.ephemeral_port()}"


class Wires:
    """The network between all machines, and its faults."""

    def __init__(self, scheduler: Scheduler, mix: Mix, hits: Counter[str], same_site: Latency, far: Latency) -> None:
        self.scheduler = scheduler
        self.hits = hits
        self.boxes: dict[str, SimulatedDatagrams] = {}
        self.doors: dict[str, tuple[Life, Callable[[Connection], Receiver | None]]] = {}
        self.connections: dict[SimulatedConnection, None] = {}
        self._latencies = {True: same_site, False: far}
        self._random = scheduler.random.random
        self._sites: dict[str, str] = {}  # by machine
        self._hosts: dict[str, str] = {}  # machine by host
        self._powered: Callable[[str], bool] = lambda machine: True
        self._paths: dict[tuple[str, str], Path] = {}
        self._targets: dict[str, str | None] = {}  # machine by address
        self._recorded: list[tuple[str, str, bytes]] = []
        self._last_port = FIRST_EPHEMERAL_PORT
        self.set_mix(mix)

    def set_mix(self, mix: Mix) -> None:
        """From now on the network has these faults."""
        self._loss = mix["loss"]
        self._duplication = mix["duplication"]
        self._reordering = mix["reordering"]
        self._corruption = mix["corruption"]
        self._replayed = mix["replay"]
        self._garbage = mix["garbage"]
        self._stream_faults = [(name, mix[name]) for name in ("stream reset", "stream corruption") if mix[name]]

    # --- machines ---

    def add(self, name: str, host: str, site: str) -> None:
        """A machine takes part."""
        self._sites[name] = site
        self._hosts[host] = name
        self._targets.clear()

    def watch_power(self, powered: Callable[[str], bool]) -> None:
        """Ask it whether a machine is on."""
        self._powered = powered

    def network_of(self, host: str, life: Life) -> SimulatedNetwork:
        """The seam for a new life."""
        return SimulatedNetwork(self, life, host)

    def ended(self, life: Life, power: bool) -> None:
        """A process is over: its sockets go."""
        for address in [address for address, box in self.boxes.items() if box.life is life]:
            del self.boxes[address]
        for address in [address for address, door in self.doors.items() if door[0] is life]:
            del self.doors[address]
        for connection in [each for each in self.connections if each.life is life]:
            connection.life_ended(power)

    def machine_at(self, address: str) -> str | None:
        """The name of the machine that has the address."""
        if address not in self._targets:
            self._targets[address] = self._hosts.get(_split(address)[0])
        return self._targets[address]

    def is_up(self, machine: str | None) -> bool:
        """Whether the machine's kernel answers."""
        return machine is not None and self._powered(machine)

    def is_powered(self, life: Life) -> bool:
        """Whether the machine of a life, which may be over, is on."""
        return self._powered(life.machine_name)

    # --- paths ---

    def path(self, source: str, target: str) -> Path:
        """From one machine to another."""
        path = self._paths.get((source, target))
        if path is None:
            latency = self._latencies[self._sites[source] == self._sites[target]]
            if source == target:
                latency = Latency(0.00001, 0.0)
            path = self._paths[source, target] = Path(self.scheduler, latency, lambda: self._silent(source, target))
        return path

    def paths(self, sources: Iterable[str], targets: Iterable[str]) -> list[Path]:
        """From each of these to each of those, but not from a machine to itself."""
        ends = list(targets)
        return [self.path(source, target) for source in sources for target in ends if source != target]

    def block(self, sources: Sequence[str], targets: Sequence[str], both: bool = False) -> Callable[[], None]:
        """What these send to those does not arrive, and if `both` the other way neither; returns what mends it."""
        paths = self.paths(sources, targets)
        if both:
            paths += self.paths(targets, sources)
        for path in paths:
            path.block()

        def mend() -> None:
            for path in paths:
                path.unblock()

        return mend

    def _silent(self, source: str, target: str) -> None:
        for connection in list(self.connections):
            ends = (connection.life.machine_name, connection.other.life.machine_name)
            if ends in ((source, target), (target, source)):
                connection.lose("Connection timed out")

    # --- datagrams ---

    def send_datagram(self, source: str, machine: str, peer: str, payload: bytes) -> None:
        """Draw what becomes of it."""
        random, hits = self._random, self.hits
        target = self._targets.get(peer) or self.machine_at(peer)
        if target is None:
            return
        path = self.path(machine, target)
        if path.blocks:
            hits["blocked"] += 1
            return
        if self._replayed and random() < self._replayed:
            self._record(source, peer, payload)
        if self._loss:
            kept = 1.0 - self._loss
            if len(payload) > PACKET_BYTES:
                kept **= -(-len(payload) // PACKET_BYTES)
            if random() >= kept:
                hits["loss"] += 1
                return
        if self._corruption and random() < self._corruption:
            hits["corruption"] += 1
            payload = self.damaged(payload)
        delay_s = path.delay_s()
        if self._reordering and random() < self._reordering:
            hits["reordering"] += 1
            delay_s += (path.base_s + path.jitter_s) * 20.0 * random()
        self.scheduler.at(self.scheduler.now_s + delay_s, None, self._arrive, path, source, peer, payload)
        if self._duplication and random() < self._duplication:
            hits["duplication"] += 1
            again_s = path.delay_s() * (1.0 + 20.0 * random())
            self.scheduler.at(self.scheduler.now_s + again_s, None, self._arrive, path, source, peer, payload)
        if self._garbage and random() < self._garbage:
            hits["garbage"] += 1
            stranger = f"203.0.113.7:{1024 + int(random() * 60000)}"
            self.scheduler.after(path.delay_s(), self._arrive, path, stranger, peer, self.noise())

    def _arrive(self, path: Path, source: str, peer: str, payload: bytes) -> None:
        if path.blocks:
            self.hits["blocked"] += 1
            return
        box = self.boxes.get(peer)
        if box is None or box.waiting >= SOCKET_DATAGRAMS:
            return
        box.waiting += 1
        life = box.life
        if life.paused:
            self.scheduler.at(self.scheduler.now_s, life, box.deliver, source, payload)
        else:
            box.deliver(source, payload)

    def _record(self, source: str, peer: str, payload: bytes) -> None:
        """Keep it, to be sent again at some time, by which its sender may have had other lives."""
        recorded, rng = self._recorded, self.scheduler.random
        if len(recorded) >= RECORDED:
            recorded[rng.randrange(RECORDED)] = (source, peer, payload)
        else:
            recorded.append((source, peer, payload))
        self.scheduler.after(rng.choice([0.5, 5.0, 60.0]) * rng.random(), self._replay)

    def _replay(self) -> None:
        if not self._replayed:
            return
        source, peer, payload = self.scheduler.random.choice(self._recorded)
        machine, target = self.machine_at(source), self.machine_at(peer)
        if machine is not None and target is not None:
            self.hits["replay"] += 1
            self._arrive(self.path(machine, target), source, peer, payload)

    # --- what is drawn ---

    def damaged(self, payload: bytes) -> bytes:
        """The same with some bits changed, or without its end."""
        rng = self.scheduler.random
        if not payload or rng.random() < 0.2:
            return payload[: rng.randrange(len(payload) + 1)]
        damaged = bytearray(payload)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return bytes(damaged)

    def noise(self) -> bytes:
        """What a stranger sends."""
        rng = self.scheduler.random
        return rng.randbytes(rng.choice([0, 1, 20, 200, 1400]))

    def stream_fault(self) -> str:
        """What happens to a piece of a stream: the name of a fault, or nothing."""
        for name, chance in self._stream_faults:
            if self._random() < chance:
                self.hits[name] += 1
                return name
        return ""

    def retransmission_s(self) -> float:
        """How long a piece of a stream is late because it was lost."""
        if self._loss and self._random() < self._loss:
            return RETRANSMISSION_S * (1.0 + self._random())
        return 0.0

    def piece_bytes(self, size_bytes: int) -> int:
        """How much of so many bytes travels as one piece."""
        return 1 + int(self._random() * size_bytes) if self._random() < 0.1 else size_bytes

    def wake_s(self) -> float:
        """From the arrival of bytes until their process runs."""
        return WAKE_S * self._random()

    def ephemeral_port(self) -> int:
        """A port that nobody has had before."""
        self._last_port += 1
        return self._last_port

    # --- what is counted ---

    def delivered(self, payload: bytes) -> None:
        """A frame goes to production code."""
        scheduler = self.scheduler
        scheduler.production_events += 1
        scheduler.digest = crc32(payload, scheduler.digest)

    def forget(self, connection: SimulatedConnection) -> None:
        """A connection has ended on this side."""
        self.connections.pop(connection, None)


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is no numeric address: give HOST:PORT or [V6]:PORT")
    return host, int(port)
