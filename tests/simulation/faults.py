"""Which faults a seed has: swarm testing.

Theory: a run in which everything can fail a little mostly tests the first failure. So each seed draws its own mix, with
most faults off and a few of them strong (Groce et al., "Swarm testing", 2012); it also draws the sizes, small enough
that cleaning, checkpoints, eviction and recycling all happen within a few hundred operations.

Rules of this file
- *Honest* faults (crashes, errors that are reported, a slow or full disk) leave every promise in force. *Lying* faults
  (rot, lost and misdirected writes) may cost availability and what was written last, never answer with wrong data.
- A mix is drawn from the world's generator and nothing else.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class FaultMix:
    """Probabilities are per call of the seam."""

    cold_read: float = 0.1  # read_cached says None
    read_error: float = 0.0
    append_error: float = 0.0
    sync_error: float = 0.0
    store_read_error: float = 0.0
    store_write_error: float = 0.0
    create_error: float = 0.0  # ENOSPC although there seemed to be room
    latency_s: float = 0.001  # mean time of what is done off the loop
    slow: float = 0.0  # share of reads and of store writes that take a hundred times as long
    power: float = 0.5  # share of crashes that lose the page cache
    tear: float = 0.5  # of the pages that a power cut finds dirty, the share that may come out mixed by sectors
    rot: float = 0.0  # a bit of what is on the device flips, per crash and per 100 operations
    lost_write: float = 0.0  # an append that reports success and did not happen
    misdirected_write: float = 0.0  # an append that lands elsewhere in the file
    crash_in_io: float = 0.5  # share of crashes inside a call of Files or Store
    room_segments: int = 1000  # size of the file system beyond the floor that the pool leaves free

    @property
    def lies(self) -> bool:
        """Whether the device does something else than it says."""
        return bool(self.rot or self.lost_write or self.misdirected_write)


def draw_mix(rng: random.Random, lying: bool = False) -> FaultMix:
    """A mix for one seed. Errors of the device are in one seed of three, a small disk in one of five."""
    mix = FaultMix(
        cold_read=rng.choice([0.0, 0.05, 0.5, 1.0]),
        latency_s=rng.choice([0.00001, 0.001, 0.001, 0.05]),
        slow=rng.choice([0.0, 0.02, 0.2, 1.0]),
        power=rng.choice([0.0, 0.5, 0.8, 1.0]),
        tear=rng.choice([0.0, 0.3, 1.0]),
        crash_in_io=rng.choice([0.0, 0.5, 1.0]),
    )
    if rng.random() < 0.33:
        faults = ["read_error", "append_error", "sync_error", "sync_error", "store_read_error", "store_write_error"]
        fault = rng.choice(faults)
        mix = changed(mix, {fault: rng.choice([0.002, 0.02, 0.1])})
    if rng.random() < 0.2:
        mix = replace(mix, room_segments=rng.randrange(6, 40))
    if rng.random() < 0.1:
        mix = replace(mix, create_error=rng.choice([0.05, 0.5]))
    if lying:
        fault = rng.choice(["rot", "lost_write", "misdirected_write"])
        mix = changed(mix, {fault: rng.choice([0.01, 0.1])})
    return mix


def changed(mix: FaultMix, changes: Mapping[str, float]) -> FaultMix:
    """The mix with some of its fields set."""
    fields: dict[str, Any] = dict(changes)
    return replace(mix, **fields)


def without_faults(mix: FaultMix) -> FaultMix:
    """The same machine on a good day."""
    return FaultMix(latency_s=mix.latency_s, room_segments=mix.room_segments)
