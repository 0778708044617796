"""Real data processes without nodes around them: who tests them plays the control process of each.

The registry is that of one node, in this process; the peers find each other on loopback.
"""

import asyncio
import os
import secrets
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metadata.embedded_registry import EmbeddedRegistry
from metadata.leveldb import NO_THREADS, LevelStore
from metadata.registry import FIRST_VOLUME, ExportSettings
from metadata.registry_calls import Change
from metadata.registry_table import RegistryTable
from metadata.replica_set import Member, ReplicaSet, replica_set_key
from nbdserver.host.clock import HostClock
from nbdserver.node.channel_registry import RegistryDesk, RegistryVisit
from nbdserver.node.data_process import DataProcess, DataProcessError, Shared
from nbdserver.node.shared_figures import SharedFigures
from nbdserver.volume.wanted import Wanted

SIZE_BYTES = 64 << 20
SEGMENT_BYTES = 4 << 20
VOLUME = "disk0"
TIMEOUT_S = 60.0

FreePort = Callable[[], int]
Tls = dict[str, str]


class KeptInMemory:
    """What a node keeps of the replica sets that it has heard of."""

    def __init__(self) -> None:
        self.sets: dict[str, ReplicaSet] = {}
        self.asked: dict[str, ReplicaSet] = {}

    def has_replica(self, family_id: str) -> bool:
        return True

    async def keep_set(self, family_id: str, value: bytes) -> bool:
        new = ReplicaSet.decode(value)
        kept = self.sets.setdefault(family_id, new)
        if new.number > kept.number:
            self.sets[family_id] = new
        return new.number >= kept.number

    async def note_asked(self, family_id: str, value: bytes) -> None:
        self.asked[family_id] = ReplicaSet.decode(value)


class DataNode:
    """A node of a test, with one data process; it may be killed and started again."""

    def __init__(self, rig: "DataRig", name: str, port: int, tls: Tls | None) -> None:
        self.rig = rig
        self.name = name
        self.address = f"127.0.0.1:{port}"
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.clients = str(rig.directory / f"{name}.sock")
        self.port = rig.free_port()
        """Where clients come by TCP."""
        self.directory = str(rig.directory / name)
        self.incarnation = 0
        self._tls = tls
        self._process: DataProcess | None = None
        self._visit: RegistryVisit | None = None
        self._descriptors: list[int] = []

    @property
    def process(self) -> DataProcess:
        assert self._process is not None
        return self._process

    async def call(self, name: str, **arguments: Any) -> Any:
        return await asyncio.wait_for(self.process.call(name, **arguments), TIMEOUT_S)

    async def start(self) -> None:
        """Start its data process, which listens to clients and to its peers."""
        lock, figures = os.memfd_create("lock"), SharedFigures.make(1)
        self._descriptors = [lock, figures]
        self._process = await DataProcess.start(
            0, 1, Shared(lock, figures, []), lambda kind, fields: self.events.append((kind, fields)), self._answer
        )
        self._visit = self.rig.desk.visit(self.process.notify)
        await self.call("start", cache_bytes=64 << 20, max_connections=100, max_data_bytes=0)
        await self.call("peers", node=self.name, address=self.address, tls=self._tls)
        self.process.notify("peer_addresses", {"nodes": self.rig.addresses()})
        listing = {"description": "", "allowed": [], "tls": "inherit"}
        self.process.notify("cluster_exports", {"exports": {VOLUME: listing}})
        Path(self.clients).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as local, socket.create_server(("127.0.0.1", self.port)) as distant:
            local.bind(self.clients)
            local.listen()
            self.process.send_descriptors([local.fileno(), distant.fileno()])
            await self.call("listen", addresses=[f"unix:{self.clients}", f"127.0.0.1:{self.port}"])

    async def _answer(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "attach":
            return await self.rig.attach(self, **arguments)
        assert self._visit is not None
        return await self._visit.answer(name, arguments)

    async def follow(self) -> dict[str, Any]:
        """Open its replica, which is made if there is none."""
        family = self.rig.family
        if not os.path.exists(self.directory):
            await self.call(
                "format", directory=self.directory, family=family, size_bytes=SIZE_BYTES, segment_bytes=SEGMENT_BYTES
            )
        followed: dict[str, Any] = await self.call(
            "follow", directory=self.directory, family=family, volume=VOLUME, max_data_bytes=0
        )
        self.incarnation = followed["incarnation"]
        return followed

    async def own(self, tries: int = 5) -> dict[str, Any]:
        """Take over and serve the volume."""
        while True:
            try:
                owned: dict[str, Any] = await self.call("own", family=self.rig.family)
                break
            except DataProcessError:
                tries -= 1
                if not tries:
                    raise
        await self.serve()
        return owned

    async def serve(self) -> None:
        """Serve the volume, which it owns."""
        volume = {"number": FIRST_VOLUME, "name": VOLUME, "settings": asdict(self.rig.settings)}
        await self.call("serve", family=self.rig.family, volumes=[volume])

    async def replicas(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("replicas", family=self.rig.family)
        return dict(found[self.rig.family])

    def uri(self, export: str = VOLUME) -> str:
        return f"nbd+unix:///{export}?socket={self.clients}"

    def heard(self, kind: str) -> list[dict[str, Any]]:
        """What it reported."""
        return [fields for each, fields in self.events if each == kind]

    async def hand_over(self, is_late: bool) -> dict[str, Any]:
        """Let another process take its place, with its clients and what it owned; that it owns `late`, after it has the
        clients."""
        given = await self.call("hand_over", handover_id="a handover")
        descriptors = self.process.receive_descriptors(1 + given["clients"])
        await self._ended()
        await self.start()
        await self.follow()
        if not is_late:
            await self.own()
        self.process.send_descriptors(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        taken: dict[str, Any] = await self.call("take_over", clients=given["clients"])
        if is_late:
            await self.own()
        return taken

    async def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        await self._ended()

    async def stop(self) -> None:
        if self._process is not None:
            try:
                await self.call("stop")
            except DataProcessError:
                self.process.kill()
            await self._ended()

    async def _ended(self) -> None:
        await self.process.wait()
        self._process = None
        assert self._visit is not None
        self._visit.close()
        for descriptor in self._descriptors:
            os.close(descriptor)


class DataRig:
    """Some nodes with a replica of one family each."""

    def __init__(
        self, directory: Path, free_port: FreePort, names: Sequence[str], tls: Tls | None, settings: ExportSettings
    ) -> None:
        self.directory = directory
        self.free_port = free_port
        self.settings = settings
        self.family = secrets.token_hex(16)
        self.registry = EmbeddedRegistry(
            RegistryTable(LevelStore(str(directory / "registry"), NO_THREADS, NO_THREADS)),
            HostClock(asyncio.get_running_loop()),
        )
        self.desk = RegistryDesk(self.registry, KeptInMemory())
        self.nodes = [DataNode(self, name, free_port(), tls) for name in names]

    def addresses(self) -> dict[str, list[str]]:
        return {node.name: [node.address] for node in self.nodes}

    async def begin(self) -> None:
        """All follow, the first one owns the family, and the others are in sync with it."""
        for node in self.nodes:
            await node.start()
            await node.follow()
        first = self.nodes[0]
        names = tuple(node.name for node in self.nodes)
        value = ReplicaSet(0, first.name, (Member(first.name, first.incarnation),), names)
        await self.put(value)
        await first.own()
        await self.until(self.all_in_sync, "all replicas are in sync")

    async def attach(
        self, asked: DataNode, export: str, failed: Sequence[str], wanted: str = Wanted.ANEW
    ) -> dict[str, Any]:
        """What the control process of a node answers: the owner serves it."""
        owner = (await self.value()).owner
        if owner == asked.name:
            return {"own": True, "address": asked.address}
        node = next(node for node in self.nodes if node.name == owner)
        return {"node": owner, "address": node.address}

    async def put(self, value: ReplicaSet) -> None:
        key = replica_set_key(bytes.fromhex(self.family))
        swapped: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.registry.swap_later([Change(key, None, value.encode())], swapped.set_result)
        await swapped

    async def value(self) -> ReplicaSet:
        read: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.registry.get_later(replica_set_key(bytes.fromhex(self.family)), read.set_result)
        return ReplicaSet.decode((await read).items[0][1])

    async def in_sync(self) -> set[str]:
        return {member.node for member in (await self.value()).in_sync}

    async def all_in_sync(self) -> bool:
        return await self.in_sync() == {node.name for node in self.nodes}

    async def are_in_sync(self, *names: str) -> bool:
        """Whether these are, and nobody else has a replica."""
        value = await self.value()
        return await self.in_sync() == set(names) == set(value.placement)

    def tell_addresses(self) -> None:
        """Tell everybody where all are."""
        for node in self.nodes:
            node.process.notify("peer_addresses", {"nodes": self.addresses()})

    async def until(self, holds: Callable[[], Any], what: str) -> None:
        """Wait for a condition, which may have to be awaited."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            answer = holds()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            assert time.monotonic() < deadline_s, f"it takes too long: {what}; {self.nodes[0].events[-5:]}"
            await asyncio.sleep(0.02)


@asynccontextmanager
async def data_nodes(
    directory: Path,
    free_port: FreePort,
    names: Sequence[str] = ("node-1", "node-2", "node-3"),
    tls: Tls | None = None,
    settings: ExportSettings = ExportSettings(),  # noqa: B008  # it is frozen
) -> AsyncIterator[DataRig]:
    """Nodes of which the first one owns a family that all have."""
    rig = DataRig(directory, free_port, names, tls, settings)
    try:
        await rig.begin()
        yield rig
    finally:
        for node in rig.nodes:
            await node.stop()
        rig.registry.close()


async def tool(*command: str) -> str:
    """What a tool of other people prints, while the data processes go on."""
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
