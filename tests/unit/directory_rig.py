"""What the directory's unit tests share: an outbox that collects, a store in memory, a clock that is set."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from metadata.directory.replica import Replica
from metadata.directory.replica_store import ReplicaStore
from metadata.seams import Batch, Done
from protocol.directory import Action, Message, Position, Update, cut

Changes = list[tuple[bytes, bytes | None]]


class MemoryBatch:
    """Changes in their order."""

    def __init__(self) -> None:
        self.changes: Changes = []

    def put(self, key: bytes, value: bytes) -> None:
        self.changes.append((key, value))

    def delete(self, key: bytes) -> None:
        self.changes.append((key, None))


class MemoryStore:
    """A Store whose late writes are done when the test says so."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.pending: list[tuple[MemoryBatch, Done]] = []
        self.fails = 0

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def range(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted((key, value) for key, value in self.values.items() if start <= key < stop))

    def batch(self) -> MemoryBatch:
        return MemoryBatch()

    def write(self, batch: Batch) -> None:
        assert isinstance(batch, MemoryBatch)
        if self.fails:
            raise OSError(self.fails, "the test says so")
        for key, value in batch.changes:
            if value is None:
                self.values.pop(key, None)
            else:
                self.values[key] = value

    def write_later(self, batch: Batch, done: Done) -> None:
        assert isinstance(batch, MemoryBatch)
        self.pending.append((batch, done))

    def sync(self) -> None:
        """Do what was asked, and what is asked because of it."""
        while self.pending:
            batch, done = self.pending.pop(0)
            if not self.fails:
                self.write(batch)
            done(self.fails)


class Outbox:
    """Collects (node, body)."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Any]] = []

    def send(self, node: int, body: Any) -> None:
        self.sent.append((node, type(body).decode(body.encode())))

    def send_all(self, nodes: Sequence[int], body: Any) -> None:
        for node in nodes:
            self.send(node, body)

    def take(self, of_type: type | None = None) -> list[tuple[int, Any]]:
        """What was sent since the last call; only bodies of a type, if one is given."""
        sent, self.sent = self.sent, []
        return [(node, body) for node, body in sent if of_type is None or isinstance(body, of_type)]


class SetClock:
    """A Clock that stands still until it is set; timers run in their order."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._timers: list[tuple[float, int, SetTimer]] = []
        self._count = 0

    def now(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "SetTimer":
        timer = SetTimer(callback)
        self._count += 1
        self._timers.append((self.now_s + delay_s, self._count, timer))
        return timer

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_later(0.0, callback)

    def advance(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self._timers and (first := min(self._timers))[0] <= until_s:
            self._timers.remove(first)
            self.now_s = max(self.now_s, first[0])
            if first[2].callback is not None:
                first[2].callback()
        self.now_s = until_s


class SetTimer:
    """A pending call."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


def make_replica(store: MemoryStore | None = None, prefixes: Sequence[str] = ()) -> Replica:
    """A copy over a store; what it says to have persisted is not listened to."""
    rng = random.Random(1)
    return Replica(ReplicaStore(store or MemoryStore(), rng, lambda *_: None, lambda _: None, prefixes), rng)


def put(key: str, value: bytes = b"v", **fields: Any) -> Update:
    return Update(Action.PUT, key, value, **fields)


def delete(key: str) -> Update:
    return Update(Action.DELETE, key)


def messages(epoch: int, first: int, *updates: Update) -> list[Message]:
    """Updates as a master numbers them."""
    found: list[Message] = []
    for update in updates:
        payloads = cut(update.encode())
        for part, payload in enumerate(payloads):
            found.append(Message(epoch, first + len(found), part, len(payloads), payload))
    return found


def filled_replica(epoch: int, *updates: Update, store: MemoryStore | None = None) -> Replica:
    """A copy that followed the first epoch of a master from its first message on."""
    replica = make_replica(store)
    replica.stage(Position(epoch, 1), epoch, ((epoch, 1),))
    replica.stage_end(Position(epoch, 1), 0.0)
    for message in messages(epoch, 2, *updates):
        assert replica.insert(message, 0.0)
    replica.drain(0.0)
    return replica
