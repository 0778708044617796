"""The open batch of a device, which all of its connections write into: one wake, one record, one append.

Theory: a wake finds several connections with requests. Each writes into the device's open batch and *joins* it; at the
end of the round one commit decides over all of them, and each is told. Sixteen writers so cost one append, and the
flushes that they ask for begin together.

Rules
- Whoever has joined is told exactly once, with the errno of the one commit; a connection joins at most once a round.
  Before that it may be told that the commit is IN_FLIGHT; until it is told the errno it must not write.
- A batch is committed in the call of the loop in which it was opened.
"""

from collections.abc import Callable
from functools import partial

from nbdserver.block import IN_FLIGHT, BlockDevice


class OpenBatch:
    """Who waits for the next commit of `device`."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._waiting: list[Callable[[int], None]] = []

    def join(self, committed: Callable[[int], None]) -> bool:
        """Call `committed(errno)` after the commit; says whether this is the first to join, who sees to the commit."""
        self._waiting.append(committed)
        return len(self._waiting) == 1

    def commit(self) -> None:
        """Commit what is open and tell everybody. Nothing happens when nobody has joined."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            errno = self._device.commit()
            if errno == IN_FLIGHT:
                self._device.acknowledged(partial(_tell, waiting))
            _tell(waiting, errno)


def _tell(waiting: list[Callable[[int], None]], errno: int) -> None:
    for committed in waiting:
        committed(errno)
