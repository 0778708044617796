"""The twin of LevelStore: an ordered dictionary whose batches are all or none.

Theory: LevelDB's synced batch is one record of its log. A crash before the call returned finds it applied or not, never
in part; afterwards it is there. A failed write leaves the store refusing writes; reopening shows if it was applied.

Rules of this file
- `SimulatedTable` outlives crashes; a `SimulatedStore` is one life's view of it.
- A batch in flight is applied at one moment and answered at a later one: a crash between the two is the case that a
  careless caller forgets.
"""

import errno
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence

from metadata.seams import Batch, Clock, Done
from tests.simulation.faults import FaultMix
from tests.simulation.world import World

Items = list[tuple[bytes, bytes]]


class SimulatedTable:
    """What LevelDB has on the device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.values: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []

    def apply(self, changes: list[tuple[bytes, bytes | None]]) -> None:
        for key, value in changes:
            if value is None:
                if self.values.pop(key, None) is not None:
                    del self.keys[bisect_left(self.keys, key)]
            else:
                if key not in self.values:
                    insort(self.keys, key)
                self.values[key] = value

    def items(self, start: bytes, stop: bytes, limit: int = 0) -> Items:
        first, last = bisect_left(self.keys, start), bisect_left(self.keys, stop)
        if limit:
            last = min(last, first + limit)
        return [(key, self.values[key]) for key in self.keys[first:last]]


class SimulatedBatch:
    """Changes in their order."""

    def __init__(self) -> None:
        self.changes: list[tuple[bytes, bytes | None]] = []

    def put(self, key: bytes, value: bytes) -> None:
        assert type(key) is bytes
        assert type(value) is bytes
        self.changes.append((key, value))

    def delete(self, key: bytes) -> None:
        self.changes.append((key, None))


class SimulatedStore:
    """The Store seam over a SimulatedTable, for one life of the process."""

    def __init__(self, table: SimulatedTable, clock: Clock, mix: FaultMix, world_ends: Callable[[], bool]) -> None:
        self.mix = mix
        self.batches = 0
        self._table = table
        self._clock = clock
        self._random = table.world.random
        self._world = table.world
        self._world_ends = world_ends
        self._failed = False
        self._in_flight: SimulatedBatch | None = None

    def crash(self) -> None:
        """End this life; a batch in flight is applied or not."""
        batch, self._in_flight = self._in_flight, None
        if batch is not None and self._random.random() < 0.5:
            self._table.apply(batch.changes)

    def get(self, key: bytes) -> bytes | None:
        return self._table.values.get(key)

    def range(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._table.items(start, stop))

    def ranges(self, ranges: Sequence[tuple[bytes, bytes]]) -> list[Items]:
        return [self._table.items(*each) for each in ranges]

    def range_later(
        self, ranges: Sequence[tuple[bytes, bytes]], done: Callable[[int, list[Items]], None], limit: int = 0
    ) -> None:
        def finish() -> None:
            if self._chance(self.mix.store_read_error):
                done(errno.EIO, [])
            else:
                done(0, found)

        found: list[Items] = []

        def look(first: int, stop: int) -> None:
            found.extend(self._table.items(*each, limit) for each in ranges[first:stop])
            if stop < len(ranges):
                self._later(lambda: look(stop, len(ranges)))
            else:
                self._later(finish)

        # It reads at one moment, or some ranges at one and the others at another, and is answered at a later one; a
        # checkpoint may be written in between.
        cut = self._random.randrange(1, len(ranges)) if len(ranges) > 1 and self._chance(0.3) else len(ranges)
        self._later(lambda: look(0, cut))

    def batch(self) -> Batch:
        return SimulatedBatch()

    def write(self, batch: Batch) -> None:
        assert isinstance(batch, SimulatedBatch)
        if self._failed:
            raise OSError(errno.EIO, "the simulated store failed earlier")
        self.batches += 1
        self._world.note("batch", len(batch.changes))
        ends, error = self._world_ends(), self._chance(self.mix.store_write_error)
        if not (ends or error) or self._random.random() < 0.5:
            self._table.apply(batch.changes)
        if ends:
            self._world.crash()
        if error:
            self._failed = True
            raise OSError(errno.EIO, "simulated store error")

    def write_later(self, batch: Batch, done: Done) -> None:
        assert isinstance(batch, SimulatedBatch)
        assert self._in_flight is None, "one write_later at a time"
        self._in_flight = batch
        size = len(batch.changes)

        def apply() -> None:
            assert len(batch.changes) == size, "a batch must not change while it is written"
            self._in_flight = None
            try:
                self.write(batch)
            except OSError as error:
                number = error.errno or errno.EIO
                self._later(lambda: done(number))
                return
            self._later(lambda: done(0))

        self._later(apply)

    def close(self) -> None:
        assert self._in_flight is None, "closed with a write in flight"

    def _later(self, callback: Callable[[], None]) -> None:
        factor = 100 if self._chance(self.mix.slow) else 1
        self._clock.call_later(factor * self._random.expovariate(2 / self.mix.latency_s), callback)

    def _chance(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability
