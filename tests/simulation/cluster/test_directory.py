"""Simulated clusters with production's directory on every node: nothing wrong is ever seen, everything converges."""

from collections import Counter

import pytest

from tests.simulation.cluster.directory import directory_run
from tests.simulation.cluster.faults import CATALOGUE
from tests.simulation.cluster.reruns import printed_elsewhere
from tests.simulation.seeds import try_seed, wrong_seeds

SEEDS = 100
CHUNK = 5
WORLD = "directory"


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_nothing_wrong_is_seen_and_all_converges_when_it_is_healed(first: int) -> None:
    wrong = wrong_seeds(WORLD, range(first, first + CHUNK))
    assert not wrong, wrong


def test_the_fixed_seeds_meet_every_fault_and_every_answer() -> None:
    hits: Counter[str] = Counter()
    for seed in range(SEEDS):
        scenario, run = directory_run(seed)
        run.go()
        hits.update(run.cluster.hits)
        hits.update(scenario.answers)
        hits["compared"] += scenario.judge.compared
        hits["masters"] += len(scenario.judge.masters) - 1
        if all(hits[fault.name] for fault in CATALOGUE) and seed > 15:
            break
    assert not [fault.name for fault in CATALOGUE if not hits[fault.name]]
    for name in ("CONFIRMED", "NOT_DONE", "UNKNOWN", "compared", "masters"):
        assert hits[name] > 10, f"{name}: {hits[name]}"


def test_the_same_seed_gives_the_same_run_in_every_process() -> None:
    seed = 7
    here = try_seed(WORLD, seed)
    program = "\n".join(
        (
            "import logging; logging.disable()",
            "from tests.simulation.seeds import try_seed",
            f"print(try_seed({WORLD!r}, {seed}).fingerprint)",
        )
    )
    prints = {here.fingerprint, try_seed(WORLD, seed).fingerprint} | printed_elsewhere(program)
    assert len(prints) == 1
    assert here.events > 1000
    assert try_seed(WORLD, seed + 1).fingerprint not in prints
