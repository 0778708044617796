"""A limit of what segment files may take: met like the end of a disk, kept at every moment, raised and lowered live."""

import random
from errno import ENOSPC

import pytest

from nbdserver.logdisk.budget import LEAST_SEGMENTS, Budget
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.segments import CLIENTS_KEEP
from tests.unit.families import BLOCK_BYTES, SimulatedFamily, block

SETTINGS = DiskSettings(cache_bytes=64 << 20, checkpoint_bytes=512 << 10, checkpoint_interval_s=1.0)
SEGMENT_BYTES = 64 << 10
LIMIT_BYTES = 32 * SEGMENT_BYTES
BLOCKS_A_SEGMENT = 15


def limited(limit_bytes: int = LIMIT_BYTES) -> SimulatedFamily:
    family = SimulatedFamily(segment_bytes=SEGMENT_BYTES, settings=SETTINGS)
    family.drive.capacity_bytes = 1 << 40
    family.disk.pool.budget.limit_bytes = limit_bytes
    return family


def file_bytes(family: SimulatedFamily) -> int:
    return sum(len(file.content) for path, file in family.drive.files.items() if path.endswith(".seg"))


def fill(family: SimulatedFamily, first_lba: int = 0) -> int:
    """Write until there is no room; returns the number of blocks that were written."""
    for lba in range(first_lba, first_lba + 4000):
        if errno := family.write(lba * BLOCK_BYTES, block(lba + 1)):
            assert errno == ENOSPC
            return lba - first_lba
    raise AssertionError("there was room for everything")


@pytest.mark.parametrize(
    ("limit", "used", "left", "overdrawn"), [(0, 1 << 50, 100, 0), (50, 0, 50, 0), (50, 49, 1, 0), (50, 60, 0, 10)]
)
def test_what_is_left_of_a_budget(limit: int, used: int, left: int, overdrawn: int) -> None:
    budget = Budget(limit)
    budget.used_bytes = used
    assert (budget.left_bytes(100), budget.overdrawn_bytes) == (left, overdrawn)


def test_at_the_limit_writes_get_enospc_and_everything_else_goes_on() -> None:
    family = limited()
    written = fill(family)
    assert written > (LIMIT_BYTES // SEGMENT_BYTES - 8) * BLOCKS_A_SEGMENT
    assert file_bytes(family) <= LIMIT_BYTES
    status = family.disk.status()
    assert (status["state"], status["full"]) == ("full", "max-data")
    assert next(fields["reason"] for kind, fields in family.events if kind == "disk-full") == "max-data"
    assert family.flush() == 0
    assert [family.number_at(lba) for lba in range(0, written, 7)] == list(range(1, written + 1, 7))
    assert family.discard(0, written // 2 * BLOCK_BYTES) == 0
    family.run(5.0)
    assert family.disk.status()["state"] == "open"
    assert fill(family, 2000) > written // 4
    assert file_bytes(family) <= LIMIT_BYTES


def test_overwriting_goes_on_for_ever_below_the_limit() -> None:
    family = limited()
    blocks = 250  # of 448 that would fit
    rng = random.Random(1)
    expected = {}
    for number in range(1, 4000):
        lba = rng.randrange(blocks)
        family.put(lba, number)
        expected[lba] = number
        assert file_bytes(family) <= LIMIT_BYTES + CLIENTS_KEEP * SEGMENT_BYTES  # it may have its reserve
        if number % 10 == 0:
            family.run(0.01)
    assert {lba: family.number_at(lba) for lba in expected} == expected


def test_a_limit_that_is_lowered_is_reached_by_cleaning_and_clients_wait_until_then() -> None:
    family = limited(0)
    for number in range(1, 900):
        family.put(number % 200, number)
    family.run(60.0)
    for number in range(1, 900):
        family.put(number % 200, number)
    assert file_bytes(family) > LIMIT_BYTES * 0.8
    family.disk.pool.budget.limit_bytes = limit_bytes = LEAST_SEGMENTS * SEGMENT_BYTES + 4 * SEGMENT_BYTES
    family.run(10.0)
    assert file_bytes(family) <= limit_bytes
    family.put(0, 7)
    assert family.number_at(0) == 7
    assert file_bytes(family) <= limit_bytes


def test_a_limit_below_the_live_data_keeps_what_is_there_and_takes_nothing_more() -> None:
    family = limited(0)
    for lba in range(300):
        family.put(lba, lba + 1)
    family.disk.pool.budget.limit_bytes = 10 * SEGMENT_BYTES
    family.run(10.0)
    assert len(family.disk.pool.spare) <= CLIENTS_KEEP
    written = fill(family, 1000)
    assert written <= 2 * BLOCKS_A_SEGMENT  # what is left of the open segment
    assert all(family.number_at(lba) == lba + 1 for lba in range(300))
    family.disk.pool.budget.limit_bytes = 0
    family.run(1.0)
    family.put(2000, 9)
    assert family.number_at(2000) == 9


def test_families_share_a_budget_and_one_may_have_what_another_gave_back() -> None:
    shared = Budget(LIMIT_BYTES)
    one, other = limited(0), limited(0)
    for family in (one, other):
        family.disk.pool.share_budget(shared)
    written = fill(one)
    assert one.disk.pool.full == "node-max-data"
    other.run(1.0)
    assert fill(other) <= 2 * BLOCKS_A_SEGMENT
    assert shared.used_bytes <= LIMIT_BYTES + CLIENTS_KEEP * SEGMENT_BYTES  # each may have its reserve
    assert one.discard(0, written * BLOCK_BYTES) == 0
    one.run(60.0)
    assert fill(other, 3000) > 100
    assert shared.used_bytes == file_bytes(one) + file_bytes(other)
    one.close()
    assert shared.used_bytes == file_bytes(other)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_counted_is_what_the_files_take(seed: int) -> None:
    family = limited()
    rng = random.Random(seed)
    for _ in range(400):
        step = rng.random()
        lba = rng.randrange(400)
        if step < 0.7:
            assert family.write(lba * BLOCK_BYTES, block(lba + 1)) in (0, ENOSPC)
        elif step < 0.8:
            family.discard(lba * BLOCK_BYTES, rng.randrange(1, 50) * BLOCK_BYTES)
        elif step < 0.83:
            family.disk.pool.budget.limit_bytes = rng.randrange(10, 40) * SEGMENT_BYTES
        else:
            family.run(rng.random() * 3)
    family.run(2.0)
    assert family.disk.pool.budget.used_bytes == file_bytes(family)
    family.crash()
    family.open()
    assert family.disk.pool.budget.used_bytes == file_bytes(family)
