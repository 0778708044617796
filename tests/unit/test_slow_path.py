"""Operations that wait: for pages, for cold data, for room; all of them end, and none is merged with what is old."""

import errno
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from metadata.seams import Buffer
from nbdserver.block import Extents, Later, Operation
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.maps import MAX_PENDING_HOLES, SMALL_HOLE_BLOCKS
from tests.simulation.faults import FaultMix
from tests.unit.families import BLOCK_BYTES, CALM, SimulatedFamily, block

COLD = FaultMix(cold_read=1.0, latency_s=0.001)
SMALL_CACHE = DiskSettings(cache_bytes=0, checkpoint_bytes=1 << 30, checkpoint_interval_s=3600.0)
TIB = 1 << 40


@pytest.fixture
def cold() -> SimulatedFamily:
    """Blocks 0 to 63; what is not in memory has to be waited for."""
    family = SimulatedFamily(size_bytes=4 * TIB)
    family.put(0, 1, 64)
    family.files.mix = COLD
    return family


def started(family: SimulatedFamily, operation: Operation, offset: int, length: int, data: bytes | None) -> list[int]:
    """Begin an operation; the list gets its errno when it ends."""
    answers: list[int] = []
    family.device.later(operation, offset, length, data, lambda number, _: answers.append(number))
    return answers


def test_a_partial_write_waits_for_its_block_and_merges(cold: SimulatedFamily) -> None:
    assert not cold.device.write(5 * BLOCK_BYTES + 10, memoryview(b"abc"))
    assert cold.write(5 * BLOCK_BYTES + 10, b"abc") == 0
    expected = bytearray(block(6))
    expected[10:13] = b"abc"
    assert cold.read(5 * BLOCK_BYTES, BLOCK_BYTES) == expected


def test_a_partial_write_is_merged_with_what_was_written_while_it_waited(cold: SimulatedFamily) -> None:
    answers = started(cold, Operation.WRITE, 5 * BLOCK_BYTES + 10, 3, b"abc")
    cold.clock.step()
    cold.put(5, 700)
    assert answers == []
    cold.run(2.0)
    assert answers == [0]
    expected = bytearray(block(700))
    expected[10:13] = b"abc"
    assert cold.read(5 * BLOCK_BYTES, BLOCK_BYTES) == expected


def test_partial_writes_of_one_block_at_the_same_time_are_all_there(cold: SimulatedFamily) -> None:
    answers = [started(cold, Operation.WRITE, 5 * BLOCK_BYTES + 16 * index, 4, b"%04d" % index) for index in range(50)]
    cold.run(20.0)
    assert answers == [[0]] * 50
    shown = cold.read(5 * BLOCK_BYTES, BLOCK_BYTES)
    assert [shown[16 * index : 16 * index + 4] for index in range(50)] == [b"%04d" % index for index in range(50)]


def test_a_cold_read_holds_its_segment_until_it_is_done() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    family.put(0, 1)
    family.files.mix = FaultMix(cold_read=1.0, latency_s=5.0)
    answers = started(family, Operation.READ, 0, BLOCK_BYTES, None)
    family.clock.step()
    family.files.mix = CALM
    assert answers == []
    for number in range(2, 200):
        family.put(0, number)
        if number % 10 == 0:
            family.checkpoint()
    assert family.disk.pool.recycled > 5
    assert answers == []
    assert 1 not in family.disk.maps.segments.in_use
    assert 1 not in family.disk.pool.spare
    family.run(120.0)
    assert answers == [0]
    assert "checksum-error" not in family.kinds()


def test_a_partial_discard_waits_for_its_edges(cold: SimulatedFamily) -> None:
    expected = bytearray(cold.read(0, 8 * BLOCK_BYTES))
    assert cold.discard(100, 5 * BLOCK_BYTES) == 0
    expected[100 : 100 + 5 * BLOCK_BYTES] = bytes(5 * BLOCK_BYTES)
    assert cold.read(0, 8 * BLOCK_BYTES) == expected


def test_a_damaged_block_is_not_merged_with(cold: SimulatedFamily) -> None:
    cold.rot(6)
    assert cold.write(5 * BLOCK_BYTES + 10, b"abc") == errno.EIO
    cold.put(5, 9)  # as a whole it can be written
    assert cold.number_at(5) == 9


def test_a_read_error_is_eio_for_its_range_only(cold: SimulatedFamily) -> None:
    cold.files.mix = FaultMix(cold_read=1.0, read_error=1.0, latency_s=0.001)
    with pytest.raises(OSError):
        cold.number_at(5)
    cold.files.mix = CALM
    assert cold.number_at(5) == 6
    assert cold.disk.status()["state"] == "open"


def test_volumes_larger_than_the_cache_are_served() -> None:
    family = SimulatedFamily(size_bytes=4 * TIB, settings=SMALL_CACHE)
    rng = random.Random(4)
    expected = {}
    for number in range(1, 400):
        lba = rng.randrange(4 * TIB // BLOCK_BYTES)
        family.put(lba, number)
        expected[lba] = number
    family.checkpoint()
    for lba, number in expected.items():
        assert family.number_at(lba) == number
    counters = family.disk.counters()
    assert counters["map_page_evictions"] > 200
    assert counters["map_pages_now"] < 300


def test_an_operation_over_many_pages_ends_with_a_cache_of_few() -> None:
    family = SimulatedFamily(size_bytes=4 * TIB, settings=SMALL_CACHE)
    family.put(0, 1, 256 * 40)
    assert family.read(0, 256 * 40 * BLOCK_BYTES)[-BLOCK_BYTES:] == block(256 * 40)
    family.checkpoint()
    assert family.write(100, bytes(256 * 30 * BLOCK_BYTES)) == 0
    assert not any(family.read(100, 256 * 30 * BLOCK_BYTES))


def test_more_holes_than_may_be_pending_wait_and_all_are_worked_in() -> None:
    family = SimulatedFamily(size_bytes=16 * TIB)
    family.put(0, 1)
    length = 1 << 25
    answers: list[int] = []
    for index in range(MAX_PENDING_HOLES + 20):
        if family.device.discard(index * 2 * length, length):
            answers.append(family.device.commit())
        else:
            assert family.device.commit() == 0
            done = lambda number, _: answers.append(number)  # noqa: E731
            family.device.later(Operation.DISCARD, index * 2 * length, length, None, done)
    assert len(answers) == MAX_PENDING_HOLES
    assert len(family.disk.maps.holes) == MAX_PENDING_HOLES
    family.run(60.0)
    assert answers == [0] * (MAX_PENDING_HOLES + 20)
    assert family.disk.maps.holes == []


def test_what_is_written_between_two_long_discards_outlives_a_checkpoint_that_lacks_the_second() -> None:
    family = SimulatedFamily(settings=SMALL_CACHE)
    for page in range(50):
        family.put(page * 256, 1)
    family.close()
    family.open()
    last = 49 * 256
    family.store.mix = replace(CALM, latency_s=1.0)
    assert family.discard(0, 50 * 256 * BLOCK_BYTES) == 0
    family.put(last, 2)
    assert family.discard((last + 1) * BLOCK_BYTES, (SMALL_HOLE_BLOCKS + 1) * BLOCK_BYTES) == 0
    family.disk.checkpointer.start()
    assert family.disk.maps.stale
    assert family.clock.run_until(lambda: family.disk.checkpointer.count == 2)
    family.crash()
    family.store.mix = CALM
    family.open()
    assert family.disk.maps.holes
    assert family.number_at(last) == 2


def test_every_operation_ends_when_the_family_fails(cold: SimulatedFamily) -> None:
    answers = [
        started(cold, Operation.READ, 0, BLOCK_BYTES, None),
        started(cold, Operation.WRITE, 10, 5, b"12345"),
        started(cold, Operation.DISCARD, 10, 5, None),
        started(cold, Operation.EXTENTS, TIB, TIB, None),
        started(cold, Operation.CACHE, 0, 64 * BLOCK_BYTES, None),
    ]
    cold.disk.fail("a test says so")
    cold.run(5.0)
    assert answers == [[errno.EIO]] * 5
    assert cold.disk.slow_path.under_way == 0


def test_cache_brings_the_range_in_and_answers_nothing(cold: SimulatedFamily) -> None:
    answers = started(cold, Operation.CACHE, 0, 64 * BLOCK_BYTES, None)
    cold.run(1.0)
    assert answers == [0]


def test_a_store_that_cannot_be_read_fails_the_family_not_the_data() -> None:
    family = SimulatedFamily(size_bytes=4 * TIB, settings=SMALL_CACHE)
    family.put(0, 5)
    family.close()
    family.open()
    family.store.mix = FaultMix(store_read_error=1.0)
    with pytest.raises(OSError):
        family.number_at(0)
    assert family.disk.status()["state"] == "failed"
    family.crash()
    family.open()
    assert family.number_at(0) == 5


def test_long_operations_take_turns_a_piece_each() -> None:
    """What others ask for between two pieces is served between them."""
    family = SimulatedFamily(segment_bytes=16 << 20)
    for mib in range(8):
        family.put(256 * mib, 1 + 256 * mib, 256)
    read, at_once = family.device.read, []

    def counted(offset: int, length: int) -> Sequence[Buffer] | None:
        at_once.append(length)
        return read(offset, length)

    family.device.read = counted
    found: dict[str, Sequence[Buffer]] = {}

    def keep(name: str) -> Later:
        def done(error: int, result: Sequence[Buffer] | Extents | None) -> None:
            assert not error
            found[name] = cast(Sequence[Buffer], result)

        return done

    for name in ("one", "two"):
        family.device.later(Operation.READ, 0, 8 << 20, None, keep(name))
    turns, most_bytes = 0, 0
    while len(found) < 2:
        at_once.clear()
        assert family.clock.step()
        turns += bool(at_once)
        most_bytes = max(most_bytes, sum(at_once))
    assert (turns, most_bytes) == (16, 1 << 20)
    expected = b"".join(block(number) for number in range(1, 1 + 256 * 8))
    assert all(b"".join(pieces) == expected for pieces in found.values())
