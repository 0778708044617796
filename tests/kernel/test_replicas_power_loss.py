"""The power of nodes with replicas of one volume fails for real, of one and of all (tests/kernel/powered_replicas.py).

One round: the one that is written to, and then the others; `make power-loss-replicas ROUNDS=12` has each kind.
"""

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Processes
from tests.kernel.frozen import FrozenNode
from tests.kernel.power_rounds import PowerRounds
from tests.kernel.powered_replicas import NODES, PoweredReplicas

ROUNDS = int(os.environ.get("POWER_LOSS_ROUNDS", "1"))
SEED = int(os.environ.get("POWER_LOSS_SEED", str(random.SystemRandom().randrange(1 << 32))))


def test_replicas_that_lose_their_power_one_and_all_lose_nothing_that_was_flushed_and_are_alike(
    frozen: FrozenNode,
    tmp_path: Path,
    processes: Processes,
    free_port: Callable[[], int],
    needs: Callable[[str, str], str],
) -> None:
    print(f"POWER_LOSS_SEED={SEED}")
    fio = needs("fio", "fio")
    generator = random.Random(SEED)
    with contextlib.closing(PoweredReplicas(frozen, tmp_path, processes, free_port, generator, fio)) as replicas:
        replicas.power_on(NODES)
        replicas.make_volume()
        rounds = PowerRounds(replicas, generator)
        rounds.run(ROUNDS)
        digests = replicas.digests(tmp_path)
        assert len({json.dumps(held["exports"]) for held in digests.values()}) == 1, digests
        print(rounds.result())
