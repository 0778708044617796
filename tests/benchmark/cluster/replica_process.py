"""One data process with one replicated family, without a node around it: the replicated path by itself.

    python -m tests.benchmark.cluster.replica_process DIRECTORY NODE LISTEN PEERS CLIENTS SIZE_BYTES

PEERS is NODE=ADDRESS,... of all. It formats DIRECTORY if there is nothing yet, prints `replica INCARNATION`, follows
whoever owns the family, and listens at the address CLIENTS for clients of the export `bench`. A line on its standard
input, `own VALUE` with a ReplicaSet as JSON, makes it the owner: it takes over, serves the family and prints `owner`.
`forward NODE` lets it forward its clients there. `forget` makes the owner's log end where it is now, for replicas that
come back, as if what was logged until then had been recycled. `figures` prints what was copied to each replica since
its stream was opened, as JSON. Each process has a registry of its own, so nothing but this may change
who owns the family: for measurements only.
"""

import asyncio
import gc
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from metadata.embedded_registry import EmbeddedRegistry
from metadata.leveldb import LevelStore
from metadata.registry_calls import Event
from metadata.registry_table import RegistryTable
from metadata.replica_set import ReplicaSet, replica_set_key
from nbdserver.frontend.attaching import Ask, Attaching
from nbdserver.frontend.away_client import Answer, There
from nbdserver.frontend.forwarded import ForwardedClients
from nbdserver.frontend.server import Server
from nbdserver.host.clock import HostClock
from nbdserver.host.completions import Workers
from nbdserver.host.network import SocketNetwork
from nbdserver.logdisk.disk import DiskSettings, LogDisk
from nbdserver.logdisk.opening import Replicated
from nbdserver.logdisk.replica import Replica
from nbdserver.replication.device import ReplicatedDevice
from nbdserver.replication.family import ReplicatedFamily
from nbdserver.replication.peer_server import PeerServer
from nbdserver.volume.admission import TlsMode
from nbdserver.volume.export import Elsewhere, Export, Exports
from nbdserver.volume.wanted import Wanted
from protocol.peer import Modification, Position
from protocol.peer_clients import FORWARDER_BYTES

from ..local_family import host, open_disk
from ..targets import EXPORT

FAMILY = bytes(16)
SEGMENT_BYTES = 64 << 20


class ForgetfulReplica(Replica):
    """One whose log can be made not to go back."""

    forgotten_txid = 0

    def modifications(
        self, after: Position, limit_bytes: int, done: Callable[[int, Sequence[Modification] | None], None]
    ) -> None:
        if after.txid < self.forgotten_txid:
            self.disk.call_soon(partial(done, 0, None))
        else:
            super().modifications(after, limit_bytes, done)


def _say(words: str) -> None:
    print(words, flush=True)


def _report(kind: str, fields: dict[str, object]) -> None:
    print(kind, fields, file=sys.stderr, flush=True)


async def serve(directory: Path, node: str, listen: str, peers: dict[str, str], clients: str, size_bytes: int) -> None:
    loop = asyncio.get_running_loop()
    is_new = not directory.exists()
    directory.mkdir(exist_ok=True, parents=True)
    with host(directory, loop) as parts:
        if is_new:
            LogDisk.format(parts.files, parts.store, FAMILY, size_bytes, SEGMENT_BYTES, random.SystemRandom())
        opened = partial(open_disk, parts, DiskSettings(), _report)
        replica = ForgetfulReplica(opened(Replicated()), lambda how, done: done(opened(how)), parts.files)
        network = SocketNetwork(loop, parts.completions)
        threads = Workers(parts.completions, 1, "registry")
        table = RegistryTable(LevelStore(str(directory / "registry"), threads, threads))
        registry = EmbeddedRegistry(table, parts.clock)
        family = ReplicatedFamily(
            parts.clock, network, registry, replica, FAMILY, node, lambda node: peers[node], _report
        )
        exports = Exports()
        server = Server(network, parts.clock, exports, lambda kind, fields: None)
        server.listen(clients)
        forwarded = ForwardedClients(parts.clock, server, exports)
        PeerServer(
            parts.clock, network, listen, lambda asked: family.accept if asked == FAMILY else None, forwarded.accept
        )
        _keep_value(directory, registry)
        _say(f"replica {replica.incarnation}")
        lines = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        gc.disable()
        while line := (await lines.readline()).decode():
            word, _, value = line.strip().partition(" ")
            if word == "own":
                await _own(table, family, replica, value, exports)
            elif word == "forget":
                replica.forgotten_txid = replica.last.txid
                _say("forgotten")
            elif word == "figures":
                _say(f"figures {json.dumps(_figures(family))}")
            elif word == "forward":
                exports.note_in_cluster(Elsewhere(None, EXPORT, "", (), TlsMode.OFF))
                there = There(value, peers[value])
                attaching = Attaching(
                    parts.clock, server, os.urandom(FORWARDER_BYTES), _always(parts.clock, there), forwarded.settle
                )
                attaching.connect_by(node, network)
        _say("ends")


def _keep_value(directory: Path, registry: EmbeddedRegistry) -> None:
    """Write the family's value down, whenever it changes, for those who look."""

    def changed(event: Event) -> None:
        for _, value in event.changes:
            if value is not None:
                beside = directory / "replica-set.new"
                beside.write_bytes(value)
                beside.rename(directory / "replica-set.json")

    registry.watch(replica_set_key(FAMILY), changed)


async def _own(table: RegistryTable, family: ReplicatedFamily, replica: Replica, value: str, exports: Exports) -> None:
    await table.compare_and_swap([(replica_set_key(FAMILY), None, ReplicaSet.decode(value.encode()).encode())])
    taken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    family.take_over(taken.set_result)
    reason = await taken
    if reason:
        _say(f"not taken over: {reason}")
        return
    assert family.owner is not None
    exports.add(Export(EXPORT, ReplicatedDevice(replica.disk.head(1), family.owner)))
    _say("owner")


def _figures(family: ReplicatedFamily) -> dict[str, dict[str, int]]:
    assert family.owner is not None
    return {
        node: {
            "regions": link.copying.regions_total,
            "sent_bytes": link.copying.sent_bytes,
            "saved_bytes": link.copying.saved_bytes,
        }
        for node, link in family.owner.links.items()
    }


def _always(clock: HostClock, there: There) -> Ask:
    def ask(_export: str, _failed: tuple[str, ...], _wanted: Wanted, done: Callable[[Answer], None]) -> None:
        clock.call_soon(lambda: done(there))

    return ask


def main() -> None:
    directory, node, listen, peers, clients, size_bytes = sys.argv[1:]
    addresses = dict(each.split("=", 1) for each in peers.split(","))
    asyncio.run(serve(Path(directory), node, listen, addresses, clients, int(size_bytes)))
    os._exit(0)


if __name__ == "__main__":
    main()
