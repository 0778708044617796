"""The write path: one batch is one record is one append, maps move only after it, and an overwrite moves the middle map
alone."""

import errno
import random

import pytest

from metadata.seams import Buffer
from nbdserver.logdisk.disk import DiskSettings
from tests.unit.families import BLOCK_BYTES, SETTINGS, SimulatedFamily, block

TIB = 1 << 40


def view(number: int, count: int = 1) -> memoryview:
    return memoryview(b"".join(block(number + index) for index in range(count)))


@pytest.fixture
def family() -> SimulatedFamily:
    family = SimulatedFamily(size_bytes=4 * TIB)
    family.put(0, 1)  # the first segment begins, the first page is there
    return family


def warm(family: SimulatedFamily, *lbas: int) -> None:
    for lba in lbas:
        family.read(lba * BLOCK_BYTES, BLOCK_BYTES)


def test_a_batch_is_one_record_and_one_append(family: SimulatedFamily) -> None:
    appends, records = family.files.counts["append"], family.disk.log.records
    for lba in range(100, 120):
        assert family.device.write(lba * BLOCK_BYTES, view(lba))
    assert family.device.write(200 * BLOCK_BYTES, view(200, 20))
    assert family.files.counts["append"] == appends
    assert family.device.commit() == 0
    assert family.files.counts["append"] == appends + 1
    assert family.disk.log.records == records + 1
    assert [family.number_at(lba) for lba in (100, 119, 200, 219)] == [100, 119, 200, 219]


def test_overwriting_blocks_of_the_head_layer_changes_the_middle_map_alone(family: SimulatedFamily) -> None:
    family.put(10, 1, 50)
    before = family.disk.counters()
    family.put(10, 101, 50)
    for lba in range(10, 20):
        family.put(lba, 200 + lba)
    after = family.disk.counters()
    assert after["logical_map_updates"] == before["logical_map_updates"]
    assert after["middle_map_updates"] == before["middle_map_updates"] + 60
    assert after["live_blocks_now"] == before["live_blocks_now"]
    assert family.number_at(15) == 215
    assert family.number_at(40) == 131


def test_new_blocks_change_both_maps_once(family: SimulatedFamily) -> None:
    before = family.disk.counters()
    family.put(300, 1, 30)
    after = family.disk.counters()
    assert after["logical_map_updates"] == before["logical_map_updates"] + 30
    assert after["middle_map_updates"] == before["middle_map_updates"] + 30
    assert after["live_blocks_now"] == before["live_blocks_now"] + 30


def test_the_last_write_of_a_block_in_a_batch_wins(family: SimulatedFamily) -> None:
    warm(family, 20)
    for number in range(1, 9):
        assert family.device.write(20 * BLOCK_BYTES, view(number))
    assert family.device.write(18 * BLOCK_BYTES, view(50, 4))
    assert family.device.write(21 * BLOCK_BYTES, view(9))
    assert family.device.commit() == 0
    assert [family.number_at(lba) for lba in (18, 19, 20, 21)] == [50, 51, 52, 9]
    assert family.disk.maps.live_blocks == 5
    family.crash()
    family.open()
    assert [family.number_at(lba) for lba in (18, 19, 20, 21)] == [50, 51, 52, 9]
    assert family.disk.maps.live_blocks == 5


def test_live_blocks_are_counted_by_segment_whatever_is_written() -> None:
    rng = random.Random(5)
    family = SimulatedFamily(segment_bytes=128 << 10)
    for step in range(300):
        lba, count = rng.randrange(600), rng.choice([1, 1, 3, 40])
        if rng.random() < 0.2:
            family.discard(lba * BLOCK_BYTES, count * BLOCK_BYTES)
        else:
            family.put(lba, step + 1, count)
    maps = family.disk.maps
    counted: dict[int, int] = {}
    for number in {mba >> 8 for page in maps.logical.pages.values() for mba in page if mba}:
        page = maps.middle.get(number)
        assert page is not None
        for segment in page[:256]:
            if segment:
                counted[segment] = counted.get(segment, 0) + 1
    assert {segment: live for segment, live in enumerate(maps.segments.live) if live} == counted
    assert sum(counted.values()) == maps.live_blocks


@pytest.mark.parametrize(("offset", "length"), [(1, 1), (4095, 2), (100, 4096), (4000, 9000), (8191, 1), (8192, 5000)])
def test_a_partial_write_changes_exactly_its_bytes(family: SimulatedFamily, offset: int, length: int) -> None:
    family.put(0, 1, 8)
    expected = bytearray(family.read(0, 8 * BLOCK_BYTES))
    data = bytes(range(1, 256)) * 40
    assert family.write(offset, data[:length]) == 0
    expected[offset : offset + length] = data[:length]
    assert family.read(0, 8 * BLOCK_BYTES) == expected


def test_a_partial_write_merges_with_what_the_same_batch_wrote(family: SimulatedFamily) -> None:
    warm(family, 5)
    assert family.device.write(5 * BLOCK_BYTES, view(7))
    assert family.device.write(5 * BLOCK_BYTES + 10, memoryview(b"abc"))
    assert family.device.commit() == 0
    expected = bytearray(block(7))
    expected[10:13] = b"abc"
    assert family.read(5 * BLOCK_BYTES, BLOCK_BYTES) == expected


def test_an_append_that_fails_changes_nothing(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    family.put(3, 3)
    before = (family.disk.maps.live_blocks, family.disk.log.lsn, family.disk.log.txid, family.disk.log.offset)
    real = family.files.append

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(family.files, "append", fails)
    assert family.write(3 * BLOCK_BYTES, block(4)) == errno.ENOSPC
    assert family.write(4 * BLOCK_BYTES, block(4)) == errno.ENOSPC
    monkeypatch.setattr(family.files, "append", real)
    after = (family.disk.maps.live_blocks, family.disk.log.lsn, family.disk.log.txid, family.disk.log.offset)
    assert after == before
    assert family.number_at(3) == 3
    assert family.number_at(4) == 0
    family.put(4, 5)
    family.crash()
    family.open()
    assert (family.number_at(3), family.number_at(4)) == (3, 5)


def test_an_append_that_fails_for_another_reason_ends_the_family(
    family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(family.files, "append", fails)
    assert family.write(3 * BLOCK_BYTES, block(4)) == errno.EIO
    assert family.disk.status()["state"] == "failed"
    with pytest.raises(OSError):
        family.number_at(0)


def test_a_batch_larger_than_a_segment_arrives_whole() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    family.put(0, 1, 200)
    assert [family.number_at(lba) for lba in range(200)] == list(range(1, 201))
    family.crash()
    family.open()
    assert [family.number_at(lba) for lba in range(200)] == list(range(1, 201))


def test_a_terabyte_is_discarded_without_touching_a_page(family: SimulatedFamily) -> None:
    for lba in range(0, 1 << 28, 1 << 22):
        family.put(lba, 5)
    family.checkpoint()
    before = family.disk.counters()
    assert family.device.discard(0, TIB)
    assert family.device.commit() == 0
    after = family.disk.counters()
    for name in ("map_page_loads", "logical_map_updates", "middle_map_updates"):
        assert after[name] == before[name]
    assert family.number_at(1 << 22) == 0
    assert {flags for _, flags in family.extents(0, TIB)} == {3}
    family.crash()
    family.open()
    assert all(family.number_at(lba) == 0 for lba in range(0, 1 << 28, 1 << 24))
    family.run(5.0)
    assert family.disk.maps.live_blocks == 0
    assert family.disk.status()["pending_holes"] == 0


def test_what_is_written_into_a_hole_that_is_still_pending_stays() -> None:
    family = SimulatedFamily(size_bytes=4 * TIB, settings=DiskSettings(0, SETTINGS.checkpoint_bytes, 3600.0))
    lbas = range(0, 1 << 28, 1 << 21)
    for lba in lbas:
        family.put(lba, 5, 2)
    family.checkpoint()
    for power in (False, True):
        assert family.device.discard(0, TIB)
        assert family.device.commit() == 0
        family.put(1 << 21, 99)
        assert family.flush() == 0
        family.crash(power=power)
        family.open()
        family.put(3 << 21, 77)
        family.checkpoint()
        family.crash(power=power)
        family.open()
        assert family.number_at(1 << 21) == 99
        assert family.number_at((1 << 21) + 1) == 0
        assert family.number_at(3 << 21) == 77
        family.run(10.0)
        assert [family.number_at(lba) for lba in lbas if lba not in (1 << 21, 3 << 21)] == [0] * (len(lbas) - 2)
        assert family.disk.maps.live_blocks == 2


@pytest.mark.parametrize(("offset", "length"), [(1, 1), (100, 8192), (4096, 4096), (4095, 20000), (0, 100), (5000, 10)])
def test_a_discard_makes_zeros_of_exactly_its_bytes(family: SimulatedFamily, offset: int, length: int) -> None:
    family.put(0, 1, 8)
    expected = bytearray(family.read(0, 8 * BLOCK_BYTES))
    assert family.discard(offset, length) == 0
    expected[offset : offset + length] = bytes(length)
    assert family.read(0, 8 * BLOCK_BYTES) == expected
    family.crash()
    family.open()
    assert family.read(0, 8 * BLOCK_BYTES) == expected


def test_the_data_of_a_batch_is_checked_before_it_is_copied(family: SimulatedFamily) -> None:
    """The caller's buffer may be reused after `commit`."""
    buffer = bytearray(block(5) * 4)
    buffers: list[Buffer] = [buffer]
    assert family.device.write(40 * BLOCK_BYTES, memoryview(buffer))
    assert family.device.commit() == 0
    buffers[0][:] = bytes(len(buffer))  # type: ignore[index]
    assert family.number_at(43) == 5


def test_mbas_of_an_epoch_are_never_given_out_again(family: SimulatedFamily) -> None:
    seen: set[int] = set()
    for life in range(3):
        family.put(50 * life, 1, 20)
        page = family.disk.maps.page(1 << 32)
        assert page is not None
        mbas = set(page[50 * life : 50 * life + 20])
        assert not mbas & seen
        assert {mba >> 40 for mba in mbas} == {family.epoch}
        seen |= mbas
        family.discard(50 * life * BLOCK_BYTES, 20 * BLOCK_BYTES)
        family.crash()
        family.open()
