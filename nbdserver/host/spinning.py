"""When to wait for the next request without sleeping.

Theory: a client that waits for its reply sends its next request some 20 µs after it. Putting the process to sleep for
that time and waking it up costs more than the request, so after a batch the network may *spin*: ask again and again,
for up to `SPIN_S`. That is worth it only if the next request does come so soon, and only if the processor has nothing
better to do: a spinning process uses up its share and is then kept waiting when it has work. Time is an argument.

Rules
- Spin while there is credit. An arrival within `SPIN_S` of the end of the last batch adds one, whether it was spun
  for or slept for; one that came later, and a spin in vain, takes one.
- A spin that lasted over `INTERRUPTED_S` was interrupted by another process: no spin for `REST_S`, and no credit
  left.
- Who has no credit limit (0) never spins: on a machine whose cores are all taken by workers that spin, the clients that
  they wait for have none.
"""

SPIN_S = 60e-6  # a wake-up of a sleeping process costs some 20 to 50 µs on both sides
INTERRUPTED_S = 500e-6  # below it are interrupts; a scheduler's slice is longer
REST_S = 0.1
CREDIT_LIMIT = 8


class Spinning:
    """Decides, wake by wake, whether to spin. `wanted` says whether to do so now."""

    def __init__(self, credit_limit: int = CREDIT_LIMIT) -> None:
        """0: never."""
        self.wanted = False
        self._credit_limit = credit_limit
        self._credit = 0
        self._batch_ended_s = 0.0
        self._rest_until_s = 0.0

    def woken(self, now_s: float, held_until_s: float = 0.0) -> None:
        """Data came after a sleep, or while something else held the loop until a time."""
        self._judge(now_s - max(self._batch_ended_s, held_until_s) < SPIN_S, now_s)

    def batch_ended(self, now_s: float) -> None:
        """All that was there is served."""
        self._batch_ended_s = now_s

    def spun(self, now_s: float, found: bool) -> None:
        """A spin since the end of the last batch is over; `found`: it ended because data came."""
        if now_s - self._batch_ended_s > INTERRUPTED_S:
            self._rest_until_s = now_s + REST_S
            self._credit = 0
            self.wanted = False
        else:
            self._judge(found, now_s)

    def _judge(self, paid: bool, now_s: float) -> None:
        if paid:
            if self._credit < self._credit_limit and now_s >= self._rest_until_s:
                self._credit += 1
        elif self._credit:
            self._credit -= 1
        self.wanted = self._credit > 0
