"""A simulated machine: a host name, a clock of its own, a disk that outlives its processes, and the process.

Theory: production code gets the five seams and a generator, and nothing else of the world. A machine builds them anew
for each life of its process, over the disk as the last life left it: after a kill everything written is there, after
a power cut what was synced, and the clock begins again, because CLOCK_BOOTTIME does.

Rules of this file
- A clock never goes back within one boot. It runs at the machine's own rate, goes on while a process is paused, and
  leaps when a suspended machine goes on; timers count without the leap, as the real ones do.
- Asking for the time takes a little of it, so that work which runs until its time is used up ends.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from metadata.registry_guard import RegistryPast
from metadata.seams import Clock, Files, Network, Registry, Store
from tests.simulation.cluster.registry_twin import RegistryTwin
from tests.simulation.cluster.scheduler import Event, Life, Scheduler
from tests.simulation.cluster.simulated_registry import SimulatedRegistry
from tests.simulation.faults import FaultMix
from tests.simulation.simulated_files import SimulatedDrive, SimulatedFiles
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.cluster.simulated_network import Wires

DRIVE_BYTES = 1 << 30
TICK_S = 1e-6  # for each time the clock is asked
STANDING_RATE = 1e-9
TIMER_LATENESS_S = 0.0002  # at most, of a timer of a process that is not paused


@dataclass(frozen=True)
class Seams:
    """What a node is built of."""

    clock: Clock
    network: Network
    files: Files
    store: Store
    registry: Registry
    random: random.Random


class Node(Protocol):
    """The production code of one process."""

    def close(self) -> None:
        """End cleanly."""


Factory = Callable[["Machine", Seams], Node]


class MachineClock:
    """The Clock seam of one life on one machine."""

    def __init__(self, machine: "Machine", life: Life, is_device: bool = False) -> None:
        self._machine = machine
        self._scheduler = machine.scheduler
        self._life = life
        self._random = machine.random.random
        self._is_device = is_device  # what a device answers is no event of production code

    def now(self) -> float:
        self._scheduler.now_s += TICK_S
        return self._machine.local_s()

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Event:
        scheduler = self._scheduler
        wait_s = (delay_s if delay_s > 0.0 else 0.0) / self._machine.rate + self._random() * TIMER_LATENESS_S
        if self._is_device:
            return scheduler.at(scheduler.now_s + wait_s, self._life, callback)
        return scheduler.at(scheduler.now_s + wait_s, self._life, self._fire, callback)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._scheduler.at(self._scheduler.now_s, self._life, callback)

    def _fire(self, callback: Callable[[], None]) -> None:
        self._scheduler.production_events += 1
        callback()


class Machine(World):
    """One machine and the process on it. As a World it has chance of its own and shares the trace of all."""

    def __init__(
        self, scheduler: Scheduler, wires: "Wires", registry: RegistryTwin, name: str, host: str, site: str
    ) -> None:
        super().__init__(scheduler.seed)
        self.random = random.Random(f"{scheduler.seed} {name}")
        self.scheduler = scheduler
        self.name = name
        self.host = host
        self.site = site
        self.rate = 1.0
        self._stopped_rate = 0.0
        self.mix = FaultMix(cold_read=0.0, power=1.0)
        self.drive = SimulatedDrive(self, DRIVE_BYTES)
        self.table = SimulatedTable(self)
        self.life: Life | None = None
        self.node: Node | None = None
        self.lives = 0
        self.ended: Callable[[bool], None] = lambda power: None  # for what else the machine has
        self.is_powered = True
        self.registry_past: RegistryPast | None = None  # on its disk
        self._wires = wires
        self._registry = registry
        self._booted_s = scheduler.now_s
        self._local_at_boot_s = 0.0
        self._files: SimulatedFiles | None = None
        self._store: SimulatedStore | None = None
        self._boot()

    # --- its clock ---

    def local_s(self) -> float:
        """CLOCK_BOOTTIME."""
        return self._local_at_boot_s + (self.scheduler.now_s - self._booted_s) * self.rate

    def set_rate(self, rate: float) -> None:
        """Run faster or slower from now on."""
        self._local_at_boot_s, self._booted_s, self.rate = self.local_s(), self.scheduler.now_s, rate

    def leap(self, seconds: float) -> None:
        """The clock goes forward at once; timers do not."""
        self._local_at_boot_s += seconds

    def stop_clock(self) -> None:
        """Time stands still on this machine, until `resume_clock`."""
        if not self._stopped_rate:
            rate = self.rate
            self.set_rate(STANDING_RATE)
            self._stopped_rate = rate

    def resume_clock(self) -> None:
        """Time goes on where it stood."""
        if self._stopped_rate:
            self.set_rate(self._stopped_rate)
            self._stopped_rate = 0.0

    def _boot(self) -> None:
        self.is_powered = True
        self.rate, self._stopped_rate = self._stopped_rate or self.rate, 0.0
        self._booted_s, self._local_at_boot_s = self.scheduler.now_s, 5.0 + 20.0 * self.random.random()

    # --- its process ---

    def start(self, factory: Factory) -> None:
        """Begin a life; the machine is switched on if it was off."""
        if not self.is_powered:
            self._boot()
        self.has_crashed = False
        self.lives += 1
        life = self.life = Life(self.name)
        device = MachineClock(self, life, is_device=True)
        self._files = SimulatedFiles(self.drive, device, self.mix)
        self._store = SimulatedStore(self.table, device, self.mix, self._files.world_ends)
        clock = MachineClock(self, life)
        seams = Seams(
            clock,
            self._wires.network_of(self.host, life),
            self._files,
            self._store,
            SimulatedRegistry(self._registry, clock, life, self.registry_past, self._remember),
            self.random,
        )
        self.note("start", self.lives)
        self.node = factory(self, seams)

    def _remember(self, past: RegistryPast) -> None:
        self.registry_past = past

    def stop(self) -> None:
        """End the process cleanly."""
        if self.node is not None and self.life is not None:
            self.note("stop")
            node = self.node
            node.close()
            self.end(power=False)

    def end(self, power: bool) -> None:
        """The process is killed, or the machine loses its power."""
        life, self.life, self.node = self.life, None, None
        self.note("end", power)
        if life is not None:
            life.alive = False
            life.backlog.clear()
            self._wires.ended(life, power)
        if self._files is not None and self._store is not None:
            self._files.crash(power)
            self._store.crash()
            self._files = self._store = None
        if power:
            self.is_powered = False
        self.ended(power)

    def lose_disk(self) -> None:
        """The disk is replaced by an empty one of the same size; no process is running."""
        self.drive = SimulatedDrive(self, self.drive.capacity_bytes)
        self.table = SimulatedTable(self)
        self.registry_past = None

    def crash_in_a_call(self, calls: int) -> None:
        """The process ends inside the call of its disk that comes after so many."""
        if self._files is not None:
            self._files.operations_left = calls

    def mend(self) -> None:
        """Its disk is fast from now on, and no call of it fails or ends the process."""
        self.mix = replace(self.mix, slow=0.0, store_write_error=0.0)
        if self._files is not None and self._store is not None:
            self._files.mix = self._store.mix = self.mix
            self._files.operations_left = None

    def pause(self) -> None:
        if self.life is not None:
            self.life.paused = True

    def resume(self) -> None:
        if self.life is not None and self.life.paused:
            self.scheduler.resume(self.life)

    @property
    def is_running(self) -> bool:
        """Whether its process lives and is not paused."""
        return self.life is not None and not self.life.paused

    def note(self, *what: object) -> None:
        self.scheduler.note(self.name, *what)
