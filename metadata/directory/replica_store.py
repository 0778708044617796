"""A node's copy of the directory in its Store.

    d                      ReplicaState: who this node is, what it promised, where its copy stands
    g                      StagingState: a snapshot that is being received; absent if there is none
    e generation(4) key    an entry of the copy, or of the snapshot under the next generation

Rules
- One batch at a time; what changes meanwhile is the next one. A position, a promise, a last key is told as persisted
  only when the batch that has it, with all entries up to it, is synced.
- A snapshot is received under a generation of its own and becomes the copy by one small batch that changes the number.
  What has another generation is deleted afterwards, a bounded number of keys a batch.
- The id is drawn once, when the store is empty; the incarnation rises at each start, before anything is sent, and is
  `least_incarnation` at least: a store that was put back from a copy does not count from there again.
- A write that fails is the end of this copy's part in the directory (`failed`): nothing is told as persisted after it.
"""

from collections.abc import Callable, Sequence
from random import Random

from construct import Int8ub, Int32ub, Int64ub, Struct

from metadata.seams import Store
from protocol.checksum import crc32c
from protocol.directory import NOWHERE, Position, Starts
from protocol.directory_control import Entry, pack_starts, unpack_starts
from protocol.disk import pack_value, unpack_value
from protocol.layout import derive

ReplicaState = Struct(
    "node" / Int64ub,
    "incarnation" / Int32ub,
    "promised" / Int32ub,  # nothing of a lower epoch is taken
    "generation" / Int32ub,
    "epoch" / Int32ub,  # the position
    "sequence" / Int64ub,
    "subscription" / Int32ub,  # checksum of the prefixes; of another one, the copy is of no use
)  # then the history
StagingState = Struct(
    "epoch" / Int32ub,  # the position that the snapshot begins at
    "sequence" / Int64ub,
    "master" / Int32ub,  # epoch of the join
    "reserved" / Int8ub,
)  # then the last key received
REPLICA_STATE = derive(ReplicaState)
STAGING_STATE = derive(StagingState)
STATE_KEY = b"d"
STAGING_KEY = b"g"
GARBAGE_A_BATCH = 1000  # keys: some 50 KiB of tombstones


def _entry_key(generation: int, key: str) -> bytes:
    return b"e" + generation.to_bytes(4, "big") + key.encode()


class ReplicaStore:
    """What is on the device, and what is on its way there. OSError or DamagedValueError if it cannot be read.

    `persisted(position, promised)` is called after each batch, `failed(errno)` once. `has_failed` after it was made
    says that the first write failed already.
    """

    def __init__(
        self,
        store: Store,
        random: Random,
        persisted: Callable[[Position, int], None],
        failed: Callable[[int], None],
        prefixes: Sequence[str] = (),
        least_incarnation: int = 0,
    ) -> None:
        self._store = store
        self._tell_persisted = persisted
        self._tell_failed = failed
        self._subscription = crc32c("\0".join(prefixes).encode()) if prefixes else 0
        self._changes: dict[bytes, bytes | None] = {}
        self._garbage: list[bytes] = []
        self._is_dirty = False
        self.is_writing = False
        self.has_failed = False
        self.node = 0
        self.incarnation = 0
        self.promised = 0
        self.generation = 1
        self.position = NOWHERE
        self.starts: Starts = ()
        self.entries: list[Entry] = []
        """As they were found; the caller takes them."""
        self.staged: tuple[Position, int, str, list[Entry]] | None = None
        """(begin, epoch of the join, last key, entries) of a snapshot that was being received."""
        self._load()
        while not self.node:
            self.node = random.getrandbits(64)
        self.incarnation = max(self.incarnation + 1, least_incarnation)
        batch = store.batch()
        batch.put(STATE_KEY, self._state())
        try:
            store.write(batch)
        except OSError:
            self.has_failed = True
        self.persisted = self.position

    def _load(self) -> None:
        found = self._store.get(STATE_KEY)
        if found is None:
            return
        state = unpack_value(STATE_KEY, found)
        (self.node, self.incarnation, self.promised, self.generation, epoch, sequence, subscription) = (
            REPLICA_STATE.unpack_from(state)
        )
        staging = self._store.get(STAGING_KEY)
        if subscription == self._subscription:
            self.position = Position(epoch, sequence)
            self.starts = unpack_starts(state[REPLICA_STATE.size :])
        else:
            self.generation += 2
            staging = None
            self._changes[STAGING_KEY] = None
        staged: list[Entry] = []
        for key, value in self._store.range(b"e", b"f"):
            generation = int.from_bytes(key[1:5], "big")
            if generation == self.generation:
                self.entries.append(Entry.decode(unpack_value(key, value)))
            elif staging is not None and generation == self.generation + 1:
                staged.append(Entry.decode(unpack_value(key, value)))
            elif generation > self.generation:
                self._changes[key] = None  # its number will be used again: gone before that
            else:
                self._garbage.append(key)
        if staging is not None:
            payload = unpack_value(STAGING_KEY, staging)
            epoch, sequence, master, _ = STAGING_STATE.unpack_from(payload)
            self.staged = (Position(epoch, sequence), master, payload[STAGING_STATE.size :].decode(), staged)

    # --- changes; each is persisted by a later `flush` ---

    def put(self, entry: Entry) -> None:
        self._put(_entry_key(self.generation, entry.update.key), entry.encode())

    def delete(self, key: str) -> None:
        self._changes[_entry_key(self.generation, key)] = None

    def move_to(self, position: Position, starts: Starts) -> None:
        """The copy is at `position` of this history, with the puts and deletes so far."""
        self.position, self.starts = position, starts
        self.promised = max(self.promised, position.epoch)
        self._is_dirty = True

    def promise(self, epoch: int) -> None:
        self.promised = max(self.promised, epoch)
        self._is_dirty = True

    def stage_begin(self, position: Position, master: int, after: str = "") -> None:
        """A snapshot that begins at `position` is there up to the key `after`."""
        self._put(STAGING_KEY, STAGING_STATE.pack(*position, master, 0) + after.encode())
        self._is_dirty = True

    def stage_put(self, entry: Entry) -> None:
        self._put(_entry_key(self.generation + 1, entry.update.key), entry.encode())

    def stage_delete(self, key: str) -> None:
        self._changes[_entry_key(self.generation + 1, key)] = None

    def stage_drop(self, keys: list[str]) -> None:
        """The snapshot is given up."""
        for key in keys:
            self.stage_delete(key)
        self._changes[STAGING_KEY] = None
        self._is_dirty = True

    def stage_install(self, old_keys: list[str], position: Position, starts: Starts) -> None:
        """The snapshot becomes the copy, at `position`; the old copy's keys are deleted by and by."""
        self._garbage += [_entry_key(self.generation, key) for key in old_keys]
        self.generation += 1
        self._changes[STAGING_KEY] = None
        self.move_to(position, starts)

    def _put(self, key: bytes, payload: bytes) -> None:
        self._changes[key] = pack_value(key, payload)

    def _state(self) -> bytes:
        head = REPLICA_STATE.pack(
            self.node, self.incarnation, self.promised, self.generation, *self.position, self._subscription
        )
        return pack_value(STATE_KEY, head + pack_starts(self.starts))

    def flush(self) -> None:
        """Write what has changed, now or when the batch under way is done."""
        if self.is_writing or self.has_failed or not (self._changes or self._is_dirty or self._garbage):
            return
        batch = self._store.batch()
        changes, self._changes = self._changes, {}
        garbage, self._garbage = self._garbage[:GARBAGE_A_BATCH], self._garbage[GARBAGE_A_BATCH:]
        for key in garbage:
            batch.delete(key)
        for key, value in changes.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        batch.put(STATE_KEY, self._state())
        position, promised = self.position, self.promised
        self._is_dirty = False
        self.is_writing = True

        def done(error: int) -> None:
            self.is_writing = False
            if error:
                self.has_failed = True
                self._tell_failed(error)
                return
            self.persisted = position
            self._tell_persisted(position, promised)
            self.flush()

        self._store.write_later(batch, done)
