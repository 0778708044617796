"""The Clock seam over asyncio.

Theory: time that decides something (leases, intervals) is CLOCK_BOOTTIME: it never steps, and unlike CLOCK_MONOTONIC it
goes on while the machine is suspended, so a node that wakes up knows that its promises have expired.

Known weakness: asyncio's timers count CLOCK_MONOTONIC, so a timer that was pending during a suspend fires late by that
long. Whoever decides by time asks `now()` when the timer fires; the timer is only the occasion.
"""

import asyncio
import time
from collections.abc import Callable

from metadata.seams import Timer


class HostClock:
    """Time and timers of this host."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self, _gettime: Callable[[int], float] = time.clock_gettime, _clock: int = time.CLOCK_BOOTTIME) -> float:
        """Seconds on CLOCK_BOOTTIME."""
        return _gettime(_clock)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` on the loop after `delay_s` seconds, unless the timer is cancelled first."""
        return self._loop.call_later(delay_s, callback)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop's next turn."""
        self._loop.call_soon(callback)
