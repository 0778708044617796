"""How many bytes of segment files there may be: of one family, and of all families of a node together.

Theory. A limit is kept where files come into being: a pool asks its budgets before it makes one, as it asks the file
system. So the end of a budget is the end of a disk, and everything that is civil about a full disk (ENOSPC for writes;
trims, deletions, reads and the cleaner go on) holds for it too.

Rules
- A file counts from the moment that it is being made until it is being unlinked, spare ones too: this is what `df`
  shows. Maps and ballast do not count: under one per cent, and 16 MiB.
- A budget may be overdrawn, by a limit that was lowered or by the reserve with which a pool cleans up. Then clients get
  nothing, not even of the files that there are, until what is freed has been unlinked.
"""

LEAST_SEGMENTS = 16
"""That a limit of a family must have room for: four of them are reserve, one is open."""


class Budget:
    """A limit (0: none) and what is used of it."""

    def __init__(self, limit_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def use(self, size_bytes: int) -> None:
        """So much more is used, or (below 0) less."""
        self.used_bytes += size_bytes

    @property
    def taken_bytes(self) -> int:
        """What counts against the limit: what is used, here and by whoever else has a part of the same budget."""
        return self.used_bytes

    @property
    def overdrawn_bytes(self) -> int:
        """How much more is used than may be."""
        return max(0, self.taken_bytes - self.limit_bytes) if self.limit_bytes else 0

    def left_bytes(self, most_bytes: int) -> int:
        """What may still be used, at most `most_bytes`."""
        if not self.limit_bytes:
            return most_bytes
        return max(0, min(most_bytes, self.limit_bytes - self.taken_bytes))
