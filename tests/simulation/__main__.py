"""Run seeds by hand.

python -m tests.simulation --seed 17            one seed, with its story
python -m tests.simulation --minutes 10         as many seeds as fit, on all cores
"""

import argparse
import multiprocessing
import sys
import time

from tests.simulation.run import Run, lies, try_seed

SEEDS_A_ROUND = 64
ENOUGH = 10  # failures, after which there is no need to look for more


def _try_for_pool(seed: int) -> tuple[int, str]:
    return seed, try_seed(seed)[0]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run one seed and tell its story")
    parser.add_argument("--minutes", type=float, default=1.0, help="run seeds on all cores for that long")
    parser.add_argument("--first", type=int, default=int(time.time()) * 1000, help="the first seed")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        run = Run(arguments.seed, lying=lies(arguments.seed), story=print).go()
        print(f"seed {arguments.seed}: fine, digest {run.world.digest:08x}, {dict(run.counters)}, {dict(run.reports)}")
        return 0
    until = time.monotonic() + arguments.minutes * 60
    ran = failed = 0
    with multiprocessing.Pool() as pool:
        while time.monotonic() < until and failed < ENOUGH:
            first = arguments.first + ran
            for seed, wrong in pool.imap_unordered(_try_for_pool, range(first, first + SEEDS_A_ROUND)):
                ran += 1
                if wrong:
                    failed += 1
                    print(f"seed {seed}: {wrong}\n    again: python -m tests.simulation --seed {seed}", flush=True)
    print(f"{ran} seeds from {arguments.first} on, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
