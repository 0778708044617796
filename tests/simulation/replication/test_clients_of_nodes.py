"""NBD clients of nodes that own a replicated volume one after the other: all of it is production's, the sessions and
the forwarding, the owner and its replicas, the log disks; only the network, the disks and the registry are simulated.

The volume moves, by chance and because its owner is cut off from the others or stands still; nobody's process ends. So
no client is disconnected, and each sees what it was told, wherever it has come to. Requests overlap. Some clients write
whole blocks, which are in flight together, some parts of them, which wait for the device one by one.
"""

import random
from collections.abc import Callable, Iterator

import pytest

from nbdserver.frontend.attaching import Attaching
from nbdserver.frontend.away_client import Answer, Here, Nobody, There
from nbdserver.frontend.deferred import Deferred
from nbdserver.frontend.forwarded import ForwardedClients
from nbdserver.frontend.receive_buffer import ReceiveBuffer
from nbdserver.frontend.server import Server
from nbdserver.frontend.session import Session
from nbdserver.frontend.unanswered import Request
from nbdserver.replication.peer_server import PeerServer
from nbdserver.volume.admission import TlsMode
from nbdserver.volume.export import Elsewhere, Export, Exports
from nbdserver.volume.wanted import Wanted
from protocol.disk import BLOCK_BYTES
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.forwarding_stage import NBD_PORT, PEER_PORT, Client, Hosts
from tests.simulation.registers import ViolationError
from tests.simulation.replication.on_log_disks import Bend, LogNode, LogScenario
from tests.simulation.replication.replicated import FamilyNode
from tests.simulation.test_forwarding_again_under_faults import BLOCKS, Talker, World
from tests.simulation.test_losing_ownership import Passer, kept_nowhere

NODES = ("node-1", "node-2", "node-3")
FOR_S = 6.0
REFUSED = b"served now"
VOLUME = 1


class ServingNode(LogNode):
    """A node with clients: of the volume when it owns it, and otherwise of whoever does."""

    def __init__(self, scenario: "ServingScenario", machine: Machine, seams: Seams) -> None:
        super().__init__(scenario, machine, seams)
        self.gone: list[object] = []
        self.gone_on = 0
        self._scenario_of_all = scenario
        self._exports = Exports()
        self._exports.note_in_cluster(Elsewhere(None, "disk", "", (), TlsMode.INHERIT))
        self._nbd = Server(seams.network, seams.clock, self._exports, self._event)
        self._nbd.listen(f"{machine.host}:{NBD_PORT}")
        forwarded = ForwardedClients(seams.clock, self._nbd, self._exports)
        self._attaching = Attaching(
            seams.clock, self._nbd, machine.name.encode().ljust(16), self._ask, forwarded.settle
        )
        self._attaching.connect_by(machine.name, seams.network)
        PeerServer(seams.clock, seams.network, f"{machine.host}:{PEER_PORT}", lambda _: None, forwarded.accept)
        self.family.gave_up = self._gave_up

    def serve(self) -> None:
        """It owns the volume, or still does."""
        owner = self.family.owner
        if owner is not None and not self.serves:
            self._exports.add(Export("disk", self.head(VOLUME, owner), shared=True, lineage=owner.value.generation))

    @property
    def serves(self) -> bool:
        return self._exports.lookup("disk") is not None

    def _gave_up(self, reason: str) -> None:
        self.doubt()
        if self.serves:
            self._exports.remove("disk", reason, has_moved=True)

    def _event(self, kind: str, fields: dict[str, object]) -> None:
        self._scenario_of_all.cluster.tell(f"{self.machine.name}: {kind} {fields}")
        self.gone_on += kind == "client-goes-on"
        if kind == "client-gone":
            self.gone.append(fields["reason"])

    def _ask(self, _export: str, failed: tuple[str, ...], wanted: Wanted, done: Callable[[Answer], None]) -> None:
        """What its control process says: who owns it, or, after some patience, that this node takes it over."""

        def answer() -> None:
            scenario = self._scenario_of_all
            owner = scenario.value().owner
            node = scenario.cluster.machines[owner].node
            assert isinstance(node, ServingNode)
            if node.serves and node.machine.is_running and owner not in failed:
                address = f"{node.machine.host}:{PEER_PORT}"
                done(Here(address) if node is self else There(owner, address))
                return
            if wanted is not Wanted.SOON and not any(each.family.is_candidate for each in scenario.nodes()):
                scenario.attach_at(self)
            done(Nobody(f"{owner} does not serve it"))

        self.seams.clock.call_later(0.01, answer)


class ServingScenario(LogScenario):
    """Three nodes without faults of chance, and a host."""

    def __init__(self) -> None:
        super().__init__(random.Random("serving"), Bend(trouble=0.0), count=len(NODES))

    def make(self, machine: Machine, seams: Seams) -> ServingNode:
        return ServingNode(self, machine, seams)

    def begin_node(self, machine: Machine, seams: Seams) -> "FamilyNode | Hosts":
        return self.start(machine, seams) if machine.name in NODES else Hosts(seams)

    def attach_at(self, node: FamilyNode) -> None:
        assert isinstance(node, ServingNode)
        node.family.take_over(lambda reason: None if reason else node.serve())


class ServedWorld:
    """The nodes, and what happens to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.scenario = ServingScenario()
        self.cluster = Cluster(seed, Mix(), self.scenario.begin_node)
        self.scenario.begin(self.cluster)
        self.cluster.add("client")
        self.cluster.start("client")
        self.scenario.attach_at(self.node("node-1"))
        assert self.cluster.run_until(lambda: not self.scenario.missing(), 10.0)
        self.is_troubled = True
        self._after(self._happen)

    @property
    def owner(self) -> str:
        return self.scenario.value().owner

    def node(self, name: str) -> ServingNode:
        node = self.cluster.machines[name].node
        assert isinstance(node, ServingNode)
        return node

    def attach(self, name: str) -> Client:
        hosts = self.cluster.machines["client"].node
        assert isinstance(hosts, Hosts)
        while True:
            client = Client(hosts.seams, f"{self.cluster.machines[name].host}:{NBD_PORT}")
            self.until(lambda client=client: bool(client.received_bytes))  # type: ignore[misc]
            client.go()
            self.until(lambda client=client: client.has_entered or REFUSED in client.received_bytes)  # type: ignore[misc]
            if client.has_entered:
                client.received_bytes.clear()
                return client
            client.hang_up()  # it comes again, as clients do that are told that nobody serves it at this moment

    def content(self, offset: int, length: int) -> bytes:
        raise AssertionError("who wants to know has to read")

    def gone(self) -> list[object]:
        return [reason for name in NODES for reason in self.node(name).gone]

    def until(self, holds: Callable[[], bool]) -> None:
        if not self.cluster.run_until(holds, 20.0):
            raise ViolationError("a client waits in vain")

    def _after(self, what: Callable[[], object], least_s: float = 0.05, most_s: float = 1.0) -> None:
        self.cluster.scheduler.after(self.random.uniform(least_s, most_s), what)

    def _happen(self) -> None:
        if not self.is_troubled:
            return
        rng, owner = self.random, self.owner
        machine = self.cluster.machines[owner]
        others = [name for name in NODES if name != owner]
        match rng.choice(["move", "move", "cut", "pause", "short cut"]):
            case "move":
                self.scenario.attach_at(self.node(rng.choice(others)))
            case "cut":
                self.cluster.registry.cuts[owner] += 1
                self._after(self._mend(owner, self.cluster.wires.block([owner], others, both=True)), 0.5, 4.0)
                self._after(lambda: self.scenario.attach_at(self.node(rng.choice(others))), 0.1, 1.0)
            case "short cut":
                self._after(self.cluster.wires.block([owner], [rng.choice(others)], both=rng.random() < 0.5), 0.05, 0.5)
            case "pause" if machine.is_running:
                machine.pause()
                self._after(machine.resume, 0.1, 3.0)
                self._after(lambda: self.scenario.attach_at(self.node(rng.choice(others))), 0.1, 1.0)
        self._after(self._happen, 0.5, 4.0)

    def _mend(self, owner: str, unblock: Callable[[], None]) -> Callable[[], None]:
        def mend() -> None:
            self.cluster.registry.cuts[owner] -= 1
            unblock()

        return mend


class Reader(Talker):
    """A client that cannot look into the disk, and writes parts of blocks."""

    block_bytes = 512

    def check(self) -> None:
        """It is looked at in the end, by way of a node."""

    def read_back(self, world: ServedWorld, client: Client) -> None:
        """By way of another client: all that was answered is there."""
        for block in range(BLOCKS):
            client.received_bytes.clear()
            client.request(0, (self._first + block) * self.block_bytes, self.block_bytes)
            world.until(lambda: len(client.received_bytes) == 16 + self.block_bytes)
            self._look(block, bytes(client.received_bytes[16:]), self._answered[block])


class WholeBlocks(Reader):
    block_bytes = BLOCK_BYTES


def run(seed: int) -> int:
    """How many clients of the owner have gone on."""
    world = ServedWorld(seed)
    made: list[Reader] = []

    def maker(kind: type[Reader]) -> Callable[[World, str, int], Reader]:
        def make(stage: World, node: str, number: int) -> Reader:
            made.append(kind(stage, node, number))
            return made[-1]

        return make

    parts, whole = maker(Reader), maker(WholeBlocks)
    # Numbers are places: those of parts lie before those of whole blocks.
    forwarded = [parts(world, "node-2", 0), whole(world, "node-3", 100)]
    passers = [Passer(world, 10, parts), Passer(world, 110, whole)]
    talkers = [*forwarded, *passers]
    until_s = world.cluster.now_s + FOR_S
    while world.cluster.now_s < until_s + 60.0:
        asks = world.cluster.now_s < until_s
        world.is_troubled = asks
        if not asks and all(talker.is_idle for talker in talkers):
            break
        world.cluster.run(0.005)
        for talker in talkers:
            talker.step(asks)
    else:
        raise ViolationError("a client waits for ever")
    reader = world.attach("node-1")
    for talker in made:
        talker.read_back(world, reader)
    return sum(passer.gone_on for passer in passers)


@pytest.mark.parametrize("seed", range(2))
def test_nobody_is_disconnected_and_everybody_finds_what_it_was_told(seed: int) -> None:
    assert run(seed)


def _nothing(self: Deferred) -> Iterator[Request]:
    return iter(())


@pytest.mark.parametrize(
    ("where", "name", "replacement"),
    [
        pytest.param(ReceiveBuffer, "set_aside", kept_nowhere, id="the batch that is in flight is kept"),
        pytest.param(Deferred, "unanswered", _nothing, id="what waits for the device is known"),
        pytest.param(Session, "leave", lambda self: None, id="clients leave"),
    ],
)
def test_a_missing_rule_is_noticed(
    where: object, name: str, replacement: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, replacement)
    for seed in range(10):
        try:
            run(seed)
        except ViolationError:
            return
    pytest.fail("nobody has noticed")
