"""Everything that can be simulated from a seed, behind one door: the tests, `make simulate` and replays go through it.

Rules of this file
- A seed means the same run wherever it is tried: what a run needs is drawn from it.
- A failure names the command that tells its story.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.simulation.registers import ViolationError
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
    duration_s: float
    events: int = 0
    """Frames delivered to, and timers fired in, production code of a cluster."""
    node_s: float = 0.0
    """Virtual time that its processes lived, together."""

    @property
    def again(self) -> str:
        """The command that tells the story."""
        return f"make simulate WORLD={self.world} SEED={self.seed}"


def _disk(seed: int, story: Story | None) -> Tried:
    began_s = time.monotonic()
    run = Run(seed, lying=lies(seed), story=story)
    wrong = _wrong(run.go)
    summary = f"{dict(run.counters)}, {dict(run.reports)}"
    return Tried("disk", seed, wrong, f"{run.world.digest:08x}", summary, time.monotonic() - began_s)


WORLDS: dict[str, Callable[[int, Story | None], Tried]] = {"disk": _disk}


def try_seed(world: str, seed: int, story: Story | None = None) -> Tried:
    """Run one seed; what it raises is what was wrong."""
    return WORLDS[world](seed, story)


def _wrong(go: Callable[[], object]) -> str:
    try:
        go()
    except (Exception, ViolationError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
