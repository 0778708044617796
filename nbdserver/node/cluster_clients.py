"""Clients of a cluster, in the data process: those of this node that are served by another one, and those of others
that are served here.

Theory: volumes of the cluster are known on every node (the note `cluster_exports`); which node serves one is asked of
the control process (`attach`), each time a client wants one that is not served here. The rest is in
frontend/away_client.py and frontend/forwarded.py.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from metadata.seams import Clock, Network
from nbdserver.frontend.attaching import Attaching
from nbdserver.frontend.away_client import Answer, Here, Nobody, There
from nbdserver.frontend.forwarded import ForwardedClients
from nbdserver.frontend.server import Server
from nbdserver.node.channel import ChannelError, RemoteError
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.volume.admission import TlsMode
from nbdserver.volume.export import Elsewhere, Exports
from nbdserver.volume.wanted import Wanted
from protocol.peer_clients import FORWARDER_BYTES, Forward, Forwarded, Keep


class ClusterClients:
    """Both ways of them."""

    def __init__(self, clock: Clock, exports: Exports, ask: Callable[..., Awaitable[Any]]) -> None:
        """`ask(name, **arguments)` of the control process: ChannelError or RemoteError if it does not answer."""
        self._clock = clock
        self._exports = exports
        self._ask = ask
        self._asking: set[asyncio.Task[Answer]] = set()
        self._attaching: Attaching | None = None
        self._forwarded: ForwardedClients | None = None

    def begin(self, server: Server) -> None:
        """This server has the clients."""
        self._forwarded = ForwardedClients(self._clock, server, self._exports)
        self._attaching = Attaching(
            self._clock, server, os.urandom(FORWARDER_BYTES), self._ask_who_serves, self._forwarded.settle
        )

    def connect_by(self, node: str, network: Network) -> None:
        """This node's name, and how it reaches the others."""
        assert self._attaching is not None
        self._attaching.connect_by(node, network)

    def accept(self, stream: PeerStream, frame: Forward | Keep) -> None:
        """A stream of another node begins with this frame."""
        if self._forwarded is None:
            stream.close(Forwarded("it is being started"))
        else:
            self._forwarded.accept(stream, frame)

    def note(self, exports: Mapping[str, dict[str, Any] | None]) -> None:
        """What the control process tells of volumes of the cluster."""
        for name, listing in exports.items():
            if listing is None:
                self._exports.forget_in_cluster(name)
            else:
                self._exports.note_in_cluster(elsewhere(None, name, listing))

    def _ask_who_serves(
        self, export: str, failed: tuple[str, ...], wanted: Wanted, done: Callable[[Answer], None]
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._who_serves(export, failed, wanted))
        self._asking.add(task)

        def answered(task: asyncio.Task[Answer]) -> None:
            self._asking.discard(task)
            if not task.cancelled():  # the process ends
                done(task.result())

        task.add_done_callback(answered)

    async def _who_serves(self, export: str, failed: tuple[str, ...], wanted: Wanted) -> Answer:
        try:
            answer = await self._ask("attach", export=export, failed=failed, wanted=wanted.value)
        except (ChannelError, RemoteError) as error:
            return Nobody(str(error))
        if answer.get("own"):
            return Here(answer["address"])
        return There(answer["node"], answer["address"]) if "node" in answer else Nobody(answer["error"])


def elsewhere(worker: int | None, name: str, listing: dict[str, Any]) -> Elsewhere:
    """What another process, or the control process, says of an export as {description, allowed, tls}."""
    return Elsewhere(worker, name, listing["description"], listing["allowed"], TlsMode(listing["tls"]))
