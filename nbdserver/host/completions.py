"""Threads beside the loop: what may wait for a device runs in a few workers, and its completions come back in bunches.

Theory: the loop must never wait for a disk, and waking it is the dear part of handing a result over (a write to the
self-pipe, a return from epoll). So workers put finished calls into one deque and wake the loop only if no wake is
already under way; one wake delivers everything that has finished by then.

Rules of this file
- Work is functions that spend their time in calls that release the GIL: reads, writes, syncs. Nothing computes here.
- A work function returns the arguments of its `done` as a tuple and turns every OSError into an errno itself. Anything
  else it raises is a defect and is raised again on the loop, for the loop's exception handler to see.
- `done` runs on the loop's thread only, never inside the call that asked for the work.

Known weakness: a worker pool is first come, first served; fairness between classes of work is the caller's affair.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Work = Callable[..., tuple[Any, ...]]
Job = tuple[Callable[..., None], Work, tuple[Any, ...]]


class Completions:
    """Calls handed from any thread to the loop's thread, one wake for many; and what those who share the loop tell
    each other of how it is used."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._finished: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake_pending = False
        self.under_way = 0
        """Calls that workers were given and that are not delivered yet."""
        self.alone_since_s = 0.0
        """When another connection than the one that is served now was served last."""
        self.held_until_s = 0.0
        """When work that waits for a device was last done on the loop itself: what came before that was not seen."""

    def call_soon(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Call on the loop's thread, soon, from there."""
        self._loop.call_soon(callback, *arguments)

    def post(self, done: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Call `done(*arguments)` on the loop's thread, soon. From any thread; lost if the loop is closed."""
        self._finished.append((done, arguments))
        # Two threads may both see False and wake twice: harmless. True means that `_deliver` has still to clear it and
        # looks into the deque after that, so it will find what was appended above.
        if not self._wake_pending:
            self._wake_pending = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._finished.clear()  # the loop is closed: there is nobody left to tell

    def _deliver(self) -> None:
        self._wake_pending = False
        finished = self._finished
        for _ in range(len(finished)):  # what arrives meanwhile has its own wake, so nobody is starved
            done, arguments = finished.popleft()
            self.under_way -= 1
            try:
                done(*arguments)
            except Exception as error:
                self._loop.call_exception_handler({"message": f"completion {done!r} failed", "exception": error})


class Workers:
    """A few daemon threads that take work from one queue and post what came of it."""

    def __init__(self, completions: Completions, threads: int, name: str) -> None:
        self._completions = completions
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._name = name
        self._limit = threads
        self._threads: list[threading.Thread] = []  # started when there is work: an idle volume has none

    def run(self, done: Callable[..., None], work: Work, *arguments: Any) -> None:
        """Run `work(*arguments)` in a thread; `done` gets the tuple it returns, on the loop's thread."""
        if len(self._threads) < self._limit:
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._completions.under_way += 1
        self._jobs.put((done, work, arguments))

    def close(self) -> None:
        """Finish what was asked for, then end the threads; waits for them. Their completions are still delivered."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _serve(self) -> None:
        take, post = self._jobs.get, self._completions.post
        while (job := take()) is not None:
            done, work, arguments = job
            try:
                result = work(*arguments)
            except BaseException as error:
                post(_raise, (error,))
            else:
                post(done, result)
            del job, done, work, arguments  # an idle worker must not keep buffers alive


def _raise(error: BaseException) -> None:
    raise error
