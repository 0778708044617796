"""What a majority of the voters has persisted: when a publication with `confirm=SITE` is answered.

Theory: a message is confirmed when a majority of the voters has persisted a position of *this* epoch at or after it. A
position of an earlier epoch counts for nothing, however far it is: a later master of another history could displace it
(docs/directory.md). While the list of voters is being changed a majority of both lists is needed, from before the
registry is asked until its answer is known, because nobody can say which of the two a new master will read.

Rule: what is confirmed only rises.
"""

from collections import deque
from collections.abc import Callable, Collection

from protocol.directory import Position
from protocol.invariant import invariant

PENDING_LIMIT = 4096  # publications that wait at once


class Confirmations:
    """The voters of one epoch, what each has persisted, and who waits for a majority."""

    def __init__(self, epoch: int, voters: Collection[int], first: int) -> None:
        """`first`: the sequence of the epoch's first message."""
        self.epoch = epoch
        self.voters = frozenset(voters)
        self.next_voters: frozenset[int] | None = None
        """The list that the registry has been asked to take."""
        self.confirmed = 0
        self._first = first
        self._persisted: dict[int, int] = {}
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    @property
    def is_waiting(self) -> bool:
        """True while somebody waits: voters should say what they have persisted."""
        return bool(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= PENDING_LIMIT

    def wait(self, sequence: int, done: Callable[[], None]) -> None:
        """Call `done` when the message with this sequence is confirmed: now, or from inside a later call."""
        invariant(not self._waiting or sequence >= self._waiting[-1][0], "publications wait in their order")
        if sequence <= self.confirmed:
            done()
            return
        self._waiting.append((sequence, done))
        self._advance()

    def persisted(self, node: int, position: Position) -> None:
        """A node says what it has persisted."""
        if position.epoch != self.epoch or position.sequence <= self._persisted.get(node, 0):
            return
        before = self._persisted.get(node, 0)
        self._persisted[node] = position.sequence
        if self._waiting and before < self._waiting[0][0] <= position.sequence:
            self._advance()

    def majority_of(self, voters: Collection[int]) -> int:
        """The highest sequence that a majority of `voters` has persisted in this epoch."""
        found = sorted((self._persisted.get(node, 0) for node in voters), reverse=True)
        return found[len(found) // 2] if found else 0

    def change_voters(self, voters: Collection[int]) -> bool:
        """Need both lists from here on. False, and nothing changes, while another change is under way, or a majority of
        the new list lacks something that is confirmed, or that the epoch began with and may have been."""
        if self.next_voters is not None or self.majority_of(voters) < max(self.confirmed, self._first):
            return False
        self.next_voters = frozenset(voters)
        return True

    def voters_changed(self, is_taken: bool) -> None:
        """The registry took the new list, or certainly never will."""
        invariant(self.next_voters is not None, "no change of voters is under way")
        assert self.next_voters is not None  # for the type checker
        if is_taken:
            self.voters = self.next_voters
        self.next_voters = None
        self._advance()

    def _advance(self) -> None:
        while self._waiting:
            reached = self.majority_of(self.voters)
            if self.next_voters is not None:
                reached = min(reached, self.majority_of(self.next_voters))
            self.confirmed = max(self.confirmed, reached)
            if self._waiting[0][0] > self.confirmed:
                return
            while self._waiting and self._waiting[0][0] <= self.confirmed:
                self._waiting.popleft()[1]()
