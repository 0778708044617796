"""A node in its cluster: the directory, what this node says of itself, and what it sees of the others.

Theory: the control process takes part in the cluster, beside serving the API; no client's data and no data process is
touched by it. The node's own volumes are listed in the registry of its data directory, as on a node alone: etcd holds
what nodes have to agree on. So a cluster that is gone costs knowledge, never a volume.

What this node publishes, under its own name:

    node/NAME     where it stands, version, start: once
    load/NAME     volumes, clients, rates, fill: every REPORT_S; goes by itself LOAD_EXPIRES_S after the last
    volumes/NAME  which volumes it has (volumes_told.py): when that has changed, with the load
    drain/NAME    it shall get nothing new (kept in the registry; published by whichever node was asked)

What snapshots the volumes of the cluster have that it serves is told in snapshots_told.py.

Rules
- The cluster is joined when clients are served already, and is left before they are handed over.
- What can be wrong with files is checked before anything starts; what is wrong with other nodes is an event and a
  problem in the status, and never stops this one.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from metadata.directory.node import DirectoryNode
from metadata.directory.registry_keys import MASTER_KEY, MEMBER_PREFIX, STATE_PREFIX
from metadata.directory.reports import Answer
from metadata.directory.settings import DirectorySettings
from metadata.leveldb import LevelStore
from metadata.seams import Registry
from metadata.waiting import answer_of
from nbdserver.host.clock import HostClock
from nbdserver.host.completions import Completions, Workers
from nbdserver.host.network import SocketNetwork
from nbdserver.host.tls_network import TlsNetwork
from nbdserver.node import cluster_view
from nbdserver.node.ballast import BallastedStore
from nbdserver.node.certificates import read_certificate
from nbdserver.node.cluster_calls import CallServer
from nbdserver.node.cluster_files import Keys, read_contexts, read_keys, write_keys
from nbdserver.node.cluster_settings import (
    DRAIN_PREFIX,
    FACTS_PREFIX,
    LOAD_PREFIX,
    SAID_PREFIXES,
    SNAPSHOTS_PREFIX,
    VOLUMES_PREFIX,
    ClusterSettings,
)
from nbdserver.node.cluster_view import LATE_S, Picture
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError
from nbdserver.node.findings import Finding
from nbdserver.node.membership import Answering, Membership
from nbdserver.node.refusals import Refusals
from nbdserver.node.volumes_told import Elsewhere, Row, said_in
from protocol.directory import Confirm, NodeKind
from protocol.disk import DamagedValueError
from protocol.sealed_frames import ClusterKeys

REPORT_S = 5.0
NODES_A_S = 50
"""Reports that a master shall get: with more nodes each reports less often."""
LOAD_EXPIRES_S = 30.0
LOOK_S = 1.0
REFUSED_S = 600.0  # how long a refusal stays in the status
CERTIFICATE_LOOK_S = 3600.0
PUBLISH_TIMEOUT_S = 35.0

Measure = Callable[[], dict[str, Any]]


class Cluster:
    """This node's part in its cluster."""

    def __init__(
        self,
        settings: ClusterSettings,
        directory: DataDirectory,
        version: str,
        registry: Registry,
        data_addresses: Sequence[str],
        measure: Measure,
        volumes: Callable[[], bytes],
        event: Callable[[str, dict[str, Any]], None],
        nodes_moved: Callable[[], None],
    ) -> None:
        """Take part, on the running loop. `registry` is the caller's; `data_addresses` are what replicas here are
        reached at; `measure()` is this node's load, `volumes()` what it says of its volumes; `nodes_moved()` is called
        when what the others are reached at may have changed. WrongInputError for files and addresses that cannot be
        used, NodeError for a store that cannot."""
        loop = asyncio.get_running_loop()
        self.settings = settings
        self._measure = measure
        self._volumes = volumes
        self._volumes_told = b""
        self._elsewhere = Elsewhere()
        self._event = event
        self._version = version
        self.clock = HostClock(loop)
        self._contexts = read_contexts(settings)
        self._keys = read_keys(settings.key_file)
        self._refusals = Refusals(self.clock, self._tell_refused)
        self._silent_since_s: dict[str, float] = {}
        self._was_active = False
        self._state_since_s = self.clock.now()
        self._was_connected = True
        self._certificate_problem = ""
        self._certificate_look_s = 0.0
        self.registry = registry
        self._data_addresses = list(data_addresses)
        self._nodes_moved = nodes_moved
        self._have_moved = False  # and it is not told yet
        self.replicas_by_node: Callable[[], tuple[Mapping[str, int], Mapping[str, int]]] = lambda: ({}, {})
        """How many replicas each node has, and how many families it owns."""
        self.answering: dict[str, Answering] = {}
        """What members may ask this node besides, by the question's `do`."""
        self.membership = Membership(
            settings,
            lambda: self.directory,
            lambda: self._keys,
            self._use_keys,
            lambda: set(self._silent_since_s),
            event,
            self.answering,
        )
        self._calls = calls = CallServer(self.clock, self.membership.answer)
        self._sockets = SocketNetwork(loop)
        network = TlsNetwork(self._sockets, self.clock, lambda: self._contexts, self._refusals.note, calls.accept)
        self._workers = Workers(Completions(loop), 1, "directory")
        self._store = self._open_store(directory)
        try:
            self.directory = DirectoryNode(
                self._directory_settings(), self.clock, network, self._store, self.registry, random.SystemRandom()
            )
        except DamagedValueError as error:
            self._give_back()
            raise NodeError(
                f"the copy in {directory.cluster_directory} is damaged: {error}; delete it, the node gets another"
            ) from None
        except OSError as error:
            self._give_back()
            raise WrongInputError(
                f"cluster.address: cannot use {settings.address}: {error.strerror or error}; it has to be one of this "
                "machine, with a port that is free by UDP and TCP"
            ) from None
        self.directory.routes.on_refused = self._refusals.note
        for prefix, watcher in (
            (MASTER_KEY, self._master_changed),
            (MEMBER_PREFIX, self._member_changed),
            (STATE_PREFIX, self._state_changed),
            (FACTS_PREFIX, self._facts_changed),
        ):
            self.directory.watch(prefix, watcher)
        for key, _ in self.directory.range(STATE_PREFIX):
            self._silent_since_s[key.removeprefix(STATE_PREFIX)] = self.clock.now()
        self._publish_facts()

    def _give_back(self) -> None:
        """What was opened before the directory could not be."""
        self._store.close()
        self._sockets.close()

    def _open_store(self, directory: DataDirectory) -> LevelStore:
        try:
            return BallastedStore(directory.cluster_directory, self._workers, directory.ballast)
        except OSError as error:
            raise NodeError(f"the copy in {directory.cluster_directory} cannot be opened: {error}") from None

    def _directory_settings(self) -> DirectorySettings:
        settings = self.settings
        return DirectorySettings(
            settings.node,
            NodeKind.SECOND if settings.across_wan else NodeKind.FIRST,
            settings.address,
            settings.address,
            ClusterKeys(settings.name, self._keys.valid),
            (*SAID_PREFIXES, SNAPSHOTS_PREFIX, *settings.subscribe) if settings.across_wan else (),
            least_incarnation=int(time.time()),  # the data directory may be an older copy
        )

    def _publish_facts(self) -> None:
        settings = self.settings
        facts = {
            "site": settings.site,
            "fault_domain": settings.own_fault_domain,
            "version": self._version,
            "data_addresses": self._data_addresses,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.directory.publish(FACTS_PREFIX + settings.node, json.dumps(facts).encode())

    # --- what others ask ---

    def describe(self) -> dict[str, Any]:
        """The cluster as this node sees it."""
        return self._describe(self._picture())

    def status(self) -> tuple[dict[str, Any], list[Finding]]:
        """The same, and what is wrong with it: for the status of the node."""
        picture = self._picture()
        described = self._describe(picture)
        return described, cluster_view.cluster_findings(picture, described["nodes"])

    def _describe(self, picture: Picture) -> dict[str, Any]:
        health = picture.registry
        return {
            "name": picture.cluster,
            "node": picture.me,
            "is_active": picture.is_active,
            "master": picture.master,
            "epoch": picture.epoch,
            "voters": sorted(picture.voters),
            "registry": {
                "kind": "etcd",
                "is_connected": health.is_connected,
                "for_s": round(picture.registry_state_s, 1),
                "endpoint": health.endpoint,
                "endpoints": list(self.settings.registry.endpoints),
                "last_error": health.last_error,
            },
            "nodes": cluster_view.nodes(picture),
        }

    def volumes_elsewhere(self) -> tuple[list[Row], int]:
        """The volumes of the other nodes, as they have told them, and how many there are."""
        picture = self._picture()
        rows = self._elsewhere.rows(
            cluster_view.nodes(picture), picture.me, lambda key: picture.directory.get(key, b"")
        )
        return rows, self._elsewhere.total

    def gauges(self) -> dict[str, float]:
        """For metrics."""
        return {
            "cluster_hears_master": int(self.is_active),
            "cluster_is_master": int(self.directory.master is not None),
            "cluster_nodes": len(self.directory.members),
            "cluster_silent_nodes": len(self._silent_since_s),
            "cluster_registry_connected": int(self.registry.health().is_connected),
            "cluster_refused": self.directory.routes.refused,
        }

    def _picture(self) -> Picture:
        directory, now_s = self.directory, self.clock.now()
        state = directory.election.state
        health = self.registry.health()
        said = [pair for prefix in SAID_PREFIXES for pair in directory.range(prefix)]
        replicas, owned = self.replicas_by_node()
        return Picture(
            cluster=self.settings.name,
            me=self.settings.node,
            members=tuple(directory.members.values()),
            own_id=directory.me.node,
            master=(directory.get(MASTER_KEY) or b"").decode(errors="replace") if directory.hears_master else "",
            epoch=directory.epoch,
            voters=frozenset(state.voters.values()) if state is not None else frozenset(),
            directory=dict(said),
            silent_s={name: now_s - since_s for name, since_s in self._silent_since_s.items()},
            is_active=self.is_active,
            in_this_state_s=now_s - self._state_since_s,
            registry=health,
            registry_state_s=now_s - health.since_s,
            registry_error=directory.election.registry_error,
            failure=directory.failure,
            refused=self._refusals.within(REFUSED_S),
            keys=len(self._keys.valid),
            replicas=replicas,
            owned=owned,
            certificate_problem=self._certificate_problem,
        )

    async def publish(self, key: str, value: bytes | None, confirm: Confirm) -> None:
        """Put or delete (None) a key for all nodes, and wait for it. NodeError."""
        answer: Answer
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                answer = await answer_of(lambda done: self.directory.publish(key, value, confirm, done))
        except TimeoutError:
            answer = Answer.UNKNOWN
        if answer is not Answer.CONFIRMED:
            raise NodeError(
                f"the cluster has not confirmed it ({answer.value}); see `nbdserver status`, then try again"
            )

    def reload(self) -> None:
        """Use what the files hold now, for what is sent and opened from here on. WrongInputError: nothing changed."""
        contexts, keys = read_contexts(self.settings), read_keys(self.settings.key_file)
        self._contexts = contexts
        self._certificate_look_s = 0.0
        self._take_keys(keys)

    def _use_keys(self, keys: Keys) -> None:
        write_keys(self.settings.key_file, keys)
        self._take_keys(keys)

    def _take_keys(self, keys: Keys) -> None:
        self._keys = keys
        self.directory.routes.use_keys(ClusterKeys(self.settings.name, keys.valid))

    # --- from now to the end ---

    async def watch(self) -> None:
        """Look, and report this node's load, for ever."""
        report_at_s = 0.0
        while True:
            now_s = self.clock.now()
            self._look(now_s)
            if now_s >= report_at_s:
                self._report()
                report_at_s = now_s + max(REPORT_S, len(self.directory.members) / NODES_A_S)
            await asyncio.sleep(LOOK_S)

    def _report(self) -> None:
        try:
            load = self._measure()
        except OSError:
            return  # the file system cannot be asked: the last report ends by itself
        value = json.dumps(load, separators=(",", ":")).encode()
        self.directory.publish(LOAD_PREFIX + self.settings.node, value, expires_s=LOAD_EXPIRES_S)
        volumes = self._volumes()
        if volumes and volumes != self._volumes_told:
            self._volumes_told = volumes
            self.directory.publish(VOLUMES_PREFIX + self.settings.node, volumes)

    def _look(self, now_s: float) -> None:
        """Tell what has changed with this node."""
        is_active = self.is_active
        if is_active != self._was_active:
            self._was_active, self._state_since_s = is_active, now_s
            self._event("cluster-joined" if is_active else "cluster-not-heard", {"cluster": self.settings.name})
        health = self.registry.health()
        if health.is_connected != self._was_connected and (health.is_connected or now_s - health.since_s > LATE_S):
            self._was_connected = health.is_connected
            fields = {"endpoint": health.endpoint} | ({} if health.is_connected else {"reason": health.last_error})
            self._event("registry-back" if health.is_connected else "registry-lost", fields)
        if now_s >= self._certificate_look_s:
            self._certificate_look_s = now_s + CERTIFICATE_LOOK_S
            self._certificate_problem = self._read_certificate()

    @property
    def is_active(self) -> bool:
        """Whether what it knows of the others is fresh."""
        return self.directory.is_active and self.directory.hears_master

    def _read_certificate(self) -> str:
        try:
            problem = read_certificate(self.settings.tls.certificate).problem(datetime.now(UTC)).partition("; ")[0]
            return f"{problem}; nbdserver cluster join TOKEN --again, then reload the node (SIGHUP)" if problem else ""
        except WrongInputError as error:
            return str(error)

    async def close(self) -> None:
        """Leave, and give everything back."""
        self._calls.close()
        self.directory.close()
        await asyncio.to_thread(self._store.close)
        await asyncio.to_thread(self._workers.close)
        self._sockets.close()

    # --- what is heard ---

    def _tell_refused(self, host: str, reason: str) -> None:
        self._event("cluster-refused", {"peer": host, "reason": reason})

    def _master_changed(self, key: str, value: bytes | None) -> None:
        if key == MASTER_KEY and value is not None:
            self._event("cluster-master", {"node": value.decode(errors="replace"), "epoch": self.directory.epoch})

    def _member_changed(self, key: str, value: bytes | None) -> None:
        name = key.removeprefix(MEMBER_PREFIX)
        self._event("node-left" if value is None else "node-joined", {"node": name})

    def _state_changed(self, key: str, value: bytes | None) -> None:
        name = key.removeprefix(STATE_PREFIX)
        if value is None:
            if self._silent_since_s.pop(name, None) is not None:
                self._event("node-heard-again", {"node": name})
        elif name not in self._silent_since_s:
            self._silent_since_s[name] = self.clock.now()
            self._event("node-silent", {"node": name})

    def _facts_changed(self, key: str, value: bytes | None) -> None:
        if not self._have_moved:  # who joins hears of all nodes at once
            self._have_moved = True
            self.clock.call_soon(self._tell_moved)

    def _tell_moved(self) -> None:
        self._have_moved = False
        self._nodes_moved()

    # --- nodes ---

    def is_up(self, name: str) -> bool:
        """Whether the cluster has such a node and hears it."""
        return self.directory.get(MEMBER_PREFIX + name) is not None and name not in self._silent_since_s

    def silent_s(self, name: str) -> float:
        """For how long a node has not been heard; 0.0 while it is."""
        since_s = self._silent_since_s.get(name)
        return 0.0 if since_s is None else self.clock.now() - since_s

    def data_addresses(self) -> dict[str, list[str]]:
        """Where the data processes of each node are."""
        facts = self.directory.range(FACTS_PREFIX)
        return {key.removeprefix(FACTS_PREFIX): cluster_view.data_addresses(said_in(value)) for key, value in facts}

    def data_addresses_of(self, name: str) -> list[str]:
        """Where those of one node are; empty if it has not said."""
        return cluster_view.data_addresses(said_in(self.directory.get(FACTS_PREFIX + name) or b""))

    async def ask(self, node: str, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A question to another node and its answer. NotFoundError, NodeError."""
        return await self.membership.ask(node, question, timeout_s)

    def names(self) -> list[str]:
        """Of all nodes."""
        return sorted(member.name for member in self.directory.members.values())

    def node(self, name: str) -> dict[str, Any]:
        """One node's row. NotFoundError."""
        for row in self.describe()["nodes"]:
            if row["name"] == name:
                return dict(row)
        raise NotFoundError(f"there is no node {name}; there are: {', '.join(self.names()) or 'none'}")

    async def drain(self, name: str, wanted: bool) -> dict[str, Any]:
        """Let a node get nothing new, or end that. NotFoundError, NodeError."""
        self.node(name)
        value = json.dumps({"since": datetime.now(UTC).isoformat(timespec="seconds")}).encode() if wanted else None
        await self.publish(DRAIN_PREFIX + name, value, Confirm.REGISTRY)
        return self.node(name)

    async def remove(self, name: str) -> None:
        """Strike a node that will not come back, and what it has said of itself. NodeError."""
        await self.membership.remove(name)
        for prefix in SAID_PREFIXES:
            if self.directory.get(prefix + name) is not None:
                await self.publish(prefix + name, None, Confirm.SITE)

    def refuse_if_draining(self) -> None:
        """Raise ConflictError while this node shall get nothing new."""
        name = self.settings.node
        if self.directory.get(DRAIN_PREFIX + name) is not None:
            raise ConflictError(
                f"{name} is being drained: it gets no new volume; end that with: nbdserver node drain {name} --end"
            )
