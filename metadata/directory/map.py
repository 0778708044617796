"""The map: keys and values in the order of the keys, and who watches them.

Rules
- Each key carries the position of the update that made it. `apply` changes nothing that is as new or newer: a snapshot
  that was read while its source changed becomes exact when the messages since it began are applied to it.
- Watchers hear of a change after the map has it, in the order in which they began to watch.
- Keys are ordered by code point, as their UTF-8 is.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator

from protocol.directory import Action, Position, Update
from protocol.directory_control import Entry

Watcher = Callable[[str, bytes | None], None]
"""Called with a key and its value, None when it is gone."""


class DirectoryMap:
    """Keys and their entries."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {entry.update.key: entry for entry in entries}
        self._keys = sorted(self._entries)

    def __len__(self) -> int:
        return len(self._keys)

    def entry(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def get(self, key: str) -> bytes | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.update.value

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        """(key, value) of every key that begins with `prefix`, in order."""
        return [(entry.update.key, entry.update.value) for entry in self.entries(prefix)]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """The entries of the keys that begin with `prefix`, in order, as of the call."""
        first = bisect_left(self._keys, prefix)
        last = bisect_right(self._keys, prefix, lo=first, key=lambda key: key[: len(prefix)])
        return iter([self._entries[key] for key in self._keys[first:last]])

    def after(self, key: str, limit: int) -> list[Entry]:
        """The next `limit` entries above `key`, as the map is now."""
        first = bisect_left(self._keys, key + "\0") if key else 0
        return [self._entries[name] for name in self._keys[first : first + limit]]

    def apply(self, position: Position, update: Update) -> bool:
        """Make the change unless the key has a newer one; False if it is without effect."""
        key = update.key
        found = self._entries.get(key)
        if found is not None and found.position.sequence >= position.sequence:
            return False
        if update.action is Action.PUT:
            if found is None:
                insort(self._keys, key)
            self._entries[key] = Entry(position, update)
            return True
        if found is None:
            return False
        del self._entries[key]
        del self._keys[bisect_left(self._keys, key)]
        return True

    def insert(self, entry: Entry) -> None:
        """Take an entry of a snapshot as it is."""
        key = entry.update.key
        if key not in self._entries:
            insort(self._keys, key)
        self._entries[key] = entry

    def differences(self, newer: "DirectoryMap") -> Iterator[tuple[str, bytes | None]]:
        """(key, its value in `newer` or None) where the two differ, in order."""
        for key in sorted({*self._keys, *newer._keys}):
            value = newer.get(key)
            if value != self.get(key):
                yield key, value


class Watchers:
    """Who wants to hear of which prefix."""

    def __init__(self) -> None:
        self._watchers: dict[int, tuple[str, Watcher]] = {}
        self._count = 0

    def add(self, prefix: str, watcher: Watcher) -> Callable[[], None]:
        """Return what ends the watch."""
        self._count += 1
        number = self._count
        self._watchers[number] = (prefix, watcher)
        return lambda: self._watchers.pop(number, None) and None

    def tell(self, key: str, value: bytes | None) -> None:
        if self._watchers:
            for number, (prefix, watcher) in list(self._watchers.items()):
                if key.startswith(prefix) and number in self._watchers:
                    watcher(key, value)
