"""Blocks that one end of a stream asks the other for, because its own copy has rotted.

Theory. What is asked is answered at a place in the stream: after everything that was sent before it. The owner asks
for a block only when all its modifications have been sent, so what comes is what it had, unless the block changed in
the meantime; then the log that repairs finds another place in its map, and takes nothing.

Rules
- Whoever asks is answered: with what came, or with nothing when WAIT_S have gone by or nobody will answer.
- At most ASKED_LIMIT questions are open at once; a further one is answered with nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from metadata.seams import Buffer, Clock, Timer
from nbdserver.replication.peer_stream import PeerStream
from nbdserver.replication.replica_log import Found, ReplicaLog
from protocol.packing import blocks_of
from protocol.peer import Blocks, ReadBlocks
from protocol.peer_frames import blocks_frame

WAIT_S = 2.0
ASKED_LIMIT = 16

Answered = Callable[[Mapping[int, Buffer]], None]


class BlockRequests:
    """The questions of one end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._number = 0
        self._asked: dict[int, tuple[Sequence[int], Answered, Timer]] = {}
        self._unsent: dict[int, Sequence[int]] = {}

    def ask(self, mbas: Sequence[int], answered: Answered) -> None:
        """Ask with the next `send`."""
        if len(self._asked) >= ASKED_LIMIT:
            self._clock.call_soon(partial(answered, {}))
            return
        self._number += 1
        number = self._number
        timer = self._clock.call_later(WAIT_S, lambda: self._tell(number, {}))
        self._asked[number] = mbas, answered, timer
        self._unsent[number] = mbas

    def send(self, stream: PeerStream) -> None:
        """Ask what was not asked yet, at this place of the stream."""
        if self._unsent:
            unsent, self._unsent = self._unsent, {}
            for number, mbas in unsent.items():
                stream.send(ReadBlocks(number, mbas))

    def answered(self, frame: Blocks) -> None:
        """An answer has come, maybe to what nobody waits for any more."""
        self._tell(frame.number, dict(zip(frame.mbas, blocks_of(frame.data), strict=True)))

    def ask_again(self) -> None:
        """The stream is lost: ask on the next one."""
        self._unsent = {number: mbas for number, (mbas, _, _) in self._asked.items()}

    def forget(self) -> None:
        """Nobody will answer."""
        for number in list(self._asked):
            self._tell(number, {})

    def _tell(self, number: int, blocks: Mapping[int, Buffer]) -> None:
        asked = self._asked.pop(number, None)
        self._unsent.pop(number, None)
        if asked is not None:
            _, answered, timer = asked
            timer.cancel()
            self._clock.call_soon(partial(answered, blocks))


def answer(log: ReplicaLog, stream: PeerStream, frame: ReadBlocks, is_patient: bool) -> None:
    """Send what the log has of the blocks that the other end asks for."""

    def read(found: Mapping[int, bytes]) -> None:
        stream.send(blocks_frame(frame.number, found))

    log.read_blocks(frame.mbas, is_patient, read)


class BlockHolder(Protocol):
    """Another replica that may be asked."""

    @property
    def node(self) -> str: ...

    def read_blocks(self, mbas: Sequence[int], answered: Answered) -> None: ...


def ask_in_turn(
    clock: Clock, holders: Sequence[BlockHolder], mbas: Sequence[int], done: Callable[[Found], None]
) -> None:
    """Ask one holder after the other for what the ones before did not have."""
    found: dict[int, tuple[str, Buffer]] = {}
    left = iter(holders)

    def ask_next() -> None:
        lacking = [mba for mba in mbas if mba not in found]
        holder = next(left, None) if lacking else None
        if holder is None:
            clock.call_soon(partial(done, found))
        else:
            holder.read_blocks(lacking, partial(answered, holder.node))

    def answered(node: str, blocks: Mapping[int, Buffer]) -> None:
        found.update((mba, (node, data)) for mba, data in blocks.items())
        ask_next()

    ask_next()
