"""A node's copy of the directory: the map, where it stands, what it misses, and the snapshot that may replace it.

Theory: messages go through a queue with stubs into the order of their sequence, from there whole updates into the map,
the store and the buffer of messages that others may ask for. A snapshot is received beside all that, as a second copy
with a queue of its own; when it is exact it takes the place of the first.

Rules
- The position moves from update to update: the parts of one are kept until the last has come.
- A snapshot's messages wait in its queue until its last entry has come: an update that was applied earlier could be a
  deletion that an entry read before it brings back.
- While a snapshot is received the old copy stands still.
- `drain` stops at the end of an update that cannot be decoded: this program does not understand its master.
"""

from collections.abc import Callable, Iterable
from random import Random

from metadata.directory.buffer import MessageBuffer
from metadata.directory.history import History
from metadata.directory.map import DirectoryMap, Watchers
from metadata.directory.replica_store import ReplicaStore
from metadata.directory.stubs import StubQueue
from protocol.directory import Action, MalformedError, Message, Position, Starts, Update
from protocol.directory_control import Entry
from protocol.invariant import invariant


class Staging:
    """A snapshot that is being received."""

    def __init__(self, begin: Position, master: int, history: History, random: Random) -> None:
        self.begin = begin
        self.master = master
        """Epoch of the join."""
        self.history = history
        self.map = DirectoryMap()
        self.after = ""
        """The last key that came."""
        self.end: Position | None = None
        """Where it is exact; None until its last entry has come."""
        self.position = begin
        self.stubs = StubQueue(begin.sequence, random)
        self.parts: list[Message] = []


class Replica:
    """The copy that is in use, and the one that may take its place."""

    def __init__(self, store: ReplicaStore, random: Random) -> None:
        self.store = store
        self._random = random
        self.map = DirectoryMap(store.entries)
        store.entries = []
        self.history = History(store.starts)
        self.position = store.position
        self.buffer = MessageBuffer()
        self.watchers = Watchers()
        self.staging: Staging | None = None
        self.on_applied: Callable[[Position, Update], None] = lambda position, update: None
        """Called with every update that the copy takes in its turn."""
        self.installs = 0
        """Snapshots that have taken the place of the copy."""
        self._parts: list[Message] = []
        self.stubs = StubQueue(self.position.sequence, random)
        self.buffer.restart(self.position.sequence + 1)
        self._restore_staging()

    def _restore_staging(self) -> None:
        staged, self.store.staged = self.store.staged, None
        if staged is not None:
            begin, master, after, entries = staged
            self.staging = Staging(begin, master, History(), self._random)
            self.staging.map = DirectoryMap(entries)
            self.staging.after = after

    # --- following a master ---

    def follow(self, starts: Starts) -> bool:
        """Go on with the messages of a history. False, and nothing changes, if this copy is not a beginning of it."""
        history = History(starts)
        if not history.has(self.position):
            return False
        self.history = history
        self._parts = []
        self.buffer.cut_to(self.position.sequence)
        self.stubs = StubQueue(self.position.sequence, self._random)
        return True

    def insert(self, message: Message, now_s: float) -> bool:
        """A message of the master's epoch or an earlier one, as its history says; False if it is of no use."""
        history = self.history if self.staging is None else self.staging.history
        return history.epoch_of(message.sequence) == message.epoch and self.queue.insert(message, now_s)

    @property
    def queue(self) -> StubQueue:
        """Where messages go: the snapshot's queue while there is one."""
        return self.stubs if self.staging is None else self.staging.stubs

    @property
    def is_receiving(self) -> bool:
        """True from the beginning of a snapshot on: its messages are taken."""
        return self.staging is not None and bool(self.staging.history.starts)

    def drain(self, now_s: float) -> None:
        """Apply what is in order. MalformedError: an update that this program does not understand."""
        staging = self.staging
        if staging is None:
            for message in self.stubs.take(now_s):
                self.buffer.append(message)
                update = _assemble(self._parts, message)
                if update is not None:
                    self._apply(Position(message.epoch, message.sequence), update)
            self.store.flush()
        elif staging.end is not None:
            for message in staging.stubs.take(now_s):
                update = _assemble(staging.parts, message)
                if update is not None:
                    self._stage_update(staging, Position(message.epoch, message.sequence), update)
            self._install_if_exact(staging)

    def _apply(self, position: Position, update: Update) -> None:
        self.position = position
        if self.map.apply(position, update):
            if update.action is Action.PUT:
                self.store.put(Entry(position, update))
                self.watchers.tell(update.key, update.value)
            else:
                self.store.delete(update.key)
                self.watchers.tell(update.key, None)
        self.store.move_to(position, self.history.starts)
        self.on_applied(position, update)

    # --- being the master ---

    def begin_epoch(self, epoch: int) -> None:
        """This copy is what the epoch starts from; its first message is the next one."""
        invariant(self.staging is None, "a master has no snapshot under way")
        self._parts = []
        self.buffer.cut_to(self.position.sequence)
        self.history = self.history.begun(epoch, self.position.sequence + 1)
        self.stubs = StubQueue(self.position.sequence, self._random)  # what a former master had is of no use now

    def publish(self, messages: Iterable[Message], update: Update) -> None:
        """Take a master's own update."""
        last = None
        for last in messages:
            self.buffer.append(last)
        invariant(last is not None, "an update has at least one message")
        assert last is not None  # for the type checker
        self._apply(Position(last.epoch, last.sequence), update)

    # --- a filtered stream: in order, without what is not subscribed to ---

    def take_filtered(self, message: Message) -> None:
        """A message of a stream that has everything in order that this node subscribes to."""
        if message.sequence <= self.position.sequence:
            return
        update = _assemble(self._parts, message)
        if update is not None:
            self._apply(Position(message.epoch, message.sequence), update)

    def pass_to(self, sequence: int) -> None:
        """Everything up to `sequence` that this node subscribes to has come."""
        if sequence > self.position.sequence and not self._parts:
            self.position = Position(self.history.epoch_of(sequence), sequence)
            self.store.move_to(self.position, self.history.starts)

    # --- a snapshot ---

    def stage(self, begin: Position, master: int, starts: Starts) -> None:
        """A snapshot begins at `begin`, or goes on if this one began there in the same epoch."""
        staging = self.staging
        if staging is None or staging.begin != begin or staging.master != master:
            self.stage_drop()
            staging = self.staging = Staging(begin, master, History(starts), self._random)
            self.store.stage_begin(begin, master)
        elif not staging.history.starts:  # it was found in the store
            staging.history = History(starts)

    def stage_entries(self, entries: Iterable[Entry]) -> None:
        staging = self.staging
        invariant(staging is not None and staging.end is None, "entries of a snapshot that did not begin")
        assert staging is not None  # for the type checker
        for entry in entries:
            staging.map.insert(entry)
            staging.after = entry.update.key
            self.store.stage_put(entry)
        self.store.stage_begin(staging.begin, staging.master, staging.after)
        self.store.flush()

    def stage_end(self, end: Position, now_s: float) -> None:
        """All entries have come: the snapshot is exact at `end`."""
        staging = self.staging
        invariant(staging is not None, "the end of a snapshot that did not begin")
        assert staging is not None  # for the type checker
        staging.end = end
        staging.stubs.notice(end.sequence, now_s)
        self.drain(now_s)

    def stage_drop(self) -> None:
        """Give the snapshot up."""
        staging, self.staging = self.staging, None
        if staging is not None:
            self.store.stage_drop([entry.update.key for entry in staging.map.entries()])

    def stage_filtered(self, message: Message) -> None:
        """As `take_filtered`, for the snapshot, after its end."""
        staging = self.staging
        assert staging is not None
        if message.sequence > staging.position.sequence:
            update = _assemble(staging.parts, message)
            if update is not None:
                self._stage_update(staging, Position(message.epoch, message.sequence), update)

    def stage_pass_to(self, sequence: int) -> None:
        """As `pass_to`, for the snapshot, after its end."""
        staging = self.staging
        assert staging is not None
        if sequence >= staging.position.sequence and not staging.parts:
            staging.position = Position(staging.history.epoch_of(sequence), sequence)
            self._install_if_exact(staging)

    def _stage_update(self, staging: Staging, position: Position, update: Update) -> None:
        staging.position = position
        if staging.map.apply(position, update):
            if update.action is Action.PUT:
                self.store.stage_put(Entry(position, update))
            else:
                self.store.stage_delete(update.key)

    def _install_if_exact(self, staging: Staging) -> None:
        if staging.end is None or staging.position.sequence < staging.end.sequence:
            return
        old, self.map = self.map, staging.map
        self.history, self.position, self.stubs = staging.history, staging.position, staging.stubs
        self._parts = staging.parts
        if self.stubs.taken < self.position.sequence:  # a filtered stream went past it
            self.stubs = StubQueue(self.position.sequence, self._random)
        self.staging = None
        self.installs += 1
        self.buffer.restart(self.position.sequence + 1)
        for message in self._parts:
            self.buffer.append(message)
        self.store.stage_install(
            [entry.update.key for entry in old.entries()], self.position, self.history.starts
        )  # fmt: skip
        self.store.flush()
        for key, value in old.differences(self.map):
            self.watchers.tell(key, value)


def _assemble(parts: list[Message], message: Message) -> Update | None:
    """Add a message to the parts of its update; the update when it is whole. MalformedError."""
    if message.part != len(parts) or (parts and parts[0].parts != message.parts):
        parts.clear()
        if message.part:
            raise MalformedError(f"message {message.sequence} is part {message.part} of an update whose others differ")
    parts.append(message)
    if len(parts) < message.parts:
        return None
    payload = b"".join(part.payload for part in parts)
    parts.clear()
    return Update.decode(payload)
