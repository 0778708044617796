"""The faults of a cluster as data, and the mix of them that a seed has.

Theory: swarm testing, as for the single disk (`tests/simulation/faults.py`): most faults are off in a run and a few of
them strong. A fault is a probability for each frame or call, or a mean number an hour for the whole cluster, in which
case `nemesis` makes it happen. Whatever happens is counted under the fault's name, so that a test can say that the
fixed seeds have met every one of them.

Rules of this file
- A fault is a row of `CATALOGUE`; what is not in it cannot be drawn.
- Nothing here may make a promise impossible to keep: a disk keeps what it synced (rot is the single disk's affair),
  and frames can be forged only by who does not have the key.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """One row: what it is, and the strengths from which a seed draws."""

    name: str
    means: str
    strengths: tuple[float, ...]
    share: float = 0.3  # of the seeds that have it
    apart: bool = False  # drawn by a generator of its own


CATALOGUE = (
    # For each datagram or piece of a stream.
    Fault("loss", "a datagram is lost; a piece of a stream comes after a retransmission", (0.01, 0.1, 0.3), 0.6),
    Fault("duplication", "a datagram arrives twice", (0.01, 0.3)),
    Fault("reordering", "a datagram is overtaken by later ones", (0.01, 0.3)),
    Fault("corruption", "bits of a datagram flip, or its end is cut off", (0.01, 0.1)),
    Fault("replay", "a datagram is sent again much later, by who has recorded it", (0.01, 0.05), 0.2),
    Fault("garbage", "a stranger's bytes reach a socket, beside a datagram", (0.02,), 0.2),
    Fault("stream reset", "both ends of a stream are told that it is over", (0.005, 0.05)),
    Fault("stream corruption", "bits of a stream flip (nothing may rely on TCP's checksum)", (0.002, 0.02), 0.15),
    # An hour of virtual time, for the whole cluster.
    Fault("split", "two halves of the cluster do not hear each other", (60.0, 240.0)),
    Fault("one-way split", "one half does not hear the other, which hears it", (60.0, 240.0)),
    Fault("bridge", "two halves do not hear each other, but one machine hears both and is heard", (60.0, 240.0)),
    Fault("isolation", "one machine hears nobody, or nobody hears it, or both", (60.0, 360.0)),
    Fault("clog", "frames from one machine to another stand still, then all come", (120.0, 1200.0)),
    Fault("kill", "a process is killed", (60.0, 360.0), 0.5),
    Fault("power", "a machine loses its power: its memory, its clock, its connections without a word", (30.0, 180.0)),
    Fault("power of all", "every machine loses its power", (60.0,), 0.15),
    Fault("crash in a call", "a process ends inside a call of its disk", (60.0, 360.0)),
    Fault("stop", "a process is ended cleanly and started again", (60.0, 180.0), 0.2),
    Fault("pause", "a process stands still (SIGSTOP): frames wait, timers come late and all at once", (60.0, 360.0)),
    Fault("suspend", "a machine stands still, and its clock has or has not gone on", (60.0,), 0.2),
    Fault("step", "a clock leaps forward by up to a minute", (30.0, 120.0), 0.2),
    # For each call, or a property of each machine.
    Fault("drift", "clocks run too fast or too slow, by up to this share", (0.0001, 0.01), 0.5),
    Fault("slow disk", "the share of a machine's disk calls that take a hundred times as long", (0.02, 0.3)),
    Fault("disk error", "the share of the writes to a machine's store that fail", (0.001, 0.01), 0.15),
    Fault("disk lost", "a machine comes back with an empty disk, once in a run", (60.0,), 0.2),
    Fault("registry outage", "the registry answers nobody for a while", (60.0, 240.0)),
    Fault("registry delay", "the share of the registry's answers that take up to some seconds", (0.05, 0.5)),
    Fault("registry unknown", "the share of the registry's changes whose outcome is not told", (0.02, 0.2)),
    Fault("registry compaction", "the registry forgets the history that watches resume from", (60.0, 600.0)),
    Fault("watch break", "a watch breaks and has to be resumed", (60.0, 600.0)),
    Fault("lease lost", "the registry ends a lease early, as after a restore from a backup", (120.0,), 0.15),
    Fault("registry put back", "the registry holds an earlier state, until it is recovered", (60.0, 240.0), 0.15, True),
)  # fmt: skip
NAMES = frozenset(fault.name for fault in CATALOGUE)


@dataclass(frozen=True)
class Mix:
    """The strengths that a seed has drawn; 0 for what it does not have."""

    strengths: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        if name not in NAMES:
            raise KeyError(f"{name!r} is no fault of the catalogue")
        return self.strengths.get(name, 0.0)

    def __str__(self) -> str:
        return ", ".join(f"{name} {strength:g}" for name, strength in self.strengths.items()) or "no faults"


def draw_mix(rng: random.Random) -> Mix:
    """One seed in twelve has no fault at all; the others have what they draw. What is drawn apart takes nothing from
    `rng`, so that seeds from before it was there mean what they meant."""
    if rng.random() < 1 / 12:
        return Mix()
    first = {fault.name: rng.choice(fault.strengths) for fault in CATALOGUE if not fault.apart and _has(fault, rng)}
    own = random.Random()
    own.setstate(rng.getstate())
    own.seed(f"{own.random()} apart")
    apart = {fault.name: own.choice(fault.strengths) for fault in CATALOGUE if fault.apart and _has(fault, own)}
    return Mix(first | apart)


def _has(fault: Fault, rng: random.Random) -> bool:
    return rng.random() < fault.share
