"""Makes the faults of a mix happen that are counted by the hour, and takes them all back.

Theory: each such fault is a Poisson process of its own. What it does ends by itself after a drawn time; healing ends
everything at once and for good.

Rules of this file
- Whoever breaks something registers how it is mended, and each is mended once.
- A machine that was ended is started again by `mend`, or after its time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tests.simulation.cluster.faults import Mix
from tests.simulation.cluster.machine import Machine
from tests.simulation.cluster.registry_twin import Backup
from tests.simulation.cluster.simulated_registry import REMEMBER_S

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster

HOUR_S = 3600.0
BETWEEN_S = 2 * REMEMBER_S
PATIENCE_S = 5.0  # a partition that begins in somebody's silence has to last longer than a lease


class Nemesis:
    """The faults of one run."""

    def __init__(self, cluster: "Cluster", mix: Mix) -> None:
        self._cluster = cluster
        self._scheduler = cluster.scheduler
        self._random = cluster.scheduler.random
        self._mix = mix
        self._mends: dict[int, Callable[[], None]] = {}
        self._last_mend = 0
        self._disks_lost = 0
        self._active = True
        self._backup: Backup | None = None
        self._deeds: dict[str, Callable[[], bool]] = {
            "split": partial(self._split, both=True),
            "one-way split": partial(self._split, both=False),
            "bridge": self._bridge,
            "isolation": self._isolate,
            "clog": self._clog,
            "kill": partial(self._end_one, power=False),
            "power": partial(self._end_one, power=True),
            "power of all": self._end_all,
            "crash in a call": self._crash_in_a_call,
            "stop": self._stop,
            "pause": partial(self._pause, stands_still=False),
            "suspend": partial(self._pause, stands_still=True),
            "step": self._step,
            "disk lost": self._lose_disk,
            "registry outage": self._silence_registry,
            "registry compaction": self._compact_registry,
            "watch break": self._break_watches,
            "lease lost": cluster.registry.end_a_lease,
            "registry put back": self._put_registry_back,
        }

    def begin(self) -> None:
        """Let the faults happen."""
        for name in self._deeds:
            if self._mix[name]:
                self._next(name)

    def heal(self) -> None:
        """Nothing happens any more, and everything that happened is mended."""
        self._active = False
        for number in list(self._mends):
            self._mend(number)

    def crashed(self, machine: Machine) -> None:
        """A machine's process has ended inside a call of its disk."""
        self._cluster.hits["crash in a call"] += 1
        self._end_and_start(machine, power=self._random.random() < 0.5)

    def exited(self, machine: Machine) -> None:
        """A machine's process has given up."""
        self._end_and_start(machine, power=False)

    def _end_and_start(self, machine: Machine, power: bool) -> None:
        machine.end(power)
        if self._active:
            self._broken(self._away_s(), partial(self._cluster.start, machine.name))
        else:
            self._cluster.start(machine.name)

    def _next(self, name: str) -> None:
        self._scheduler.after(self._random.expovariate(self._mix[name] / HOUR_S), self._happens, name)

    def _happens(self, name: str) -> None:
        if self._active:
            if self._deeds[name]():
                self._cluster.hits[name] += 1
                self._scheduler.note(name)
            self._next(name)

    def _broken(self, duration_s: float, mend: Callable[[], None]) -> None:
        self._last_mend += 1
        self._mends[self._last_mend] = mend
        self._scheduler.after(duration_s, self._mend, self._last_mend)

    def _mend(self, number: int) -> None:
        mend = self._mends.pop(number, None)
        if mend is not None:
            mend()

    def _away_s(self) -> float:
        """How long something is broken: mostly for a moment, now and then for longer than any patience."""
        return self._random.choice([0.05, 1.0, 1.0, 5.0, 5.0, 20.0, 100.0]) * self._random.random()

    # --- the network ---

    def _block(self, sources: Sequence[str], targets: Sequence[str], both: bool, is_long: bool = False) -> None:
        unblock = self._cluster.wires.block(sources, targets, both)
        # The registry is on one side of it, or has a way of its own to everyone.
        cut_off = self._random.choice([sources, targets, []]) if both else []
        duration_s = self._away_s() + is_long * PATIENCE_S
        self._cluster.registry.cuts.update(cut_off)

        def mend() -> None:
            self._cluster.registry.cuts.subtract(cut_off)
            unblock()

        self._cluster.tell(f"{sources} {'and' if both else 'to'} {targets} blocked for {duration_s:.3f} s")
        self._broken(duration_s, mend)

    def _split(self, both: bool) -> bool:
        names = list(self._cluster.machines)
        self._random.shuffle(names)
        cut = self._random.randrange(1, len(names)) if len(names) > 1 else 0
        if not cut:
            return False
        self._block(names[:cut], names[cut:], both)
        return True

    def _bridge(self) -> bool:
        """Both halves have a majority with the machine between: with the registry on one side there are soon two
        masters, and one machine hears both."""
        names = list(self._cluster.machines)
        if len(names) < 3:
            return False
        self._random.shuffle(names)
        cut = self._random.randrange(1, len(names) - 1)
        self._block(names[:cut], names[cut + 1 :], both=True, is_long=True)
        return True

    def _isolate(self) -> bool:
        names = list(self._cluster.machines)
        one = [self._random.choice(names)]
        way = self._random.randrange(3)
        if way == 0:
            self._block(one, names, both=True)
        elif way == 1:
            self._block(one, names, both=False)
        else:
            self._block(names, one, both=False)
        return len(names) > 1

    def _clog(self) -> bool:
        if len(self._cluster.machines) < 2:
            return False
        source, target = self._random.sample(list(self._cluster.machines), 2)
        duration_s = self._away_s() / 5
        self._cluster.tell(f"{source} to {target} clogged for {duration_s:.3f} s")
        self._cluster.wires.path(source, target).clog(duration_s)
        return True

    # --- machines ---

    def _one(self) -> Machine | None:
        """Some machine whose process runs."""
        running = [machine for machine in self._cluster.machines.values() if machine.is_running]
        return self._random.choice(running) if running else None

    def _end(self, machine: Machine, power: bool) -> None:
        away_s = self._away_s()
        self._cluster.tell(f"{machine.name} {'loses its power' if power else 'is killed'} for {away_s:.3f} s")
        machine.end(power)
        self._broken(away_s, partial(self._cluster.start, machine.name))

    def _end_one(self, power: bool) -> bool:
        machine = self._one()
        if machine is not None:
            self._end(machine, power)
        return machine is not None

    def _end_all(self) -> bool:
        for machine in self._cluster.machines.values():
            if machine.life is not None:
                self._end(machine, power=True)
        return True

    def _crash_in_a_call(self) -> bool:
        machine = self._one()
        if machine is not None:
            machine.crash_in_a_call(self._random.choice([0, 1, 5, 50]))
        return False  # counted when it comes to pass

    def _stop(self) -> bool:
        machine = self._one()
        if machine is not None:
            away_s = self._away_s()
            self._cluster.tell(f"{machine.name} is stopped for {away_s:.3f} s")
            machine.stop()
            self._broken(away_s, partial(self._cluster.start, machine.name))
        return machine is not None

    def _pause(self, stands_still: bool) -> bool:
        machine = self._one()
        if machine is None:
            return False
        duration_s, life = self._away_s(), machine.life
        clock_too = stands_still and self._random.random() < 0.5
        self._cluster.tell(f"{machine.name} stands still for {duration_s:.3f} s{', its clock too' * clock_too}")
        if clock_too:
            machine.stop_clock()
        machine.pause()
        # Of a process that is stopped the kernel still answers, of a machine it does not.
        unblock = self._cluster.wires.block([machine.name] if stands_still else [], list(self._cluster.machines))

        def mend() -> None:
            if clock_too:
                machine.resume_clock()
            unblock()
            if machine.life is life:
                machine.resume()

        self._broken(duration_s, mend)
        return True

    def _step(self) -> bool:
        machine = self._random.choice(list(self._cluster.machines.values()))
        leap_s = self._random.choice([0.01, 1.0, 60.0]) * self._random.random()
        self._cluster.tell(f"the clock of {machine.name} leaps by {leap_s:.3f} s")
        machine.leap(leap_s)
        return True

    def _lose_disk(self) -> bool:
        machine = self._one()
        if machine is None or self._disks_lost or not self._cluster.may_lose_disk(machine.name):
            return False
        self._disks_lost += 1
        self._end(machine, power=True)
        self._cluster.tell(f"{machine.name} has lost its disk")
        machine.lose_disk()
        return True

    # --- the registry ---

    def _silence_registry(self) -> bool:
        registry, duration_s = self._cluster.registry, self._away_s()
        if self._random.random() < 0.5:
            self._cluster.tell(f"the registry is silent for {duration_s:.3f} s")
            registry.go_down()
            self._broken(duration_s, registry.come_back)
        else:
            machine = self._random.choice(list(self._cluster.machines))
            self._cluster.tell(f"the registry is silent to {machine} for {duration_s:.3f} s")
            registry.cuts[machine] += 1
            self._broken(duration_s, lambda: registry.cuts.subtract([machine]))
        return True

    def _compact_registry(self) -> bool:
        self._cluster.registry.compact()
        return True

    def _break_watches(self) -> bool:
        self._cluster.registry.break_watches()
        return True

    def _put_registry_back(self) -> bool:
        """To the backup that was made the last time, in the same life. It is recovered after a while."""
        cluster, backup = self._cluster, self._backup
        # Nobody does it again before the nodes have remembered that it was recovered.
        if cluster.recover is None or cluster.needs_recovery or cluster.now_s < cluster.recovered_s + BETWEEN_S:
            return False
        self._backup = cluster.registry.back_up()
        if backup is None or backup.life != self._backup.life:
            return False
        away_s = self._away_s()
        cluster.tell(f"the registry is put back from {self._backup.revision} to {backup.revision} for {away_s:.3f} s")
        cluster.needs_recovery = True
        cluster.put_back_keys |= cluster.registry.put_back(backup)
        self._broken(away_s, cluster.recover)
        return True
