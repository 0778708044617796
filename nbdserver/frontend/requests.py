"""The requests that are not done in the walk over the buffer: all but plain writes and plain reads of whole blocks.

Theory: what the device does inline becomes a reply, an acknowledgement or a flush of the `Batch`; what it cannot do
inline goes to `Deferred`, and its reply leaves by itself.

Rules
- Requests were checked by the caller: command, flags, range, room.
- A long read looks for holes first, and is then answered with a chunk an extent; a client that said DF gets one chunk.
- What has more than ONE_TURN_BYTES of data to read is not read inline: the device reads it in turns of the loop.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from metadata.seams import Buffer
from nbdserver.block import BLOCK_BYTES, SPARSE_READ_BYTES, ZERO, BlockDevice, Extents
from nbdserver.frontend.cold_reads import ColdReads
from nbdserver.frontend.deferred import Deferred
from nbdserver.frontend.inline_reads import RUN_LIMIT_BYTES
from nbdserver.frontend.unanswered import Request
from nbdserver.volume.counters import Counters
from protocol.agreement import Agreement, ReplyStyle
from protocol.contexts import Context
from protocol.nbd import Command, CommandFlag
from protocol.transmission import parse_status_payload, replies_of, shortened

EXTENT_LIMIT = 512  # extents in one BLOCK_STATUS reply, chunks of one sparse read
ONE_TURN_BYTES = 2 << 20  # some 0.5 ms, and several where the memory for it has to be got from the kernel
EXTENT_COST_BYTES = 2 << 10  # what one extent counts as replied data: half a microsecond, like copying so much

_FUA = int(CommandFlag.FUA)


@dataclass(slots=True)
class Batch:
    """What the requests of one wake leave to be done at its end."""

    replies: list[Buffer] = field(default_factory=list)
    acknowledged: list[bytes] = field(default_factory=list)  # replies to changes, sent after the commit
    forced: list[bytes] = field(default_factory=list)  # the same with FUA, sent after a flush
    flushes: list[tuple[int, int]] = field(default_factory=list)  # (cookie, offset)
    size_bytes: int = 0  # of data replied

    @property
    def waits_for_commit(self) -> bool:
        return bool(self.acknowledged or self.forced or self.flushes)


class Requests:
    """Does requests of one connection."""

    def __init__(
        self,
        device: BlockDevice,
        agreement: Agreement,
        counters: Counters,
        deferred: Deferred,
        cold_reads: ColdReads,
        batch: Batch,
    ) -> None:
        self._device = device
        self._agreement = agreement
        self._counters = counters
        self._deferred = deferred
        self._cold_reads = cold_reads
        self._batch = batch
        self._replies = replies_of(agreement.style)
        self._simple = agreement.style is ReplyStyle.SIMPLE

    def do(
        self, flags: int, command: int, cookie: int, offset: int, length: int, payload: memoryview, tried: bool
    ) -> None:
        """Do a request that was checked; `tried`: the device could not do it inline."""
        device, deferred = self._device, self._deferred
        fua = bool(flags & _FUA)
        if command == Command.READ:
            self._read(flags, cookie, offset, length, tried)
        elif command == Command.WRITE:
            if not tried and device.write(offset, payload):
                self._counters.write_bytes += length
                self._changed(cookie, offset, fua)
            else:
                deferred.write(Request(flags, command, cookie, offset, length, bytes(payload)))
        elif command == Command.FLUSH:
            self._counters.flushes += 1
            self._batch.flushes.append((cookie, offset))
        elif command == Command.CACHE:
            deferred.cache(Request(flags, command, cookie, offset, length))
        elif command == Command.BLOCK_STATUS:
            self._block_status(flags, cookie, offset, length, payload)
        elif flags & CommandFlag.NO_HOLE:
            if flags & CommandFlag.FAST_ZERO:
                self.fail(cookie, offset, errno.ENOTSUP)
            else:
                deferred.zero_fill(Request(flags, command, cookie, offset, length))
        elif device.discard(offset, length):
            self._changed(cookie, offset, fua)
        elif flags & CommandFlag.FAST_ZERO:
            self.fail(cookie, offset, errno.ENOTSUP)
        else:
            deferred.discard(Request(flags, command, cookie, offset, length))

    def _changed(self, cookie: int, offset: int, fua: bool) -> None:
        self._counters.writes += 1
        (self._batch.forced if fua else self._batch.acknowledged).append(self._replies.success(cookie, offset))

    def fail(self, cookie: int, offset: int, error: int) -> None:
        """Answer with an errno."""
        self._counters.errors += 1
        self._batch.replies.append(self._replies.error(cookie, offset, error))

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
            answer = self._device.read(offset, length) if length <= ONE_TURN_BYTES else None
            if answer is not None:
                self._count_read(length)
                self._batch.replies.append(self._replies.data(cookie, offset, offset, length, True))
                self._batch.replies += answer
                return
            if (
                length <= RUN_LIMIT_BYTES
                and not (offset | length) & (BLOCK_BYTES - 1)
                and self._cold_reads.missed([(cookie, offset, length)])
            ):
                self._batch.size_bytes += length
                return
        self._deferred.read(cookie, offset, length)

    def _count_read(self, length: int) -> None:
        self._counters.reads += 1
        self._counters.read_bytes += length
        self._batch.size_bytes += length

    def _read_sparse(self, cookie: int, offset: int, length: int, extents: Extents) -> bool:
        """Answer with a chunk an extent; False if the extents do not cover the range, there is too much data for one
        turn of the loop, or some is not at hand."""
        if sum(extent_bytes for extent_bytes, state in extents if not state & ZERO) > ONE_TURN_BYTES:
            return False
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
        self._batch.size_bytes += len(out) * EXTENT_COST_BYTES
        self._batch.replies += out
        return True

    def _block_status(self, flags: int, cookie: int, offset: int, length: int, payload: memoryview) -> None:
        contexts: Sequence[Context] = self._agreement.contexts
        request = Request(flags, int(Command.BLOCK_STATUS), cookie, offset, length, bytes(payload))
        if flags & CommandFlag.PAYLOAD_LEN:
            asked = parse_status_payload(self._agreement, bytes(payload))
            if asked is None or offset + asked[0] > self._device.size_bytes:
                self.fail(cookie, offset, errno.EINVAL)
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
            self._batch.replies.append(self._replies.success(cookie, offset))
            return
        extents = None
        if len(contexts) == 1 and not contexts[0].is_bitmap:
            extents = self._device.extents(offset, length, limit)
        if extents is None:
            self._batch.size_bytes += EXTENT_COST_BYTES * limit * len(contexts)
            self._deferred.block_status(request, length, limit, contexts, answer)
        else:
            self._batch.size_bytes += EXTENT_COST_BYTES * len(extents)
            self._batch.replies.append(answer([extents]))
