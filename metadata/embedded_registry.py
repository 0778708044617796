"""The registry of one node: `Registry` over a Store of its own.

    registry-version            "1"; written when the registry is made, checked at every opening
    (every other key)           see metadata/registry.py

Rules
- A value on disk carries a version and a CRC-32C over key and value, as all of our values in LevelDB do. A damaged
  value is never used: OSError(EIO).
- `compare_and_swap` changes all of its keys or none, and has synced them when it returns True.

Known weakness: a synced write costs one LevelDB fsync on the caller's thread; nothing on the data path calls it.
"""

import errno
from collections.abc import Sequence

from metadata.registry import RegistryError
from metadata.seams import Store
from protocol.disk import DamagedValueError, pack_value, unpack_value

REGISTRY_VERSION = b"1"
_VERSION_KEY = b"registry-version"


class EmbeddedRegistry:
    """`Registry` over a Store of its own: one node, one process."""

    def __init__(self, store: Store) -> None:
        """Take a Store; an empty one becomes a registry. RegistryError for a newer one, OSError for a damaged one."""
        self._store = store
        version = self._get(_VERSION_KEY)
        if version is None:
            batch = store.batch()
            batch.put(_VERSION_KEY, pack_value(_VERSION_KEY, REGISTRY_VERSION))
            store.write(batch)
        elif version != REGISTRY_VERSION:
            raise RegistryError(
                f"the registry has version {version.decode(errors='replace')}, this program knows "
                f"{REGISTRY_VERSION.decode()}; use the nbdserver that wrote it"
            )

    def get(self, key: str) -> bytes | None:
        """Return the value of `key`, or None. OSError(EIO) when it is damaged."""
        return self._get(key.encode())

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        """Return every (key, value) below `prefix`, in order. OSError(EIO) when one is damaged."""
        start = prefix.encode()
        stop = start[:-1] + bytes([start[-1] + 1])
        return [(key.decode(), _open(key, value)) for key, value in self._store.range(start, stop)]

    def compare_and_swap(self, changes: Sequence[tuple[str, bytes | None, bytes | None]]) -> bool:
        """Make every (key, expected, new) true, durably, or change nothing and return False."""
        batch = self._store.batch()
        for key, expected, new in changes:
            name = key.encode()
            if self._get(name) != expected:
                return False
            if new is None:
                batch.delete(name)
            else:
                batch.put(name, pack_value(name, new))
        self._store.write(batch)
        return True

    def close(self) -> None:
        self._store.close()

    def _get(self, key: bytes) -> bytes | None:
        value = self._store.get(key)
        return None if value is None else _open(key, value)


def _open(key: bytes, sealed: bytes) -> bytes:
    try:
        return unpack_value(key, sealed)
    except DamagedValueError as error:
        raise OSError(
            errno.EIO, f"the registry's value of {key.decode(errors='replace')} is damaged: {error}"
        ) from error
