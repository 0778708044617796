"""Three simulated nodes of which one serves a volume, and hosts that have clients of theirs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from metadata.seams import Buffer, Connection, Done
from nbdserver.block import IN_FLIGHT, Later, Operation
from nbdserver.frontend.attaching import Ask, Attaching
from nbdserver.frontend.away_client import Answer, Here, Nobody, There
from nbdserver.frontend.forwarded import ForwardedClients
from nbdserver.frontend.server import Server
from nbdserver.replication.peer_server import PeerServer
from nbdserver.volume.admission import TlsMode
from nbdserver.volume.export import Elsewhere, Export, Exports
from nbdserver.volume.wanted import Wanted
from protocol import nbd
from protocol.nbd import Command, Option
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.unit.memory_device import MemoryDevice
from tests.unit.session_rig import HELLO, named

SIZE_BYTES = 1 << 20
BLOCK_BYTES = 512
NBD_PORT, PEER_PORT = 10809, 10810
CLIENT_LIMIT = 8
GREETING_BYTES = 18
ACKNOWLEDGED = nbd.OPTION_REPLY_HEADER.pack(nbd.OPTION_REPLY_MAGIC, Option.GO, nbd.OptionReply.ACK, 0)


class OwnedDevice(MemoryDevice):
    """The volume as one node has it: the stage's while that node owns it, and fenced off from then on."""

    def __init__(self, stage: "Stage", node: str, soon: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(SIZE_BYTES, soon)
        self.data, self._view = stage.device.data, memoryview(stage.device.data)
        self.written = stage.device.written
        self._stage, self._node = stage, node

    @property
    def is_fenced(self) -> bool:
        return self._stage.owner != self._node

    def read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        return None if self.is_fenced else super().read(offset, length)

    def commit(self) -> int:
        if self.is_fenced:
            self._open.clear()
            return IN_FLIGHT
        self.in_flight = self._stage.device.in_flight
        return super().commit()

    def acknowledged(self, done: Done) -> None:
        if not self.is_fenced:
            self._stage.device.acknowledged(done)

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        if not self.is_fenced:
            super().later(operation, offset, length, data, done, limit)

    def flush(self, done: Done) -> None:
        if not self.is_fenced:
            if self._stage.held_flushes is not None:
                self._stage.held_flushes.append(done)
            else:
                super().flush(done)


class Node:
    """One life of a node."""

    def __init__(self, stage: "Stage", machine: Machine, seams: Seams) -> None:
        self.stage, self.name = stage, machine.name
        self.exports = Exports()
        self.exports.note_in_cluster(Elsewhere(None, "disk", "of the cluster", (), TlsMode.INHERIT))
        self.events: list[tuple[str, dict[str, object]]] = []
        self.device: MemoryDevice = OwnedDevice(stage, machine.name, seams.clock.call_soon)
        self.server = Server(
            seams.network, seams.clock, self.exports, lambda *event: self.events.append(event), CLIENT_LIMIT
        )
        self.server.listen(f"{machine.host}:{NBD_PORT}")
        self.forwarded = ForwardedClients(seams.clock, self.server, self.exports)
        self.attaching = Attaching(
            seams.clock,
            self.server,
            f"{machine.name} {machine.lives}".encode().ljust(16),
            stage.ask(machine.name, seams),
            self.forwarded.settle,
        )
        self.attaching.connect_by(machine.name, seams.network)
        PeerServer(seams.clock, seams.network, f"{machine.host}:{PEER_PORT}", lambda _: None, self.forwarded.accept)
        if machine.name == stage.owner:
            self.serve()

    def serve(self) -> None:
        self.exports.add(Export("disk", self.device, lineage=self.stage.lineage))

    def heard(self, kind: str) -> list[dict[str, object]]:
        """What it reported."""
        return [fields for each, fields in self.events if each == kind]

    def gone(self) -> list[object]:
        return [fields["reason"] for fields in self.heard("client-gone")]

    def close(self) -> None:
        pass


class Client:
    """An NBD client's connection."""

    def __init__(self, seams: Seams, address: str) -> None:
        self.received_bytes = bytearray()
        self.lost_because = ""
        self.connection: Connection | None = None
        self._room = bytearray(64 << 10)
        self._sent = 0
        seams.network.connect(address, self._connected, self._failed)

    def _connected(self, connection: Connection) -> "Client":
        self.connection = connection
        return self

    def _failed(self, reason: str) -> None:
        self.lost_because = reason

    def send(self, data: bytes) -> None:
        assert self.connection is not None
        self.connection.send([data])

    def go(self, name: str = "disk") -> None:
        self.send(HELLO + named(Option.GO, name))

    @property
    def has_entered(self) -> bool:
        return self.received_bytes.endswith(ACKNOWLEDGED)

    def request(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self._sent += 1
        fields = {
            "flags": 0, "command": command, "cookie": self._sent, "offset": offset, "length": length or len(data)
        }  # fmt: skip
        self.send(nbd.Request.build(fields) + data)

    def write(self, offset: int, text: bytes) -> None:
        """Ask to write a block that begins with this."""
        self.request(Command.WRITE, offset, data=text.ljust(BLOCK_BYTES))

    def hang_up(self) -> None:
        assert self.connection is not None
        self.connection.close()

    def buffer(self) -> memoryview:
        return memoryview(self._room)

    def received(self, size_bytes: int) -> None:
        self.received_bytes += self._room[:size_bytes]

    def drained(self) -> None:
        pass

    def lost(self, reason: str) -> None:
        self.lost_because = reason


@dataclass
class Hosts:
    """The process of a machine that has clients."""

    seams: Seams
    clients: list[Client] = field(default_factory=list)

    def close(self) -> None:
        pass


class Stage:
    """Nodes node-1 to node-3 and a host `client`."""

    node_type = Node

    def __init__(self, owner: str = "node-1", seed: int = 7) -> None:
        self.owner = owner
        self.answers: list[Answer] | None = None  # what control processes answer, one after the other
        self.asked: list[tuple[str, tuple[str, ...]]] = []
        self.cluster = Cluster(seed, Mix(), self._begin)
        scheduler = self.cluster.scheduler
        self.device = MemoryDevice(SIZE_BYTES, lambda callback: scheduler.after(0.0001, callback) and None)
        self.lineage = 7
        self.held_flushes: list[Done] | None = None
        for name in ("node-1", "node-2", "node-3", "client", "other"):
            self.cluster.add(name)
            self.cluster.start(name)

    def hold_flushes(self) -> Callable[[], None]:
        """Flushes of the owner that there is now are not answered; returns what lets those of the next one be."""
        self.held_flushes = []

        def let_go() -> None:
            self.held_flushes = None

        return let_go

    def move(self, to: str) -> None:
        """Another node has the volume from now on; the one before, whatever has become of it, serves it no more, and
        knows why."""
        before = self.cluster.machines[self.owner]
        self.owner = to
        if before.life is not None:
            node = self.node(before.name)
            if node.exports.lookup("disk") is not None:
                node.exports.remove("disk", has_moved=True)
        self.node(to).serve()

    def _begin(self, machine: Machine, seams: Seams) -> "Node | Hosts":
        return self.node_type(self, machine, seams) if machine.name.startswith("node") else Hosts(seams)

    def ask(self, node: str, seams: Seams) -> Ask:
        def asked(_export: str, failed: tuple[str, ...], _wanted: Wanted, done: Callable[[Answer], None]) -> None:
            self.asked.append((node, failed))
            answer: Answer = (
                Here(self.peer_address(node))
                if node == self.owner
                else There(self.owner, self.peer_address(self.owner))
            )
            if self.answers is not None:
                answer = self.answers.pop(0) if self.answers else Nobody("no node has it")
            seams.clock.call_later(0.01, lambda: done(answer))

        return asked

    def peer_address(self, name: str) -> str:
        return f"{self.cluster.machines[name].host}:{PEER_PORT}"

    def node(self, name: str) -> Node:
        node = self.cluster.machines[name].node
        assert isinstance(node, Node)
        return node

    def connect(self, name: str, host: str = "client") -> Client:
        hosts = self.cluster.machines[host].node
        assert isinstance(hosts, Hosts)
        client = Client(hosts.seams, f"{self.cluster.machines[name].host}:{NBD_PORT}")
        hosts.clients.append(client)
        self.until(lambda: len(client.received_bytes) >= GREETING_BYTES or bool(client.lost_because))
        return client

    def attach(self, name: str, host: str = "client") -> Client:
        """A client that has entered the volume."""
        client = self.connect(name, host)
        client.go()
        self.until(lambda: client.has_entered)
        client.received_bytes.clear()
        return client

    def attach_with_a_write_that_waits(self, name: str) -> Client:
        """A client that has written "first" into the first block, which is in flight until `acknowledge`, and then
        "old" into the next one, which waits at the owner until then."""
        self.device.in_flight = True
        client = self.attach(name)
        for offset, text in ((0, b"first"), (BLOCK_BYTES, b"old")):
            client.write(offset, text)
            self.cluster.run(0.01)
        return client

    def acknowledge(self) -> None:
        """What is in flight is acknowledged, and from now on everything is at once."""
        self.device.in_flight = False
        self.device.acknowledge(0)

    def until(self, holds: Callable[[], bool], limit_s: float = 5.0) -> None:
        assert self.cluster.run_until(holds, limit_s), f"not within {limit_s} s"

    def read(self, client: Client, offset: int, length: int) -> bytes:
        client.received_bytes.clear()
        client.request(Command.READ, offset, length)
        self.until(lambda: len(client.received_bytes) == 16 + length)
        return bytes(client.received_bytes[16:])

    def sessions(self, name: str) -> int:
        return len(self.node(name).server.clients())
