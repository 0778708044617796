"""Fetching: what many reads lack is brought in by one job, map pages included; what it cannot help is left alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.fetching import BLOCKS_A_TURN, JOBS
from tests.simulation.faults import FaultMix
from tests.unit.families import BLOCK_BYTES, RealFamily, SimulatedFamily, block

COLD = FaultMix(cold_read=1.0, latency_s=0.001)
SMALL_CACHE = DiskSettings(cache_bytes=0, checkpoint_bytes=1 << 30, checkpoint_interval_s=3600.0)


@pytest.fixture
def family() -> SimulatedFamily:
    family = SimulatedFamily(segment_bytes=4 << 20)
    family.put(0, 1, 64)
    return family


def jobs(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int, int]]]:
    """The extents of each job from now on."""
    seen: list[list[tuple[int, int, int]]] = []
    real = family.files.fetch_later

    def record(extents: list[tuple[int, int, int]], done: Callable[[], None]) -> None:
        seen.append(list(extents))
        real(extents, done)

    monkeypatch.setattr(family.files, "fetch_later", record)
    return seen


def ranges(*lbas: int) -> list[tuple[int, int]]:
    return [(lba * BLOCK_BYTES, BLOCK_BYTES) for lba in lbas]


def test_what_one_turn_asks_for_is_one_job(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = jobs(family, monkeypatch)
    told: list[str] = []
    family.put(5, 700)
    assert family.device.fetch([(0, 8 * BLOCK_BYTES), *ranges(20, 100)], lambda: told.append("one"))
    assert family.device.fetch(ranges(30), lambda: told.append("another"))
    assert told == [], "answered from inside the call"
    family.run(1.0)
    assert told == ["one", "another"]
    (only,) = seen
    assert [length // BLOCK_BYTES for _, length, _ in only] == [5, 1, 2, 1, 1], "a hole needs nothing"
    assert family.disk.counters()["cold_reads"] == 4
    assert family.disk.slow_path.under_way == 0


def test_while_jobs_are_under_way_the_next_one_gathers(
    family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    family.files.mix = FaultMix(latency_s=5.0)
    seen = jobs(family, monkeypatch)
    told: list[int] = []
    for lba in range(10):
        assert family.device.fetch(ranges(lba), lambda lba=lba: told.append(lba))  # type: ignore[misc]
        family.run(1e-9)
    assert [len(job) for job in seen] == [1] * JOBS
    family.run(200.0)
    assert sum(map(len, seen)) == 10
    assert len(seen) <= JOBS + 2
    assert sorted(told) == list(range(10))


def test_a_turn_looks_up_a_bounded_number_of_blocks(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    family.put(0, 1, 3 * BLOCKS_A_TURN)
    seen = jobs(family, monkeypatch)
    told: list[int] = []
    for lba in range(3 * BLOCKS_A_TURN):
        assert family.device.fetch(ranges(lba), lambda lba=lba: told.append(lba))  # type: ignore[misc]
    family.run(5.0)
    assert [len(job) for job in seen] == [BLOCKS_A_TURN] * 3
    assert len(told) == 3 * BLOCKS_A_TURN


def test_map_pages_that_are_not_in_memory_are_brought_in_first() -> None:
    family = SimulatedFamily(settings=SMALL_CACHE)
    for lba in range(0, 1 << 16, 1 << 8):
        family.put(lba, lba + 1)
    family.checkpoint()
    cold = [lba for lba in range(0, 1 << 16, 1 << 8) if family.device.read(lba * BLOCK_BYTES, BLOCK_BYTES) is None]
    assert len(cold) > 100
    for lba in cold[:20]:
        assert family.fetch(lba * BLOCK_BYTES, BLOCK_BYTES)
        found = family.device.read(lba * BLOCK_BYTES, BLOCK_BYTES)
        assert found is not None
        assert b"".join(found) == block(lba + 1)


def test_the_segments_of_a_job_are_held_until_it_is_over() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    family.put(0, 1)
    family.files.mix = FaultMix(latency_s=5.0)
    told: list[bool] = []
    assert family.device.fetch(ranges(0), lambda: told.append(True))
    family.run(1e-9)
    family.files.mix = FaultMix(cold_read=0.0)
    for number in range(2, 200):
        family.put(0, number)
        if number % 10 == 0:
            family.checkpoint()
    assert not told
    assert 1 not in family.disk.maps.segments.in_use
    assert 1 not in family.disk.pool.spare
    family.run(200.0)
    assert told
    family.checkpoint()
    assert 1 in family.disk.pool.spare or 1 in family.disk.maps.segments.in_use


def test_nothing_is_fetched_where_it_cannot_help(family: SimulatedFamily) -> None:
    family.files.answers_from_cache = False
    assert not family.device.fetch(ranges(0), lambda: None)
    family.files.answers_from_cache = True
    told: list[bool] = []
    assert family.device.fetch(ranges(0), lambda: told.append(True))
    family.disk.fail("a test")
    assert not family.device.fetch(ranges(0), lambda: None)
    family.run(1.0)
    assert told == [True]


def test_a_look_up_that_breaks_condemns_the_family_and_leaves_nobody_waiting(
    family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(offset: int, length: int) -> None:
        raise IndexError("a test")

    monkeypatch.setattr(family.device.reader, "places", breaks)
    told: list[bool] = []
    assert family.device.fetch(ranges(0), lambda: told.append(True))
    family.run(1.0)
    assert told == [True]
    assert "IndexError" in family.disk.failure
    assert family.disk.slow_path.under_way == 0


def test_a_view_that_is_closed_meanwhile_is_told_all_the_same(family: SimulatedFamily) -> None:
    family.wait(lambda done: family.disk.snapshot(1, "monday", 0, done))
    view = family.disk.view(family.disk.snapshots()[0].layer)
    told: list[bool] = []
    assert view.fetch(ranges(0), lambda: told.append(True))
    view.close()
    assert not view.fetch(ranges(0), lambda: None)
    family.run(1.0)
    assert told == [True]


def test_what_the_page_cache_of_a_real_host_has_lost_is_read_again(tmp_path: Path) -> None:
    family = RealFamily(tmp_path)
    family.open()
    family.put(0, 1, 64)
    assert family.flush() == 0
    for handle in family.disk.pool.handles:
        if handle >= 0:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    told: list[bool] = []
    if family.files.answers_from_cache:
        family.wait(lambda done: told.append(family.device.fetch(ranges(*range(64)), done)))
        assert told == [True]
    assert [family.number_at(lba) for lba in range(64)] == list(range(1, 65))
    family.close()
