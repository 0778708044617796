"""Where the replicas of a family shall be: what its owner was asked for, one change of the registry's value a time.

Theory. What is asked for is put into the value at once: nodes that are new get a replica, which is brought into sync
like any other; members that shall go are noted as *leaving*, and stay in the set until all the others are in sync. So
it does not matter who owns the family by then.

Rules
- Who asks is told when the value says so, or that the owner is not the owner any more; not when all is done.
- An owner does not let itself go: that is for the next one.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from metadata.replica_set import ReplicaSet
from metadata.seams import Clock

Placed = Callable[[str], None]
"""Called with why it was not done, empty if it was."""


class Placing:
    """What one owner was asked for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._asked: deque[tuple[tuple[str, ...], Placed]] = deque()

    def ask(self, nodes: Sequence[str], done: Placed) -> None:
        """Have replicas on these nodes alone. `done` is never called from inside."""
        self._asked.append((tuple(nodes), done))

    def next_value(self, value: ReplicaSet) -> ReplicaSet | None:
        """The change that is due; None if there is none."""
        while self._asked:
            nodes, done = self._asked[0]
            if value.staying != nodes:
                return value.placed(nodes)
            self._asked.popleft()
            self._clock.call_soon(partial(done, ""))
        return value.without_leaving() if value.can_let_go else None

    def close(self, reason: str) -> None:
        """This node is not the owner any more."""
        while self._asked:
            _, done = self._asked.popleft()
            self._clock.call_soon(partial(done, reason))
