"""A cluster in one thread: its machines, its network, its faults, and what goes on in it from one seed.

Theory: two phases. In the first, *safety*, faults of the seed's mix happen at any time and clients go on working; no
answer may be wrong, however few there are. In the second, *liveness*, a core of machines is mended for good; then
everything must converge within a time. A cluster that is never wrong and never does anything passes only the first.

What is run is a `Scenario`: which machines there are, what production code runs on them, what clients do, what must
always hold and what must hold in the end.

Rules of this file
- What production code raises ends the run; only SimulatedCrash is the end of one process.
- The seed alone decides: two runs have the same fingerprint (`Scheduler.fingerprint`).
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from metadata.registry_calls import LIFE_KEY, Change
from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Factory, Machine
from tests.simulation.cluster.nemesis import Nemesis
from tests.simulation.cluster.paths import Latency
from tests.simulation.cluster.registry_twin import RegistryTwin
from tests.simulation.cluster.scheduler import Scheduler
from tests.simulation.cluster.simulated_network import Wires
from tests.simulation.registers import ViolationError
from tests.simulation.world import SimulatedCrash

SAME_SITE = Latency(0.0001, 0.0002)
FAR = Latency(0.02, 0.01)
CHECK_S = 0.5  # of virtual time between looks at what must always hold
SLOW_DISK_LATENCY_S = 0.001


class Scenario(Protocol):
    """What runs in a cluster, and by what it is judged."""

    converges_within_s: float

    def begin(self, cluster: "Cluster") -> None:
        """Add the machines and start them."""

    def act(self) -> None:
        """Clients do something."""

    def check(self) -> None:
        """Raise ViolationError if something does not hold that always must."""

    def core(self, rng: random.Random) -> set[str]:
        """The machines that are mended in the end; all others stay off. They must be enough."""

    def missing(self) -> str:
        """What has not converged yet; empty when everything has."""

    def end(self) -> None:
        """Look back on the whole run: raise ViolationError."""


class Cluster:
    """The machines and what is between them."""

    def __init__(
        self,
        seed: int,
        mix: Mix,
        factory: Factory,
        story: Callable[[str], None] | None = None,
    ) -> None:
        self.scheduler = Scheduler(seed)
        self.random = self.scheduler.random
        self.mix = mix
        self.hits: Counter[str] = Counter()
        self.wires = Wires(self.scheduler, mix, self.hits, SAME_SITE, FAR)
        self.wires.watch_power(lambda name: self.machines[name].is_powered)
        self.machines: dict[str, Machine] = {}
        self.registry = RegistryTwin(self.scheduler, mix, self.hits)
        self.nemesis = Nemesis(self, mix)
        self.may_lose_disk: Callable[[str], bool] = lambda name: False  # whether a machine's disk is one too few
        self.recover: Callable[[], None] | None = None  # what operators do when the registry was put back
        self.needs_recovery = False
        self.recovered_s = 0.0
        self.put_back_keys: set[str] = set()  # of the registry: what they held is gone, or is older
        self.node_s = 0.0  # lives of processes, all together, in virtual time
        self._factory = factory
        self._story = story

    @property
    def now_s(self) -> float:
        """Virtual time."""
        return self.scheduler.now_s

    def tell(self, what: str) -> None:
        """Part of the story of a run that is looked at."""
        if self._story is not None:
            self._story(f"{self.scheduler.now_s - 1000.0:12.6f} {what}")

    def add(self, name: str, site: str = "site-1") -> Machine:
        """Set up a machine; it is started by `start`."""
        number = len(self.machines) + 1
        host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        self.wires.add(name, host, site)
        machine = self.machines[name] = Machine(self.scheduler, self.wires, self.registry, name, host, site)
        if self.mix["drift"]:
            self.hits["drift"] += 1
            machine.set_rate(1.0 + self.mix["drift"] * self.random.uniform(-1.0, 1.0))
        if self.mix["slow disk"]:
            self.hits["slow disk"] += 1
            machine.mix = replace(machine.mix, slow=self.mix["slow disk"], latency_s=SLOW_DISK_LATENCY_S)
        machine.mix = replace(machine.mix, store_write_error=self.mix["disk error"])
        return machine

    def failed(self, machine: Machine, reason: str) -> None:
        """The process of a machine cannot go on: it ends, as one that exits, and is started again."""
        self.tell(f"{machine.name} ends: {reason}")
        self.hits["disk error"] += 1
        self.scheduler.at(self.now_s, machine.life, self.nemesis.exited, machine)

    def hear_each_other(self, one: Machine, other: Machine) -> bool:
        """Whether a call between them would be answered."""
        ends = one.name, other.name
        return one is other or not (self.wires.path(*ends).blocks or self.wires.path(*reversed(ends)).blocks)

    def make_registry_whole(self, changes: Sequence[Change], told: Sequence[Machine]) -> None:
        """The registry begins its next life with these changes, made from what some machines have told."""
        registry = self.registry
        lives = [machine.registry_past.life for machine in told if machine.registry_past is not None]
        life = str(max([registry.past.life, *lives]) + 1).encode()
        before = registry.get(LIFE_KEY).items
        registry.swap([*changes, Change(LIFE_KEY, before[0][1] if before else None, life)])
        registry.home = registry.cluster_id
        self.needs_recovery, self.recovered_s = False, self.now_s
        self.put_back_keys.clear()

    def start(self, name: str) -> None:
        """Start the process of a machine, if it has none."""
        machine = self.machines[name]
        if machine.life is None:
            self.tell(f"{name} starts")
            try:
                machine.start(self._factory)
            except SimulatedCrash:
                self._crashed()
            except OSError as error:
                self.failed(machine, f"it cannot start: {error}")

    def isolate(self, name: str) -> Callable[[], None]:
        """A machine hears nobody, nor does anybody hear it, the registry neither; returns what mends it."""
        unblock = self.wires.block([name], list(self.machines), both=True)
        self.registry.cuts[name] += 1

        def mend() -> None:
            self.registry.cuts[name] -= 1
            unblock()

        return mend

    def run(self, duration_s: float) -> None:
        """Let that much virtual time go by."""
        self.run_until(lambda: False, duration_s)

    def run_until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """Run events until `holds()`; False if it does not within that much virtual time."""
        scheduler = self.scheduler
        begun_s, until_s = scheduler.now_s, scheduler.now_s + limit_s
        step = scheduler.step
        try:
            while not holds():
                try:
                    if not step(until_s):
                        scheduler.now_s = max(scheduler.now_s, until_s)
                        return holds()
                except SimulatedCrash:
                    self._crashed()
            return True
        finally:
            self.node_s += (scheduler.now_s - begun_s) * sum(each.life is not None for each in self.machines.values())

    def heal(self, core: set[str]) -> None:
        """No fault happens any more. The core's machines run; the others are off."""
        self.nemesis.heal()
        self.wires.set_mix(Mix())
        self.registry.set_mix(Mix())
        for name, machine in self.machines.items():
            if name in core:
                machine.mend()
                self.start(name)
            else:
                machine.end(power=True)

    def _crashed(self) -> None:
        for machine in self.machines.values():
            if machine.has_crashed and machine.life is not None:
                self.tell(f"{machine.name} ends inside a call of its disk")
                self.nemesis.crashed(machine)


class ClusterRun:
    """Both phases of one seed. `go` raises ViolationError, or what production code raised."""

    def __init__(self, cluster: Cluster, scenario: Scenario, safety_s: float, act_s: float) -> None:
        self.cluster = cluster
        self.scenario = scenario
        self._safety_s = safety_s
        self._act_s = act_s
        self._acting = True
        self.converged_s = 0.0  # how long healing took, in virtual time

    def go(self) -> "ClusterRun":
        cluster, scenario = self.cluster, self.scenario
        cluster.tell(f"the faults: {cluster.mix}")
        scenario.begin(cluster)
        cluster.nemesis.begin()
        self._act()
        self._check()
        cluster.run(self._safety_s)
        self._acting = False
        core = scenario.core(cluster.random)
        cluster.tell(f"healed: {', '.join(sorted(core))}")
        healed_s = cluster.now_s
        cluster.heal(core)
        converge(cluster, scenario)
        self.converged_s = cluster.now_s - healed_s
        scenario.end()
        return self

    def _act(self) -> None:
        if self._acting:
            self.scenario.act()
            self.cluster.scheduler.after(self.cluster.random.expovariate(1.0 / self._act_s), self._act)

    def _check(self) -> None:
        self.scenario.check()
        self.cluster.scheduler.after(CHECK_S, self._check)


def converge(cluster: Cluster, scenario: Scenario) -> None:
    """Let time go by until nothing is missing; ViolationError if that takes too long."""
    limit_s = scenario.converges_within_s
    until_s = cluster.now_s + limit_s
    while cluster.now_s < until_s:
        missing = scenario.missing()
        if not missing:
            cluster.tell("converged")
            return
        cluster.run(min(CHECK_S, limit_s))
    raise ViolationError(f"{limit_s:g} s after all was healed: {missing}")
