"""How far the modifications of a family are appended by every replica that has to have them.

Theory. What is not committed may have to go again: the log of a replica that lost touch is cut where it parts from the
owner's. Everything in memory comes back by replay from the last checkpoint; so no checkpoint may be later than that,
and as freeing happens only in checkpoints, nothing that the cut brings back was written over. A family on one node is
its own whole set of replicas: there `txid` has no limit, and nothing here costs anything.

Rules: the committed txid only rises. It is not stored: the last checkpoint's txid is a lower bound of it.
"""

from __future__ import annotations

from collections.abc import Callable

WITHOUT_LIMIT = (1 << 64) - 1


class Committed:
    """The committed txid of one log, and who waits for it."""

    def __init__(self, txid: int = WITHOUT_LIMIT) -> None:
        self.txid = txid
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    def reach(self, txid: int) -> None:
        """Everything up to `txid` is committed."""
        if txid <= self.txid:
            return
        self.txid = txid
        ready = [callback for wanted, callback in self._waiting if wanted <= txid]
        self._waiting = [each for each in self._waiting if each[0] > txid]
        for callback in ready:
            callback()

    def when_reached(self, txid: int, callback: Callable[[], None]) -> None:
        """Call it when `txid` is committed; at once if it is."""
        if txid <= self.txid:
            callback()
        else:
            self._waiting.append((txid, callback))
