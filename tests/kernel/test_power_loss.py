"""The power fails for real: the server runs inside a guest, its data on a virtio disk, and QEMU is killed with -9.

What the guest's kernel had not written to its disk is gone then, page cache and all. The judge stands outside: it
writes over the network, notes what was flushed, and reads everything back after the next boot, which starts the server
on the same disk. So a round costs one boot. `make power-loss ROUNDS=50` cuts it more often.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.durability import Judge
from tests.kernel.frozen import FrozenNode
from tests.kernel.powered import JUDGED_BLOCKS, NEVER, SingleNode, write_until_the_power_fails

ROUNDS = int(os.environ.get("POWER_LOSS_ROUNDS", "3"))
SEED = int(os.environ.get("POWER_LOSS_SEED", str(random.SystemRandom().randrange(1 << 32))))
SHORTEST_S, LONGEST_S = 0.5, 4.0


def test_a_power_cut_loses_nothing_that_was_flushed(
    frozen: FrozenNode, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    print(f"POWER_LOSS_SEED={SEED}")
    generator = random.Random(SEED)
    machine = SingleNode(frozen, tmp_path, free_port())
    judge = Judge(JUDGED_BLOCKS, generator)
    for number in range(ROUNDS):
        flushes, generation = judge.flushes, machine.generation
        writeback_centisecs = generator.choice((NEVER, 10, 50))
        write_until_the_power_fails(machine, judge, generator.uniform(SHORTEST_S, LONGEST_S), writeback_centisecs)
        print(f"round {number + 1} of {ROUNDS}: {judge.writes} writes, {judge.flushes} flushes so far")
        assert judge.flushes > flushes, "a round without a flush shows nothing"
        assert machine.generation > generation, "acknowledged writes may be gone, and the generation did not rise"
    generation = machine.generation
    with machine.start() as client:
        judge.check(client, acknowledged_too=False)
    assert machine.generation > generation
