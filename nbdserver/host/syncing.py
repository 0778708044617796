"""Where a sync waits for the device: in a thread, or on the loop while nobody else is there.

Theory. To hand a sync to a thread and back takes two wake-ups and several quarrels about the interpreter's lock, often
longer than the sync itself takes on a good device. A client that alone uses the node and flushes after each write waits
for all of that each time, and there is nobody whom the loop could serve meanwhile. For it the sync is made on the loop.

Rules
- On the loop only while one connection alone is served (`Completions.alone_since_s`) and the last QUICK_SYNCS took
  less than QUICK_S each. One that took longer, wherever, begins the count anew: a slow device is left to the thread.
- After what else the loop has to do first: `run` never waits, and what was replied before it has left.
- What gives the data to the device early promises nothing and is told no errors: the fdatasync that follows is.
- In the order they were asked for, one at a time. A failed one is reported once and never repeated.

Known weakness: a device that is quick for long and then stands still holds the loop once.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from time import monotonic

from metadata.seams import Done
from nbdserver.host.completions import Completions, Workers

QUICK_S = 1e-3
QUICK_SYNCS = 16
ALONE_S = 0.02  # nobody else for so long

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = ctypes.CDLL(None).sync_file_range  # Python has no name for it
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Syncer:
    """Syncs files for one family."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions
        self._thread = Workers(completions, 1, "nbdserver-sync")
        self._quick = 0  # syncs in a row
        self._in_thread = 0

    def run(self, handles: Sequence[int], done: Done) -> None:
        """fdatasync in the order given; the first failure ends it. `done` comes later, from the loop."""
        if (
            self._quick >= QUICK_SYNCS
            and not self._in_thread
            and monotonic() - self._completions.alone_since_s > ALONE_S
        ):
            for handle in handles:
                _sync_file_range(handle, 0, 0, _SYNC_FILE_RANGE_WRITE)  # the whole file
            self._completions.call_soon(self._on_loop, tuple(handles), done)
        else:
            self._in_thread += 1
            self._thread.run(self._back, _sync_all, tuple(handles), done)

    def close(self) -> None:
        """Finish what was asked for; waits for it."""
        self._thread.close()

    def _on_loop(self, handles: tuple[int, ...], done: Done) -> None:
        error, took_s, _ = _sync_all(handles, done)
        self._completions.held_until_s = monotonic()
        self._judge(took_s)
        done(error)

    def _back(self, error: int, took_s: float, done: Done) -> None:
        self._in_thread -= 1
        self._judge(took_s)
        done(error)

    def _judge(self, took_s: float) -> None:
        self._quick = self._quick + 1 if took_s < QUICK_S else 0


def _sync_all(handles: tuple[int, ...], done: Done) -> tuple[int, float, Done]:
    """(errno, how long it took, done)"""
    began_s = monotonic()
    error = 0
    try:
        for handle in handles:
            os.fdatasync(handle)
    except OSError as failure:
        error = failure.errno or errno.EIO
    return error, monotonic() - began_s, done
