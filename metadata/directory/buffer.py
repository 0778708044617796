"""The last messages, in case somebody asks for one again: a master's retransmit buffer and every relay's.

Theory: it holds a run of consecutive sequences without a gap. What is oldest goes when there is too much, unless a hold
(a join's synchronization point) needs it; a hold may double the room several times, not without end, so a hold that
wants too much is broken, and its join begins again.

Rules
- Only whole updates go: the floor is always the first message of an update.
- Bounds: LIMIT_BYTES without a hold, HELD_LIMIT_BYTES with one, HOLDS_LIMIT holds, each for its time.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice

from protocol.directory import Message
from protocol.invariant import invariant

LIMIT_BYTES = 4 << 20  # at 100 messages of 400 bytes a second: more than a minute and a half
HELD_LIMIT_BYTES = 16 << 20
HOLDS_LIMIT = 32


class MessageBuffer:
    """Messages by their sequence, the newest few megabytes."""

    def __init__(self, limit_bytes: int = LIMIT_BYTES, held_limit_bytes: int = HELD_LIMIT_BYTES) -> None:
        self._messages: deque[Message] = deque()
        self._limit_bytes = limit_bytes
        self._held_limit_bytes = held_limit_bytes
        self._holds: dict[int, tuple[int, float]] = {}
        self.size_bytes = 0
        self.floor = 1
        """The lowest sequence that is here; one above the newest when there is none."""

    @property
    def newest(self) -> int:
        return self.floor + len(self._messages) - 1

    def restart(self, sequence: int) -> None:
        """Forget everything; the next message has this sequence."""
        self._messages.clear()
        self._holds.clear()
        self.size_bytes = 0
        self.floor = sequence

    def append(self, message: Message) -> None:
        invariant(message.sequence == self.newest + 1, f"message {message.sequence} after {self.newest}")
        self._messages.append(message)
        self.size_bytes += message.size_bytes
        while self.size_bytes > self._limit_bytes and self._drop_first_update():
            pass

    def cut_to(self, sequence: int) -> None:
        """Drop what is above `sequence`: it belongs to an update that will never be whole."""
        while self._messages and self._messages[-1].sequence > sequence:
            self.size_bytes -= self._messages.pop().size_bytes

    def _drop_first_update(self) -> bool:
        first = self._messages[0]
        end = first.sequence - first.part + first.parts  # the sequence after the update
        if end > self.newest + 1:
            return False  # it is still being appended
        for attempt, (sequence, _) in list(self._holds.items()):
            if sequence + 1 < end:
                if self.size_bytes <= self._held_limit_bytes:
                    return False
                del self._holds[attempt]
        while self._messages and self._messages[0].sequence < end:
            self.size_bytes -= self._messages.popleft().size_bytes
        self.floor = end
        return True

    def get(self, sequence: int) -> Message | None:
        index = sequence - self.floor
        return self._messages[index] if 0 <= index < len(self._messages) else None

    def since(self, sequence: int) -> Iterator[Message]:
        """The messages above `sequence`, which must not be below the floor."""
        invariant(sequence + 1 >= self.floor, "messages below the floor are asked for")
        return iter(list(islice(self._messages, sequence + 1 - self.floor, None)))

    # --- holds ---

    def hold(self, attempt: int, sequence: int, until_s: float) -> bool:
        """Keep what is above `sequence` for that join; False if it is gone already or there are too many holds."""
        if sequence + 1 < self.floor or sequence > self.newest:
            return False
        if attempt not in self._holds and len(self._holds) >= HOLDS_LIMIT:
            return False
        self._holds[attempt] = (sequence, until_s)
        return True

    def extend(self, attempt: int, until_s: float) -> bool:
        """The join is alive; False if its hold is broken."""
        if attempt not in self._holds:
            return False
        self._holds[attempt] = (self._holds[attempt][0], until_s)
        return True

    def release(self, attempt: int) -> None:
        self._holds.pop(attempt, None)

    def expire(self, now_s: float) -> None:
        """End the holds whose time is over."""
        for attempt, (_, until_s) in list(self._holds.items()):
            if until_s <= now_s:
                del self._holds[attempt]
