"""The registry of a node that keeps its own: a LevelDB in its data directory.

Rules
- An empty registry beside volumes is a damaged one: it is refused, not begun anew.
- Its writes are small and must not fail when the file system is full: ballast (ballast.py) gives way to them.
"""

from metadata.leveldb import NO_THREADS
from metadata.registry import RegistryError
from metadata.registry_table import RegistryTable
from nbdserver.node.ballast import BallastedStore
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError


def open_registry(directory: DataDirectory) -> RegistryTable:
    """Open, or make, the registry of a data directory. Raises NodeError."""
    try:
        store = BallastedStore(directory.registry, NO_THREADS, directory.ballast)
        if next(store.range(b"a", b"z"), None) is None and any(directory.families.iterdir()):
            store.close()
            raise RegistryError(f"it is empty, yet there are volumes in {directory.families}: it is damaged")
        return RegistryTable(store)
    except (OSError, RegistryError) as error:
        raise NodeError(f"the registry in {directory.registry} cannot be opened: {error}") from None
