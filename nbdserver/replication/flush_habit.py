"""Whether a client flushes after each of its modifications, as a database's journal does.

Then the sync need not wait for the flush: it begins with the modification, here and at the others, and the flush that
follows finds it under way. A wrong guess costs one sync, and ends the habit.
"""

HABIT_FLUSHES = 4
"""So many flushes after one modification each, and the next one is expected."""


class FlushHabit:
    """Of one family; txids are of the newest modification at the time."""

    def __init__(self) -> None:
        self._flushed_txid = 0  # when a flush was asked for last
        self._flushes = 0  # how often, lately, exactly one modification came before a flush

    def flushed(self, txid: int) -> None:
        """A flush is asked for."""
        self._flushes = self._flushes + 1 if txid == self._flushed_txid + 1 else 0
        self._flushed_txid = txid

    def expects_flush(self, txid: int) -> bool:
        """Whether a flush is expected right after this modification."""
        if txid > self._flushed_txid + 1:
            self._flushes = 0
        return self._flushes >= HABIT_FLUSHES
