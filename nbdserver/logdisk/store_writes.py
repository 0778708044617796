"""Batches on their way into a family's LevelDB, one at a time, in their order (the Store takes no second one)."""

from __future__ import annotations

from collections import deque

from metadata.seams import Batch, Done, Store


class StoreWrites:
    """Writes batches off the loop, one after the other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: deque[tuple[Batch, Done]] = deque()

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return bool(self._waiting)

    def write_later(self, batch: Batch, done: Done) -> None:
        """As Store.write_later."""
        self._waiting.append((batch, done))
        if len(self._waiting) == 1:
            self._store.write_later(batch, self._written)

    def _written(self, errno: int) -> None:
        _, done = self._waiting.popleft()
        if self._waiting:
            self._store.write_later(self._waiting[0][0], self._written)
        done(errno)
