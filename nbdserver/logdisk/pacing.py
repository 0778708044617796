"""Long work beside the clients: on the loop in slices, on the device at a pace.

A background job is a generator that yields after each small step. A slice runs steps until its time is used up, then
lets the loop serve clients; when clients are busy the gaps grow with the slices, so that a job takes at most a share
of the loop.

Rule: a step must stay well under SLICE_S by itself, because nothing interrupts it.
"""

from collections.abc import Callable, Iterator

from metadata.seams import Clock

SLICE_S = 0.0004
BUSY_SHARE = 0.125  # of its rate that a paced reader takes while clients move more than it does
DEFAULT_SHARE = 0.25  # of the loop's time that a job takes while there is no hurry


def guarded(failed: Callable[[str], None], callback: Callable[..., None]) -> Callable[..., None]:
    """`callback`, but what it raises condemns the family instead of being logged by the loop and served on."""

    def call(*arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception as error:
            failed(f"an internal error: {error!r}")

    return call


class Job:
    """Runs `steps` in slices that take `share` of the loop's time, and calls `finished` at its end; `failed` with
    what a step raised."""

    def __init__(
        self,
        clock: Clock,
        steps: Iterator[object],
        finished: Callable[[], None],
        failed: Callable[[Exception], None],
        share: float = DEFAULT_SHARE,
    ) -> None:
        self._clock = clock
        self._steps = steps
        self._finished = finished
        self._failed = failed
        self._pause_s = SLICE_S * (1 / share - 1)
        self._stopped = False
        clock.call_soon(self._slice)

    def stop(self) -> None:
        """Run no further step and call nothing."""
        self._stopped = True

    def hurry(self) -> None:
        """Run what is left at once: someone waits for it."""
        while not self._stopped:
            self._run(float("inf"))

    def _slice(self) -> None:
        if not self._stopped:
            self._run(self._clock.now() + SLICE_S)
            if not self._stopped:
                self._clock.call_later(self._pause_s, self._slice)

    def _run(self, until: float) -> None:
        now = self._clock.now
        try:
            for _ in self._steps:
                if now() >= until or self._stopped:
                    return
        except Exception as error:
            self._stopped = True
            self._failed(error)
            return
        self._stopped = True
        self._finished()


class Pace:
    """When the next piece may be read. Time is an argument."""

    def __init__(self, bytes_per_s: int, now_s: float, moved_bytes: int = 0) -> None:
        """`moved_bytes`: what clients have moved by now."""
        self.bytes_per_s = bytes_per_s
        self.is_slowed = False
        """Whether clients were moving more, when it was asked last."""
        self._due_s = now_s
        self._moved_bytes = moved_bytes

    def wait_s(self, size_bytes: int, moved_bytes: int, now_s: float) -> float:
        """How long to wait after `size_bytes` were read; `moved_bytes` is what clients have moved by then."""
        by_clients, self._moved_bytes = moved_bytes - self._moved_bytes, moved_bytes
        self.is_slowed = by_clients > size_bytes
        share = BUSY_SHARE if self.is_slowed else 1.0
        # What was slow is not made up for: the device has enough to do.
        self._due_s = max(self._due_s, now_s - size_bytes / self.bytes_per_s) + size_bytes / (self.bytes_per_s * share)
        return max(0.0, self._due_s - now_s)
