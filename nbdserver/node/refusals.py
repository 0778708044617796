"""Streams between nodes that were refused: told of once in a while, however often they are tried."""

from collections import deque
from collections.abc import Callable

from metadata.seams import Clock

AGAIN_S = 60.0
"""Before the same is told of the same host again."""
KEPT = 32


class Refusals:
    """The newest ones; `tell(host, reason)` is called for those that are news."""

    def __init__(self, clock: Clock, tell: Callable[[str, str], None]) -> None:
        self._clock = clock
        self._tell = tell
        self._kept: deque[tuple[float, str, str]] = deque(maxlen=KEPT)

    def note(self, peer: str, reason: str) -> None:
        """A stream of HOST:PORT was refused."""
        host = peer.rpartition(":")[0]
        if (host, reason) not in self.within(AGAIN_S):
            self._kept.append((self._clock.now(), host, reason))
            self._tell(host, reason)

    def within(self, duration_s: float) -> tuple[tuple[str, str], ...]:
        """(host, reason) of those that were told of lately."""
        now_s = self._clock.now()
        return tuple((host, reason) for at_s, host, reason in self._kept if now_s - at_s < duration_s)
