"""Two replicas through crashes, cuts, skips and copies: nothing that was durable is lost, and both are alike."""

from collections import Counter

import pytest

from nbdserver.logdisk.ordering import CRASH_POINTS, OF_REPLICAS
from tests.simulation.replica_pair import try_pair

SEEDS = 100
CHUNK = 20
FOUND = (168,)  # a page that was set aside under a long discard when a checkpoint wrote it was not read again


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_two_replicas_are_alike_after_any_crash(first: int) -> None:
    wrong = {seed: message for seed in range(first, first + CHUNK) if (message := try_pair(seed)[0])}
    assert not wrong, "\n".join(f"seed {seed}: {message}" for seed, message in wrong.items())


@pytest.mark.parametrize("seed", FOUND)
def test_what_once_went_wrong_goes_well(seed: int) -> None:
    assert not try_pair(seed)[0]


def test_the_runs_meet_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        seen.update(try_pair(seed)[1].hits)
    points = [name for name, rule in CRASH_POINTS.items() if rule in OF_REPLICAS]
    work = ("power", "kill", "removed", "cut", "caught up", "skipped", "copied", "kept", "started over", "rot")
    for name in (*points, *work):
        assert seen[name] >= 3, f"{name}: {seen[name]}"
    assert sum(seen[f"crash at {name}"] for name in points) >= 3
