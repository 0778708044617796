"""Seeds that nobody has tried before: a few in every run of the tests, two minutes of both cores in CI."""

import os
import time

import pytest

from tests.simulation.seeds import WORLDS, try_seed

FRESH_S = float(os.environ.get("SIMULATION_FRESH_S") or (120 if os.environ.get("REQUIRE_ALL") == "1" else 3))


@pytest.mark.parametrize("core", [0, 1])
def test_fresh_seeds_break_no_promise(core: int) -> None:
    until_s = time.monotonic() + FRESH_S
    seed = int(time.time()) * 1000 + core * 500
    while time.monotonic() < until_s:
        seed += 1
        for world in WORLDS:
            tried = try_seed(world, seed)
            assert not tried.wrong, f"{world}, seed {seed}: {tried.wrong}\n    {tried.again}"
