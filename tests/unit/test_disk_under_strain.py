"""What once went wrong in the log disk when room, memory or trust ran out, over the simulated seams."""

import errno
import signal
from dataclasses import replace
from typing import Any

import pytest

from nbdserver.logdisk.disk import DiskSettings
from protocol.disk import RECORD_MAGIC, SEGMENT_HEADER_BYTES
from tests.unit.families import BLOCK_BYTES, CALM, SimulatedFamily, block

SMALL_CACHE = DiskSettings(cache_bytes=1 << 20)


def fail_next_header(family: SimulatedFamily, number: int) -> None:
    """The next write of a segment header fails."""
    real = family.files.append

    def append(handle: int, buffers: Any, offset: int) -> None:
        if offset == 0 and sum(map(len, buffers)) == SEGMENT_HEADER_BYTES:
            family.files.append = real  # type: ignore[method-assign]
            raise OSError(number, "injected")
        real(handle, buffers, offset)

    family.files.append = append  # type: ignore[method-assign]


def fill(family: SimulatedFamily) -> int:
    """Write 4 KiB blocks from LBA 0 on until there is no room; how many were written."""
    written = 0
    while family.write(written * BLOCK_BYTES, block(written + 1)) == 0:
        written += 1
        if written % 64 == 0:
            family.run(0.01)
    return written


def small_disk(room_segments: int = 60) -> SimulatedFamily:
    return SimulatedFamily(size_bytes=16 << 30, mix=replace(CALM, room_segments=room_segments))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_nothing_is_acknowledged_behind_a_seal_without_successor(number: int) -> None:
    family = SimulatedFamily()
    for lba in range(200):
        family.put(lba, lba + 1)
    fail_next_header(family, number)
    lba = 200
    while family.write(lba * BLOCK_BYTES, block(lba + 1)) == 0:
        lba += 1
    acknowledged = [each for each in range(50) if family.write(each * BLOCK_BYTES, block(5000 + each)) == 0]
    family.crash()
    family.open()
    assert not [each for each in acknowledged if family.number_at(each) != 5000 + each]


def test_a_discard_over_many_resident_pages_is_worked_in() -> None:
    family = SimulatedFamily(size_bytes=16 << 30, segment_bytes=4 << 20)
    for page in range(4000):
        family.put(page * 256, page + 1)
    assert family.discard(0, 16 << 30) == 0
    family.run(5.0)
    assert not family.disk.maps.holes
    assert family.disk.maps.live_blocks == 0


def test_a_full_disk_says_so_and_gets_room_by_random_trims() -> None:
    family = small_disk()
    written = fill(family)
    assert family.disk.status()["state"] == "full"
    for lba in range(0, written, 2):
        assert family.discard(lba * BLOCK_BYTES, BLOCK_BYTES) == 0
        if lba % 64 == 0:
            family.run(0.01)
    family.run(60.0)
    assert all(family.write(lba * BLOCK_BYTES, block(9)) == 0 for lba in range(0, written // 4, 2))
    assert family.disk.status()["state"] == "open"


def test_a_full_disk_at_rest_does_not_clean_in_circles() -> None:
    family = small_disk()
    fill(family)
    family.run(10.0)
    appended = family.disk.log.appended_bytes
    family.run(60.0)
    assert family.disk.log.appended_bytes == appended


def test_overwriting_what_fits_never_fills_the_disk() -> None:
    family = SimulatedFamily(segment_bytes=4 << 20, mix=replace(CALM, room_segments=40))
    data = bytes(32 << 20)
    for index in range(24):
        assert family.write((index & 1) * len(data), data) == 0
        family.run(0.001)


def test_an_exception_behind_the_append_fails_the_family() -> None:
    family = SimulatedFamily()
    family.put(0, 1)

    def out_of_memory(stop: int) -> None:
        raise MemoryError

    real = family.disk.maps.take_mbas
    family.disk.maps.take_mbas = out_of_memory  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        family.put(100, 1000)
    family.disk.maps.take_mbas = real  # type: ignore[method-assign]
    assert family.write(200 * BLOCK_BYTES, block(2000)) == errno.EIO


@pytest.mark.parametrize("blocks", [0xFFFFFFFF, 100])
def test_client_data_full_of_record_headers_does_not_hold_up_recovery(blocks: int) -> None:
    family = SimulatedFamily(segment_bytes=4 << 20)
    pattern = RECORD_MAGIC.to_bytes(4, "little") + b"\x01\x00\xff\xff" + blocks.to_bytes(4, "little")
    data = (pattern * (1 << 20))[: 4 << 20]
    for _ in range(3):
        assert family.write(0, data) == 0
    family.checkpoint()
    family.run(1.0)
    before = family.disk.pool.recycled
    number = 0
    while family.disk.pool.recycled == before or family.disk.log.offset > 20000:
        family.put(5000 + number % 40, 7)
        number += 1
    family.crash()

    def too_long(*_: Any) -> None:
        pytest.fail("recovery takes longer than 60 s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        family.open()
    finally:
        signal.alarm(0)
    assert family.number_at(5000) == 7


def test_a_hole_over_more_than_the_cache_stays_within_it() -> None:
    family = SimulatedFamily(
        size_bytes=64 << 30, segment_bytes=4 << 20, settings=SMALL_CACHE, mix=replace(CALM, room_segments=5000)
    )
    for page in range(3000):
        family.put(page * 256, page + 1)
        if page % 64 == 0:
            family.run(0.005)
    family.checkpoint()
    assert family.discard(0, 64 << 30) == 0
    limit = family.disk.maps.logical.limit_pages
    while family.disk.maps.holes:
        family.run(0.001)
        assert family.disk.maps.logical.resident_pages < 2 * limit + 64


def test_discards_of_everything_again_and_again_cost_the_region_table_one_run() -> None:
    family = SimulatedFamily(size_bytes=16 << 40)
    for _ in range(50):
        assert family.discard(0, 16 << 40) == 0
    assert len(family.disk.maps.regions._recent_runs) < 3


def test_a_victim_that_is_freed_while_it_is_read_is_no_damage() -> None:
    family = SimulatedFamily()
    for lba in range(2000):
        family.put(lba, lba + 1)
    for lba in range(200):
        if lba % 3:
            family.put(lba, 9000 + lba)
    cleaner = family.disk.cleaner
    while cleaner.running:
        family.run(0.01)
    held: list[Any] = []
    real = family.files.read_later
    family.files.read_later = lambda *arguments: held.append(arguments)  # type: ignore[method-assign]
    assert cleaner.start()
    family.files.read_later = real  # type: ignore[method-assign]
    for lba in range(2000):
        family.put(lba, 50000 + lba)
    family.checkpoint()
    real(*held[0])
    family.run(1.0)
    assert "segment-not-cleaned" not in family.kinds()


def test_a_first_segment_that_met_a_full_disk_is_begun_later() -> None:
    family = SimulatedFamily()
    fail_next_header(family, errno.ENOSPC)
    family.write(0, block(1))
    family.run(5.0)
    assert family.write(0, block(1)) == 0


def test_a_discard_that_cannot_be_done_at_once_leaves_the_open_batch_empty() -> None:
    family = SimulatedFamily()
    family.put(0, 1, 10)
    reads = 0
    real = family.files.read_cached

    def cached(handle: int, length: int, offset: int) -> bytes | None:
        nonlocal reads
        reads += 1
        return real(handle, length, offset) if reads <= 2 else None

    family.device.reader._read_cached = cached
    assert not family.device.discard(100, 5 * BLOCK_BYTES)
    assert family.device.writer._lbas == []
