"""What must hold of a directory, looked at from outside all nodes.

Theory: the judge sees what no node sees: every copy at once, and all that any client was told. It keeps, for the whole
run, each message that was ever in any buffer, which process published in which epoch, and what each copy looked like
at each position. Two that do not agree are a violation, whoever is right.

Rules of this file
- Nothing here is asked of a node that a user could not see, but the node's own copy is read without its help.
- What was confirmed is expected of every master of the highest epoch from then on, and of every copy in the end.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

from metadata.directory.kept import NUMBER_BYTES
from metadata.directory.registry_keys import EVERYBODYS, KEPT_PREFIX, STATE_PREFIX
from metadata.directory.replica import Replica
from protocol.directory import NOWHERE, Message, Position, Update
from tests.simulation.registers import ViolationError

Shape = dict[str, Position]
"""A copy: where each key's update is in the order of all. Messages are compared, so values need not be."""


@dataclass
class View:
    """One running node, as the judge looks at it."""

    name: str
    life: int
    replica: Replica
    prefixes: tuple[str, ...] | None
    """What a node of the second kind subscribes to; None for the first kind."""
    epoch: int
    """In which it publishes as master; 0: it does not."""


@dataclass
class _Seen:
    """How far a process's buffer was looked at."""

    epoch: int = 0
    sequence: int = 0
    position: Position = NOWHERE


class Judge:
    """Remembers everything; raises ViolationError."""

    def __init__(self) -> None:
        self.messages: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.masters: dict[int, tuple[str, int]] = {}
        self.shapes: dict[Position, Shape] = {}
        self.confirmed: dict[str, bytes] = {}
        """Keys that are published once: they stay."""
        self.reached: dict[str, int] = {}
        """Keys whose values are numbers that rise: the highest that was confirmed."""
        self.refused: set[str] = set()
        """Keys of publications that were answered with *not done*: nobody may ever have them."""
        self.forgiven: dict[str, int] = {}
        """Keys that were kept in a registry that was put back: up to which number nothing is expected of them."""
        self.compared = 0
        self._superseded: set[tuple[str, int, int]] = set()  # masters after whom there was another one
        self._seen: dict[tuple[str, int], _Seen] = {}

    # --- what clients were told ---

    def confirm(self, key: str, value: bytes) -> None:
        """A client was told that this is confirmed."""
        if int(value.split()[0]) <= self.forgiven.get(key, -1):
            return
        if key.startswith("once/"):
            self.confirmed[key] = value
        elif key.startswith("count/"):
            self.reached[key] = max(self.reached.get(key, 0), int(value))

    def forgive(self, keys: set[str], number: int) -> None:
        """The registry that was asked to keep these has lost what was published up to that number."""
        self.forgiven |= dict.fromkeys(keys, number)
        for key in keys:
            self.confirmed.pop(key, None)
            self.reached.pop(key, None)

    def refuse(self, key: str) -> None:
        """A client was told that nothing was changed."""
        self.refused.add(key)

    # --- at any time ---

    def look(self, views: list[View], newest_epoch: int) -> None:
        """Look at all nodes at one moment. `newest_epoch` is that of the registry: its master may have come and gone
        between two looks, and have confirmed what an older one that stands still cannot know. So it may have when the
        registry is put back and names the older one again."""
        for view in views:
            self._look_at_master(view)
            seen = self._seen.setdefault((view.name, view.life), _Seen())
            self._look_at_messages(view, seen)
            if view.replica.position != seen.position:
                seen.position = view.replica.position
                self._look_at_shape(view)
        for view in views:
            if 0 < view.epoch < newest_epoch:
                self._superseded.add((view.name, view.life, view.epoch))
            elif 0 < view.epoch == newest_epoch and (view.name, view.life, view.epoch) not in self._superseded:
                self.must_have_confirmed(view)

    def _look_at_master(self, view: View) -> None:
        if view.epoch:
            before = self.masters.setdefault(view.epoch, (view.name, view.life))
            if before != (view.name, view.life):
                raise ViolationError(f"both {before} and {(view.name, view.life)} publish in epoch {view.epoch}")

    def _look_at_messages(self, view: View, seen: _Seen) -> None:
        buffer = view.replica.buffer
        last = buffer.get(seen.sequence)
        after = seen.sequence if last is not None and last.epoch == seen.epoch else buffer.floor - 1
        expected = max(after, buffer.floor - 1)
        for message in buffer.since(after):
            expected += 1
            if message.sequence != expected:
                raise ViolationError(f"{view.name} took message {message.sequence} instead of {expected}")
            self._look_at_message(view, message)
            seen.epoch, seen.sequence = message.epoch, message.sequence

    def _look_at_message(self, view: View, message: Message) -> None:
        place = (message.epoch, message.sequence)
        content = (message.part, message.parts, crc32(message.payload))
        if self.messages.setdefault(place, content) != content:
            raise ViolationError(f"{view.name} has another message at {place} than others")

    def _look_at_shape(self, view: View) -> None:
        position = view.replica.position
        if position == NOWHERE:
            return
        shape = {entry.update.key: entry.position for entry in view.replica.map.entries()}
        if not self.refused.isdisjoint(shape):
            raise ViolationError(f"{view.name} has {self.refused & set(shape)}, which was answered with not done")
        expected = self.shapes.get(position)
        if view.prefixes is not None:
            if expected is not None:
                wanted = (*EVERYBODYS, *view.prefixes)
                expected = {key: at for key, at in expected.items() if key.startswith(wanted)}
                shape = {key: at for key, at in shape.items() if key.startswith(wanted)}
        elif expected is None:
            self.shapes[position] = shape
        if expected is not None:
            self.compared += 1
            if expected != shape:
                raise ViolationError(
                    f"{view.name} at {tuple(position)} has not what others have there: {_difference(expected, shape)}"
                )

    def must_have_confirmed(self, view: View) -> None:
        """Raise unless a copy has all that was ever confirmed."""
        found = view.replica.map
        for key, value in self.confirmed.items():
            if found.get(key) != value:
                raise ViolationError(f"{view.name} lacks {key}, which was confirmed")
        for key, number in self.reached.items():
            value = found.get(key)
            if value is None or int(value) < number:
                raise ViolationError(f"{view.name} has {key} at {value!r}; {number} was confirmed")

    # --- in the end ---

    def missing(self, views: list[View], kept: dict[str, bytes], said: dict[str, bytes]) -> str:
        """What has not converged yet. `kept` is what the registry has, `said` what nodes last said of themselves."""
        masters = [view for view in views if view.epoch and view.epoch == max(self.masters)]
        if len(masters) != 1:
            return "there is no master of the newest epoch"
        master = masters[0].replica
        full = {entry.update.key: entry.update.value for entry in master.map.entries()}
        for view in views:
            replica = view.replica
            if replica.staging is not None:
                return f"{view.name} is receiving a snapshot"
            if replica.position != master.position:
                return f"{view.name} is at {tuple(replica.position)}, the master at {tuple(master.position)}"
            if replica.store.persisted != replica.position:
                return f"{view.name} has not persisted what it has"
            if replica is not master and view.prefixes is None and replica.stubs.missing:
                return f"{view.name} misses {replica.stubs.missing} messages"
            found = {entry.update.key: entry.update.value for entry in replica.map.entries()}
            wanted = full
            if view.prefixes is not None:
                prefixes = (*EVERYBODYS, *view.prefixes)
                wanted = {key: value for key, value in full.items() if key.startswith(prefixes)}
                found = {key: value for key, value in found.items() if key.startswith(prefixes)}
            if found != wanted:
                return f"{view.name} has not exactly its keys: {_difference(wanted, found)}"
        for key, value in said.items():
            if full.get(key) != value:
                return f"{key} is {full.get(key)!r}, its node says {value!r}"
        suspected = [view.name for view in views if STATE_PREFIX + view.name in full]
        if suspected:
            return f"{suspected[0]} is there and suspected of being dead"
        late = [key for key in full if key.startswith("passing/")]
        if late:
            return f"{late[0]} has not expired"
        return self._missing_of_kept(master, kept)

    @staticmethod
    def _missing_of_kept(master: Replica, kept: dict[str, bytes]) -> str:
        in_map = {entry.update.key: entry.update.value for entry in master.map.entries() if entry.update.is_kept}
        updates = [Update.decode(value[NUMBER_BYTES:]) for key, value in kept.items() if key.startswith(KEPT_PREFIX)]
        wrong = _difference({update.key: update.value for update in updates}, in_map)
        return f"the registry keeps what the map has not: {wrong}" if wrong else ""


def _difference(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    def sentences() -> Iterator[str]:
        for key in sorted({*expected, *found}):
            if expected.get(key) != found.get(key):
                yield f"{key} {_short(expected.get(key))} there, {_short(found.get(key))} here"

    return "; ".join(list(sentences())[:3])


def _short(value: object) -> str:
    text = "absent" if value is None else repr(tuple(value) if isinstance(value, Position) else value)
    return text if len(text) < 40 else f"{text[:40]}.."
