"""What the control process asks the data process about replicas: each `do_NAME` is a request of the channel.

Order of a replica's life here: `follow`, which opens it and obeys whoever owns the family; `own`, after which it is
served like any other; `disown`, or another node takes over, and it is followed again; `close`. Before the first one:
`peers`, which says who this node is and where its data process listens.

Rules
- On each node a family lives in the worker that its id says: everybody knows where to find it.
- When this node is not the owner any more its clients leave for the next one before anybody else is obeyed.
- Where the peers are is told by notes (`peer_addresses`); who is not known yet is asked for again and again.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from metadata.replica_set import ReplicaSets
from metadata.seams import Connection, Network, Receiver
from metadata.waiting import answer_of
from nbdserver.host.clock import HostClock
from nbdserver.host.tls_network import DATA_PROTOCOL, PeerContexts, TlsNetwork, make_data_contexts
from nbdserver.logdisk.replica import Replica
from nbdserver.node.cluster_clients import ClusterClients
from nbdserver.node.family_requests import FamilyRequests
from nbdserver.node.open_family import NOT_OWNED, FamilyError, NotOwnedError
from nbdserver.node.open_replica import OpenReplica
from nbdserver.node.ownership import ReplicatedOwnership
from nbdserver.node.placement import worker_of
from nbdserver.node.refusals import Refusals
from nbdserver.node.served_family import ServedFamily
from nbdserver.replication.copy_budget import CopyBudget
from nbdserver.replication.link import Link, State
from nbdserver.replication.owner import Owner
from nbdserver.replication.peer_server import PeerServer
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.replication.slow_disks import SLOW
from protocol.peer import Open

Report = Callable[[str, dict[str, Any]], None]

DISOWN_TIMEOUT_S = 5.0
"""How long giving a family up waits for what was acknowledged to be durable everywhere."""


class ReplicaRequests:
    """The replicas among the open families."""

    def __init__(
        self,
        families: FamilyRequests,
        network: Network,
        clock: HostClock,
        registry: ReplicaSets,
        clients: ClusterClients,
        report: Report,
    ) -> None:
        """`families` has them among the others; `network` is the one without TLS; `clients` come and go by the same
        addresses."""
        self._families = families
        self._sockets = network
        self._network = network  # that of the links
        self._budget = CopyBudget(clock, families.moved_bytes)
        self._clock = clock
        self._registry = registry
        self._clients = clients
        self._report = report
        self._refusals = Refusals(clock, self._tell_refused)
        self._node = ""
        self._address = ""
        self._contexts: PeerContexts | None = None
        self._server: PeerServer | None = None
        self._addresses: dict[str, Sequence[str]] = {}
        self._replicas: dict[str, OpenReplica] = {}

    def __len__(self) -> int:
        return len(self._replicas)

    # -- peers

    async def do_peers(self, node: str, address: str, tls: dict[str, str] | None) -> None:
        """Be this node, listen to its peers there, over TLS with these files (ca, certificate, key) or without. Again:
        renewed files. TlsError for files that cannot be used, FamilyError for an address that cannot."""
        contexts = None
        if tls is not None:
            contexts = make_data_contexts(Path(tls["ca"]), Path(tls["certificate"]), Path(tls["key"]))
        if (node, address, contexts is None) == (self._node, self._address, self._contexts is None):
            self._contexts = contexts
            return
        if self._server is not None:
            raise FamilyError("who this node is to its peers, and where, is settled until it is started again")
        self._contexts = contexts
        if contexts is not None:
            self._network = TlsNetwork(
                self._sockets, self._clock, self._present_contexts, self._refusals.note, _no_call, DATA_PROTOCOL
            )
        try:
            self._server = PeerServer(self._clock, self._network, address, self._acceptor, self._clients.accept)
        except OSError as error:
            raise FamilyError(f"{address} cannot be listened at: {error.strerror}") from error
        self._node, self._address = node, address
        self._clients.connect_by(node, self._network)

    def peer_addresses(self, nodes: dict[str, Sequence[str]]) -> None:
        """Where each node's data processes are, one after the other."""
        self._addresses = nodes

    def _present_contexts(self) -> PeerContexts:
        assert self._contexts is not None
        return self._contexts

    def _tell_refused(self, host: str, reason: str) -> None:
        self._report("peer-refused", {"peer": host, "reason": reason})

    def _acceptor(self, family: bytes) -> Callable[[PeerStream, Open], None] | None:
        replica = self._replicas.get(family.hex())
        return None if replica is None else replica.family.accept

    def _address_of(self, family: str) -> Callable[[str], str]:
        def address_of(node: str) -> str:
            addresses = self._addresses.get(node, ())
            return addresses[worker_of(family, len(addresses))] if addresses else ""

        return address_of

    # -- replicas

    async def do_follow(self, directory: str, family: str, volume: str, max_data_bytes: int) -> dict[str, Any]:
        """Open a family's replica and obey whoever owns it."""
        if self._server is None:
            raise FamilyError("this node has no address for its peers")
        served = await self._families.open_replica(directory, family, volume, max_data_bytes)
        replica = served.family
        assert isinstance(replica, OpenReplica)
        replica.take_part(self._network, self._registry, self._node, self._address_of(family), self._budget)
        replica.family.gave_up = lambda reason: self._gave_up(family, served, reason)
        replica.ended = lambda: self._replicas.pop(family, None)
        self._replicas[family] = replica
        log = replica.replica
        return {
            "incarnation": log.incarnation,
            "last_txid": log.last.txid,
            "resync_regions": log.resync_count,
            "sizes_bytes": {str(number): size_bytes for number, size_bytes in served.sizes_bytes().items()},
        }

    async def do_own(self, family: str, only_again: bool = False) -> dict[str, Any]:
        """Become the owner of a family that is followed; `only_again`: unless another node owns it by now. FamilyError
        with the reason if that cannot be."""
        served, replica = self._followed(family)
        if replica.disk.failure:
            raise FamilyError(replica.disk.failure)
        reason = await answer_of(partial(replica.family.take_over, only_again=only_again))
        owner = replica.family.owner
        if reason or owner is None:
            raise FamilyError(reason or "another node has taken the volume over at once")
        if served.ownership is None:
            served.ownership = ReplicatedOwnership(owner)
            self._report("owned", {"family": family, "epoch": owner.epoch})
        return {
            "epoch": owner.epoch,
            "generation": owner.value.generation,
            "sizes_bytes": {str(number): size_bytes for number, size_bytes in served.sizes_bytes().items()},
        }

    async def do_disown(self, family: str) -> None:
        """Own a family no more, and follow it. What was acknowledged is made durable first, its clients
        leave for the next owner."""
        served, replica = self._followed(family)
        owner = replica.family.owner
        if owner is None:
            return
        served.give_up("the volume is given up by this node")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISOWN_TIMEOUT_S):
                await answer_of(owner.flush)
        owner.depose("it is given up")

    async def do_place(self, family: str, placement: list[str]) -> None:
        """Have replicas on these nodes alone. Who is new is brought into sync; members elsewhere are let go when all of
        these are. Answered when the registry says so. NotOwnedError; FamilyError without this node."""
        owner = self._followed(family)[1].family.owner
        if owner is None:
            raise NotOwnedError(NOT_OWNED)
        if self._node not in placement or len(set(placement)) < len(placement):
            raise FamilyError(f"{self._node} owns the volume: it is one of the nodes, each of which is named once")
        reason: str = await answer_of(lambda done: owner.place(placement, done))
        if reason:
            raise NotOwnedError(reason)

    async def do_replicas(self, family: str = "") -> dict[str, Any]:
        """How replication of one family stands, or of all."""
        wanted = [family] if family else list(self._replicas)
        return {each: self._described(self._followed(each)[1]) for each in wanted}

    def _followed(self, family: str) -> tuple[ServedFamily, OpenReplica]:
        replica = self._replicas.get(family)
        if replica is None:
            raise FamilyError("this node has no open replica of the volume")
        return self._families.family(family), replica

    def _gave_up(self, family: str, served: ServedFamily, reason: str) -> None:
        served.give_up(f"the volume is owned by another node: {reason}")

    def _described(self, replica: OpenReplica) -> dict[str, Any]:
        part = replica.family
        value = part.value
        owner = part.owner
        return {
            "role": "owner" if owner is not None else "candidate" if part.is_candidate else "following",
            "value": None if value is None else asdict(value),
            "links": []
            if owner is None
            else [
                _link(owner, link) | _from_the_log(link, replica.replica, self._clock.now())
                for link in owner.links.values()
            ],
            "resync_regions": replica.replica.resync_count,
            "differences": [asdict(each) for each in part.differences],
            "log": {
                "incarnation": replica.replica.incarnation,
                "last": replica.replica.last,
                "promised_epoch": replica.replica.promised_epoch,
            },
            "waiting_for": "" if owner is None else owner.waits_for,
        }


def _link(owner: Owner, link: Link) -> dict[str, Any]:
    return {
        "node": link.node,
        "state": link.state.value,
        "is_member": owner.value.member(link.node) is not None,
        "appended_txid": link.appended.txid,
        "lag_bytes": link.backlog_bytes,
        "regions_left": link.regions_left,
        "regions_total": link.copying.regions_total,
        "region_bytes": link.copying.region_bytes,
        "bytes_per_s": link.copying.bytes_per_s,
        "resync_bytes_sent": link.copying.sent_bytes,
        "resync_bytes_saved": link.copying.saved_bytes,
        "reason": link.reason or link.copying.reason,
        "disk": owner.in_sync.lost.get(link.node, SLOW if owner.slow_disks.is_slow(link.node) else ""),
    }


def _from_the_log(link: Link, log: Replica, now_s: float) -> dict[str, int]:
    """What a replica still gets from the owner's log."""
    left = total = 0
    if link.state is State.CATCHING_UP and link.opened is not None:
        left, total = (log.log_bytes_after(at.txid) for at in (link.appended, link.opened.last))
    per_s = (total - left) / max(now_s - link.copying.began_s, 1.0)
    return {"log_left_bytes": left, "log_total_bytes": total, "log_bytes_per_s": max(0, int(per_s))}


def _no_call(stream: Connection) -> Receiver | None:
    """Nobody calls here: data processes offer streams alone."""
    return None
