"""Which epoch each sequence belongs to: how a node tells that what it has is a beginning of what its master has.

Theory: the sequence goes on across epochs, and a master begins its epoch after everything it collected. So (epoch,
first sequence of each epoch) says for every sequence which epoch's message is there, and two nodes that have the same
position have the same messages before it.

Rule: only the last HISTORY_LIMIT epochs are kept. A node that is further behind takes a snapshot.
"""

from itertools import pairwise

from protocol.directory import HISTORY_LIMIT, Position, Starts
from protocol.invariant import invariant


class History:
    """The last epochs, each with its first sequence."""

    def __init__(self, starts: Starts = ()) -> None:
        invariant(all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(starts)), "epochs and their starts rise")
        self.starts = starts[-HISTORY_LIMIT:]

    def begun(self, epoch: int, first: int) -> "History":
        """This history up to the message before `first`, and one more epoch."""
        return History((*(start for start in self.starts if start[1] < first), (epoch, first)))

    def epoch_of(self, sequence: int) -> int:
        """The epoch of the message with this sequence; 0 if it is from before what is known."""
        for epoch, first in reversed(self.starts):
            if sequence >= first:
                return epoch
        return 0

    def has(self, position: Position) -> bool:
        """True if a node at `position` has the first messages of this history and no others."""
        return position.epoch > 0 and self.epoch_of(position.sequence) == position.epoch
