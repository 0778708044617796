"""The transmission phase of one connection: all requests of a wake as one batch.

Theory: `_walk` goes over everything that was received. WRITE without flags is checked and done right there, with
local names and no object a request; runs of READs of whole blocks go to `InlineReads`; every other request goes
through `_other`.
Successful changes collect their acknowledgements in `_acknowledged` (or, with FUA, `_forced`); at the end of the
wake one commit decides over them and those of the export's other connections (`OpenBatch`), and one `send` carries
all replies. FLUSH and FUA share one flush, begun after the commit.

Rules
- Nothing that changes data is acknowledged before `commit` returned 0; if it fails, all changes of the batch get its
  error.
- Payloads are used in the receive buffer; they stay where they are until the commit, because only `buffer.used` and
  `buffer.reserve` move them, in `_end_batch`, and nothing is received before it.
- Replies to inline reads leave before another connection has its turn: their memory is everybody's.
- The refused request's payload is skipped; a peer whose stream is out of step (wrong magic) is disconnected.
- Bounds: replies of one batch (`BATCH_BYTES`), bytes that the peer does not take (`UNSENT_LIMIT_BYTES`: then nothing
  more is done for it until all of them left), waiting requests (`Deferred`). What is not processed stays in the
  buffer, and the connection is not read.

Known weakness: a read of up to 32 MiB from memory is one piece of work for the loop, some milliseconds.
"""

import errno
from collections.abc import Callable, Sequence

from metadata.seams import Buffer, Clock, Connection, Timer
from nbdserver.block import ZERO, Extents
from nbdserver.frontend.deferred import Deferred
from nbdserver.frontend.inline_reads import RUN_LIMIT_BYTES, InlineReads
from nbdserver.frontend.receive_buffer import NORMAL_BYTES, ReceiveBuffer
from nbdserver.volume.counters import Counters
from nbdserver.volume.export import Export
from nbdserver.volume.limits import Throttle
from protocol import nbd
from protocol.contexts import Context
from protocol.handshake import Agreement, ReplyStyle
from protocol.nbd import Chunk, Command, CommandFlag, ReplyFlag
from protocol.transmission import parse_status_payload, payload_bytes, refuse, replies_of, shortened

BATCH_BYTES = 4 << 20  # reply data of one batch: about one millisecond of copying
BATCH_REQUESTS = 1024  # requests of one batch: some milliseconds of a client that sends the smallest possible ones
UNSENT_LIMIT_BYTES = 4 << 20
SPARSE_READ_BYTES = 256 << 10  # reads from here on look for holes first
EXTENT_LIMIT = 512  # extents in one BLOCK_STATUS reply, chunks of one sparse read
EXTENT_COST_BYTES = 2 << 10  # what one extent counts against BATCH_BYTES: half a microsecond, like copying so much
SHRINK_DELAY_S = 1.0  # a buffer grown for a big payload shrinks when it had no such payload for this long

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_FUA = int(CommandFlag.FUA)
_STOP = -1

_SIMPLE_MAGIC = nbd.SIMPLE_REPLY_MAGIC
_STRUCTURED_MAGIC = nbd.STRUCTURED_REPLY_MAGIC
_EXTENDED_MAGIC = nbd.EXTENDED_REPLY_MAGIC
_DONE, _OFFSET_DATA, _NONE = int(ReplyFlag.DONE), int(Chunk.OFFSET_DATA), int(Chunk.NONE)
_PAYLOAD_LIMIT_BYTES = nbd.MAXIMUM_PAYLOAD_BYTES
_pack_simple = nbd.SIMPLE_REPLY.pack
_pack_data = nbd.STRUCTURED_DATA.pack
_pack_extended = nbd.EXTENDED_REPLY.pack
_pack_extended_data = nbd.EXTENDED_DATA.pack


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
        self._simple = agreement.style is ReplyStyle.SIMPLE
        self._request = nbd.EXTENDED_REQUEST if self._extended else nbd.REQUEST
        self._inline_reads = InlineReads(
            agreement.style,
            export.device,
            RUN_LIMIT_BYTES if self._simple else min(RUN_LIMIT_BYTES, SPARSE_READ_BYTES - 1),
            connection.send,
        )
        self._bound = (  # what `_walk` needs and what never changes on a connection
            self._request.unpack_from,
            self._request.size,
            nbd.EXTENDED_REQUEST_MAGIC if self._extended else nbd.REQUEST_MAGIC,
            int(CommandFlag.PAYLOAD_LEN) if self._extended else 0,
            self._inline_reads.take,
            export.device.write,
        )
        self._deferred = Deferred(export.device, clock, self._replies, counters, connection.send, self._freed)
        self._out: list[Buffer] = []
        self._acknowledged: list[bytes] = []
        self._forced: list[bytes] = []
        self._flushes: list[tuple[int, int]] = []
        self._requests = 0
        self._started_s = 0.0
        self._position = 0  # how far the batch has come in the buffer
        self._skip_bytes = 0
        self._missing_bytes = 0  # what the buffer must hold, from the first unused byte on, to go on
        self._stalled = False
        self._ending = ""  # why the connection ends once nothing waits; "" while it goes on
        self._over = False
        self._continuing = False
        self._batch_bytes = 0
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
        return self._deferred.operations

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
        if self._serve():
            if self._export.open_batch.join(self._committed):
                self._connection.at_round_end(self._export.open_batch.commit)
            if self._inline_reads.count and self._waits_for_commit():
                self._send_replies()

    def process(self) -> None:
        """Do everything that was received and has room."""
        if self._serve():
            self._export.open_batch.join(self._committed)
            self._export.open_batch.commit()

    def _serve(self) -> bool:
        """Do what was received as far as it goes without a commit; say whether one has to follow."""
        if self._stalled or self._over or self._ending:
            return False
        if self._export.throttle is not None and not self._admitted(self._export.throttle):
            return False
        self._started_s = self._clock.now()
        self._position = self._walk()
        if self._waits_for_commit():
            return True
        self._end_batch()
        return False

    def _waits_for_commit(self) -> bool:
        """Whether the batch so far waits for a commit."""
        return bool(self._acknowledged or self._forced or self._flushes)

    def _committed(self, error: int) -> None:
        """The batch's changes are in the log, or none of them is; begin the flush that it asks for."""
        acknowledged, forced, flushes = self._acknowledged, self._forced, self._flushes
        self._acknowledged, self._forced, self._flushes = [], [], []
        if self._over:
            return  # the connection was lost meanwhile: there is nobody to tell
        replies = self._replies
        if error:
            for reply in acknowledged + forced:
                self._fail(*replies.unpack_success(reply), error)
            forced = []
        elif acknowledged:
            self._out.append(b"".join(acknowledged))
        if forced or flushes:
            waiting = flushes + [replies.unpack_success(reply) for reply in forced]
            self._deferred.flush(forced + [replies.success(*request) for request in flushes], waiting)
        self._end_batch()

    def _end_batch(self) -> None:
        """Send the batch's replies, give its part of the buffer back, count it, and see how to go on."""
        self._send_replies()
        self._use(self._position)
        requests, self._requests = self._requests, 0
        if requests:
            counters = self._counters
            counters.batches += 1
            counters.requests += requests
            counters.batch_requests.add(requests)
            counters.latency_us.add(int((self._clock.now() - self._started_s) * 1e6), requests)
            if self._export.throttle is not None:
                moved_bytes = counters.read_bytes + counters.write_bytes
                self._export.throttle.take(requests, moved_bytes - self._charged_bytes)
                self._charged_bytes = moved_bytes
        if self._ending:
            self._end(self._ending)
        elif self._connection.unsent_bytes > UNSENT_LIMIT_BYTES:
            self._stall()
        elif self._batch_bytes > self._most_bytes and not self._continuing:
            self._continuing = True
            self._clock.call_soon(self._continue)

    def _send_replies(self) -> None:
        out, reads = self._out, self._inline_reads
        if reads.count:
            self._counters.reads += reads.count
            self._counters.read_bytes += reads.size_bytes
            self._requests += reads.count
            out += reads.complete()
        if out:
            self._out = []
            self._connection.send(out)

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
        if not (self._stalled or self._over or self._ending or self._waits_since_s is not None):
            self._connection.resume_reading()

    def _continue(self) -> None:
        self._continuing = False
        self.process()

    def _walk(self) -> int:
        """Do the buffer's requests; return how far it got. `_batch_bytes` tells whether the batch is big enough.

        Longer than other functions, on purpose: a call for each request would cost as much as all that is done here.
        """
        buffer = self._buffer
        data, view, position, end = buffer.data, buffer.view, buffer.start, buffer.end
        if self._skip_bytes:
            position = self._skip(position, end, self._skip_bytes)
        unpack, header_bytes, magic_expected, write_flags, take_reads, write = self._bound
        extended = self._extended
        size_bytes = self._device.size_bytes
        writable = not (self._export.read_only or self._agreement.offer.read_only)
        acknowledge = self._acknowledged.append
        last = end - header_bytes
        left, most_bytes = self._most_requests, self._most_bytes
        writes = write_bytes = 0
        self._batch_bytes = 0
        self._missing_bytes = header_bytes
        while position <= last:
            if left <= 0:
                self._batch_bytes = most_bytes + 1
                break
            magic, flags, command, cookie, offset, length = unpack(data, position)
            tried = False
            if magic != magic_expected:
                self._ending = f"a request starts with {magic:#010x}: the stream is out of step"
                break
            if command == 0:
                after, taken_bytes = take_reads(view, position, end, left, most_bytes - self._batch_bytes)
                if after != position:
                    left -= (after - position) // header_bytes
                    position = after
                    self._batch_bytes += taken_bytes
                    if self._batch_bytes > most_bytes:
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
            if self._ending or self._batch_bytes > most_bytes:
                break
            left -= 1
        counters = self._counters
        counters.writes += writes
        counters.write_bytes += write_bytes
        self._requests += writes
        return position

    def _use(self, position: int) -> None:
        """Give the used part of the buffer back and make room for what is missing."""
        buffer, missing_bytes = self._buffer, self._missing_bytes
        if buffer.used(position) + missing_bytes > buffer.capacity_bytes:
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
            self._fail(cookie, offset, error)
            return self._skip(start, end, payload)
        if start + payload > end:
            self._missing_bytes = start - position + payload
            return _STOP
        if not self._deferred.has_room(length if command in (_READ, _WRITE) else 0):
            self._stall()
            return _STOP
        self._requests += 1
        self._do(flags, command, cookie, offset, length, self._buffer.view[start : start + payload], tried)
        return start + payload

    def _do(
        self, flags: int, command: int, cookie: int, offset: int, length: int, payload: memoryview, tried: bool
    ) -> None:
        device, deferred = self._device, self._deferred
        fua = bool(flags & _FUA)
        if command == Command.READ:
            self._read(flags, cookie, offset, length, tried)
        elif command == Command.WRITE:
            if not tried and device.write(offset, payload):
                self._counters.write_bytes += length
                self._changed(cookie, offset, fua)
            else:
                deferred.write(cookie, offset, bytes(payload), fua)
        elif command == Command.FLUSH:
            self._counters.flushes += 1
            self._flushes.append((cookie, offset))
        elif command == Command.CACHE:
            deferred.cache(cookie, offset, length)
        elif command == Command.BLOCK_STATUS:
            self._block_status(flags, cookie, offset, length, payload)
        elif flags & CommandFlag.NO_HOLE:
            if flags & CommandFlag.FAST_ZERO:
                self._fail(cookie, offset, errno.ENOTSUP)
            else:
                deferred.zero_fill(cookie, offset, length, fua)
        elif device.discard(offset, length):
            self._changed(cookie, offset, fua)
        elif flags & CommandFlag.FAST_ZERO:
            self._fail(cookie, offset, errno.ENOTSUP)
        else:
            deferred.discard(cookie, offset, length, fua)

    def _changed(self, cookie: int, offset: int, fua: bool) -> None:
        self._counters.writes += 1
        (self._forced if fua else self._acknowledged).append(self._replies.success(cookie, offset))

    def _fail(self, cookie: int, offset: int, error: int) -> None:
        self._counters.errors += 1
        self._out.append(self._replies.error(cookie, offset, error))

    def _read(self, flags: int, cookie: int, offset: int, length: int, tried: bool) -> None:
        if not tried:
            if length >= SPARSE_READ_BYTES and not self._simple and not flags & CommandFlag.DF:
                extents = self._device.extents(offset, length, EXTENT_LIMIT)
                if (
                    extents
                    and any(state & ZERO for _, state in extents)
                    and self._read_sparse(cookie, offset, length, extents)
                ):
                    return
            answer = self._device.read(offset, length)
            if answer is not None:
                self._count_read(length)
                self._out.append(self._replies.data(cookie, offset, offset, length, True))
                self._out += answer
                return
        self._deferred.read(cookie, offset, length)

    def _count_read(self, length: int) -> None:
        self._counters.reads += 1
        self._counters.read_bytes += length
        self._batch_bytes += length

    def _read_sparse(self, cookie: int, offset: int, length: int, extents: Extents) -> bool:
        """Answer with a chunk an extent; False if the extents do not cover the range or data is not at hand."""
        out: list[Buffer] = []
        position, stop = offset, offset + length
        for extent_bytes, state in extents:
            extent_bytes = min(extent_bytes, stop - position)
            if extent_bytes <= 0:
                break
            done = position + extent_bytes == stop
            if state & ZERO:
                out.append(self._replies.hole(cookie, offset, position, extent_bytes, done))
            else:
                answer = self._device.read(position, extent_bytes)
                if answer is None:
                    return False
                out.append(self._replies.data(cookie, offset, position, extent_bytes, done))
                out += answer
            position += extent_bytes
        if position != stop:
            return False
        self._count_read(length)
        self._batch_bytes += len(out) * EXTENT_COST_BYTES
        self._out += out
        return True

    def _block_status(self, flags: int, cookie: int, offset: int, length: int, payload: memoryview) -> None:
        contexts: Sequence[Context] = self._agreement.contexts
        if flags & CommandFlag.PAYLOAD_LEN:
            asked = parse_status_payload(self._agreement, bytes(payload))
            if asked is None or offset + asked[0] > self._device.size_bytes:
                self._fail(cookie, offset, errno.EINVAL)
                return
            length, context_ids = asked
            contexts = [context for context in contexts if context.id in context_ids]
        limit = 1 if flags & CommandFlag.REQ_ONE else EXTENT_LIMIT

        def answer(found: Sequence[Extents]) -> bytes:
            described = [
                (context.id, shortened(extents, length, limit))
                for context, extents in zip(contexts, found, strict=True)
            ]
            return self._replies.block_status(cookie, offset, described)

        if not contexts:
            self._out.append(self._replies.success(cookie, offset))
            return
        extents = None
        if len(contexts) == 1 and not contexts[0].is_bitmap:
            extents = self._device.extents(offset, length, limit)
        if extents is None:
            self._batch_bytes += EXTENT_COST_BYTES * limit * len(contexts)
            self._deferred.block_status(cookie, offset, length, limit, contexts, answer)
        else:
            self._batch_bytes += EXTENT_COST_BYTES * len(extents)
            self._out.append(answer([extents]))

    def _skip(self, position: int, end: int, size_bytes: int) -> int:
        """Pass over a payload, as far as it is here; what is not here yet is noted."""
        here = min(size_bytes, end - position)
        self._skip_bytes = size_bytes - here
        return position + here

    # --- stopping and going on ---

    def _stall(self) -> None:
        if not self._stalled:
            self._stalled = True
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
        if self._stalled and self._connection.unsent_bytes <= UNSENT_LIMIT_BYTES:
            self._stalled = False
            self.process()
            self._read_on()

    def _end(self, reason: str) -> None:
        """Finish, as soon as nothing waits for the device."""
        self._ending = reason
        if self._deferred.operations:
            self._stall()
        elif not self._over:
            self._over = True
            if self._shrink_timer is not None:
                self._shrink_timer.cancel()
            self._finished(reason)
