"""One seed, one thread, one virtual time: the scheduler under every simulated seam.

Theory: what makes a run unrepeatable is time, threads and chance. Here time is a number that only the event queue and
the askers of the time move, "threads" are events at random later times, and chance is one generator. So the seed fixes
the run, and a digest over everything that happened shows that it did.

Rules of this file
- `World` outlives crashes (it is the machine and its history); a `SimulatedClock` is one life of the process: a crash
  throws it away with every event in it.
- SimulatedCrash is a BaseException: no `except Exception` of the product may swallow the end of its process.
"""

import random
import zlib
from collections.abc import Callable
from heapq import heappop, heappush
from typing import NoReturn


class SimulatedCrash(BaseException):
    """The simulated process ends here and now."""


class World:
    """What all lives of one run share."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now_s = 1000.0
        self.digest = 0
        self.events = 0
        self.has_crashed = False

    def crash(self) -> NoReturn:
        """End the process here. Whatever the product does on the way out has no effect."""
        self.has_crashed = True
        raise SimulatedCrash

    def note(self, *what: object) -> None:
        """Make `what` part of the trace: two runs of one seed must agree on all of it."""
        self.digest = zlib.crc32(repr(what).encode(), self.digest)
        self.events += 1


class SimulatedTimer:
    """A pending call."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class SimulatedClock:
    """The Clock seam, and the event queue of one life.

    Asking for the time takes a little of it (`tick_s` at most), so that work which runs until its time is used up ends.
    """

    def __init__(self, world: World, tick_s: float = 0.0001) -> None:
        self._world = world
        self._queue: list[tuple[float, int, SimulatedTimer]] = []
        self._count = 0
        self._tick_s = tick_s

    def now(self) -> float:
        self._world.now_s += self._tick_s * self._world.random.random()
        return self._world.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> SimulatedTimer:
        timer = SimulatedTimer(callback)
        self._count += 1
        heappush(self._queue, (self._world.now_s + max(delay_s, 0.0), self._count, timer))
        return timer

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_later(0.0, callback)

    def step(self, until_s: float = float("inf")) -> bool:
        """Run the next event that is due by `until_s`; False if there is none."""
        queue, world = self._queue, self._world
        while queue and queue[0][0] <= until_s:
            at_s, number, timer = heappop(queue)
            callback = timer.callback
            if callback is None:
                continue
            world.now_s = max(world.now_s, at_s)
            world.note("event", number, round(world.now_s, 9))
            callback()
            return True
        return False

    def run(self, duration_s: float) -> None:
        """Let `duration_s` of virtual time go by."""
        until_s = self._world.now_s + duration_s
        while self.step(until_s):
            pass
        self._world.now_s = max(self._world.now_s, until_s)

    def run_until(self, holds: Callable[[], bool], limit_s: float = 600.0) -> bool:
        """Run events until `holds()`; False if nothing is left to happen or `limit_s` of virtual time went by."""
        until_s = self._world.now_s + limit_s
        while not holds():
            if not self.step(until_s):
                return False
        return True
