"""The canary of the power-loss test: a build whose fdatasync does nothing must be found out by it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.durability import Judge, LostError
from tests.kernel.frozen import FrozenNode
from tests.kernel.powered import JUDGED_BLOCKS, SingleNode, write_until_the_power_fails
from tests.nbd_client import RefusedError

WRITING_S = 4.0


def test_a_build_that_does_not_sync_is_found_out_by_a_power_cut(
    frozen: FrozenNode, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    machine = SingleNode(frozen, tmp_path, free_port(), without_sync=True)
    judge = Judge(JUDGED_BLOCKS, random.Random())
    write_until_the_power_fails(machine, judge, WRITING_S)
    assert judge.flushes
    # What is lost may be blocks, the volume, or what the node needs to start.
    found_out = pytest.raises((LostError, RefusedError), match=r"faults in|no export 'disk0'|the node ended")
    with found_out as found, machine.start() as client:
        judge.check(client, acknowledged_too=False)
    print(found.value)
