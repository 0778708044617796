"""Simulate from seeds: a disk under crashes and faults, and clusters of many nodes.

make simulate MINUTES=10                as many fresh seeds as fit, on all cores
make simulate WORLD=directory SEED=17   one seed again, with its story
"""

import argparse
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator

from tests.simulation.seeds import WORLDS, Tried, try_seed

PROGRESS_S = 1.0  # on a terminal; in a log a tenth as often
ENOUGH = 10  # failures, after which there is no need to look for more


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=[*WORLDS, "all"], default="all", help="what to simulate")
    parser.add_argument("--seed", type=int, help="run one seed and tell its story")
    parser.add_argument("--minutes", type=float, default=1.0, help="run fresh seeds on all cores for that long")
    parser.add_argument("--first", type=int, default=int(time.time()) * 1000, help="the first of the fresh seeds")
    arguments = parser.parse_args()
    worlds = list(WORLDS) if arguments.world == "all" else [arguments.world]
    if arguments.seed is not None:
        return max(tell(world, arguments.seed) for world in worlds)
    return explore(worlds, arguments.first, arguments.minutes * 60)


def tell(world: str, seed: int) -> int:
    """Run one seed with its story; return the exit code."""
    tried = try_seed(world, seed, story=print)
    print(f"{world}, seed {seed}: {tried.wrong or 'fine'}; fingerprint {tried.fingerprint}\n{tried.summary}")
    return 1 if tried.wrong else 0


def explore(worlds: list[str], first: int, duration_s: float) -> int:
    """Run fresh seeds of all worlds in turn; return the exit code."""
    logging.getLogger().addHandler(
        logging.NullHandler()
    )  # what thousands of nodes log belongs to the story of one seed
    began_s = time.monotonic()
    tally = Tally(began_s, duration_s)

    def seeds() -> Iterator[tuple[str, int]]:
        number = first
        while time.monotonic() < began_s + duration_s and len(tally.failed) < ENOUGH:
            for world in worlds:
                yield world, number
            number += 1

    # Plain `imap` would take all that `seeds` has to give at once: hand out what the cores can do, and a little more.
    with multiprocessing.Pool() as pool:
        source, waiting = seeds(), []
        while True:
            while len(waiting) < 2 * (multiprocessing.cpu_count() + 1) and (task := next(source, None)) is not None:
                waiting.append(pool.apply_async(try_seed, task))
            if not waiting:
                break
            waiting[0].wait(0.05)
            for each in [each for each in waiting if each.ready()]:
                waiting.remove(each)
                tally.add(each.get())
            tally.show()
    tally.show(last=True)
    return 1 if tally.failed else 0


class World:
    """What was done in one world so far."""

    def __init__(self) -> None:
        self.seeds = 0
        self._events = 0
        self._node_s = 0.0
        self._busy_s = 0.0

    def add(self, tried: Tried) -> None:
        self.seeds += 1
        self._events += tried.events
        self._node_s += tried.node_s
        self._busy_s += tried.busy_s

    @property
    def rates(self) -> str:
        """Events and node-seconds for each second of CPU time; empty for a world that is no cluster."""
        if not self._events or not self._busy_s:
            return ""
        return (
            f" ({self._events / self._busy_s:,.0f} events/s, {self._node_s / self._busy_s:,.0f} node-seconds/s a core)"
        )


class Tally:
    """What came of all seeds so far, and the line that says so."""

    def __init__(self, began_s: float, duration_s: float) -> None:
        self.failed: list[Tried] = []
        self._ran: dict[str, World] = {}
        self._began_s = began_s
        self._limit_s = duration_s
        self._shown_s = began_s
        self._is_terminal = sys.stdout.isatty()

    def add(self, tried: Tried) -> None:
        """Count it; a failure is printed at once."""
        self._ran.setdefault(tried.world, World()).add(tried)
        if tried.wrong:
            self.failed.append(tried)
            print(f"{chr(13) * self._is_terminal}{tried.world}, seed {tried.seed}: {tried.wrong}\n    {tried.again}")

    def show(self, last: bool = False) -> None:
        """Print the progress line when it is time."""
        now_s = time.monotonic()
        if not last and now_s - self._shown_s < PROGRESS_S * (1 if self._is_terminal else 10):
            return
        self._shown_s = now_s
        seeds = ", ".join(f"{world.seeds} of {name}{world.rates}" for name, world in self._ran.items()) or "none"
        line = f"{now_s - self._began_s:.0f} of {self._limit_s:.0f} s; failed: {len(self.failed)}; seeds: {seeds}"
        if self._is_terminal:
            print(f"\r{line:<180}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
