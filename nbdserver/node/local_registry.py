"""The registry of a node that keeps its own: a LevelDB in its data directory.

Rules
- An empty registry beside volumes is a damaged one: it is refused, not begun anew.
- Its writes are small and must not fail when the file system is full: ballast (ballast.py) gives way to them.
"""

from metadata.leveldb import NO_THREADS, LevelSettings, LevelStore
from metadata.registry import RegistryError
from metadata.registry_table import RegistryTable
from metadata.seams import Batch
from nbdserver.node.ballast import Ballast
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError


def open_registry(directory: DataDirectory) -> RegistryTable:
    """Open, or make, the registry of a data directory. Raises NodeError."""
    try:
        store = _RegistryStore(directory)
        if next(store.range(b"a", b"z"), None) is None and any(directory.families.iterdir()):
            store.close()
            raise RegistryError(f"it is empty, yet there are volumes in {directory.families}: it is damaged")
        return RegistryTable(store)
    except (OSError, RegistryError) as error:
        raise NodeError(f"the registry in {directory.registry} cannot be opened: {error}") from None


class _RegistryStore(LevelStore):
    """The registry's LevelDB, with ballast against a full file system."""

    def __init__(self, directory: DataDirectory) -> None:
        self._ballast = Ballast(directory.ballast)
        self._ballast.give_way()
        small = LevelSettings(block_cache_bytes=1 << 20, write_buffer_bytes=4 << 20)
        super().__init__(str(directory.registry), NO_THREADS, NO_THREADS, small)
        self._ballast.keep()

    def write(self, batch: Batch) -> None:
        self._ballast.give_way()
        super().write(batch)
        self._ballast.keep()
