"""Whether the loop was held: turns of the asyncio loop that took longer than HELD_S, and what took so long.

Theory. Between two waits for events the loop serves clients, runs completions and slices of background work; nobody
else is served meanwhile. Each wait for events so ends one turn and begins the next, and two looks at the clock there,
once a turn, tell how long it was. To show *what* held it, a timer signal (SIGALRM, every SAMPLE_S) interrupts a turn
that is already too long and notes where it is: it comes between two steps of the interpreter, so a long system call
shows as the line that made it. How much of the turn the thread had a processor is told beside it: the rest of the time
the machine ran something else, or the thread slept in a call. All that costs some wake-ups a second even on an idle
node, so it is for those who look for something: WATCH_VARIABLE in the environment turns it on, and each such turn is
then an event, `loop-held`.

Known weakness: the count alone does not tell time in which the machine ran something else instead of this process.
"""

import asyncio
import os
import selectors
import signal
import traceback
from collections.abc import Callable
from time import monotonic, thread_time
from types import FrameType
from typing import Any

HELD_S = 0.005
SAMPLE_S = 0.001
WATCH_VARIABLE = "NBDSERVER_WATCH_LOOP"
_FRAMES = 8  # of a place, the innermost last
_WAITING = float("inf")


class LoopWatch:
    """Makes the event loop that it watches."""

    def __init__(self) -> None:
        self.held = 0
        """Turns longer than HELD_S."""
        self.longest_s = 0.0
        self.report: Callable[[str, dict[str, Any]], None] | None = None
        self.began_s = _WAITING
        """When the present turn began."""
        self._where: list[str] = []
        self._worked_s: Callable[[], float] | None = None
        """Of the present turn, if places are noted: the time on a processor."""

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """An event loop whose turns are counted; places are noted if WATCH_VARIABLE is set."""
        if os.environ.get(WATCH_VARIABLE):
            signal.signal(signal.SIGALRM, self._interrupt)
            signal.siginterrupt(signal.SIGALRM, False)
            signal.setitimer(signal.ITIMER_REAL, SAMPLE_S, SAMPLE_S)
            sampled = _SampledSelector(self)
            self._worked_s = sampled.worked_s
            return asyncio.SelectorEventLoop(sampled)
        return asyncio.SelectorEventLoop(_Selector(self))

    def was_held(self, took_s: float) -> None:
        """A turn that was too long has ended."""
        self.held += 1
        self.longest_s = max(self.longest_s, took_s)
        where, self._where = self._where, []
        if where and self.report is not None and self._worked_s is not None:
            cpu_ms = round(self._worked_s() * 1000, 1)
            self.report("loop-held", {"ms": round(took_s * 1000, 1), "cpu_ms": cpu_ms, "where": where})

    def _interrupt(self, _signal: int, frame: FrameType | None) -> None:
        """Note where the turn is; the first look at it counts."""
        if monotonic() - self.began_s > HELD_S and not self._where:
            places = traceback.extract_stack(frame)[-_FRAMES:]
            self._where = [f"{place.name} ({os.path.basename(place.filename)}:{place.lineno})" for place in places]


class _Selector(selectors.EpollSelector):
    """Tells the watch when the loop waits."""

    def __init__(self, watch: LoopWatch) -> None:
        super().__init__()
        self._watch = watch

    def select(self, timeout: float | None = None, _select: Any = selectors.EpollSelector.select) -> Any:
        watch = self._watch
        took_s = monotonic() - watch.began_s
        watch.began_s = _WAITING
        if took_s > HELD_S:
            watch.was_held(took_s)
        events = _select(self, timeout)
        watch.began_s = monotonic()
        return events


class _SampledSelector(_Selector):
    """Knows too how long the thread had a processor."""

    def __init__(self, watch: LoopWatch) -> None:
        super().__init__(watch)
        self._began_s = 0.0

    def worked_s(self) -> float:
        """In the present turn."""
        return thread_time() - self._began_s

    def select(self, timeout: float | None = None, _select: Any = _Selector.select) -> Any:
        events = _select(self, timeout)
        self._began_s = thread_time()
        return events
