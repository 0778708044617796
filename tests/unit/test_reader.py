"""The read path: inline from memory and page cache, one read a contiguous run, and never a block with a wrong CRC."""

import errno

import pytest

from nbdserver.frontend.inline_reads import RUN_BLOCKS, rooms
from nbdserver.logdisk.segments import segment_path
from tests.simulation.faults import FaultMix
from tests.unit.families import BLOCK_BYTES, SimulatedFamily, block

COLD = FaultMix(cold_read=1.0, latency_s=0.001)


@pytest.fixture
def family() -> SimulatedFamily:
    family = SimulatedFamily()
    family.put(0, 1, 64)
    return family


def counted_reads(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the inline reads from now on."""
    lengths: list[int] = []
    real = family.files.read_cached

    def record(handle: int, length: int, offset: int) -> bytes | None:
        lengths.append(length)
        return real(handle, length, offset)

    monkeypatch.setattr(family.device.reader, "_read_cached", record)
    return lengths


def test_a_contiguous_run_is_one_read(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = counted_reads(family, monkeypatch)
    assert family.read(0, 64 * BLOCK_BYTES) == b"".join(block(number) for number in range(1, 65))
    assert lengths == [64 * BLOCK_BYTES]


def test_a_run_that_was_broken_is_read_in_its_parts(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    family.put(10, 900)
    family.discard(20 * BLOCK_BYTES, BLOCK_BYTES)
    lengths = counted_reads(family, monkeypatch)
    expected = [*range(1, 11), 900, *range(12, 21), 0, *range(22, 65)]
    assert family.read(0, 64 * BLOCK_BYTES) == b"".join(block(number) for number in expected)
    assert [length // BLOCK_BYTES for length in lengths] == [10, 1, 9, 43]


def test_holes_are_zeros_without_a_read(family: SimulatedFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = counted_reads(family, monkeypatch)
    assert family.read(100 * BLOCK_BYTES, 50 * BLOCK_BYTES) == bytes(50 * BLOCK_BYTES)
    assert lengths == []


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (4095, 1), (4095, 2), (100, 9000), (63 * 4096 + 5, 8000)])
def test_any_offset_and_length_can_be_read(family: SimulatedFamily, offset: int, length: int) -> None:
    whole = b"".join(block(number) for number in range(1, 65)) + bytes(10 * BLOCK_BYTES)
    assert family.read(offset, length) == whole[offset : offset + length]


@pytest.mark.parametrize("length", [BLOCK_BYTES, 3 * BLOCK_BYTES, 100])
def test_a_block_with_a_wrong_checksum_is_eio_and_reported_and_the_others_are_answered(
    family: SimulatedFamily, length: int
) -> None:
    family.rot(31)
    assert family.device.read(30 * BLOCK_BYTES, length) is None
    with pytest.raises(OSError) as caught:
        family.read(30 * BLOCK_BYTES, length)
    assert caught.value.errno == errno.EIO
    assert family.disk.damage.listed() == [{"number": 1, "snapshot": "", "lba": 30}]
    assert ("checksum-error", 30) in [(kind, fields.get("lba")) for kind, fields in family.events]
    assert family.number_at(29) == 30
    assert family.number_at(31) == 32
    assert family.disk.status()["state"] == "open"


def test_a_block_that_was_exchanged_for_an_older_one_is_eio(family: SimulatedFamily) -> None:
    """A lost write: the device has what was there before, with a good checksum of its own."""
    family.put(5, 500)
    content = family.drive.files[segment_path(1)].content
    new, old = content.find(block(500)), content.find(block(6))
    content[new : new + BLOCK_BYTES] = content[old : old + BLOCK_BYTES]
    with pytest.raises(OSError):
        family.number_at(5)


def test_cold_data_is_read_off_the_loop_and_is_the_same(family: SimulatedFamily) -> None:
    family.files.mix = COLD
    assert family.device.read(3 * BLOCK_BYTES, BLOCK_BYTES) is None
    assert [family.number_at(lba) for lba in range(64)] == list(range(1, 65))
    assert family.disk.counters()["cold_reads"] >= 64


def test_extents_tell_data_from_holes(family: SimulatedFamily) -> None:
    family.discard(10 * BLOCK_BYTES, 5 * BLOCK_BYTES)
    found = family.extents(0, 100 * BLOCK_BYTES)
    assert [(length // BLOCK_BYTES, flags) for length, flags in found] == [(10, 0), (5, 3), (49, 0), (36, 3)]
    assert family.extents(100, 50) == [(50, 0)]
    assert family.extents(0, 100 * BLOCK_BYTES, 1) == [(10 * BLOCK_BYTES, 0)]
    assert family.extents(12 * BLOCK_BYTES + 7, BLOCK_BYTES) == [(BLOCK_BYTES, 3)]


def test_a_failed_family_answers_nothing(family: SimulatedFamily) -> None:
    family.disk.fail("a test says so")
    assert family.device.read(0, BLOCK_BYTES) is None
    assert family.device.extents(0, BLOCK_BYTES, 1) is None
    with pytest.raises(OSError):
        family.read(0, BLOCK_BYTES)


def read_block(family: SimulatedFamily, lba: int) -> bytes | None:
    room = rooms(16).blocks
    return bytes(room[3][0][0]) if family.device.read_blocks([lba * BLOCK_BYTES], room, 3) == [] else None


def read_run(family: SimulatedFamily, lba: int, blocks: int) -> bytes | None:
    room = rooms(16).run
    room.view[:] = b"\xee" * len(room.view)
    if not family.device.read_run(lba * BLOCK_BYTES, blocks, room, 1):
        return None
    assert bytes(room.view[:BLOCK_BYTES]) == b"\xee" * BLOCK_BYTES
    assert bytes(room.view[(1 + blocks) * BLOCK_BYTES :]) == b"\xee" * ((RUN_BLOCKS - 1 - blocks) * BLOCK_BYTES)
    return bytes(room.view[BLOCK_BYTES : (1 + blocks) * BLOCK_BYTES])


def test_a_block_is_read_into_the_room_that_is_given(family: SimulatedFamily) -> None:
    assert [read_block(family, lba) for lba in range(64)] == [block(number) for number in range(1, 65)]


def test_blocks_that_are_not_at_hand_leave_no_gap(family: SimulatedFamily) -> None:
    family.rot(6)
    room = rooms(16).blocks
    offsets = [lba * BLOCK_BYTES for lba in (9, 5, 3, 5, 64, 4)]
    assert family.device.read_blocks(offsets, room, 2) == [1, 3]
    assert [bytes(views[0]) for views, _ in room[2:6]] == [block(10), block(4), bytes(BLOCK_BYTES), block(5)]


def test_a_block_that_is_not_in_the_page_cache_is_not_read_into_a_room(family: SimulatedFamily) -> None:
    family.files.mix = COLD
    assert read_block(family, 0) is None, "cold"
    assert read_run(family, 0, 4) is None, "cold"
    family.files.mix = FaultMix()
    family.disk.fail("a test")
    assert read_block(family, 0) is None, "failed"
    assert read_run(family, 0, 4) is None, "failed"


def test_a_damaged_block_is_not_read_into_a_room(family: SimulatedFamily) -> None:
    family.rot(6)
    assert [lba for lba in range(64) if read_block(family, lba) is None] == [5]
    assert [lba for lba in range(62) if read_run(family, lba, 3) is None] == [3, 4, 5]


def test_a_run_of_data_and_holes_is_read_into_the_room_that_is_given(family: SimulatedFamily) -> None:
    family.put(10, 900)
    family.put(300, 1000, 20)
    family.discard(20 * BLOCK_BYTES, BLOCK_BYTES)
    for first, blocks in ((0, 63), (9, 3), (19, 3), (60, 10), (20, 1), (250, 60), (256, 63)):
        expected = family.read(first * BLOCK_BYTES, blocks * BLOCK_BYTES)
        assert read_run(family, first, blocks) == expected


def test_a_long_run_is_read_into_the_room_unless_it_has_holes_to_be_told_of(family: SimulatedFamily) -> None:
    family.put(0, 1, 300)
    assert read_run(family, 200, 100) == family.read(200 * BLOCK_BYTES, 100 * BLOCK_BYTES)
    family.discard(270 * BLOCK_BYTES, BLOCK_BYTES)
    assert read_run(family, 200, 63) is not None
    assert read_run(family, 200, 100) is None
    assert read_run(family, 271, 100) is None
