"""What an agent misses, and asking for it: a queue with a stub for each message that has not come.

Theory: like a reader whose magazine comes in issues: each missing one gets a slip on the shelf. A slip is *asked* when
a request has gone out for it; a refusal or the end of patience takes that mark off again, so that nobody waits for what
will not come. Requests are paced like a careful TCP: losses halve what may be asked at once, arrivals let it grow.

Rules
- Messages leave in the order of their sequence, each once.
- Bounds: STUBS_LIMIT messages and stubs; what is beyond is forgotten and asked for when the queue has moved on. At most
  the window (WINDOW_MIN to WINDOW_MAX) is asked at a time.
- A stub is asked of the master first; after each refusal or timeout of a relay and of the master in turn.
- Nothing is asked before REORDER_S and up to as much at random again have passed: overtaking is no loss, and a thousand
  agents that lost the same datagram do not ask in the same instant.
"""

from collections.abc import Iterator
from enum import Enum
from random import Random

from metadata.ranges import runs_of
from protocol.directory import RANGES_LIMIT, Message, Ranges
from protocol.invariant import invariant

STUBS_LIMIT = 4096
SCAN_LIMIT = 256  # stubs looked at when requests are made: four times what may be asked
WINDOW_MIN, WINDOW_START, WINDOW_MAX = 16.0, 32.0, 64.0
WINDOW_GROWTH = 8.0  # for each window that arrived
REORDER_S = 0.005
SPREAD_S = 0.010
PATIENCE_S = 0.05  # for an answer: a site's round trip and a busy node's turn
PATIENCE_LIMIT_S = 0.25
PATIENCE_GROWTH = 1.5  # each time in a row: at 30 % loss half of the answers are lost, and nothing is congested
RETRY_S = 0.02  # after a refusal


class Stub(Enum):
    """How a place in the queue stands."""

    MISSING = "missing"
    ASKED = "asked"
    FILLED = "filled"


class Move(Enum):
    """What happens to it."""

    ASK = "ask"
    RESENT = "resent"
    REFUSED = "refused"
    TIMED_OUT = "timed out"


TRANSITIONS: dict[Stub, dict[Move, Stub]] = {
    Stub.MISSING: {Move.ASK: Stub.ASKED, Move.RESENT: Stub.FILLED},
    Stub.ASKED: {Move.RESENT: Stub.FILLED, Move.REFUSED: Stub.MISSING, Move.TIMED_OUT: Stub.MISSING},
    Stub.FILLED: {},
}


class Source(Enum):
    """Whom to ask."""

    MASTER = "the master"
    RELAY = "a relay"


class _Place:
    """A stub, or the message that took its place."""

    __slots__ = ("due_s", "message", "state", "tries")

    def __init__(self, due_s: float) -> None:
        self.state = Stub.MISSING
        self.due_s = due_s  # MISSING: when it may be asked for; ASKED: until when the answer may take
        self.tries = 0
        self.message: Message | None = None

    def move(self, move: Move) -> None:
        after = TRANSITIONS[self.state].get(move)
        invariant(after is not None, f"a stub that is {self.state.value} cannot be {move.value}")
        assert after is not None  # for the type checker
        self.state = after


class StubQueue:
    """Everything beyond the last message taken."""

    def __init__(self, taken: int, random: Random) -> None:
        self.taken = taken
        """The sequence of the last message taken out."""
        self.newest = taken
        """The highest sequence known to exist."""
        self._places: dict[int, _Place] = {}
        self._highest = taken  # places are there for (taken, _highest]
        self._random = random
        self._window = WINDOW_START
        self._asked = 0
        self._shrunk_s = float("-inf")
        self._due_at_s: float | None = None  # None: something has changed since it was looked for

    @property
    def missing(self) -> int:
        """How many messages are known of and not here."""
        return self.newest - self.taken - sum(place.state is Stub.FILLED for place in self._places.values())

    @property
    def asked(self) -> int:
        return self._asked

    @property
    def next_tries(self) -> int:
        """How often the next message was asked for in vain."""
        place = self._places.get(self.taken + 1)
        return place.tries if place is not None else 0

    def notice(self, newest: int, now_s: float) -> None:
        """There are messages up to `newest`: make stubs."""
        self.newest = max(self.newest, newest)
        end = min(self.newest, self.taken + STUBS_LIMIT)
        if end > self._highest:
            self._due_at_s = None
            due_s = now_s + REORDER_S + SPREAD_S * self._random.random()
            for sequence in range(self._highest + 1, end + 1):
                self._places[sequence] = _Place(due_s)
            self._highest = end

    def insert(self, message: Message, now_s: float) -> bool:
        """A message has come; False if it was here or is too far ahead."""
        sequence = message.sequence
        if sequence <= self.taken:
            return False
        self.notice(sequence, now_s)
        place = self._places.get(sequence)
        if place is None or place.state is Stub.FILLED:
            return False
        if place.state is Stub.ASKED:
            self._asked -= 1
            self._window = min(WINDOW_MAX, self._window + WINDOW_GROWTH / self._window)
        place.move(Move.RESENT)
        place.message = message
        self._due_at_s = None
        return True

    def take(self, now_s: float) -> Iterator[Message]:
        """The messages whose turn it is, in order."""
        while (place := self._places.get(self.taken + 1)) is not None and place.message is not None:
            self.taken += 1
            del self._places[self.taken]
            self._due_at_s = None
            yield place.message
        self.notice(self.newest, now_s)

    def refused(self, ranges: Ranges, now_s: float) -> None:
        """Whoever was asked for these will not send them: reset their flags, so that they are asked for again."""
        chance = self._random.random()  # one for all: what was refused together is asked for together
        is_any = False
        for first, count in ranges:
            for sequence in range(max(first, self.taken + 1), min(first + count, self._highest + 1)):
                place = self._places[sequence]
                if place.state is Stub.ASKED:
                    self._unask(place, Move.REFUSED, now_s)
                    place.due_s = now_s + _backoff_s(RETRY_S, place.tries) * chance
                    is_any = True
        if is_any:
            self._shrink(now_s)

    def due(self, now_s: float) -> list[tuple[Source, Ranges]]:
        """Requests to send now; their stubs are asked from here on."""
        if now_s < self.due_at_s:
            return []
        self._due_at_s = None
        timed_out = False
        wanted: dict[Source, list[int]] = {Source.MASTER: [], Source.RELAY: []}
        for _, place in self._scan():
            if place.state is Stub.ASKED and place.due_s <= now_s:
                self._unask(place, Move.TIMED_OUT, now_s)
                timed_out = True
        if timed_out:
            self._shrink(now_s)
        for sequence, place in self._scan():
            if place.state is Stub.MISSING and place.due_s <= now_s and self._asked < int(self._window):
                place.move(Move.ASK)
                self._asked += 1
                wanted[Source.RELAY if place.tries % 2 else Source.MASTER].append(sequence)
                place.due_s = now_s + _backoff_s(PATIENCE_S, place.tries)
        return [(source, ranges) for source, found in wanted.items() for ranges in _ranges(found)]

    @property
    def due_at_s(self) -> float:
        """When `due` has something to do again; infinity if never without news."""
        if self._due_at_s is None:
            is_full = self._asked >= int(self._window)
            self._due_at_s = min(
                (
                    place.due_s
                    for _, place in self._scan()
                    if place.state is Stub.ASKED or (place.state is Stub.MISSING and not is_full)
                ),
                default=float("inf"),
            )
        return self._due_at_s

    def _scan(self) -> Iterator[tuple[int, _Place]]:
        for sequence in range(self.taken + 1, min(self._highest, self.taken + SCAN_LIMIT) + 1):
            yield sequence, self._places[sequence]

    def _unask(self, place: _Place, move: Move, now_s: float) -> None:
        place.move(move)
        place.tries += 1
        place.due_s = now_s
        self._asked -= 1
        self._due_at_s = None

    def _shrink(self, now_s: float) -> None:
        """Ask for less at a time; what was lost together counts once."""
        if now_s >= self._shrunk_s + PATIENCE_S:
            self._shrunk_s = now_s
            self._window = max(WINDOW_MIN, self._window / 2)


def _backoff_s(first_s: float, tries: int) -> float:
    backoff_s: float = min(first_s * PATIENCE_GROWTH ** min(tries, 20), PATIENCE_LIMIT_S)
    return backoff_s


def _ranges(sequences: list[int]) -> Iterator[Ranges]:
    """Rising sequences as runs, at most RANGES_LIMIT in one."""
    runs = runs_of(sequences)
    for start in range(0, len(runs), RANGES_LIMIT):
        yield runs[start : start + RANGES_LIMIT]
