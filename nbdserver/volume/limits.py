"""How fast clients may use a volume: operations and bytes a second, with bursts.

Theory: two token buckets, shared by all connections of a volume. Before a batch a connection is told how many requests
and bytes it may do now; afterwards what it did is taken. A request is never cut, so the bytes may go into debt, by one
batch at most, and the debt is waited for: over any longer time the rate is kept exactly. Who gets nothing waits in a
line; who is first in it goes on as soon as there is a token, with its share of what there is, and goes to the end of
the line. So connections of one volume are served in turn, however deep their queues are.

Rules
- Time is an argument; a bucket never holds more than its burst.
- An export without limits has no `Throttle`: the hot path asks for it once a batch, and for nothing else.
- In any window of t seconds at most rate * t + burst operations begin; of bytes one batch's more.

Known weakness: what clients wait for is not told apart by kind, a flush counts as one operation like any other.
"""

from collections.abc import Callable
from dataclasses import dataclass

from metadata.seams import Clock, Timer

MOST_WAITS_S = 60.0  # a timer looks again after so long, however slow the rate


@dataclass(frozen=True)
class Limits:
    """Rates a second, 0 for none, and the bursts: what may be done at once after a pause. 0: one second's worth."""

    iops: int = 0
    iops_burst: int = 0
    bandwidth: int = 0
    bandwidth_burst: int = 0

    @property
    def any(self) -> bool:
        return bool(self.iops or self.bandwidth)


class TokenBucket:
    """`rate` tokens a second, at most `burst` of them kept. `rate` 0: without limit."""

    def __init__(self, rate: int, burst: int, now_s: float) -> None:
        self._rate = rate
        self._burst = float(burst or rate)
        self._tokens = self._burst
        self._at_s = now_s

    def available(self, now_s: float, most: int) -> int:
        """Whole tokens that may be taken now, at most `most`; 0 while there is debt."""
        if not self._rate:
            return most
        if now_s > self._at_s:
            self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
            self._at_s = now_s
        # What a wait was computed for must be there after it, whatever the last bit of a float says.
        return max(0, min(most, int(self._tokens + 1e-6)))

    def take(self, tokens: int) -> None:
        """Use tokens, those that are not there yet too."""
        self._tokens -= tokens

    def wait_s(self, now_s: float) -> float:
        """Until there is a whole token."""
        return 0.0 if self.available(now_s, 1) else (1 - self._tokens) / self._rate


class Throttle:
    """The buckets of one export and the line of connections that wait for them."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self._clock = clock
        now_s = clock.now()
        self._operations = TokenBucket(limits.iops, limits.iops_burst, now_s)
        self._bytes = TokenBucket(limits.bandwidth, limits.bandwidth_burst, now_s)
        self._line: dict[Callable[[], None], None] = {}
        self._timer: Timer | None = None
        self._ended = False

    def allowance(self, most_operations: int, most_bytes: int) -> tuple[int, int]:
        """(requests, bytes) that may be done now; one of them 0: wait in the line."""
        now_s = self._clock.now()
        operations = self._operations.available(now_s, most_operations)
        return -(-operations // (len(self._line) + 1)), self._bytes.available(now_s, most_bytes)

    def take(self, operations: int, size_bytes: int) -> None:
        """So much was done."""
        self._operations.take(operations)
        self._bytes.take(size_bytes)

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` when it is this one's turn; it asks for an allowance then."""
        self._line[go_on] = None
        self._arm()

    def leave(self, go_on: Callable[[], None]) -> None:
        """Wait no longer."""
        self._line.pop(go_on, None)

    def end(self) -> None:
        """The limits changed: everybody goes on, and finds the new ones."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        line, self._line = self._line, {}
        for go_on in line:
            self._clock.call_soon(go_on)

    def _arm(self) -> None:
        if self._timer is None and self._line and not self._ended:
            now_s = self._clock.now()
            wait_s = max(self._operations.wait_s(now_s), self._bytes.wait_s(now_s))
            self._timer = self._clock.call_later(min(wait_s, MOST_WAITS_S), self._turn)

    def _turn(self) -> None:
        self._timer = None
        for _ in range(len(self._line)):
            if 0 in self.allowance(1, 1):
                break
            first = next(iter(self._line))
            del self._line[first]
            first()
        self._arm()
