"""Requests of one connection that cannot be answered inline, and the bound on them.

Theory: `BlockDevice.later` and `flush` answer by callback. Each request that waits for one counts against the
connection's bounds until its reply is handed over; with the bounds reached, the connection stops taking requests (and
soon stops being read). A reply goes out at once if nothing else is waiting; otherwise the replies that come in one
turn of the loop leave together. Each keeps what it was asked with, for a client that has to go on elsewhere
(`unanswered`).

Rules
- Bounds: `OPERATION_LIMIT` requests, `BYTES_LIMIT` of data; a request larger than the rest of the room waits, but one
  alone may always go.
- A reply with FUA is sent only after a flush that began after the write was acknowledged by the device.
- When the connection is gone, operations run to their end and their replies are dropped.
- What the device has answered is true whenever it is told: `deliver` sends what would leave in this turn.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from metadata.seams import Buffer, Clock, Done
from nbdserver.block import IN_FLIGHT, BlockDevice, Extents, Operation
from nbdserver.frontend.unanswered import Request, flush_of, read_of
from nbdserver.volume.counters import Counters
from protocol.contexts import Context
from protocol.nbd import CommandFlag
from protocol.transmission import Replies

OPERATION_LIMIT = 128
BYTES_LIMIT = 64 << 20
CACHE_LIMIT_BYTES = 32 << 20  # of one CACHE request
ZERO_PIECE_BYTES = 1 << 20  # one piece of a NO_HOLE zeroing: some 100 µs of the loop's time

_ZEROS = memoryview(bytes(ZERO_PIECE_BYTES))
_FUA = int(CommandFlag.FUA)


def _nothing() -> None:
    """Nobody is left to be told."""


class _ZeroFill:
    """Real zeros from `position` to `end`, a piece a turn of the loop, then `done(errno)`."""

    def __init__(self, device: BlockDevice, clock: Clock, position: int, end: int, done: Done) -> None:
        self._device = device
        self._clock = clock
        self._position = position
        self._end = end
        self._done = done
        self._error = 0

    def stop(self) -> None:
        """Be done after the piece that is under way."""
        self._end = self._position

    def step(self) -> None:
        """Write the next piece, or be done."""
        if self._error or self._position >= self._end:
            self._done(self._error)
            return
        offset = self._position
        size_bytes = min(ZERO_PIECE_BYTES - offset % ZERO_PIECE_BYTES, self._end - offset)
        self._position += size_bytes
        if self._device.write(offset, _ZEROS[:size_bytes]):
            error = self._device.commit()
            if error == IN_FLIGHT:
                self._device.acknowledged(lambda error: self._written(error, None))
            else:
                self._error = error
                self._clock.call_soon(self.step)
        else:
            self._device.later(Operation.WRITE, offset, size_bytes, bytes(_ZEROS[:size_bytes]), self._written)

    def _written(self, error: int, _result: object) -> None:
        self._error = error
        self.step()


class _Status:
    """What an extent's contexts say, one after the other, then `done(errno, found)`."""

    def __init__(
        self,
        device: BlockDevice,
        offset: int,
        length: int,
        limit: int,
        contexts: Sequence[Context],
        done: Callable[[int, Sequence[Extents]], None],
    ) -> None:
        self._device = device
        self._range = offset, length
        self._limit = limit
        self._contexts = contexts
        self._done = done
        self._found: list[Extents] = []
        self._stopped = False

    def stop(self) -> None:
        """Be done after the context that is under way."""
        self._stopped = True

    def step(self) -> None:
        """Ask for the next context, or be done."""
        while len(self._found) < len(self._contexts):
            if self._stopped:
                self._done(errno.ESHUTDOWN, [])
                return
            context = self._contexts[len(self._found)]
            if context.is_bitmap:
                self._device.changed(context.since, *self._range, self._limit, self._told)
                return
            extents = self._device.extents(*self._range, self._limit)
            if extents is None:
                self._device.later(Operation.EXTENTS, *self._range, None, self._told, self._limit)
                return
            self._found.append(extents)
        self._done(0, self._found)

    def _told(self, error: int, result: Sequence[Buffer] | Extents | None) -> None:
        if error or not result:
            self._done(error or errno.EIO, [])
        else:
            self._found.append(cast(Extents, result))
            self.step()


class _Waiting:
    """One operation, and what asked for it."""

    __slots__ = ("data_bytes", "requests", "started_s")

    def __init__(self, requests: Sequence[Request], data_bytes: int, started_s: float) -> None:
        self.requests = requests
        self.data_bytes = data_bytes
        self.started_s = started_s


class Deferred:
    """The waiting requests of one connection."""

    def __init__(
        self,
        device: BlockDevice,
        clock: Clock,
        replies: Replies,
        counters: Counters,
        send: Callable[[Sequence[Buffer]], None],
        freed: Callable[[], None],
    ) -> None:
        """`send` takes replies; `freed` is called after requests have left, with their replies sent."""
        self.operations = 0
        self.data_bytes = 0
        self._device = device
        self._clock = clock
        self._replies = replies
        self._counters = counters
        self._send = send
        self._freed = freed
        self._waiting: dict[_Waiting, None] = {}  # in the order in which they came
        self._ready: list[Buffer] = []
        self._delivery_pending = False
        self.connected = True
        self._zero_fills: deque[_ZeroFill] = deque()  # the first one is being done
        self._statuses: deque[_Status] = deque()  # the first one is being done

    def has_room(self, length: int, operations: int = 1) -> bool:
        """Whether so many more requests with `length` bytes of data may wait."""
        if self.operations + operations > OPERATION_LIMIT:
            return False
        return not self.operations or self.data_bytes + length <= BYTES_LIMIT

    def disconnect(self) -> None:
        """Drop all replies from now on."""
        self.connected = False
        self._freed = _nothing  # the transmission, which refers back to this: no cycle stays
        self._ready.clear()
        if self._zero_fills:
            self._zero_fills[0].stop()
            while len(self._zero_fills) > 1:
                self._zero_fills.pop()
        if self._statuses:
            self._statuses[0].stop()
            while len(self._statuses) > 1:
                self._statuses.pop()

    def unanswered(self) -> Iterator[Request]:
        """What waits here, in the order in which it came."""
        for waiting in self._waiting:
            yield from waiting.requests

    # --- what can wait ---

    def read(self, cookie: int, offset: int, length: int) -> None:
        waiting = self._begin(length, read_of(cookie, offset, length))

        def done(error: int, result: Sequence[Buffer] | Extents | None) -> None:
            if error:
                self._finish(waiting, [self._error(cookie, offset, error)])
            else:
                self._counters.reads += 1
                self._counters.read_bytes += length
                data = cast(Sequence[Buffer], result)
                self._finish(waiting, [self._replies.data(cookie, offset, offset, length, True), *data])

        self._device.later(Operation.READ, offset, length, None, done)

    def write(self, request: Request) -> None:
        self._counters.write_bytes += request.length
        self._change(Operation.WRITE, request, request.length, request.payload)

    def discard(self, request: Request) -> None:
        self._change(Operation.DISCARD, request, request.length)

    def cache(self, request: Request) -> None:
        # A hint: the rest may be asked for again. One request must not sweep the whole page cache.
        self._change(Operation.CACHE, request, min(request.length, CACHE_LIMIT_BYTES))

    def block_status(
        self,
        request: Request,
        length: int,
        limit: int,
        contexts: Sequence[Context],
        answer: Callable[[Sequence[Extents]], bytes],
    ) -> None:
        """`answer` packs the reply from the extents of each context. One request of a connection is worked on at a
        time."""
        waiting = self._begin(0, request)
        cookie, offset = request.cookie, request.offset

        def done(error: int, found: Sequence[Extents]) -> None:
            self._statuses.popleft()
            if self._statuses:
                self._clock.call_soon(self._statuses[0].step)
            self._finish(waiting, [self._error(cookie, offset, error) if error else answer(found)])

        self._statuses.append(_Status(self._device, offset, length, limit, contexts, done))
        if len(self._statuses) == 1:
            self._clock.call_soon(self._statuses[0].step)

    def flush(self, acknowledgements: Sequence[Buffer], requests: Sequence[tuple[int, int]]) -> None:
        """Send the acknowledgements after a flush that begins now; or errors for their (cookie, offset) requests."""
        waiting = self._begin(0, *(flush_of(cookie, offset) for cookie, offset in requests))

        def done(error: int) -> None:
            if error:
                self._finish(waiting, [self._error(cookie, offset, error) for cookie, offset in requests])
            else:
                self._finish(waiting, acknowledgements)

        self._device.flush(done)

    def zero_fill(self, request: Request) -> None:
        """Write real zeros in pieces: of all these requests of a connection, one piece a turn of the loop."""
        waiting = self._begin(ZERO_PIECE_BYTES, request)
        offset, end = request.offset, request.offset + request.length

        def done(error: int) -> None:
            self._zero_fills.popleft()
            if self._zero_fills:
                self._clock.call_soon(self._zero_fills[0].step)
            self._changed(waiting, request, error)

        self._zero_fills.append(_ZeroFill(self._device, self._clock, offset, end, done))
        if len(self._zero_fills) == 1:
            self._clock.call_soon(self._zero_fills[0].step)

    # --- those that wait elsewhere ---

    def begin(self, data_bytes: int, operations: int = 1) -> None:
        """So many more requests wait."""
        self.operations += operations
        self.data_bytes += data_bytes

    def end(self, data_bytes: int, operations: int = 1) -> None:
        """So many do not any more."""
        self.operations -= operations
        self.data_bytes -= data_bytes

    def go_on(self) -> None:
        """They have ended, and their replies are sent."""
        self._freed()

    # --- bookkeeping ---

    def _change(self, operation: Operation, request: Request, length: int, data: bytes | None = None) -> None:
        waiting = self._begin(len(data) if data is not None else 0, request)

        def done(error: int, _result: object) -> None:
            self._changed(waiting, request, error)

        self._device.later(operation, request.offset, length, data, done)

    def _changed(self, waiting: _Waiting, request: Request, error: int) -> None:
        """The device has done it, or not; with FUA it is answered when that is durable."""
        cookie, offset = request.cookie, request.offset
        if error:
            self._finish(waiting, [self._error(cookie, offset, error)])
        elif request.flags & _FUA:
            flushes = flush_of(cookie, offset)
            waiting.requests = (flushes,)
            self._device.flush(lambda failed: self._changed(waiting, flushes, failed))
        else:
            self._counters.writes += 1
            self._finish(waiting, [self._replies.success(cookie, offset)])

    def _begin(self, data_bytes: int, *requests: Request) -> _Waiting:
        """Count one more waiting operation; `_finish` ends it with the reply."""
        self.begin(data_bytes)
        self._counters.deferred += 1
        waiting = _Waiting(requests, data_bytes, self._clock.now())
        self._waiting[waiting] = None
        return waiting

    def _finish(self, waiting: _Waiting, reply: Sequence[Buffer]) -> None:
        self.end(waiting.data_bytes)
        self._counters.latency_us.add(int((self._clock.now() - waiting.started_s) * 1e6))
        del self._waiting[waiting]
        if self.connected:
            self._ready += reply
        if not self.operations:
            self._deliver()
        elif not self._delivery_pending:
            self._delivery_pending = True
            self._clock.call_soon(self._deliver_pending)

    def deliver(self) -> None:
        """Send what was answered, and not sent yet."""
        if self._ready:
            ready, self._ready = self._ready, []
            self._send(ready)

    def _deliver_pending(self) -> None:
        self._delivery_pending = False
        self._deliver()

    def _deliver(self) -> None:
        if self.connected:
            self.deliver()
            self._freed()

    def _error(self, cookie: int, offset: int, error: int) -> bytes:
        self._counters.errors += 1
        return self._replies.error(cookie, offset, error)
