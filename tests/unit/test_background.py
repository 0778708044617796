"""When checkpoints come, what blocks writers, and that a clean end leaves nothing to replay."""

from collections.abc import Callable
from dataclasses import replace

from nbdserver.logdisk.check import check_family
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.ordering import Rule, disabled
from tests.simulation.faults import FaultMix
from tests.unit.families import BLOCK_BYTES, SETTINGS, SimulatedFamily

TIB = 1 << 40


def test_a_checkpoint_comes_after_so_many_bytes_of_log() -> None:
    settings = DiskSettings(cache_bytes=64 << 20, checkpoint_bytes=1 << 20, checkpoint_interval_s=3600.0)
    family = SimulatedFamily(settings=settings)
    for number in range(1024):
        family.put(number % 300, number)
        family.run(0.001)
    assert 3 <= family.disk.counters()["checkpoints"] - 1 <= 6
    assert family.disk.checkpointer.bytes_since <= 2 << 20


def test_a_checkpoint_comes_after_the_interval_if_anything_changed() -> None:
    settings = DiskSettings(cache_bytes=64 << 20, checkpoint_bytes=1 << 30, checkpoint_interval_s=5.0)
    family = SimulatedFamily(settings=settings)
    family.put(0, 1)
    before = family.disk.counters()["checkpoints"]
    family.run(4.0)
    assert family.disk.counters()["checkpoints"] == before
    family.run(2.0)
    assert family.disk.counters()["checkpoints"] == before + 1
    family.run(60.0)
    assert family.disk.counters()["checkpoints"] == before + 1


def test_writers_wait_while_the_pages_that_wait_for_a_checkpoint_fill_the_cache() -> None:
    settings = DiskSettings(cache_bytes=0, checkpoint_bytes=1 << 30, checkpoint_interval_s=3600.0)
    family = SimulatedFamily(size_bytes=4 * TIB, settings=settings)
    most = 0
    for number in range(1, 600):
        family.put(number * 1000, number)
        most = max(most, family.disk.maps.logical.pinned_pages)
    assert most <= family.disk.maps.logical.limit_pages + 64
    assert family.disk.counters()["checkpoints"] > 3
    assert family.number_at(5000) == 5


def test_a_checkpoint_waits_for_the_fdatasync_that_covers_it() -> None:
    def ahead_of_the_disk() -> bool:
        """Whether the store ever names a record that is not durable."""
        family = SimulatedFamily(mix=FaultMix(cold_read=0.0, latency_s=0.01))
        family.disk.background.stop()
        found = False
        for number in range(30):
            family.put(number, number)
            family.disk.checkpointer.start()
            count = family.store.batches
            while family.disk.checkpointer.running and family.clock.step():
                if family.store.batches > count:
                    count = family.store.batches
                    found |= family.disk.log.durable_lsn < family.disk.checkpointer.last_lsn
        return found

    assert not ahead_of_the_disk()
    with disabled(Rule.CHECKPOINT_BEHIND_SYNC):
        assert ahead_of_the_disk()


def test_a_clean_end_leaves_nothing_to_replay() -> None:
    family = SimulatedFamily()
    for number in range(100):
        family.put(number, number)
    family.close()
    family._begin()
    result = check_family(family.files, family.store, quick=False)
    assert result.records_to_replay == 0
    assert result.findings == []
    family.open()
    assert "recovered" not in family.kinds()


def test_a_store_that_refuses_a_checkpoint_ends_the_family_and_loses_nothing() -> None:
    family = SimulatedFamily()
    family.put(0, 7)
    family.store.mix = FaultMix(store_write_error=1.0)
    family.disk.checkpointer.start()
    family.run(2.0)
    assert family.disk.status()["state"] == "failed"
    family.crash()
    family.open()
    assert family.number_at(0) == 7


def test_a_long_hole_is_worked_in_beside_the_clients_and_its_segments_come_back() -> None:
    settings = DiskSettings(cache_bytes=0, checkpoint_bytes=1 << 30, checkpoint_interval_s=1.0)
    family = SimulatedFamily(size_bytes=4 * TIB, segment_bytes=64 << 10, settings=settings)
    for number in range(1, 500):
        family.put(number * 3000, number)
    assert family.discard(0, 2 * TIB) == 0
    family.put(6000, 77)
    family.run(60.0)
    assert family.disk.maps.holes == []
    assert family.disk.maps.live_blocks == 1
    assert family.number_at(6000) == 77
    assert len(family.disk.maps.segments.in_use) <= 3


def test_a_volume_that_was_never_written_takes_no_room() -> None:
    family = SimulatedFamily()
    family.run(120.0)
    assert [path for path in family.drive.files if path.endswith(".seg")] == []
    assert family.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)


def test_a_family_at_rest_is_hardly_looked_at_and_wakes_up_for_what_comes() -> None:
    family = SimulatedFamily(settings=replace(SETTINGS, checkpoint_interval_s=30.0))
    looks = 0

    def counted(look: Callable[[], None]) -> Callable[[], None]:
        def counting() -> None:
            nonlocal looks
            looks += 1
            look()

        return counting

    background = family.disk.background
    background._tick = counted(background._tick)
    for lba in range(20):
        family.put(lba, lba + 1)
    family.run(120.0)
    assert family.disk.log.lsn == family.disk.checkpointer.last_lsn, "the checkpoint is made all the same"
    looks = 0
    family.run(800.0)
    assert looks <= 101
    for lba in range(64):
        family.put(lba, 100 + lba)
    family.run(0.0)
    looks = 0
    family.run(0.3)
    assert looks == 1
