"""What lies between two machines: one direction of the network, and what is wrong with it now.

Theory: everything that travels, datagram or piece of a stream, asks the `Path` from its machine to the other one when
it arrives. So a fault is a state of paths, one for each direction, and a partition is many of them at once.

Rules of this file
- Several faults may block one path; it is open when the last of them is over.
- A path that was blocked for `SILENCE_LIMIT_S` without a break ends the connections over it, as keepalive and
  TCP_USER_TIMEOUT do.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.simulation.cluster.scheduler import Scheduler

SILENCE_LIMIT_S = 60.0  # nbdserver/host/connection.py: UNACKNOWLEDGED_LIMIT_MS


@dataclass(frozen=True)
class Latency:
    """One-way delays: at least `base_s`, and in the mean `jitter_s` more."""

    base_s: float
    jitter_s: float


class Path:
    """From one machine to another."""

    __slots__ = ("_scheduler", "_silent", "base_s", "blocked_times", "blocks", "clogged_until_s", "jitter_s")

    def __init__(self, scheduler: Scheduler, latency: Latency, silent: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._silent = silent
        self.base_s = latency.base_s
        self.jitter_s = latency.jitter_s
        self.blocks = 0
        self.blocked_times = 0
        self.clogged_until_s = 0.0

    def delay_s(self) -> float:
        """How long something takes that leaves now."""
        random = self._scheduler.random.random
        delay_s = self.base_s + self.jitter_s * random() * random() * 4.0
        left_s = self.clogged_until_s - self._scheduler.now_s
        return delay_s + left_s if left_s > 0.0 else delay_s

    def block(self) -> None:
        """Nothing arrives from now on."""
        self.blocks += 1
        if self.blocks == 1:
            self.blocked_times += 1
            self._scheduler.after(SILENCE_LIMIT_S, self._check, self.blocked_times)

    def unblock(self) -> None:
        """One reason less."""
        self.blocks -= 1

    def clog(self, duration_s: float) -> None:
        """What leaves from now on arrives when that is over."""
        self.clogged_until_s = max(self.clogged_until_s, self._scheduler.now_s + duration_s)

    def _check(self, times: int) -> None:
        if self.blocks and times == self.blocked_times:
            self._silent()
