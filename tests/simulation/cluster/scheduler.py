"""Many machines, one queue of events, one virtual time.

Theory: a cluster is a `World` like the one under a single disk, but its events belong to lives of processes. A life
that is over takes its events with it; one that is paused finds them, in order, when it goes on. That is all that kill
and SIGSTOP are.

Rules of this file
- Two events at one time are run in the order in which they were asked for; who wants a race draws the times.
- The trace digest takes in the number and the time of every event, and whatever is `note`d. Both follow from the seed
  alone, in every process: production code that walks over a set of strings is found by it.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from tests.simulation.world import World

BACKLOG_LIMIT = 20_000  # events of a paused process: a kernel's buffers are finite too


class Life:
    """One life of a process: from its start to its end."""

    __slots__ = ("alive", "backlog", "machine_name", "paused")

    def __init__(self, machine_name: str) -> None:
        self.machine_name = machine_name
        self.alive = True
        self.paused = False
        self.backlog: list[Event] = []


class Event:
    """A pending call; also the Timer of the Clock seam."""

    __slots__ = ("arguments", "callback", "life")

    def __init__(self, life: Life | None, callback: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.life = life
        self.callback: Callable[..., None] | None = callback
        self.arguments = arguments

    def cancel(self) -> None:
        self.callback = None
        self.arguments = ()


class Scheduler(World):
    """The World of a cluster: all of its events."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.trace = 0  # folded over every event; part of `fingerprint`
        self.production_events = 0  # frames delivered to, and timers fired in, production code
        self._queue: list[tuple[float, int, Event]] = []
        self._count = 0

    def at(self, at_s: float, life: Life | None, callback: Callable[..., None], *arguments: Any) -> Event:
        """Call it at that time; for a life, if it is still alive then, and once it is not paused."""
        event = Event(life, callback, arguments)
        self._count += 1
        heappush(self._queue, (at_s if at_s > self.now_s else self.now_s, self._count, event))
        return event

    def after(self, delay_s: float, callback: Callable[..., None], *arguments: Any) -> Event:
        """Something that happens to the world, not in a process."""
        return self.at(self.now_s + delay_s, None, callback, *arguments)

    def resume(self, life: Life) -> None:
        """What a paused life has missed happens now, in its order."""
        life.paused = False
        backlog, life.backlog = life.backlog, []
        for event in backlog:
            self._count += 1
            heappush(self._queue, (self.now_s, self._count, event))

    def step(self, until_s: float) -> bool:
        """Run the next event that is due by `until_s`; False if there is none."""
        queue = self._queue
        while queue and queue[0][0] <= until_s:
            at_s, number, event = heappop(queue)
            callback = event.callback
            if callback is None:
                continue
            life = event.life
            if life is not None:
                if not life.alive:
                    continue
                if life.paused:
                    if len(life.backlog) < BACKLOG_LIMIT:
                        life.backlog.append(event)
                    continue
            if at_s > self.now_s:
                self.now_s = at_s
            self.events += 1
            self.trace = hash((self.trace, number, at_s))
            callback(*event.arguments)
            return True
        return False

    @property
    def fingerprint(self) -> str:
        """What two runs of a seed must agree on."""
        return f"{self.digest:08x}-{self.trace & 0xFFFFFFFFFFFFFFFF:016x}"
