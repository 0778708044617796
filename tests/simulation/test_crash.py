"""Simulated lives of a LogDisk: crashes, power cuts, errors and lies of the device, and what is there afterwards.

A failing test names its seed; `make simulate WORLD=disk SEED=N` tells the story of it.
"""

import pytest

from tests.simulation.run import POINTS, Run, try_seed
from tests.simulation.sizes import Bend

SEEDS = 640
CHUNK = 20
CRASHES = 3  # at each crash point, each survived
TRIES = 60
SCRUBBED_SEEDS = 60
# Seeds that once went wrong. A seed's story changes with the product, so each fault has a directed test as well.
FOUND = (
    1795351970517, 1795351970685, 1795351970821, 1795351970852, 1795349487151, 1795349066063, 1795619071529,
    1795627448579, 1795643007420, 1795644292291, 1795647399258, 1795652751053, 1795655211313, 1795660000787,
)  # fmt: skip


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_what_was_promised_is_there_after_any_crash(first: int) -> None:
    wrong = {seed: message for seed in range(first, first + CHUNK) if (message := try_seed(seed)[0])}
    assert not wrong, "\n".join(f"seed {seed}: {message}" for seed, message in wrong.items())


@pytest.mark.parametrize("seed", FOUND)
def test_what_once_went_wrong_goes_well(seed: int) -> None:
    assert not try_seed(seed)[0]


@pytest.mark.parametrize("name", POINTS)
def test_every_crash_point_is_reached_and_survived(name: str) -> None:
    crashes = 0
    for seed in range(TRIES):
        message, run = try_seed(seed, Bend(crash_at=name, hot=seed % 2 == 0, snapshots=0.1))
        assert not message, f"seed {seed}: {message}"
        crashes += run.counters[f"crash at {name}"]
        if crashes >= CRASHES:
            return
    pytest.fail(f"{crashes} crashes at {name!r} in {TRIES} runs: is it still called?")


def test_scrubs_under_every_fault_end_and_report_only_what_has_a_cause() -> None:
    scrubs = 0
    for seed in range(SCRUBBED_SEEDS):
        message, run = try_seed(seed, Bend(scrubs=0.1, hot=seed % 2 == 0, snapshots=0.05))
        assert not message, f"seed {seed}: {message}"
        scrubs += run.counters["scrubs"]
    assert scrubs > SCRUBBED_SEEDS


def test_the_same_seed_gives_the_same_trace() -> None:
    for seed in (3, 6, 14):
        one, other = try_seed(seed)[1], try_seed(seed)[1]
        assert one.world.events == other.world.events > 50
        assert one.world.digest == other.world.digest
    assert try_seed(3)[1].world.digest != try_seed(6)[1].world.digest


def test_runs_meet_what_they_are_for() -> None:
    """A change of the product or of the mixes must not quietly make the runs harmless."""
    seen = Run(0).counters
    for seed in range(60):
        run = try_seed(seed)[1]
        seen.update(run.counters)
        seen.update(run.hits)
        seen.update(run.reports)
    for name in (
        "recycled", "clean-after-append", "checkpoint-after-batch", "segment-after-seal", "later", "cold", "unlink",
        "prepare", "crash in a call", "clean end", "errno 5", "errno 28", "generation-raised", "recovered",
        "snapshots", "snapshots deleted", "comparisons", "rollbacks", "clones", "writes of clones", "resizes",
        "layers_merged", "layers_dropped", "layers_blocks_freed",
    ):  # fmt: skip
        assert seen[name] >= 3, f"{name}: {seen[name]}"
