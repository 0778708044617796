"""Whether the loop was held: turns of the asyncio loop that took longer than HELD_S, and what took so long.

Theory. Between two waits for events the loop serves clients, runs completions and slices of background work; nobody
else is served meanwhile. Each wait for events so ends one turn and begins the next, and two looks at the clock there,
once a turn, tell how long it was. To show *what* held it, a timer signal (SIGALRM, every SAMPLE_S) interrupts a turn
that is already too long and notes where it is: it comes between two steps of the interpreter, so a long system call
shows as the line that made it. That costs some wake-ups a second even on an idle node, so it is for those who look for
something: WATCH_VARIABLE in the environment turns it on, and each such turn is then an event, `loop-held`.

Known weakness: time in which the machine ran something else instead of this process counts as held.
"""

import asyncio
import os
import selectors
import signal
import traceback
from collections.abc import Callable
from time import monotonic
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

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """An event loop whose turns are counted; places are noted if WATCH_VARIABLE is set."""
        if os.environ.get(WATCH_VARIABLE):
            signal.signal(signal.SIGALRM, self._interrupt)
            signal.siginterrupt(signal.SIGALRM, False)
            signal.setitimer(signal.ITIMER_REAL, SAMPLE_S, SAMPLE_S)
        return asyncio.SelectorEventLoop(_Selector(self))

    def was_held(self, took_s: float) -> None:
        """A turn that was too long has ended."""
        self.held += 1
        self.longest_s = max(self.longest_s, took_s)
        where, self._where = self._where, []
        if where and self.report is not None:
            self.report("loop-held", {"ms": round(took_s * 1000, 1), "where": where})

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
