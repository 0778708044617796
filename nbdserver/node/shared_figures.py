"""What the data processes of a node have to know of each other at once: how many clients there are, which numbers they
have had, and how many bytes of segment files there are, for the limits that hold for all together.

Theory: one page of memory that all of them have mapped. Each process writes only its own row; whoever asks adds up the
column. An aligned 64-bit number is written and read whole, so there is no lock. Two processes that ask at the same
moment may both be admitted: a limit on all is then overdrawn by what one of them took, a connection or a segment.

    worker 0   clients   last number given   bytes of segment files
    worker 1   ...

Rules
- A row belongs to the process that runs as that worker. The control process clears it when that process has ended, but
  for the last number: numbers of clients are not given twice.
- Numbers are given in residue classes, so that two processes never give the same one: worker w of n gives those that
  are w + 1 modulo n.
"""

import mmap
import os

from nbdserver.frontend.census import Census
from nbdserver.logdisk.budget import Budget

_CLIENTS, _LAST_ID, _DATA_BYTES = range(3)
_ROW = 4  # numbers
_NUMBER_BYTES = 8


class SharedFigures:
    """The page, as one of `workers` processes (or the control process) sees it."""

    def __init__(self, descriptor: int, workers: int) -> None:
        """`descriptor` of a file that `make` has made."""
        self._workers = workers
        self._memory = mmap.mmap(descriptor, workers * _ROW * _NUMBER_BYTES)
        self._numbers = memoryview(self._memory).cast("q")

    @staticmethod
    def make(workers: int) -> int:
        """The descriptor of a new page, in memory, with nothing in it."""
        descriptor = os.memfd_create("nbdserver-figures", os.MFD_CLOEXEC)
        os.truncate(descriptor, workers * _ROW * _NUMBER_BYTES)
        return descriptor

    def clear(self, worker: int) -> None:
        """The process that ran as this worker has ended."""
        self._numbers[worker * _ROW + _CLIENTS] = self._numbers[worker * _ROW + _DATA_BYTES] = 0

    def own(self, worker: int, column: int) -> int:
        """One number."""
        return self._numbers[worker * _ROW + column]

    def set(self, worker: int, column: int, number: int) -> None:
        """Write one number."""
        self._numbers[worker * _ROW + column] = number

    def column(self, column: int) -> list[int]:
        """The numbers of all workers."""
        return [self._numbers[worker * _ROW + column] for worker in range(self._workers)]


class SharedCensus(Census):
    """The clients of a node with several processes."""

    def __init__(self, figures: SharedFigures, worker: int, workers: int) -> None:
        super().__init__()
        self._figures = figures
        self._worker = worker
        self._workers = workers

    def others(self) -> int:
        return sum(self._figures.column(_CLIENTS)) - self._figures.own(self._worker, _CLIENTS)

    def note(self, clients: int) -> None:
        self._figures.set(self._worker, _CLIENTS, clients)

    def next_id(self) -> int:
        last = max(self._figures.column(_LAST_ID))
        given = last + 1 + (self._worker - last) % self._workers
        self._figures.set(self._worker, _LAST_ID, given)
        return given

    def used(self, client_id: int) -> None:
        self._figures.set(self._worker, _LAST_ID, max(client_id, self._figures.own(self._worker, _LAST_ID)))


class SharedBudget(Budget):
    """The limit on the segment files of all families of a node with several processes; `used_bytes` is our part."""

    def __init__(self, figures: SharedFigures, worker: int) -> None:
        super().__init__()
        self._figures = figures
        self._worker = worker

    def use(self, size_bytes: int) -> None:
        super().use(size_bytes)
        self._figures.set(self._worker, _DATA_BYTES, self.used_bytes)

    @property
    def taken_bytes(self) -> int:
        return sum(self._figures.column(_DATA_BYTES))
