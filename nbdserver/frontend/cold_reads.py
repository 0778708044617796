"""Reads of one connection that were not at hand: fetched together, then answered as inline ones are.

Theory. `InlineReads` hands over what it misses and goes on. At the end of the batch the device is asked to fetch all
of it; when that is over the reads are tried again, and what is not at hand after FETCHES waits for itself (`Deferred`).

Kernels of late begin to read when they are asked for what they do not have, although they do not wait for it. There
what was missed mostly *comes unasked* within some turns of the loop, and that takes less than handing it to a thread
and back. So it is tried again first, turn by turn, until nothing has come for TURNS of them; and no more for a while
where that is in vain, as with a slow device or an older kernel.

Rules
- They count as waiting requests from the moment they are missed, and are bounded as these.
- When the connection is gone nothing of it is answered.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from metadata.seams import Clock
from nbdserver.block import BlockDevice
from nbdserver.frontend.deferred import Deferred
from nbdserver.volume.counters import Counters

FETCHES = 2  # the first one may have waited for less than all
TURNS = 16  # some 200 µs; a good device needs half of that
AT_ONCE = 16  # the longest missed ones: one that is not there yet costs some 3 µs
CREDIT_LIMIT = 8
TRIED_AGAIN = 64  # without credit one batch in so many is tried all the same

MissedRead = tuple[int, int, int]
"""cookie, offset, length"""

Answer = Callable[[Sequence[MissedRead]], Sequence[MissedRead]]


class ColdReads:
    """Those that are to be fetched next."""

    def __init__(self, device: BlockDevice, clock: Clock, counters: Counters, deferred: Deferred) -> None:
        self._device = device
        self._clock = clock
        self._counters = counters
        self._deferred = deferred
        self._missed: list[MissedRead] = []
        self._under_way: dict[_Batch, None] = {}
        self._batches = 0
        self._credit = CREDIT_LIMIT  # for trying before fetching

    def missed(self, reads: list[MissedRead]) -> bool:
        """Take reads that are not at hand; False, and none is taken, if there is no room for all of them."""
        size_bytes = _size_bytes(reads)
        if not self._deferred.has_room(size_bytes, len(reads)):
            return False
        self._deferred.begin(size_bytes, len(reads))
        self._missed += reads
        return True

    def fetch(self, answer: Answer) -> None:
        """Bring in what was missed since the last call. `answer` replies as far as reads are at hand by then and
        returns the others."""
        if self._missed:
            batch = _Batch(self._missed, answer, self._clock.now())
            self._missed = []
            self._under_way[batch] = None
            self._batches += 1
            if self._credit or not self._batches % TRIED_AGAIN:
                self._try_soon(batch, TURNS)
            else:
                self._fetch(batch, FETCHES)

    def unanswered(self) -> Iterator[MissedRead]:
        """All that wait here."""
        for batch in self._under_way:
            yield from batch.reads
        yield from self._missed

    def _try_soon(self, batch: "_Batch", turns: int) -> None:
        self._clock.call_soon(partial(self._try, batch, turns))

    def _try(self, batch: "_Batch", turns: int) -> None:
        """Answer what came unasked, and go on so until nothing does."""
        reads = batch.reads
        batch.reads = [*self._answer(batch, reads[:AT_ONCE]), *reads[AT_ONCE:]]
        if len(batch.reads) < len(reads):
            self._credit = min(self._credit + 1, CREDIT_LIMIT)
            turns = TURNS + 1
        if not batch.reads:
            del self._under_way[batch]
        elif turns > 1:
            self._try_soon(batch, turns - 1)
        else:
            self._credit = max(self._credit - 1, 0)
            self._fetch(batch, FETCHES)
        self._deferred.go_on()

    def _fetch(self, batch: "_Batch", fetches: int) -> None:
        reads, fetched = batch.reads, partial(self._fetched, batch, fetches - 1)
        if not fetches or not self._device.fetch([(offset, length) for _, offset, length in reads], fetched):
            del self._under_way[batch]
            self._deferred.end(_size_bytes(reads), len(reads))
            for read in reads:
                self._deferred.read(*read)

    def _fetched(self, batch: "_Batch", fetches: int) -> None:
        batch.reads = self._answer(batch, batch.reads)
        if batch.reads:
            self._fetch(batch, fetches)
        else:
            del self._under_way[batch]
        self._deferred.go_on()

    def _answer(self, batch: "_Batch", reads: Sequence[MissedRead]) -> Sequence[MissedRead]:
        """Answer the reads that are at hand, count them, and return the others; none when the connection is gone."""
        deferred, counters = self._deferred, self._counters
        if not deferred.connected:
            deferred.end(_size_bytes(reads), len(reads))
            return ()
        left = batch.answer(reads)
        answered, size_bytes = len(reads) - len(left), _size_bytes(reads) - _size_bytes(left)
        deferred.end(size_bytes, answered)
        counters.reads += answered
        counters.read_bytes += size_bytes
        counters.deferred += answered
        counters.latency_us.add(int((self._clock.now() - batch.since_s) * 1e6), answered)
        return left


class _Batch:
    """Reads that were missed together, as far as they were not answered."""

    __slots__ = ("answer", "reads", "since_s")

    def __init__(self, reads: Sequence[MissedRead], answer: Answer, since_s: float) -> None:
        self.reads = reads
        self.answer = answer
        self.since_s = since_s


def _size_bytes(reads: Sequence[MissedRead]) -> int:
    return sum(length for _, _, length in reads)
