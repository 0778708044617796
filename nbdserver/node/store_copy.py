"""Opening a LevelDB without changing a byte of it.

Theory. LevelDB writes when it is opened: it replays its own log, begins a new MANIFEST and deletes what is obsolete. So
a store that may not be changed is not opened where it lies: a temporary directory gets links to its table files, which
LevelDB never changes, and copies of the few others. What is opened there is what the next start would open here.

Known weakness: the copies and what LevelDB makes of them need some megabytes of the temporary directory's room.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metadata.leveldb import NO_THREADS, LevelStore

_TABLE_SUFFIXES = (".ldb", ".sst")


@contextmanager
def opened_copy(path: Path) -> Iterator[LevelStore]:
    """A store to be read with `get` and `range`. OSError if it is damaged or not there."""
    if not (path / "CURRENT").exists():
        raise FileNotFoundError(f"{path} holds no LevelDB (its file CURRENT is missing)")
    with tempfile.TemporaryDirectory(prefix="nbdserver-check-") as scratch:
        for entry in path.iterdir():
            if entry.suffix in _TABLE_SUFFIXES:
                os.symlink(entry.absolute(), os.path.join(scratch, entry.name))
            elif entry.name != "LOCK":
                shutil.copyfile(entry, os.path.join(scratch, entry.name))
        store = LevelStore(scratch, NO_THREADS, NO_THREADS)
        try:
            yield store
        finally:
            store.close()
