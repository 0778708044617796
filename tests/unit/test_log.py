"""The log: one chain across segments, group commit, the oldest first, and no belief in a failed fdatasync."""

import errno

import pytest

from nbdserver.logdisk.log import ALIGNED_BLOCKS, HABIT_RECORDS
from nbdserver.logdisk.ordering import Rule, disabled
from protocol.disk import WRITE
from tests.simulation.faults import FaultMix
from tests.unit.families import BLOCK_BYTES, CALM, SimulatedFamily

SLOW_SYNC = FaultMix(cold_read=0.0, latency_s=0.01, tear=0.0)


def places(family: SimulatedFamily, lba: int) -> list[int]:
    """Where in its segment a block begins, modulo a block."""
    found = family.device.reader.places(lba * BLOCK_BYTES, BLOCK_BYTES)
    assert found is not None
    return [place.offset % BLOCK_BYTES for place in found]


def test_the_data_of_a_long_record_begins_at_a_page_and_is_found_again() -> None:
    family = SimulatedFamily()
    family.put(0, 1)
    family.put(100, 500, ALIGNED_BLOCKS)
    family.put(1, 2)
    family.put(200, 900, ALIGNED_BLOCKS - 1)
    family.put(300, 700, ALIGNED_BLOCKS + 1)
    assert places(family, 100) == places(family, 300) == [0]
    assert places(family, 0) != [0] != places(family, 200)
    for _ in range(2):
        numbers = [family.number_at(lba) for lba in (0, 1, 100, 131, 200, 230, 300, 332)]
        assert numbers == [1, 2, 500, 531, 900, 930, 700, 732]
        family.crash()
        family.open()


def test_a_long_record_that_fits_only_unaligned_is_not_aligned() -> None:
    for spare, expected in ((0, False), (1, True)):
        family = SimulatedFamily(segment_bytes=256 << 10)
        family.put(0, 1)
        room = family.disk.log.room_blocks(WRITE, 1)
        assert room - spare >= ALIGNED_BLOCKS
        segment = family.disk.log.segment
        family.put(100, 500, room - spare)
        assert family.disk.log.segment == segment, "it had room"
        assert (places(family, 100) == [0]) is expected
        family.put(1, 2)
        family.crash()
        family.open()
        assert [family.number_at(lba) for lba in (0, 1, 100, 99 + room - spare)] == [1, 2, 500, 499 + room - spare]


def test_flushes_asked_for_during_a_sync_share_the_next_one() -> None:
    family = SimulatedFamily(mix=SLOW_SYNC)
    family.put(0, 1)
    syncs = family.disk.log.syncs
    answers: list[int] = []
    family.device.flush(answers.append)
    for number in range(20):
        family.put(number, number)
        family.device.flush(answers.append)
    assert answers == []
    family.run(5.0)
    assert answers == [0] * 21
    assert family.disk.log.syncs == syncs + 2
    assert family.disk.counters()["sync_requests"] >= 21


def test_a_flush_covers_what_was_appended_before_it_and_no_less() -> None:
    family = SimulatedFamily(mix=SLOW_SYNC)
    family.put(0, 1)
    durable: list[int] = []
    family.device.flush(lambda _: durable.append(family.disk.log.durable_lsn))
    family.put(1, 2)
    asked = family.disk.log.lsn
    family.device.flush(lambda _: durable.append(family.disk.log.durable_lsn))
    family.run(5.0)
    assert durable[1] >= asked > durable[0]


def test_the_sync_for_a_client_that_flushes_after_each_write_begins_with_the_write() -> None:
    family = SimulatedFamily(mix=SLOW_SYNC)
    log = family.disk.log
    for number in range(HABIT_RECORDS):
        syncs = log.syncs
        family.put(number, number)
        assert log.syncs == syncs, "not a habit yet"
        assert family.flush() == 0
    syncs = log.syncs
    for number in range(10):
        family.put(number, number)
        assert log.syncs == syncs + number + 1
        asked = log.lsn
        assert family.flush() == 0
        assert log.durable_lsn >= asked
    assert log.syncs == syncs + 10, "the flush shares the sync that was begun for it"


def test_a_client_that_stops_flushing_pays_for_one_sync_in_vain() -> None:
    family = SimulatedFamily(mix=SLOW_SYNC)
    log = family.disk.log
    for number in range(HABIT_RECORDS):
        family.put(number, number)
        assert family.flush() == 0
    syncs = log.syncs
    for number in range(50):
        family.put(number, number)
        family.run(0.05)
    assert log.syncs == syncs + 1
    assert family.flush() == 0
    assert log.durable_lsn == log.lsn


def test_a_flush_of_what_is_durable_is_answered_at_once() -> None:
    family = SimulatedFamily()
    family.put(0, 1)
    assert family.flush() == 0
    syncs, answers = family.disk.log.syncs, []
    family.device.flush(answers.append)
    assert answers == [0]
    assert family.disk.log.syncs == syncs


def handles_of_one_flush(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """(handles that a flush over four segments syncs, the segments' handles in the order of the log)."""
    family = SimulatedFamily(segment_bytes=64 << 10)
    family.put(0, 1)
    assert family.flush() == 0
    asked: list[list[int]] = []
    real = family.files.fdatasync_later

    def record(handles: list[int], done: object) -> None:
        asked.append(list(handles))
        real(handles, done)  # type: ignore[arg-type]

    first = family.disk.log.segment
    order = [first]
    monkeypatch.setattr(family.files, "fdatasync_later", record)
    for number in range(45):
        family.put(number, number)
        if family.disk.log.segment != order[-1]:
            order.append(family.disk.log.segment)
    assert family.flush() == 0
    assert len(order) == 4
    return asked[0], [family.disk.pool.handles[segment] for segment in order]


def test_a_flush_covers_every_segment_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    synced, order = handles_of_one_flush(monkeypatch)
    assert synced == order
    with disabled(Rule.FLUSH_OLDEST_FIRST):
        synced, order = handles_of_one_flush(monkeypatch)
        assert synced == order[-1:]


def test_a_segment_that_is_durable_is_not_synced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    for number in range(40):
        family.put(number, number)
    assert family.flush() == 0
    family.put(0, 1)
    count = family.files.counts["sync"]
    assert family.flush() == 0
    assert family.files.counts["sync"] == count + 1


def flush_after_a_failed_one() -> tuple[SimulatedFamily, list[int]]:
    family = SimulatedFamily()
    family.put(0, 1)
    file = family.files
    file.mix = FaultMix(sync_error=1.0, cold_read=0.0, latency_s=0.0001)
    answers = [family.flush()]
    file.mix = CALM
    answers.append(family.flush())
    return family, answers


def test_a_failed_fdatasync_is_fatal_and_is_not_believed_when_it_is_repeated() -> None:
    family, answers = flush_after_a_failed_one()
    assert answers == [errno.EIO, errno.EIO]
    assert family.disk.status()["state"] == "failed"
    assert "fdatasync" in str(family.disk.status()["failure"])
    assert family.write(0, bytes(4096)) == errno.EIO
    assert "family-failed" in family.kinds()
    with disabled(Rule.FSYNC_FAILURE_IS_FATAL):
        _, answers = flush_after_a_failed_one()
        assert answers == [0, 0]


def test_every_life_of_a_segment_has_another_salt() -> None:
    def salts() -> list[bytes]:
        family = SimulatedFamily(segment_bytes=64 << 10)
        found: list[tuple[int, bytes]] = []
        for number in range(300):
            family.put(number % 3, number)
            if number % 20 == 0:
                family.checkpoint()
            if not found or found[-1] != (family.disk.log.segment, family.disk.log.salt):
                found.append((family.disk.log.segment, family.disk.log.salt))
        assert family.disk.pool.recycled > 5
        return [salt for _, salt in found]

    drawn = salts()
    assert len(set(drawn)) == len(drawn)
    with disabled(Rule.SALT_DRAWN_PER_LIFE):
        assert len(set(salts())) <= 3


def test_each_header_says_what_was_durable_when_it_was_written() -> None:
    family = SimulatedFamily()
    family.put(0, 1)
    family.put(0, 2)
    assert family.flush() == 0
    assert family.disk.log.durable_lsn == family.disk.log.lsn
    assert family.disk.status()["unsynced_records"] == 0
    family.put(0, 3)
    assert family.disk.status()["unsynced_records"] == 1
