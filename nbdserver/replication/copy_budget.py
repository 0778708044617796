"""What all resyncs of a process may take together: of its memory, its loop and its disks.

Theory. Each link that has regions to copy asks for one at a time and stands in one queue, so families that resync at
the same time get their turns one after the other, however much each lacks. What is under way takes MEMORY_BYTES at
most: a region counts whole until it has been read, and then as what of it travels, so that many of those that hardly
differ are under way at once and share their syncs. What regions cost follows a pace: `bytes_per_s`, and an eighth of it
while clients move more than the copies do (pacing.py). So clients are not crushed, and recovery does not starve.

Rules
- Who was given a turn gives it back, whatever became of the copy.
- What a region costs is what is read for it, on both sides, not what travels; at least LEAST_BYTES, because looking at
  one that holds next to nothing takes the loops of both sides as much time as reading that.

Known weakness: what this node appends as a replica of others' volumes counts as clients' work.
"""

from collections import deque
from collections.abc import Callable

from metadata.region_table import REGION_BYTES
from metadata.seams import Clock, Timer
from nbdserver.logdisk.pacing import Pace

BYTES_PER_S = 256 << 20
MEMORY_BYTES = 8 * REGION_BYTES
MOST_AT_ONCE = 256
LEAST_BYTES = 256 << 10


class Turn:
    """One region that somebody wants to copy."""

    def __init__(self, budget: "CopyBudget", begin: Callable[[], None]) -> None:
        self.begin = begin
        self.is_given = False
        self.size_bytes = REGION_BYTES
        """Of the memory, that it takes at this moment."""
        self._budget = budget
        self._is_over = False

    def shrink(self, size_bytes: int) -> None:
        """It takes no more than that from now on; of one that was given."""
        if not self._is_over and size_bytes < self.size_bytes:
            self._budget.shrunk(self.size_bytes - size_bytes)
            self.size_bytes = size_bytes

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
        self._under_way_bytes = 0
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

    def shrunk(self, size_bytes: int) -> None:
        """See Turn.shrink."""
        self._under_way_bytes -= size_bytes
        self._give()

    def given_back(self, turn: Turn, read_bytes: int) -> None:
        """See Turn.give_back."""
        if not turn.is_given:
            self._waiting.remove(turn)
            return
        self._under_way -= 1
        self._under_way_bytes -= turn.size_bytes
        now_s = self._clock.now()
        self._due_s = now_s + self._pace.wait_s(max(read_bytes, LEAST_BYTES), self._moved_bytes(), now_s)
        self._give()

    def _give(self) -> None:
        while self._waiting and self._has_room and self._timer is None:
            wait_s = self._due_s - self._clock.now()
            if wait_s > 0:
                self._timer = self._clock.call_later(wait_s, self._is_due)
                return
            turn = self._waiting.popleft()
            turn.is_given = True
            self._under_way += 1
            self._under_way_bytes += turn.size_bytes
            self._clock.call_soon(turn.begin)

    @property
    def _has_room(self) -> bool:
        return self._under_way < MOST_AT_ONCE and self._under_way_bytes + REGION_BYTES <= MEMORY_BYTES

    def _is_due(self) -> None:
        self._timer = None
        self._give()
