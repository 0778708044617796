"""What reads lack is brought in, for many of them together.

Theory. A read through a thread costs several times what it costs from the page cache, and nearly all of that is
handing it over and back. So whatever one turn of the loop was asked for is one job: the places are looked up, the
kernel is asked for all of them at once, a thread waits until they are there, and then whoever asked reads inline. While
jobs are under way the next one gathers. Map pages that are missing are loaded in the same way before.

Rules
- Nothing is decided here: what a block holds is looked up again when it is read. It may be gone again by then.
- A job holds the segments that it named (`begin_read`), so that their files stay open under it.
- A turn of the loop looks up little more than BLOCKS_A_TURN blocks.

Known weakness: a job that has to load map pages keeps the whole of it waiting for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from metadata.seams import Clock, Files
from nbdserver.logdisk.maps import Need
from nbdserver.logdisk.reader import Place
from protocol.disk import BLOCK_BYTES

if TYPE_CHECKING:
    from nbdserver.logdisk.devices import Device
    from nbdserver.logdisk.disk import LogDisk

BLOCKS_A_TURN = 256
JOBS = 2  # at a time, so that the device is not idle while one is handed over
_LOADS = 2  # logical pages first; they tell which middle pages


class _Wanted(NamedTuple):
    """What somebody lacks."""

    device: Device
    ranges: Sequence[tuple[int, int]]
    done: Callable[[], None]


class Fetching:
    """Of one family."""

    def __init__(self, disk: LogDisk, files: Files, clock: Clock) -> None:
        self._disk = disk
        self._files = files
        self._clock = clock
        self._wanted: deque[_Wanted] = deque()
        self._jobs = 0
        self._turn_pending = False

    def fetch(self, device: Device, ranges: Sequence[tuple[int, int]], done: Callable[[], None]) -> bool:
        """See BlockDevice."""
        if not self._files.answers_from_cache or self._disk.failure:
            return False
        self._disk.slow_path.under_way += 1
        self._disk.background.stir()
        self._wanted.append(_Wanted(device, ranges, done))
        self._go_on()
        return True

    def _go_on(self) -> None:
        if self._wanted and self._jobs < JOBS and not self._turn_pending:
            self._turn_pending = True
            self._clock.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_pending = False
        job: list[_Wanted] = []
        size_bytes = 0
        while self._wanted and size_bytes < BLOCKS_A_TURN * BLOCK_BYTES:
            job.append(self._wanted.popleft())
            size_bytes += sum(length for _, length in job[-1].ranges)
        self._jobs += 1
        self._find(job, _LOADS)
        self._go_on()

    def _find(self, job: list[_Wanted], loads: int) -> None:
        """Go where the data is, once the map pages for it are there."""
        try:
            places, need = self._look_up(job)
        except Exception as error:
            self._disk.parted(error)
            places, need = [], []
        if need and loads and not self._disk.failure:
            self._disk.maps.load(list(dict.fromkeys(need)), partial(self._find, job, loads - 1))
        elif places:
            self._bring_in(job, places)
        else:
            self._clock.call_soon(partial(self._over, job))

    def _look_up(self, job: list[_Wanted]) -> tuple[list[Place], Need]:
        places: list[Place] = []
        need: Need = []
        for device, ranges, _ in job:
            for offset, length in ranges:
                found = None if device.gone else device.reader.places(offset, length)
                if found is not None:
                    places += found
                elif not device.gone:
                    first = offset // BLOCK_BYTES
                    count = (offset + length + BLOCK_BYTES - 1) // BLOCK_BYTES - first
                    need += self._disk.maps.needed(device.first_address + first, count)
        return places, need

    def _bring_in(self, job: list[_Wanted], places: list[Place]) -> None:
        disk = self._disk
        segments = [place.segment for place in places]
        for segment in segments:
            disk.pool.begin_read(segment)
        disk.slow_path.cold_reads += sum(len(wanted.ranges) for wanted in job)
        disk.slow_path.cold_bytes += sum(place.length for place in places)
        extents = [(disk.pool.handles[segment], length, offset) for segment, length, offset in places]
        self._files.fetch_later(extents, partial(self._brought_in, job, segments))

    def _brought_in(self, job: list[_Wanted], segments: list[int]) -> None:
        for segment in segments:
            self._disk.pool.end_read(segment)
        self._over(job)

    def _over(self, job: list[_Wanted]) -> None:
        self._jobs -= 1
        self._go_on()
        for wanted in job:
            self._disk.slow_path.under_way -= 1
            wanted.done()
