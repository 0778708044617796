"""What all resyncs of a process may take together: of its memory, its loop and its disks.

Theory. Each link that has regions to copy asks for one at a time and stands in one queue, so families that resync at
the same time get their turns one after the other, however much each lacks. At most AT_ONCE regions are under way, which
bounds the memory, and what they take follows a pace: `bytes_per_s`, and an eighth of it while clients move more than
the copies do (pacing.py). So clients are not crushed, and recovery does not starve.

Rules
- Who was given a turn gives it back, whatever became of the copy.
- What a region costs is what is read for it, on both sides, not what travels.

Known weakness: what this node appends as a replica of others' volumes counts as clients' work.
"""

from collections import deque
from collections.abc import Callable

from metadata.seams import Clock, Timer
from nbdserver.logdisk.pacing import Pace

BYTES_PER_S = 256 << 20
AT_ONCE = 8


class Turn:
    """One region that somebody wants to copy."""

    def __init__(self, budget: "CopyBudget", begin: Callable[[], None]) -> None:
        self.begin = begin
        self.is_given = False
        self._budget = budget
        self._is_over = False

    def give_back(self, read_bytes: int = 0) -> None:
        """The copy is done, or was given up, also before its turn came; idempotent."""
        if not self._is_over:
            self._is_over = True
            self._budget.given_back(self, read_bytes)

    @property
    def reason(self) -> str:
        """Why it has not been given; "" if it has been."""
        return "" if self.is_given else self._budget.reason


class CopyBudget:
    """See above; `moved_bytes()` is what clients have moved so far in this process."""

    def __init__(
        self, clock: Clock, moved_bytes: Callable[[], int] = lambda: 0, bytes_per_s: int = BYTES_PER_S
    ) -> None:
        self._clock = clock
        self._moved_bytes = moved_bytes
        self._pace = Pace(bytes_per_s, clock.now(), moved_bytes())
        self._waiting: deque[Turn] = deque()
        self._under_way = 0
        self._due_s = 0.0
        self._timer: Timer | None = None

    def ask(self, begin: Callable[[], None]) -> Turn:
        """`begin` is called, from the loop, when its turn has come."""
        turn = Turn(self, begin)
        self._waiting.append(turn)
        self._clock.call_soon(self._give)
        return turn

    @property
    def reason(self) -> str:
        """Why those wait that wait."""
        if self._timer is not None:
            return "clients are busy" if self._pace.is_slowed else "resyncs of this node are at their rate"
        return "other resyncs of this node come before it"

    def given_back(self, turn: Turn, read_bytes: int) -> None:
        """See Turn.give_back."""
        if not turn.is_given:
            self._waiting.remove(turn)
            return
        self._under_way -= 1
        now_s = self._clock.now()
        self._due_s = now_s + self._pace.wait_s(read_bytes, self._moved_bytes(), now_s)
        self._give()

    def _give(self) -> None:
        while self._waiting and self._under_way < AT_ONCE and self._timer is None:
            wait_s = self._due_s - self._clock.now()
            if wait_s > 0:
                self._timer = self._clock.call_later(wait_s, self._is_due)
                return
            turn = self._waiting.popleft()
            turn.is_given = True
            self._under_way += 1
            self._clock.call_soon(turn.begin)

    def _is_due(self) -> None:
        self._timer = None
        self._give()
