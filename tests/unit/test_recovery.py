"""Recovery: what a crash leaves comes back, damage is refused, nothing of a former life joins the chain."""

import errno
import random
from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest

from metadata.family_state import Checkpoint, put_checkpoint
from nbdserver.logdisk.disk import DiskError
from nbdserver.logdisk.maps import EPOCH_SHIFT
from nbdserver.logdisk.ordering import Rule, disabled
from nbdserver.logdisk.records import parse_segment_header
from nbdserver.logdisk.segments import segment_path
from protocol.checksum import crc32c
from protocol.disk import (
    RECORD_MAGIC,
    SEGMENT_HEADER_BYTES,
    WRITE,
    chain_key,
    pack_record_header,
    pack_segment_header,
)
from tests.simulation.simulated_files import SimulatedFiles
from tests.simulation.simulated_store import SimulatedBatch
from tests.unit.families import BLOCK_BYTES, CALM, SETTINGS, SimulatedFamily, block

MAGIC = RECORD_MAGIC.to_bytes(4, "little")


def content(family: SimulatedFamily, segment: int) -> bytearray:
    return family.drive.files[segment_path(segment)].content


def test_a_kill_loses_nothing_that_was_acknowledged() -> None:
    family = SimulatedFamily()
    for lba in range(300):
        family.put(lba, lba + 1)
    family.crash()
    family.open()
    assert [family.number_at(lba) for lba in range(300)] == list(range(1, 301))
    assert family.disk.status()["generation"] == 1


def test_a_power_cut_loses_nothing_that_was_flushed() -> None:
    for seed in range(20):
        family = SimulatedFamily(segment_bytes=64 << 10, seed=seed)
        for lba in range(40):
            family.put(lba, lba + 1)
        assert family.flush() == 0
        for lba in range(40):
            family.put(lba, lba + 1001)
        family.crash(power=True)
        family.open()
        assert all(family.number_at(lba) in (lba + 1, lba + 1001) for lba in range(40))


def test_the_generation_rises_only_when_writes_may_be_gone() -> None:
    family = SimulatedFamily()
    family.put(0, 1)
    family.close()
    family.boot_id += "+"
    family.open()
    assert family.disk.status()["generation"] == 1
    family.crash()
    family.open()
    assert family.disk.status()["generation"] == 1
    family.crash(power=True)
    family.open()
    assert family.disk.status()["generation"] == 2
    assert "generation-raised" in family.kinds()


def test_a_record_whose_data_did_not_arrive_does_not_count() -> None:
    def shown() -> int:
        family = SimulatedFamily()
        family.put(5, 1)
        assert family.flush() == 0
        family.put(5, 2)
        place = bytes(content(family, 1)).rfind(block(2))
        family.crash()
        content(family, 1)[place : place + 512] = bytes(512)
        family.open()
        return family.number_at(5)

    assert shown() == 1
    with disabled(Rule.REPLAY_VERIFIES_DATA), pytest.raises(OSError):
        shown()


def test_a_break_below_what_was_durable_is_refused_and_nothing_is_cut_off() -> None:
    def damaged() -> SimulatedFamily:
        family = SimulatedFamily()
        for lba in range(5):
            family.put(lba, lba + 1)
        assert family.flush() == 0
        family.put(9, 9)
        family.crash()
        at = bytes(content(family, 1)).find(block(3))
        content(family, 1)[at] ^= 1
        return family

    family = damaged()
    before = bytes(content(family, 1))
    with pytest.raises(DiskError, match="the log is damaged: record 3 cannot be read"):
        family.open()
    assert bytes(content(family, 1)) == before
    with disabled(Rule.LOG_ENDS_ONLY_ABOVE_DURABLE):
        family = damaged()
        family.open()
        assert family.number_at(2) == 0  # the rule is what stands between us and silent loss


def test_a_record_behind_a_torn_one_is_never_reached_again() -> None:
    family = SimulatedFamily()
    for number in range(1, 6):
        family.put(number, number)
    family.crash()
    at = bytes(content(family, 1)).find(block(4))
    content(family, 1)[at] ^= 1
    family.open()
    assert [family.number_at(lba) for lba in range(1, 6)] == [1, 2, 3, 0, 0]
    family.crash()
    content(family, 1)[at] ^= 1  # the sector turns up after all
    family.open()
    assert [family.number_at(lba) for lba in range(1, 6)] == [1, 2, 3, 0, 0]


def test_client_data_that_looks_like_the_next_record_is_not_replayed() -> None:
    family = SimulatedFamily()
    family.put(1, 1)
    log = family.disk.log
    start = log.offset
    family.put(2, 2)
    record = bytes(content(family, 1)[start : log.offset])
    # A client stores a whole record of ours, and the device loses the write that came before it.
    image = (record + bytes(2 * BLOCK_BYTES))[: 2 * BLOCK_BYTES]
    assert family.write(10 * BLOCK_BYTES, image) == 0
    family.crash()
    content(family, 1)[start : start + 8] = bytes(8)
    family.open()
    assert family.number_at(1) == 1
    assert family.number_at(2) == 0
    assert family.read(10 * BLOCK_BYTES, 2 * BLOCK_BYTES) == bytes(2 * BLOCK_BYTES)


@pytest.mark.parametrize(("lsn_ahead", "crc_off", "shown"), [(1, 0, 9), (2, 0, 0), (0, 0, 0), (1, 1, 0)])
def test_only_the_next_link_of_the_chain_counts(lsn_ahead: int, crc_off: int, shown: int) -> None:
    """A record of this very life, whole and with a good CRC, that does not follow the last one."""
    family = SimulatedFamily()
    family.put(1, 1)
    log = family.disk.log
    body = array("Q", [7, 1]).tobytes() + array("Q", [(1 << EPOCH_SHIFT) + 5]).tobytes()
    body += array("I", [crc32c(block(9))]).tobytes()
    key, crc = chain_key(log.sequence, log.salt), log.previous_crc + crc_off
    header, _ = pack_record_header(key, WRITE, 1, 1, 1, crc, log.txid + 1, log.lsn + lsn_ahead, 0, 1, body, False)
    content(family, 1)[log.offset : log.offset + len(header) + BLOCK_BYTES] = header + block(9)
    family.crash()
    family.open()
    assert (family.number_at(1), family.number_at(7)) == (1, shown)


def test_a_segment_that_does_not_go_on_with_the_chain_is_not_entered() -> None:
    def shown(previous_crc_off: int) -> int:
        family = SimulatedFamily(segment_bytes=64 << 10)
        for number in range(1, 21):
            family.put(number, number)
        log = family.disk.log
        start = parse_segment_header(bytes(content(family, log.segment)[:SEGMENT_HEADER_BYTES]))
        assert start is not None
        assert start.sequence == 2
        content(family, log.segment)[:SEGMENT_HEADER_BYTES] = pack_segment_header(
            start.family, start.segment, start.epoch, 2, start.salt, start.previous_crc ^ previous_crc_off
        )
        family.crash()
        family.open()
        return max(family.number_at(lba) for lba in range(1, 21))

    assert shown(0) == 20
    assert shown(1) == 15


def test_the_remains_of_a_former_life_do_not_join_the_chain() -> None:
    """A segment that is used again holds whole, valid records of its last life behind the new ones."""
    family = SimulatedFamily(segment_bytes=64 << 10)
    for number in range(1, 200):
        family.put(number % 4, number)
        if number % 20 == 0:
            family.checkpoint()
    assert family.disk.pool.recycled > 3
    expected = [family.number_at(lba) for lba in range(4)]
    assert content(family, family.disk.log.segment)[family.disk.log.offset + 100 :].find(MAGIC) > 0
    family.crash()
    family.open()
    assert [family.number_at(lba) for lba in range(4)] == expected


def test_replay_goes_on_across_segments_and_from_a_checkpoint_in_the_middle() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    for number in range(1, 30):
        family.put(number, number)
    family.checkpoint()
    for number in range(30, 100):
        family.put(number, number)
    family.discard(5 * BLOCK_BYTES, 10 * BLOCK_BYTES)
    family.crash()
    family.open()
    shown = [family.number_at(number) for number in range(1, 100)]
    assert shown == [0 if 5 <= number < 15 else number for number in range(1, 100)]
    family.close()
    family.open()
    assert [family.number_at(number) for number in range(1, 100)] == shown


def test_opening_again_and_again_without_a_clean_end_keeps_everything() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    rng = random.Random(3)
    expected = dict.fromkeys(range(20), 0)
    for number in range(1, 60):
        lba = rng.randrange(20)
        family.put(lba, number)
        expected[lba] = number
        if number % 5 == 0:
            family.crash(power=False)
            family.open()
    assert {lba: family.number_at(lba) for lba in range(20)} == expected


def test_a_tail_that_only_the_page_cache_has_is_durable_before_it_is_served() -> None:
    """After a failed fdatasync the page cache shows as clean what the device never got."""

    def shown(power: bool) -> int:
        family = SimulatedFamily()
        family.put(1, 1)
        assert family.flush() == 0
        family.put(1, 2)
        file = family.drive.files[segment_path(1)]
        file.end_sync(file.begin_sync(), failed=True)
        family.crash()
        family.open()
        assert family.number_at(1) == 2  # served: from here on it may not go back
        if power:
            family.crash(power=True)
            family.open()
        return family.number_at(1)

    assert shown(power=True) == 2
    with disabled(Rule.TAIL_SYNCED_BEFORE_SERVING), pytest.raises(OSError):
        shown(power=True)


def test_a_log_that_goes_on_in_a_segment_in_use_is_refused() -> None:
    """LevelDB lost its newest checkpoint key, and only that."""
    family = SimulatedFamily(segment_bytes=64 << 10)
    for number in range(1, 40):
        family.put(number, number)
    family.checkpoint()
    family.crash()
    batch = SimulatedBatch()
    salt = family.disk.maps.segments.salt[1]
    put_checkpoint(batch, Checkpoint(0, 0, 0, 1, 0, 0, 1, salt, 1 << EPOCH_SHIFT, 1, 0))
    family.table.apply(batch.changes)
    with pytest.raises(DiskError, match="segment 1, which is in use"):
        family.open()


def test_an_epoch_that_is_not_later_is_refused() -> None:
    family = SimulatedFamily()
    family.close()
    family.epoch = 0
    with pytest.raises(DiskError, match="not later"):
        family.open()


def test_a_damaged_value_is_refused_with_its_key() -> None:
    family = SimulatedFamily()
    family.put(1, 1)
    family.close()
    value = family.table.values[b"C"]
    family.table.values[b"C"] = value[:-1] + bytes([value[-1] ^ 1])
    with pytest.raises(DiskError, match=r"metadata at key 43 is damaged: wrong checksum"):
        family.open()


def test_a_family_that_cannot_be_opened_leaves_no_file_open() -> None:
    family = SimulatedFamily()
    family.put(1, 1)
    family.close()
    family.table.values[b"C"] = b"nonsense"
    with pytest.raises(DiskError):
        family.open()
    assert not family.files._handles


def test_a_segment_whose_length_a_power_cut_took_is_read_all_the_same() -> None:
    """Its file is shorter than a segment, the log goes on in it, and the checkpoint does not know it yet."""
    family = SimulatedFamily(segment_bytes=64 << 10)
    family.put(0, 1)
    family.checkpoint()
    first = family.disk.log.segment
    number = 1
    while family.disk.log.segment == first:
        family.put(number, number)
        number += 1
    family.put(500, 77)
    assert family.flush() == 0
    begun = segment_path(family.disk.log.segment)
    end = family.disk.log.offset
    family.crash()
    del family.drive.files[begun].content[end:]
    family.open()
    assert family.number_at(500) == 77


def test_a_spare_file_that_is_not_whole_is_unlinked() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    family.put(0, 1)
    family.run(5.0)
    spare = segment_path(family.disk.pool.spare[0])
    family.crash()
    del family.drive.files[spare].content[100:]
    family.open()
    family.run(1.0)
    whole = [len(file.content) for path, file in family.drive.files.items() if path.endswith(".seg")]
    assert set(whole) == {64 << 10}


def test_the_log_does_not_begin_in_a_file_that_is_being_unlinked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut took the length of a family's first file, and no other one can be made at once."""
    family = SimulatedFamily(segment_bytes=64 << 10)
    family.put(0, 1)
    first = segment_path(family.disk.log.segment)
    family.crash()
    family.drive.files[first].content.clear()
    tries = 0
    real = SimulatedFiles.create

    def create(files: SimulatedFiles, path: str, size_bytes: int) -> int:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise OSError(errno.ENOSPC, "no room for the first two")
        return real(files, path, size_bytes)

    monkeypatch.setattr(SimulatedFiles, "create", create)
    family.open()
    family.run(1.0)
    assert family.disk.log.segment not in family.disk.pool.spare
    family.put(3, 33)
    assert family.flush() == 0
    assert family.number_at(3) == 33
    assert len(family.drive.files[first].content) == 64 << 10


def test_a_full_disk_does_not_lose_a_segment_of_its_reserve_to_each_crash() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10, mix=replace(CALM, room_segments=12))
    number = 0
    while family.write(number * BLOCK_BYTES, block(number + 1)) == 0:
        number += 1
    for _ in range(6):
        family.crash()
        family.open()
        assert family.discard(0, BLOCK_BYTES) == 0
    assert family.discard(0, 1 << 30) == 0


def test_replay_reads_the_map_pages_of_a_group_in_the_order_of_their_keys_and_no_others() -> None:
    """Overwrites all over a volume: their logical pages say what they said, their middle pages are read in one go."""
    family = SimulatedFamily(segment_bytes=8 << 20)  # all of it is one group
    lbas = random.Random(4).sample(range(1 << 18), 400)
    for lba in lbas:
        family.put(lba, lba + 1)
    family.close()
    family.open()
    for lba in reversed(lbas):
        family.put(lba, lba + 2)
    family.put(7, 7, count=300)  # these are new
    family.crash()
    family._begin()
    asked: list[list[tuple[bytes, bytes]]] = []
    read = family.store.ranges

    def ranges(wanted: Sequence[tuple[bytes, bytes]]) -> list[list[tuple[bytes, bytes]]]:
        asked.append(list(wanted))
        return read(wanted)

    family.store.ranges = ranges  # type: ignore[method-assign]
    family._open_disk()
    middle, logical = [[start for start, _ in wanted] for wanted in asked]
    assert [key[:1] for key in logical] == [b"L"] * 2
    assert [key[:1] for key in middle] == [b"M"] * 2
    assert logical == sorted(logical)
    assert middle == sorted(middle)
    expected = {lba: lba + 2 for lba in lbas} | {7 + index: 7 + index for index in range(300)}
    assert {lba: family.number_at(lba) for lba in expected} == expected


def test_replay_needs_no_more_cache_than_it_has() -> None:
    """More pages are touched than fit, and what is read ahead may be pushed out again before it is used."""
    family = SimulatedFamily(settings=replace(SETTINGS, cache_bytes=0))
    lbas = random.Random(5).sample(range(1 << 18), 300)
    for lba in lbas:
        family.put(lba, lba + 1)
    for lba in lbas[:100]:
        family.discard(lba * BLOCK_BYTES, 3 * BLOCK_BYTES)
    family.crash()
    family.open()
    shown = [family.number_at(lba) for lba in lbas]
    assert [number for number in shown if number] == [lba + 1 for lba in lbas[100:]]


def test_replay_of_short_discards_frees_what_they_discarded() -> None:
    family = SimulatedFamily()
    family.put(0, 1, count=600)
    family.checkpoint()
    family.put(100, 1000)
    family.discard(50 * BLOCK_BYTES, 500 * BLOCK_BYTES)
    family.put(300, 2000)
    family.crash()
    family.open()
    live = {lba: family.number_at(lba) for lba in range(600)}
    assert live == {lba: lba + 1 if not 50 <= lba < 550 else 0 for lba in range(600)} | {300: 2000}
    assert family.disk.status()["live_bytes"] == 101 * BLOCK_BYTES
