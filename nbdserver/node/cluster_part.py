"""What a node has because it belongs to a cluster: the shared registry, its replicas, and its place among the others.

Order: the shared registry, before data processes start; each of them is told where its peers are, before its replicas
are followed; when clients are served the node joins the others (`join`). In the other order at a stop. A program that
is to be replaced leaves the others only (`leave`): its data processes still need the registry.

Rules
- Whatever is wrong with the cluster stops no volume of the node's own.
- Data processes ask here: for the registry (channel_registry.py), and where a client shall go (owning.py).
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metadata.families import Families
from metadata.registry import Family, VolumeState
from nbdserver.node import replica_view
from nbdserver.node.at_owner import AtOwner
from nbdserver.node.channel_registry import RegistryVisit
from nbdserver.node.cluster import Cluster, Measure
from nbdserver.node.cluster_settings import SNAPSHOTS_PREFIX, ClusterSettings
from nbdserver.node.data_process import DataProcess
from nbdserver.node.data_processes import DataProcesses
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError, NotJoinedError
from nbdserver.node.findings import Finding
from nbdserver.node.owning import Owning
from nbdserver.node.recovery import Recovery
from nbdserver.node.replica_changes import ReplicaChanges
from nbdserver.node.replicas import Replicas
from nbdserver.node.resync_view import ResyncView
from nbdserver.node.shared_registry import SharedRegistry
from nbdserver.node.snapshots_told import Listings, SnapshotsTold
from nbdserver.node.volumes import Volumes
from nbdserver.volume.wanted import Wanted


class ClusterPart:
    """A node's part in its cluster."""

    def __init__(
        self,
        settings: ClusterSettings,
        directory: DataDirectory,
        families: Families,
        volumes: Volumes,
        data: DataProcesses,
        version: str,
        load: Measure,
        told: Callable[[], bytes],
        event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """On the running loop. `load()` and `told()` are what the others are told of this node and of its volumes.
        WrongInputError for files that cannot be used."""
        self.settings = settings
        self.cluster: Cluster | None = None
        self._directory = directory
        self._families = families
        self._data = data
        self._version = version
        self._load = load
        self._told = told
        self._event = event
        self._visits: dict[int, RegistryVisit] = {}
        self._exports: dict[str, dict[str, Any]] = {}
        self._peers_problem = ""
        """Why this node's data processes cannot be reached by the others; "" if they can."""
        self._tasks: list[asyncio.Task[None]] = []
        self.replicas = Replicas(
            settings.node,
            directory,
            families,
            volumes.opening,
            volumes.lock,
            data.call,
            data.placement.place_replica,
            event,
        )
        self.owning = Owning(families, self.replicas, lambda: self.cluster, data.call)
        self.at_owner = AtOwner(families, self.replicas, self.owning)
        self.changes = ReplicaChanges(
            families, self.replicas, self.owning, volumes, lambda: self.cluster, event, settings.repair_delay
        )
        self.resync = ResyncView(families, self.replicas, self.owning, self._is_up, data.ask)
        self.snapshots = SnapshotsTold(families, self.replicas.owns, data.snapshots, self._note_exports)
        self._shared = SharedRegistry(settings, families, self._registry_changed)
        self.recovery = Recovery(families, self._shared, lambda: self.cluster, data.ask)
        volumes.replicas, volumes.is_up, volumes.share = self.replicas, self._is_up, self.changes.share
        volumes.told_snapshots = self.snapshots.of
        data.answer, data.ended = self._answer, self._data_process_ended
        data.exports_changed = self.replicas.now_owns = self.snapshots.stir

    def _is_up(self, node: str) -> bool:
        return node == self.settings.node or (self.cluster is not None and self.cluster.is_up(node))

    # --- data processes ---

    async def begin(self, process: DataProcess) -> None:
        """Tell one that was started who it is for its peers, and where these are."""
        await self._tell_peers(process)
        process.notify("peer_addresses", {"nodes": self._peer_addresses()})
        process.notify("cluster_exports", {"exports": self._exports})
        self.snapshots.list_again(lambda listings: process.notify("cluster_exports", {"exports": listings}))

    async def follow(self, process: DataProcess) -> None:
        """Let it open its replicas."""
        await self.replicas.follow_all(self._data.placement.families(process.worker, self._families.replicas()))

    async def _tell_peers(self, process: DataProcess) -> None:
        tls = self.settings.tls
        files = {"ca": str(tls.ca), "certificate": str(tls.certificate), "key": str(tls.key)}
        try:
            await process.call(
                "peers",
                node=self.settings.node,
                address=self.settings.data_addresses(self._data.workers)[process.worker],
                tls=files if self.settings.data_tls else None,
            )
            self._peers_problem = ""
        except NodeError as error:
            self._peers_problem = str(error)
            self._event("peers-not-served", {"reason": str(error)})

    def _tell_peer_addresses(self) -> None:
        if self.cluster is not None:  # else it has been left, and what was told stays
            self._data.notify_all("peer_addresses", {"nodes": self._peer_addresses()})

    def _peer_addresses(self) -> dict[str, list[str]]:
        own = {self.settings.node: self.settings.data_addresses(self._data.workers)}
        return (self.cluster.data_addresses() if self.cluster else {}) | own

    async def _answer(self, worker: int, name: str, arguments: dict[str, Any]) -> Any:
        """Answer a data process."""
        if name == "attach":
            return await self.owning.attach(arguments["export"], arguments["failed"], Wanted(arguments["wanted"]))
        visit = self._visits.get(worker)
        if visit is None:
            visit = self._visits[worker] = self._shared.desk.visit(
                lambda kind, fields: self._data.notify(worker, kind, fields)
            )
        return await visit.answer(name, arguments)

    def _data_process_ended(self, worker: int) -> None:
        visit = self._visits.pop(worker, None)
        if visit is not None:
            visit.close()

    def _registry_changed(self) -> None:
        self.replicas.stir()
        self.changes.stir()
        self.snapshots.stir()
        listed = {
            volume.name: {
                "description": volume.settings.description,
                "allowed": list(volume.settings.allowed_clients),
                "tls": volume.settings.tls,
            }
            for family in self._families.of_cluster()
            for volume in family.volumes
            if volume.state == VolumeState.THERE
        }
        if listed != self._exports:
            gone: dict[str, Any] = dict.fromkeys(self._exports.keys() - listed.keys())
            self._note_exports(gone | listed)
            self._exports = listed

    def _note_exports(self, listings: Listings) -> None:
        self._data.notify_all("cluster_exports", {"exports": listings})

    # --- the others ---

    def _replicas_by_node(self) -> tuple[Counter[str], Counter[str]]:
        values = [self._families.replica_set(family.id) for family in self._families.of_cluster()]
        known = [value for value in values if value is not None]
        return Counter(node for value in known for node in value.placement), Counter(value.owner for value in known)

    def replica_gauges(self, family: Family) -> dict[str, float]:
        """For metrics, of a family that is served here."""
        value = self._families.replica_set(family.id) if family.replicas else None
        if value is None:
            return {}
        return {"replicas_wanted": family.replicas, "replicas_in_sync": len(value.in_sync)}

    def findings(
        self, volumes: Sequence[Mapping[str, Any]], waits: Mapping[str, str], resync: Sequence[Mapping[str, Any]]
    ) -> list[Finding]:
        """What is wrong with the cluster's volumes, of these of all, some of which wait for something; with replicas
        that are being made complete (`resync`); and with this node's part in them."""
        problems = {**self.replicas.problems, **self.changes.problems}
        named = {getattr(self._families.get(family_id), "name", ""): why for family_id, why in problems.items()}
        found = [*replica_view.waiting_findings(waits), *replica_view.replica_findings(volumes, named)]
        found += replica_view.disk_findings(resync)
        if self._peers_problem:
            found.append(replica_view.peers_finding(self._peers_problem))
        return found

    def join(self) -> None:
        """Take part. NodeError."""
        self.cluster = Cluster(
            self.settings,
            self._directory,
            self._version,
            self._shared.registry,
            self.settings.data_addresses(self._data.workers),
            self._load,
            self._told,
            self._event,
            self._tell_peer_addresses,
        )
        self.cluster.replicas_by_node = self._replicas_by_node
        self.cluster.answering.update(
            {
                "own": self.owning.answer_own,
                "owns": self.owning.answer_owns,
                "api": self.at_owner.answer,
                "resync": self.resync.answer,
                "known": self.recovery.answer,
            }
        )
        self.snapshots.directory = self.cluster.directory
        self.cluster.directory.watch(SNAPSHOTS_PREFIX, lambda key, value: self.snapshots.stir())
        self.snapshots.stir()
        loop = asyncio.get_running_loop()
        watching = (self.cluster, self.replicas, self.changes, self._shared, self.snapshots)
        self._tasks = [loop.create_task(each.watch()) for each in watching]
        self._tell_peer_addresses()

    async def remove(self, name: str) -> None:
        """Strike a node that will not come back, and forget what it had still to delete. NodeError."""
        if self.cluster is None:
            raise NotJoinedError
        await self.cluster.remove(name)
        for family_id, nodes in self._families.removed().items():
            if name in nodes:
                await self._families.has_removed(family_id, name)

    async def leave(self) -> None:
        """Take part no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self.snapshots.directory = None
        cluster, self.cluster = self.cluster, None
        if cluster is not None:
            await cluster.close()

    async def reload(self) -> None:
        """Use what the files hold now. WrongInputError: nothing changed."""
        if self.cluster is not None:
            self.cluster.reload()
        for process in self._data.running():
            await self._tell_peers(process)

    async def close(self) -> None:
        """Give everything back."""
        await self.leave()
        with contextlib.suppress(OSError):
            await self._shared.close()
