"""When puts that expire are over.

Theory: only the master's clock counts. It notes each such put when it takes it, and deletes the key when that time has
passed and the key still has that put. A new master begins with all of them anew: late, never early.
"""

from collections.abc import Iterator
from heapq import heappop, heappush

from metadata.directory.map import DirectoryMap
from protocol.directory import Action, Position, Update


class Expiries:
    """The puts of one map that expire."""

    def __init__(self, directory: DirectoryMap, now_s: float) -> None:
        self._map = directory
        self._heap: list[tuple[float, str, Position]] = []
        for entry in directory.entries():
            self.taken(entry.position, entry.update, now_s)

    def taken(self, position: Position, update: Update, now_s: float) -> None:
        """The map has taken this update now."""
        if update.action is Action.PUT and update.expires_ms:
            heappush(self._heap, (now_s + update.expires_ms / 1000, update.key, position))

    @property
    def due_at_s(self) -> float:
        return self._heap[0][0] if self._heap else float("inf")

    def over(self, now_s: float) -> Iterator[str]:
        """Keys to delete now."""
        while self._heap and self._heap[0][0] <= now_s:
            _, key, position = heappop(self._heap)
            entry = self._map.entry(key)
            if entry is not None and entry.position == position:
                yield key
