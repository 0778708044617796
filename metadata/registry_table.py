"""The keys of a registry in a Store of its own: what is durable of a registry on one node.

    registry-version            "2"; written when the registry is made, checked at every opening
    NUL revision                the newest revision, in decimal digits
    NUL bound/<key>             the id of the lease that `key` is bound to, in decimal digits
    (every other key)           see metadata/registry.py

Theory: a state and its transitions; no time, no callback but one. Everything answers at once. EmbeddedRegistry makes
the Registry seam of it; what needs neither leases nor watches uses it as it is.

Rules
- A value on disk carries a version and a CRC-32C over key and value, as all of our values in LevelDB do. A damaged
  value is never used: OSError(EIO).
- A swap is one synced batch: the changes, the revision and what is bound.
- After an OSError from a swap it is unknown if it was made: LevelDB may find it in its log at the next opening.

Known weakness: a synced write costs one LevelDB fsync on the caller's thread; nothing on the data path calls it.
"""

import errno
from collections.abc import Callable, Sequence

from metadata.registry import RegistryError
from metadata.registry_calls import (
    NO_LEASE,
    READABLE_VERSIONS,
    REGISTRY_VERSION,
    VERSION_KEY,
    Change,
    check_changes,
    check_key,
    check_prefix,
    end_of_prefix,
)
from metadata.seams import Batch, Store
from protocol.disk import DamagedValueError, pack_value, unpack_value

_VERSION = VERSION_KEY.encode()
_REVISION = b"\0revision"
_BOUND = b"\0bound/"
_FIRST_KEY = b"\1"

Changed = Callable[[int, Sequence[tuple[str, bytes | None]]], None]


class RegistryTable:
    """`HeldRegistry`: one node, one process, one Store."""

    def __init__(self, store: Store) -> None:
        """Take a Store; an empty one becomes a registry. RegistryError for a newer one, OSError for a damaged one."""
        self._store = store
        version = self._get(_VERSION)
        if version is not None and version not in READABLE_VERSIONS:
            raise RegistryError(
                f"the registry has version {version.decode(errors='replace')}, this program knows "
                f"{REGISTRY_VERSION.decode()}; use the nbdserver that wrote it"
            )
        if version != REGISTRY_VERSION:
            batch = store.batch()
            _put(batch, _VERSION, REGISTRY_VERSION)
            store.write(batch)
        self.revision = int(self._get(_REVISION) or b"0")
        self.changed: Changed = _tell_no_one
        """Called after each swap that wrote, with its revision and what it wrote."""
        self._lease_of = {
            key.removeprefix(_BOUND).decode(): int(lease_id) for key, lease_id in self._range(_BOUND, _BOUND + b"\xff")
        }

    def get(self, key: str) -> bytes | None:
        """Return the value of `key`, or None. OSError(EIO) when it is damaged."""
        check_key(key)
        return self._get(key.encode())

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        """Return every (key, value) below `prefix`, in order. OSError(EIO) when one is damaged."""
        check_prefix(prefix)
        start = prefix.encode()
        items = self._range(start or _FIRST_KEY, end_of_prefix(start))
        return [(key.decode(), value) for key, value in items if key != _VERSION]

    async def compare_and_swap(self, changes: Sequence[tuple[str, bytes | None, bytes | None]]) -> bool:
        """Make every (key, expected, new) true, durably, or change nothing and return False. OSError: unknown.
        Nothing is waited for but the device."""
        return self.swap([Change(*change) for change in changes])

    def swap(self, changes: Sequence[Change]) -> bool:
        """Make every change, durably, or none and return False. OSError: unknown."""
        check_changes(changes)
        if any(self._get(change.key.encode()) != change.expected for change in changes):
            return False
        written = [change for change in changes if not change.is_check]
        if written:
            self._write(written)
        return True

    def bound_keys(self, lease_id: int | None = None) -> list[str]:
        """Return the keys that are bound to a lease, or to any."""
        return [key for key, lease in self._lease_of.items() if lease_id in (lease, None)]

    def remove(self, keys: Sequence[str]) -> None:
        """Remove keys whatever is in them, as one revision. OSError: unknown."""
        if keys:
            self._write([Change(key, None, None) for key in keys])

    def close(self) -> None:
        self._store.close()

    def _write(self, changes: Sequence[Change]) -> None:
        batch = self._store.batch()
        for change in changes:
            key = change.key.encode()
            if change.new is None:
                batch.delete(key)
            else:
                _put(batch, key, change.new)
            if change.lease_id != NO_LEASE:
                _put(batch, _BOUND + key, str(change.lease_id).encode())
            elif change.key in self._lease_of:
                batch.delete(_BOUND + key)
        _put(batch, _REVISION, str(self.revision + 1).encode())
        self._store.write(batch)
        self.revision += 1
        for change in changes:
            self._lease_of.pop(change.key, None)
            if change.lease_id != NO_LEASE:
                self._lease_of[change.key] = change.lease_id
        self.changed(self.revision, [(change.key, change.new) for change in changes])

    def _range(self, start: bytes, stop: bytes) -> list[tuple[bytes, bytes]]:
        return [(key, _open(key, value)) for key, value in self._store.range(start, stop)]

    def _get(self, key: bytes) -> bytes | None:
        value = self._store.get(key)
        return None if value is None else _open(key, value)


def _tell_no_one(revision: int, changes: Sequence[tuple[str, bytes | None]]) -> None:
    pass


def _put(batch: Batch, key: bytes, value: bytes) -> None:
    batch.put(key, pack_value(key, value))


def _open(key: bytes, sealed: bytes) -> bytes:
    try:
        return unpack_value(key, sealed)
    except DamagedValueError as error:
        raise OSError(
            errno.EIO, f"the registry's value of {key.decode(errors='replace')} is damaged: {error}"
        ) from error
