"""Looking once at all pages that LevelDB has of a map, in the background.

Theory. A checkpoint is made first, so that what was true at the call is in LevelDB; what changes while the walk goes on
is the caller's to know. The pages are made for the walk alone and never enter the cache, which clients need.

Rules
- Keys are read off the loop, a few pages at a time; pages are made and looked at in slices.
- A value that is damaged is reported and its page left out: whoever needs it will meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from metadata.pages import Page, PageMap
from metadata.seams import Clock
from nbdserver.logdisk.pacing import Job
from protocol.disk import DamagedValueError
from protocol.invariant import InvariantError

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_KEYS = 600  # read at a time; a page has at most 258

StoredItems = list[tuple[bytes, bytes]]


class PageWalk:
    """Calls `look(number, page)` for each page, its own entries only, then `done`; `failed` with what `look` raised."""

    def __init__(
        self,
        disk: LogDisk,
        clock: Clock,
        page_map: PageMap,
        look: Callable[[int, Page], None],
        done: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._disk = disk
        self._clock = clock
        self._map = page_map
        self._look = look
        self._done = done
        self._failed = failed
        self._stopped = False
        self.reading = False  # LevelDB, off the loop
        prefix = page_map.prefix
        self._keys = prefix, prefix[:-1] + bytes((prefix[-1] + 1,))
        disk.checkpointer.when_done(self._ask)

    def stop(self) -> None:
        """Look at nothing more and call nothing."""
        self._stopped = True

    def _ask(self) -> None:
        if self._stopped:
            return
        if self._disk.failure:
            self._done()
        else:
            self.reading = True
            self._disk.read_store([self._keys], self._read, _KEYS)

    def _read(self, items: list[StoredItems]) -> None:
        self.reading = False
        if self._stopped:
            return
        by_page = groupby(items[0], lambda item: self._map.page_of_key(item[0]))
        pages = [(number, list(of_page)) for number, of_page in by_page]
        is_last = len(items[0]) < _KEYS
        if not is_last:
            pages.pop()  # may be cut off
        if pages:
            self._keys = self._map.key_range(pages[-1][0])[1], self._keys[1]
        Job(self._clock, self._steps(pages), self._done_or_on(is_last), self._failed)

    def _done_or_on(self, is_last: bool) -> Callable[[], None]:
        def go_on() -> None:
            if not self._stopped:
                self._done() if is_last else self._ask()

        return go_on

    def _steps(self, pages: list[tuple[int, StoredItems]]) -> Iterator[None]:
        for number, items in pages:
            if self._stopped:
                return
            try:
                found = self._map.parse(items)
                page = self._map.zeros() if found.base is None else found.base
                found.lay_over(page)
            except (DamagedValueError, InvariantError) as error:
                self._disk.report("value-damaged", {"reason": str(error)})
                continue
            yield
            self._look(number, page)
            yield
