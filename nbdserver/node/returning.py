"""Clients that were handed over while their volume is not served yet: they stand still until it is, for a while.

A replicated volume is owned again only when the registry of the cluster answers and a grant has run out, which may take
longer than all that a process has to do before it serves. If another node owns it by then, they are closed.

Known weakness: whoever still waits when the next handover begins is closed.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from metadata.seams import Clock
from nbdserver.frontend.forwarded import RETURN_S
from nbdserver.frontend.server import Server
from nbdserver.host.listening import descriptor_cookie
from nbdserver.host.network import SocketNetwork
from nbdserver.node import handover
from nbdserver.node.descriptors import close_all
from nbdserver.volume.export import Exports
from protocol.handover import ClientState, Handover

LOOK_S = 0.05

Client = tuple[ClientState, int]
"""With its socket."""


class Returning:
    """Clients of the process before."""

    def __init__(
        self,
        clock: Clock,
        network: SocketNetwork,
        server: Server,
        exports: Exports,
        report: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._clock = clock
        self._network = network
        self._server = server
        self._exports = exports
        self._report = report
        self._waiting: asyncio.Task[None] | None = None

    def take(self, before: Handover, descriptors: Sequence[int], may_wait: bool) -> int:
        """Go on with those whose volumes are served, at once; with the others when they are, if they `may_wait`. How
        many there are."""
        by_cookie = {descriptor_cookie(descriptor): descriptor for descriptor in descriptors}
        clients = [(state, by_cookie.pop(state.cookie)) for state in before.clients if state.cookie in by_cookie]
        close_all(by_cookie.values())
        served, waiting = self._parted(clients) if may_wait else (clients, [])
        taken = self._go_on_with(served)
        if waiting:
            self._waiting = asyncio.get_running_loop().create_task(self._wait(waiting, before.frozen_s))
        return taken + len(waiting)

    def _parted(self, clients: Sequence[Client]) -> tuple[list[Client], list[Client]]:
        """Those whose volumes are served, and the others."""
        served: list[Client] = []
        others: list[Client] = []
        for client in clients:
            is_served = self._exports.lookup(client[0].agreement.offer.name) is not None
            (served if is_served else others).append(client)
        return served, others

    def _go_on_with(self, clients: Sequence[Client]) -> int:
        states, descriptors = [state for state, _ in clients], [descriptor for _, descriptor in clients]
        return handover.take(self._server, self._network, states, descriptors)

    async def _wait(self, clients: list[Client], frozen_s: float) -> None:
        until_s = self._clock.now() + RETURN_S
        while clients and self._clock.now() < until_s:
            ready, clients = self._parted(clients)
            if ready:
                taken, pause_s = self._go_on_with(ready), round(self._clock.now() - frozen_s, 3)
                self._report("clients-returned", {"clients": taken, "pause_s": pause_s})
            await asyncio.sleep(LOOK_S)
        for state, descriptor in clients:
            close_all([descriptor])
            name = state.agreement.offer.name
            reason = f"{name} was not served here within {RETURN_S:.0f} s"
            self._report("client-not-taken-over", {"peer": f"client {state.id}", "reason": reason})
