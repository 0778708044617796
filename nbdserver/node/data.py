"""A data process: one asyncio loop with the NBD sessions, the exports and the log disks of this node, or of its part.

Started by the control process (data_process.py), with numbers of descriptors: its end of the channel, the socket over
which descriptors come and go, and what the data processes of a node share. It does what the channel asks (`Worker`),
and reports events on it.

Rules
- The first thing it does is to ask the kernel to be killed with its parent; then it looks whether the parent is
  still there.
- SIGINT and SIGTERM are the control process's affair (a terminal sends Ctrl-C to both): ignored here.
- The cyclic garbage collector never runs by itself: nothing on the hot path makes cycles, and a full collection
  would stop every client. A handshake leaves some (construct's contexts refer to themselves): after every
  CLIENTS_A_COLLECTION clients that went, what was made since the last time is looked through, some milliseconds.
- An exception that no one expected, in a callback of the loop, ends the process: what it left half done is not to be
  served from. The control process starts another one, which takes its state from the log.
- Nothing of FastAPI, pydantic or typer is imported here.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdserver.frontend.server import Server
from nbdserver.host.clock import HostClock
from nbdserver.host.network import SocketNetwork
from nbdserver.host.tls import Tls, TlsError, make_context
from nbdserver.host.watching import LoopWatch
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.node import channel_registry, handover
from nbdserver.node.channel import Channel
from nbdserver.node.channel_registry import ChannelRegistry
from nbdserver.node.cluster_clients import ClusterClients, elsewhere
from nbdserver.node.descriptors import close_all, receive_descriptors, send_descriptors
from nbdserver.node.family_requests import FamilyRequests
from nbdserver.node.garbage import collect_garbage
from nbdserver.node.open_family import FamilyError, StoreThreads
from nbdserver.node.passing import Passing
from nbdserver.node.process_name import DATA, name_process
from nbdserver.node.replica_requests import ReplicaRequests
from nbdserver.node.returning import Returning
from nbdserver.node.shared_figures import SharedBudget, SharedCensus, SharedFigures
from nbdserver.volume.admission import TlsMode
from nbdserver.volume.export import Export, ExportError, Exports, volume_of
from protocol.checksum import CHECKSUM_IS_FAST, CHECKSUM_LIBRARY
from protocol.handover import HandoverError

PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h

DRAIN_TIMEOUT_S = 10.0
"""How long a stop waits for what clients have asked to be done."""

LEAVING_LOOK_S = 0.02

TAKEN_FIRST_S = 0.02
"""Requests that arrived before the wish to stop are taken before it."""

PREPARE_TIMEOUT_S = 30.0
"""How long a checkpoint may take before clients are made to wait for it."""

CLIENTS_A_COLLECTION = 256
"""Each leaves a few KiB of cyclic garbage."""

EXIT_DEFECT = 70  # EX_SOFTWARE of sysexits.h

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Which one of the node's data processes this is, and how it reaches the others."""

    worker: int
    workers: int
    figures: int  # a descriptor, as those in `inboxes`
    inboxes: Sequence[int]
    """Our own to read from, then the one of each worker to write to; nothing for one alone."""

    @property
    def may_spin(self) -> bool:
        """Whether there is a core left for those who are waited for, even if all workers spin."""
        return self.workers == 1 or self.workers < len(os.sched_getaffinity(0))


class Worker:
    """What the control process can ask for: each `do_NAME`, here, in `families` and in `replicas`, is a request of the
    channel."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, descriptors: socket.socket, watch: LoopWatch, place: Place
    ) -> None:
        self._place = place
        self._loop = loop
        self._watch = watch
        watch.report = self._report
        self._descriptors = descriptors
        self._clock = HostClock(loop)
        threads = StoreThreads(loop)
        self._network = SocketNetwork(loop, threads.completions, place.may_spin)
        self._exports = Exports()
        self._exports.changed = self._publish
        self._figures = SharedFigures(place.figures, place.workers)
        budget = SharedBudget(self._figures, place.worker)
        self._families = FamilyRequests(self._exports, threads, self._clock, self._report, budget)
        self._registry = ChannelRegistry(self._ask)
        self._clients = ClusterClients(self._clock, self._exports, self._ask)
        self._replicas = ReplicaRequests(
            self._families, self._network, self._clock, self._registry, self._clients, self._report
        )
        self._tls = Tls(self._clock.call_soon)
        self._clients_gone = 0
        self._server: Server | None = None
        self._passing: Passing | None = None
        self._returning: Returning | None = None
        self.channel: Channel | None = None
        self.stopped = asyncio.Event()

    async def handle(self, name: str, arguments: dict[str, Any]) -> Any:
        """Do one request of the control process."""
        try:
            rooms = (self, self._families, self._replicas)
            room = next(room for room in rooms if hasattr(room, f"do_{name}"))
            return await getattr(room, f"do_{name}")(**arguments)
        except (FamilyError, ExportError, HandoverError, TlsError):
            raise  # a refusal
        except Exception:
            _log.exception("the request %s failed", name)
            raise

    async def do_start(self, cache_bytes: int, max_connections: int, max_data_bytes: int) -> dict[str, Any]:
        """Take the settings; the first request."""
        self._families.settings = DiskSettings(cache_bytes=cache_bytes)
        self._families.budget.limit_bytes = max_data_bytes
        place = self._place
        census = SharedCensus(self._figures, place.worker, place.workers)
        self._server = Server(self._network, self._clock, self._exports, self._report, max_connections, census)
        self._clients.begin(self._server)
        if place.inboxes:
            inbox, *outboxes = (socket.socket(fileno=descriptor) for descriptor in place.inboxes)
            self._passing = Passing(self._network, self._server, inbox, outboxes)
        return {"checksum": CHECKSUM_LIBRARY, "checksum_is_fast": CHECKSUM_IS_FAST}

    async def do_tls(
        self, mode: str, certificate: str | None, key: str | None, client_ca: str | None, verify_clients: bool
    ) -> None:
        """Use these certificates for new connections, and `mode` for volumes that say nothing themselves at once. If
        they cannot be used everything stays as it was."""
        assert self._server is not None
        context = None
        if certificate is not None and key is not None:
            ca = Path(client_ca) if client_ca is not None else None
            context = make_context(Path(certificate), Path(key), ca, verify_clients)
        self._server.secure = self._tls.with_certificates(context) if context is not None else None
        self._exports.have_tls = context is not None
        self._exports.inherit_tls(TlsMode(mode))

    async def do_listen(self, addresses: list[str]) -> None:
        """Accept clients at exactly these addresses, with the sockets that were sent, one for each; from now on, also
        those whom other processes send."""
        assert self._server is not None
        descriptors = receive_descriptors(self._descriptors, len(addresses))
        there = set(self._server.addresses())
        for address, descriptor in zip(addresses, descriptors, strict=True):
            if address in there:
                os.close(descriptor)  # a copy of the one that it has
            else:
                self._network.inherit(address, descriptor)
        for address in dict.fromkeys(addresses):
            self._server.listen(address)
        for gone in there - set(addresses):
            self._server.stop_listening(gone)
        if self._passing is not None:
            self._passing.open()

    async def do_take_over(self, clients: int) -> dict[str, Any]:
        """Go on with so many clients of the process before, whose state and sockets were sent; every family that can be
        opened is open. Those of a replicated volume may have to wait until it is owned here again."""
        assert self._server is not None
        state, *descriptors = receive_descriptors(self._descriptors, 1 + clients)
        try:
            before = handover.read_state(state)
        except HandoverError:
            close_all(descriptors)
            raise
        self._returning = Returning(self._clock, self._network, self._server, self._exports, self._report)
        taken = self._returning.take(before, descriptors, may_wait=bool(self._replicas))
        return {"clients": taken, "pause_s": round(self._clock.now() - before.frozen_s, 3)}

    async def do_ping(self) -> None:
        """Answer."""

    async def do_counters(self, after: str = "") -> dict[str, Any]:
        """Counters (numbers that only grow, and histograms) and gauges: of the node, and of each volume of a page of
        families; `last` is what the next page comes after, if there is one."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        node = {
            "counters": {
                "data_process_cpu_seconds": usage.ru_utime + usage.ru_stime,
                "tls_handshakes": self._tls.handshakes,
                "tls_failures": self._tls.failures,
                "loop_held": self._watch.held,
            },
            "gauges": {
                "loop_longest_turn_seconds": self._watch.longest_s,
                "connections": len(self._server.clients()) if self._server else 0,
                "forwarded_connections": len(self._server.away()) if self._server else 0,
                "data_process_peak_resident_bytes": usage.ru_maxrss * 1024,
            },
        }
        volumes, last = await self._families.figures(after)
        return {"worker": self._place.worker, "node": node, "volumes": volumes, "last": last}

    async def do_clients(self) -> list[dict[str, Any]]:
        """Every connection, also those that are forwarded to other nodes: what they do is counted there."""
        now_s = self._clock.now()
        clients = [*self._server.clients(), *self._server.away()] if self._server else []
        return [
            {
                "id": client.id,
                "worker": self._place.worker,
                "peer": client.peer.name,
                "tls": client.peer.tls,
                "certificate": client.peer.certificate,
                "via": client.peer.via,
                "forwarded_to": client.forwarded_to,
                "volume": client.export,
                "connected_s": round(now_s - client.since_s, 1),
                "in_flight": client.in_flight,
                "requests": client.requests,
                "read_bytes": client.read_bytes,
                "write_bytes": client.write_bytes,
                "unsent_bytes": client.unsent_bytes,
            }
            for client in clients
        ]

    async def do_disconnect(self, client: int) -> bool:
        """Drop a connection; False if there is none of this id."""
        return self._server.disconnect(client) if self._server else False

    async def do_prepare(self) -> None:
        """Make a checkpoint of every family, so that closing them soon has little to write."""
        for disk in self._families.disks():
            if not (disk.failure or disk.is_closed) and disk.log.is_committed:
                made = asyncio.Event()
                disk.checkpointer.when_done(made.set)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(made.wait(), PREPARE_TIMEOUT_S)

    async def do_hand_over(self, handover_id: str) -> dict[str, Any]:
        """Let clients stand still, close every family cleanly, send the sockets and their state, and end after the
        reply."""
        assert self._server is not None
        frozen_s = self._clock.now()
        if self._passing is not None:
            self._passing.close()
        clients = len(self._server.clients())
        frozen = asyncio.Event()
        self._server.freeze(handover.FREEZE_TIMEOUT_S, frozen.set)
        await frozen.wait()
        problems = await self._families.close()

        def fit(export: Export) -> bool:
            return volume_of(export.name) not in problems  # a snapshot's family is its volume's

        descriptors, given, dropped = handover.give(self._server, fit, handover_id, frozen_s, clients)
        send_descriptors(self._descriptors, descriptors)
        close_all(descriptors)
        self._loop.call_soon(self.stopped.set)
        return {
            "clients": given,
            "dropped": dropped,
            "closed_s": round(self._clock.now() - frozen_s, 3),
            "problems": list(dict.fromkeys(problems.values())),
        }

    async def do_stop(self) -> None:
        """Finish what clients have asked, close every family cleanly, and end after the reply."""
        if self._server is not None:
            await asyncio.sleep(TAKEN_FIRST_S)
            if self._passing is not None:
                self._passing.close()
            drained = asyncio.Event()
            self._server.drain(DRAIN_TIMEOUT_S, drained.set)
            await drained.wait()
        problems = await self._families.close()
        while self._network.leaving:  # clients that have still to take their last replies
            await asyncio.sleep(LEAVING_LOOK_S)
        self._loop.call_soon(self.stopped.set)
        if problems:
            raise FamilyError("not closed cleanly: " + "; ".join(dict.fromkeys(problems.values())))

    def note(self, kind: str, fields: dict[str, Any]) -> None:
        """What the control process tells: `exports` of other processes, each {description, allowed, tls} or None;
        `cluster_exports` in the same way; where peers are, and what the registry has."""
        if kind == "peer_addresses":
            self._replicas.peer_addresses(**fields)
        elif kind == channel_registry.EVENT:
            self._registry.heard(fields)
        elif kind == "exports":
            for worker, listings in fields["workers"].items():
                for name, listing in listings.items():
                    if listing is None:
                        self._exports.forget_elsewhere(int(worker), name)
                    else:
                        self._exports.note_elsewhere(elsewhere(int(worker), name, listing))
        elif kind == "cluster_exports":
            self._clients.note(**fields)

    async def _ask(self, name: str, **arguments: Any) -> Any:
        """Ask the control process."""
        assert self.channel is not None
        return await self.channel.call(name, **arguments)

    def _publish(self, name: str, export: Export | None) -> None:
        """Say what clients may be told of an export by other processes and nodes."""
        listing: dict[str, Any] | None = None
        if export is not None:
            allowed, tls = list(export.allowed.texts), export.tls.value
            listing = {"description": export.description, "allowed": allowed, "tls": tls}
            if export.created_s is not None:
                listing |= {"created_s": export.created_s, "size_bytes": export.device.size_bytes}
        self._report("export", {"name": name, "listing": listing})

    def _report(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "client-gone":
            self._clients_gone += 1
            if self._clients_gone % CLIENTS_A_COLLECTION == 0:
                self._loop.call_soon(collect_garbage)
        if self.channel is not None:
            self.channel.notify(kind, fields)


def end_on_defect(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio's exception handler: log it; end the process if a callback of the loop, or a completion, failed."""
    loop.default_exception_handler(context)
    if context.get("exception") is not None and "future" not in context and "transport" not in context:
        os._exit(EXIT_DEFECT)


async def serve(sock: socket.socket, descriptors: socket.socket, watch: LoopWatch, place: Place) -> None:
    """Serve the channel until it asks for the end, or ends."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(end_on_defect)
    worker = Worker(loop, descriptors, watch, place)

    def channel_ended() -> None:
        if not worker.stopped.is_set():
            os._exit(1)  # the parent is gone: kill -9 loses nothing acknowledged, and nor does this

    worker.channel = await Channel.connect(sock, worker.handle, worker.note, channel_ended)
    await worker.stopped.wait()
    await worker.channel.close()


def main() -> None:
    """The data process."""
    parent, worker, workers, descriptor, descriptors, figures, _lock, *inboxes = map(int, sys.argv[1:])
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    name_process(DATA)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()
    sock, sending = socket.socket(fileno=descriptor), socket.socket(fileno=descriptors)
    logging.basicConfig(level=logging.WARNING, format="nbdserver data process: %(levelname)s: %(name)s: %(message)s")
    watch = LoopWatch()
    with asyncio.Runner(loop_factory=watch.new_loop) as runner:
        runner.run(serve(sock, sending, watch, Place(worker, workers, figures, inboxes)))


if __name__ == "__main__":
    main()
