"""Everything that can be simulated from a seed, behind one door: the tests, `make simulate` and replays go through it.

Rules of this file
- A seed means the same run wherever it is tried: what a run needs is drawn from it.
- A failure names the command that tells its story.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.simulation.cluster.cluster import ClusterRun
from tests.simulation.cluster.directory import directory_run
from tests.simulation.registers import ViolationError
from tests.simulation.replication.in_memory import replication_run
from tests.simulation.replication.on_log_disks import replicas_run
from tests.simulation.run import Run, lies

Story = Callable[[str], None]


@dataclass(frozen=True)
class Tried:
    """What came of one seed."""

    world: str
    seed: int
    wrong: str
    """Empty if no promise was broken."""
    fingerprint: str
    summary: str
    """Of what happened, for who looks at one seed."""
    busy_s: float
    """CPU time."""
    events: int = 0
    """Frames delivered to, and timers fired in, production code of a cluster."""
    node_s: float = 0.0
    """Virtual time that its processes lived, together."""

    @property
    def again(self) -> str:
        """The command that tells the story."""
        return f"make simulate WORLD={self.world} SEED={self.seed}"


def _disk(seed: int, story: Story | None) -> Tried:
    began_s = time.process_time()
    run = Run(seed, lying=lies(seed), story=story)
    wrong = _wrong(run.go)
    summary = f"{dict(run.counters)}, {dict(run.reports)}"
    return Tried("disk", seed, wrong, f"{run.world.digest:08x}", summary, time.process_time() - began_s)


def _cluster(world: str, make: Callable[..., tuple[Any, ClusterRun]], seed: int, story: Story | None) -> Tried:
    scenario, run = make(seed, story=story)
    began_s = time.process_time()
    wrong = _wrong(run.go)
    cluster = run.cluster
    summary = (
        f"the faults: {cluster.mix}\nwhat happened: {dict(cluster.hits)}\nanswers: {dict(scenario.answers)};"
        f" converged in {run.converged_s:.1f} s"
    )
    return Tried(
        world,
        seed,
        wrong,
        cluster.scheduler.fingerprint,
        summary,
        time.process_time() - began_s,
        cluster.scheduler.production_events,
        cluster.node_s,
    )


WORLDS: dict[str, Callable[[int, Story | None], Tried]] = {
    "disk": _disk,
    "directory": partial(_cluster, "directory", directory_run),
    "replication": partial(_cluster, "replication", replication_run),
    "replicas": partial(_cluster, "replicas", replicas_run),
}


def try_seed(world: str, seed: int, story: Story | None = None) -> Tried:
    """Run one seed; what it raises is what was wrong."""
    return WORLDS[world](seed, story)


def wrong_seeds(world: str, seeds: Iterable[int]) -> str:
    """What was wrong in these, and how each is looked at again; empty if nothing was."""
    tried = [try_seed(world, seed) for seed in seeds]
    return "\n".join(f"seed {each.seed}: {each.wrong}\n    {each.again}" for each in tried if each.wrong)


def _wrong(go: Callable[[], object]) -> str:
    try:
        go()
    except (Exception, ViolationError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
