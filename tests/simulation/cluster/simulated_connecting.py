"""Connecting over the simulated network.

Rules of this file
- SYNs are sent again until something comes back or the time is up.
- The accepting side has its connection first, and may have lost it before the other side has its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from metadata.seams import Connection, Receiver
from tests.simulation.cluster.scheduler import Life
from tests.simulation.cluster.simulated_streams import SimulatedConnection

if TYPE_CHECKING:
    from tests.simulation.cluster.simulated_network import Wires

SYN_RETRY_S = 1.0


class SimulatedConnecting:
    """A connect under way: SYNs are sent again until something comes back or the time is up."""

    def __init__(
        self,
        wires: "Wires",
        life: Life,
        source: str,
        address: str,
        connected: Callable[[Connection], Receiver | None],
        failed: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        self._wires = wires
        self._life = life
        self._source = source
        self._address = address
        self._connected = connected
        self._failed = failed
        self._open = True
        now_s = wires.scheduler.now_s
        self._timer = wires.scheduler.at(now_s + timeout_s, life, self._fail, f"no answer in {timeout_s:g} s")
        self._target = wires.machine_at(address)
        if self._target is None:
            wires.scheduler.at(now_s, life, self._fail, "No route to host")
        else:
            self._forth = wires.path(life.machine_name, self._target)
            self._back = wires.path(self._target, life.machine_name)
            wires.scheduler.after(self._forth.delay_s(), self._arrive)

    def give_up(self) -> None:
        self._open = False
        self._timer.cancel()

    def _arrive(self) -> None:
        """The SYN has come to the other machine, or has not."""
        wires = self._wires
        if not self._open or not self._life.alive:
            return
        if self._forth.blocks or self._back.blocks or not wires.is_up(self._target) or wires.retransmission_s():
            wires.scheduler.after(SYN_RETRY_S * (1.0 + wires.scheduler.random.random()), self._arrive)
            return
        door = wires.doors.get(self._address)
        if door is None:
            wires.scheduler.at(
                wires.scheduler.now_s + self._back.delay_s(), self._life, self._fail, "Connection refused"
            )
            return
        life, accept = door
        ours = SimulatedConnection(wires, self._life, self._address, self._forth)
        theirs = SimulatedConnection(wires, life, self._source, self._back)
        ours.other, theirs.other = theirs, ours
        wires.connections.update({ours: None, theirs: None})
        wires.scheduler.at(wires.scheduler.now_s + wires.wake_s(), life, _accept, theirs, accept)
        wires.scheduler.at(wires.scheduler.now_s + self._back.delay_s(), self._life, self._succeed, ours)

    def _succeed(self, connection: SimulatedConnection) -> None:
        if not self._open:
            connection.abort()
            return
        self.give_up()
        _accept(connection, self._connected)

    def _fail(self, reason: str) -> None:
        if self._open:
            self.give_up()
            self._failed(reason)


def _accept(connection: SimulatedConnection, accept: Callable[[Connection], Receiver | None]) -> None:
    receiver = accept(connection)
    if receiver is None:
        connection.abort()
    else:
        connection.start(receiver)
