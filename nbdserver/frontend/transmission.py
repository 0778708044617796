"""The transmission phase of one connection: all requests of a wake as one batch.

Theory: `_walk` goes over everything that was received. WRITE without flags is checked and done right there, with
local names and no object a request; runs of READs of whole blocks go to `InlineReads`; every other request goes
through `_other` to `Requests`.
Successful changes collect their acknowledgements in the `Batch`; at the end of the wake one commit decides over them
and those of the export's other connections (`OpenBatch`), and one `send` carries all replies. FLUSH and FUA share one
flush, begun after the commit.

Rules
- Nothing that changes data is acknowledged before `commit` returned 0; if it fails, all changes of the batch get its
  error.
- Payloads are used in the receive buffer; they stay where they are until the commit, because only `buffer.used` and
  `buffer.reserve` move them, in `_end_batch` or `_hold`, and nothing is received before these.
- A connection whose batch is IN_FLIGHT stands still until that is acknowledged; what comes meanwhile is its next batch.
  The one that is in flight stays where it was received, set aside: it may have to be asked for again elsewhere.
- Who `leave`s takes along what was not answered; what the device has answered has been told before (unanswered.py).
- Replies to inline reads leave before another connection has its turn: their memory is everybody's.
- The refused request's payload is skipped; a peer whose stream is out of step (wrong magic) is disconnected.
- Bounds: replies of one batch (`BATCH_BYTES`), bytes that the peer does not take (`UNSENT_LIMIT_BYTES`: then nothing
  more is done for it until all of them left), waiting requests (`Deferred`). What is not processed stays in the
  buffer, and the connection is not read.

Known weakness: a write of more than some MiB is one piece of work for the loop, some milliseconds.
"""

from collections.abc import Callable

from metadata.seams import Clock, Connection, Timer
from nbdserver.block import BLOCK_BYTES, IN_FLIGHT
from nbdserver.frontend.cold_reads import ColdReads
from nbdserver.frontend.deferred import Deferred
from nbdserver.frontend.inline_reads import SLOTS, InlineReads
from nbdserver.frontend.receive_buffer import NORMAL_BYTES, NOTHING, ReceiveBuffer
from nbdserver.frontend.requests import Batch, Requests
from nbdserver.frontend.unanswered import asked_again, read_of
from nbdserver.volume.counters import Counters
from nbdserver.volume.export import Export
from nbdserver.volume.limits import Throttle
from protocol import nbd
from protocol.agreement import Agreement, ReplyStyle
from protocol.nbd import Chunk, Command, CommandFlag, ReplyFlag
from protocol.transmission import payload_bytes, refuse, replies_of

BATCH_BYTES = 4 << 20  # reply data of one batch: about one millisecond of copying
BATCH_REQUESTS = 1024  # requests of one batch: some milliseconds of a client that sends the smallest possible ones
UNSENT_LIMIT_BYTES = 4 << 20
SHRINK_DELAY_S = 1.0  # a buffer grown for a big payload shrinks when it had no such payload for this long

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_STOP = -1

_SIMPLE_MAGIC = nbd.SIMPLE_REPLY_MAGIC
_EXTENDED_MAGIC = nbd.EXTENDED_REPLY_MAGIC
_DONE, _NONE = int(ReplyFlag.DONE), int(Chunk.NONE)
_PAYLOAD_LIMIT_BYTES = nbd.MAXIMUM_PAYLOAD_BYTES
_pack_simple = nbd.SIMPLE_REPLY.pack
_pack_extended = nbd.EXTENDED_REPLY.pack


class Transmission:
    """Serves the requests of one connection."""

    def __init__(
        self,
        connection: Connection,
        clock: Clock,
        export: Export,
        agreement: Agreement,
        buffer: ReceiveBuffer,
        counters: Counters,
        finished: Callable[[str], None],
    ) -> None:
        """`finished(reason)` is called once, when the connection should be closed (its replies are sent)."""
        self._connection = connection
        self._clock = clock
        self._export = export
        self._device = export.device
        self._counters = counters
        self._agreement = agreement
        self._buffer = buffer
        self._finished = finished
        self._replies = replies_of(agreement.style)
        self._extended = agreement.style is ReplyStyle.EXTENDED
        self._request = nbd.EXTENDED_REQUEST if self._extended else nbd.REQUEST
        self._deferred = Deferred(export.device, clock, self._replies, counters, connection.send, self._freed)
        self._cold_reads = ColdReads(export.device, clock, counters, self._deferred)
        self._inline_reads = InlineReads(agreement.style, export.device, connection.send, self._cold_reads.missed)
        self._bound = (  # what `_walk` needs and what never changes on a connection
            self._request.unpack_from,
            self._request.size,
            nbd.EXTENDED_REQUEST_MAGIC if self._extended else nbd.REQUEST_MAGIC,
            int(CommandFlag.PAYLOAD_LEN) if self._extended else 0,
            self._inline_reads.take,
            export.device.write,
        )
        self._batch = Batch()
        self._others = Requests(export.device, agreement, counters, self._deferred, self._cold_reads, self._batch)
        self._requests = 0
        self._started_s = 0.0
        self._position = 0  # how far the batch has come in the buffer
        self._skip_bytes = 0
        self._missing_bytes = 0  # what the buffer must hold, from the first unused byte on, to go on
        self._stalled = False
        self._held = False  # until the batch that is in flight is acknowledged
        self._ending = ""  # why the connection ends once nothing waits; "" while it goes on
        self._over = False
        self._continuing = False
        self._most_requests, self._most_bytes = (
            BATCH_REQUESTS,
            BATCH_BYTES,
        )  # of one batch; the volume's limits may allow less
        self._limited_by: Throttle | None = None
        self._charged_bytes = 0  # of all bytes moved, what the limits were charged
        self._waits_since_s: float | None = None  # for the limits
        self._shrink_timer: Timer | None = None

    @property
    def in_flight(self) -> int:
        """Requests that wait for the device."""
        return self._deferred.operations + self._held

    def lost(self) -> None:
        """The connection is gone."""
        self._over = True
        self._deferred.disconnect()
        if self._limited_by is not None:
            self._limited_by.leave(self._admit)
        if self._shrink_timer is not None:
            self._shrink_timer.cancel()

    def drained(self) -> None:
        """The peer took all replies."""
        self._go_on()

    def shut_down(self) -> None:
        """Take no more requests; finish when nothing waits."""
        self._end("the server is shutting down")

    def freeze(self, frozen: Callable[[], None]) -> None:
        """Take no more requests; `frozen()` when nothing waits. What is not processed stays in the buffer. One that
        ends already goes on ending."""
        if not self._ending and not self._over:
            self._connection.pause_reading()
            self._finished = lambda _reason: frozen()
            self._end("the server hands its clients over")

    def leave(self) -> bytes | None:
        """End without an answer to what waits; returns all that was not answered or not looked at, the last request
        perhaps cut off, without the `skip_bytes` that come next. None, and nothing done, if the connection ends."""
        if self._ending or self._over:
            return None
        self._send_replies()
        self._deferred.deliver()
        buffer, batch, replies = self._buffer, self._batch, self._replies
        asked, rest_at = memoryview(b""), buffer.start
        if self._held:
            asked = buffer.aside
        elif batch.waits_for_commit:  # which has still to come in this turn of the loop
            asked, rest_at = buffer.view[buffer.start : self._position], self._position
        rest_at = self._skip(rest_at, buffer.end, self._skip_bytes)
        cookies = {cookie for cookie, _ in batch.flushes}
        cookies.update(replies.unpack_success(reply)[0] for reply in (*batch.acknowledged, *batch.forced))
        waiting = [*self._deferred.unanswered(), *(read_of(*read) for read in self._cold_reads.unanswered())]
        again = asked_again(self._agreement.style, waiting, asked, cookies)
        return b"".join([*again, buffer.view[rest_at : buffer.end]])

    @property
    def skip_bytes(self) -> int:
        """How much of a refused request's payload is still to come."""
        return self._skip_bytes

    def resume(self, skip_bytes: int, unsent: bytes) -> None:
        """Go on where another process stopped; the buffer holds what it had not processed."""
        self._skip_bytes = skip_bytes
        if self._buffer.capacity_bytes > NORMAL_BYTES:
            self._shrink_timer = self._clock.call_later(SHRINK_DELAY_S, self._shrink)
        if unsent:
            self._connection.send([unsent])
        if self._connection.unsent_bytes > UNSENT_LIMIT_BYTES:
            self._stall()
        else:
            self.process()

    # --- the batch ---

    def received(self) -> None:
        """More was received, and others may have received something too: what they write becomes one record."""
        count, rest = divmod(self._buffer.end, self._request.size)
        if not rest and count <= SLOTS and self._serve_reads(count):
            return
        if self._serve():
            if self._export.open_batch.join(self._committed):
                self._connection.at_round_end(self._export.open_batch.commit)
            if self._inline_reads.requests and self._batch.waits_for_commit:
                self._send_replies()

    def _serve_reads(self, count: int) -> bool:
        """Do a batch of `count` requests if it is nothing but reads of one block each: what is below, in less time."""
        buffer, counters = self._buffer, self._counters
        if (
            self._stalled
            or self._over
            or self._ending
            or self._skip_bytes
            or buffer.start
            or self._export.throttle is not None
        ):
            return False
        started_s = self._clock.now()
        answered = self._inline_reads.whole_batch(buffer.data, count)
        if answered is None:
            return False
        buffer.end = 0
        if answered:
            self._connection.send(self._inline_reads.first_slots[answered])
        if answered < count:
            self._cold_reads.fetch(self._inline_reads.again)
        counters.reads += answered
        counters.read_bytes += answered * BLOCK_BYTES
        counters.add_batch(count, self._clock.now() - started_s)
        if self._connection.unsent_bytes > UNSENT_LIMIT_BYTES:
            self._stall()
        return True

    def process(self) -> None:
        """Do everything that was received and has room."""
        if self._serve():
            self._export.open_batch.join(self._committed)
            self._export.open_batch.commit()

    def _serve(self) -> bool:
        """Do what was received as far as it goes without a commit; say whether one has to follow."""
        if self._stalled or self._over or self._ending:
            if self._held and not self._over and not self._buffer.has_room_behind:
                self._connection.pause_reading()
            return False
        if self._export.throttle is not None and not self._admitted(self._export.throttle):
            return False
        self._started_s = self._clock.now()
        self._position = self._walk()
        self._cold_reads.fetch(self._inline_reads.again)
        if self._batch.waits_for_commit:
            return True
        self._end_batch()
        return False

    def _committed(self, error: int) -> None:
        """The batch's changes are in the log, or none of them is; begin the flush that it asks for."""
        if error == IN_FLIGHT:
            self._hold()
            return
        batch = self._batch
        acknowledged, forced, flushes = batch.acknowledged, batch.forced, batch.flushes
        batch.acknowledged, batch.forced, batch.flushes = [], [], []
        if self._over:
            return  # the connection was lost meanwhile: there is nobody to tell
        replies = self._replies
        if error:
            for reply in acknowledged + forced:
                self._others.fail(*replies.unpack_success(reply), error)
            forced = []
        elif acknowledged:
            batch.replies.append(b"".join(acknowledged))
        if forced or flushes:
            waiting = flushes + [replies.unpack_success(reply) for reply in forced]
            self._deferred.flush(forced + [replies.success(*request) for request in flushes], waiting)
        self._end_batch()
        if self._held:
            self._held = False
            self._buffer.aside = NOTHING
            if self._ending:
                self._end(self._ending)
            else:
                self._go_on()

    def _hold(self) -> None:
        """What was read may be said; nothing more is done until the changes are acknowledged. What comes meanwhile, as
        far as there is room, is the next batch."""
        if not self._over:
            self._held = self._stalled = True
            self._send_replies()
            self._buffer.set_aside(self._position)
            self._make_room(0)
            if not self._buffer.has_room_behind:
                self._connection.pause_reading()

    def _end_batch(self) -> None:
        """Send the batch's replies, give its part of the buffer back, count it, and see how to go on."""
        self._send_replies()
        if not self._held:
            self._use(self._position)
        requests, self._requests = self._requests, 0
        if requests:
            counters = self._counters
            counters.add_batch(requests, self._clock.now() - self._started_s)
            if self._export.throttle is not None:
                moved_bytes = counters.read_bytes + counters.write_bytes
                self._export.throttle.take(requests, moved_bytes - self._charged_bytes)
                self._charged_bytes = moved_bytes
        if self._ending:
            self._end(self._ending)
        elif self._connection.unsent_bytes > UNSENT_LIMIT_BYTES:
            self._stall()
        elif self._batch.size_bytes > self._most_bytes and not self._continuing:
            self._continuing = True
            self._clock.call_soon(self._continue)

    def _send_replies(self) -> None:
        batch, reads = self._batch, self._inline_reads
        if reads.requests:
            self._counters.reads += reads.answered
            self._counters.read_bytes += reads.size_bytes
            self._requests += reads.requests
            batch.replies += reads.complete()
        if batch.replies:
            replies, batch.replies = batch.replies, []
            self._connection.send(replies)

    def _admitted(self, throttle: Throttle) -> bool:
        """Whether the volume's limits let anything be done now; if not, it is, when it is this connection's turn."""
        if self._waits_since_s is not None:
            return False
        if self._limited_by is not throttle:
            self._limited_by = throttle
            self._charged_bytes = self._counters.read_bytes + self._counters.write_bytes
        self._most_requests, self._most_bytes = throttle.allowance(BATCH_REQUESTS, BATCH_BYTES)
        if self._most_requests and self._most_bytes:
            return True
        self._waits_since_s = self._clock.now()
        self._connection.pause_reading()
        throttle.wait(self._admit)
        return False

    def _admit(self) -> None:
        """The limits let this connection go on."""
        if self._waits_since_s is not None:
            self._counters.throttled_us += int((self._clock.now() - self._waits_since_s) * 1e6)
            self._waits_since_s = None
        if self._export.throttle is None:
            self._limited_by = None
            self._most_requests, self._most_bytes = BATCH_REQUESTS, BATCH_BYTES
        if self._stalled or self._over or self._ending:
            return
        self.process()
        self._read_on()

    def _read_on(self) -> None:
        stalled = self._stalled and not (self._held and self._buffer.has_room_behind)
        if not (stalled or self._over or self._ending or self._waits_since_s is not None):
            self._connection.resume_reading()

    def _continue(self) -> None:
        self._continuing = False
        self.process()

    def _walk(self) -> int:
        """Do the buffer's requests; return how far it got. `_batch.size_bytes` tells whether the batch is big enough.

        Longer than other functions, on purpose: a call for each request would cost as much as all that is done here.
        """
        buffer = self._buffer
        data, view, position, end = buffer.data, buffer.view, buffer.start, buffer.end
        if self._skip_bytes:
            position = buffer.start = self._skip(position, end, self._skip_bytes)
        unpack, header_bytes, magic_expected, write_flags, take_reads, write = self._bound
        extended = self._extended
        size_bytes = self._device.size_bytes
        writable = not (self._export.read_only or self._agreement.offer.read_only)
        acknowledge = self._batch.acknowledged.append
        last = end - header_bytes
        left, most_bytes = self._most_requests, self._most_bytes
        writes = write_bytes = 0
        self._batch.size_bytes = 0
        self._missing_bytes = header_bytes
        while position <= last:
            if left <= 0:
                self._batch.size_bytes = most_bytes + 1
                break
            magic, flags, command, cookie, offset, length = unpack(data, position)
            tried = False
            if magic != magic_expected:
                self._ending = f"a request starts with {magic:#010x}: the stream is out of step"
                break
            if command == 0:
                after, taken_bytes = take_reads(view, position, end, left, most_bytes - self._batch.size_bytes)
                if after != position:
                    left -= (after - position) // header_bytes
                    position = after
                    self._batch.size_bytes += taken_bytes
                    if self._batch.size_bytes > most_bytes:
                        break
                    continue
            elif (
                command == 1
                and flags == write_flags
                and writable
                and 0 < length <= _PAYLOAD_LIMIT_BYTES
                and offset + length <= size_bytes
            ):
                start = position + header_bytes
                stop = start + length
                if stop > end:
                    self._missing_bytes = header_bytes + length
                    break
                if write(offset, view[start:stop]):
                    if extended:
                        acknowledge(_pack_extended(_EXTENDED_MAGIC, _DONE, _NONE, cookie, offset, 0))
                    else:
                        acknowledge(_pack_simple(_SIMPLE_MAGIC, 0, cookie))
                    writes += 1
                    write_bytes += length
                    position = stop
                    left -= 1
                    continue
                tried = True
            after = self._other(flags, command, cookie, offset, length, position, tried)
            if after == _STOP:
                break
            position = after
            if self._ending or self._batch.size_bytes > most_bytes:
                break
            left -= 1
        counters = self._counters
        counters.writes += writes
        counters.write_bytes += write_bytes
        self._requests += writes
        return position

    def _use(self, position: int) -> None:
        """Give the used part of the buffer back and make room for what is missing."""
        self._make_room(self._buffer.used(position))

    def _make_room(self, start: int) -> None:
        buffer, missing_bytes = self._buffer, self._missing_bytes
        if start + missing_bytes > buffer.capacity_bytes:
            buffer.reserve(missing_bytes)
            if buffer.capacity_bytes > NORMAL_BYTES and self._shrink_timer is None:
                self._shrink_timer = self._clock.call_later(SHRINK_DELAY_S, self._shrink)

    def _shrink(self) -> None:
        self._shrink_timer = None
        if not self._buffer.shrink() or self._missing_bytes > self._buffer.capacity_bytes:
            self._buffer.reserve(self._missing_bytes)
            self._shrink_timer = self._clock.call_later(SHRINK_DELAY_S, self._shrink)

    # --- all other requests ---

    def _other(
        self, flags: int, command: int, cookie: int, offset: int, length: int, position: int, tried: bool
    ) -> int:
        """Do one request, whose header is at `position`; `tried`: the device could not do it inline.

        Returns the position behind the request, or _STOP if it has to be tried again later.
        """
        start = position + self._request.size
        end = self._buffer.end
        payload = payload_bytes(self._extended, flags, command, length)
        if command == _DISC:
            self._ending = "the client disconnected"
            return start
        if self._extended and payload > nbd.MAXIMUM_PAYLOAD_BYTES:
            self._ending = f"a payload of {payload} bytes is over the limit of {nbd.MAXIMUM_PAYLOAD_BYTES}"
            return start
        read_only = self._export.read_only or self._agreement.offer.read_only
        error = refuse(self._agreement, self._device.size_bytes, read_only, (flags, command, offset, length))
        if error:
            self._requests += 1
            self._others.fail(cookie, offset, error)
            return self._skip(start, end, payload)
        if start + payload > end:
            self._missing_bytes = start - position + payload
            return _STOP
        if not self._deferred.has_room(length if command in (_READ, _WRITE) else 0):
            self._stall()
            return _STOP
        self._requests += 1
        self._others.do(flags, command, cookie, offset, length, self._buffer.view[start : start + payload], tried)
        return start + payload

    def _skip(self, position: int, end: int, size_bytes: int) -> int:
        """Pass over a payload, as far as it is here; what is not here yet is noted."""
        here = min(size_bytes, end - position)
        self._skip_bytes = size_bytes - here
        return position + here

    # --- stopping and going on ---

    def _stall(self) -> None:
        """Do nothing more for now, and read nothing, which goes on while a batch is in flight."""
        self._stalled = True
        if not self._over:
            self._connection.pause_reading()

    def _freed(self) -> None:
        if self._ending:
            self._end(self._ending)
        elif self._connection.unsent_bytes > UNSENT_LIMIT_BYTES:
            self._stall()
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._ending or self._over:
            return  # what would be read now has nobody to process it
        if self._stalled and not self._held and self._connection.unsent_bytes <= UNSENT_LIMIT_BYTES:
            self._stalled = False
            if self._buffer.end:
                self.process()
            self._read_on()

    def _end(self, reason: str) -> None:
        """Finish, as soon as nothing waits for the device."""
        self._ending = reason
        if self._deferred.operations or self._held:
            self._stall()
        elif not self._over:
            self._over = True
            if self._shrink_timer is not None:
                self._shrink_timer.cancel()
            self._finished(reason)
