"""The offline check: a healthy family is clean, and each kind of damage is found and named."""

import asyncio
import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metadata.family_state import PendingHole, put_checkpoint, put_pending_holes, read_checkpoint
from metadata.leveldb import NO_THREADS, LevelStore
from metadata.pages import PAGE_SHIFT
from nbdserver.host.completions import Completions
from nbdserver.host.files import HostFiles
from nbdserver.logdisk.check import CheckResult, check_family
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.maps import EPOCH_SHIFT, Maps
from nbdserver.logdisk.segments import segment_path
from nbdserver.node.store_copy import opened_copy
from protocol.disk import pack_value, unpack_value
from tests.unit.families import RealFamily, SimulatedFamily
from tests.unit.replica_rig import ReplicaFamily

SETTINGS = DiskSettings(cache_bytes=0, checkpoint_bytes=4 << 20, checkpoint_interval_s=3600.0)
FIRST_MBA = 1 << EPOCH_SHIFT


def checked(directory: Path, quick: bool = False) -> CheckResult:
    loop = asyncio.new_event_loop()
    files = HostFiles(str(directory), Completions(loop))
    try:
        with opened_copy(directory / "maps") as store:
            return check_family(files, store, quick)
    finally:
        files.shut_down()
        loop.close()


def found(result: CheckResult) -> list[str]:
    return [f"{finding.kind}: {finding.sentence}" for finding in result.findings]


def kinds(result: CheckResult) -> set[str]:
    return {finding.kind for finding in result.findings}


@pytest.fixture
def family(tmp_path: Path) -> RealFamily:
    """A closed family: blocks 0 to 599 with a hole at 100 to 109."""
    family = RealFamily(tmp_path, segment_bytes=1 << 20, settings=SETTINGS)
    family.open()
    for lba in range(0, 600, 20):
        family.put(lba, lba + 1, 20)
    family.discard(100 * 4096, 10 * 4096)
    family.close()
    return family


@contextmanager
def store_of(family: RealFamily) -> Iterator[LevelStore]:
    store = LevelStore(str(family.directory / "maps"), NO_THREADS, NO_THREADS)
    yield store
    store.close()


def change(family: RealFamily, key: bytes, payload: Callable[[bytes], bytes | None]) -> None:
    """Change the payload of a value, keeping it well-formed; None deletes it."""
    with store_of(family) as store:
        value = store.get(key)
        assert value is not None
        new = payload(unpack_value(key, value))
        batch = store.batch()
        if new is None:
            batch.delete(key)
        else:
            batch.put(key, pack_value(key, new))
        store.write(batch)


def logical_key(family: RealFamily, lba: int) -> bytes:
    """Of the base value of the page that holds the LBA."""
    return Maps(family.store, 0, print).logical.key_range(1 << 32 | lba >> PAGE_SHIFT)[0] + b"\x00"


def middle_key(family: RealFamily, mba: int) -> bytes:
    return Maps(family.store, 0, print).middle.key_range(mba >> PAGE_SHIFT)[0] + b"\x00"


def edited(typecode: str, index: int, value: int) -> Callable[[bytes], bytes]:
    def edit(payload: bytes) -> bytes:
        items = array(typecode, payload)
        items[index] = value
        return items.tobytes()

    return edit


# --- healthy


def test_a_family_that_was_closed_cleanly_is_clean(family: RealFamily) -> None:
    result = checked(family.directory)
    assert found(result) == []
    assert result.live_blocks == result.blocks_verified == 590
    assert result.records_to_replay == 0
    assert result.is_complete


def test_quick_reads_no_data(family: RealFamily) -> None:
    result = checked(family.directory, quick=True)
    assert found(result) == []
    assert result.blocks_verified == 0
    assert result.records_verified > 30


def test_an_empty_family_is_clean(tmp_path: Path) -> None:
    RealFamily(tmp_path)
    assert found(checked(tmp_path)) == []


def test_the_check_changes_no_byte_of_the_family(family: RealFamily) -> None:
    def content() -> dict[str, bytes]:
        paths = sorted(path for path in family.directory.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in paths}

    before = content()
    checked(family.directory)
    assert content() == before


@pytest.mark.parametrize("seed", range(12))
def test_a_family_is_clean_at_any_moment_of_random_work(seed: int) -> None:
    settings = DiskSettings(cache_bytes=0, checkpoint_bytes=512 << 10, checkpoint_interval_s=0.5)
    rng = random.Random(seed)
    family = SimulatedFamily(size_bytes=1 << 40, segment_bytes=128 << 10, settings=settings, seed=seed)
    areas = [rng.randrange(1 << 28) for _ in range(40)]
    for life in range(3):
        for step in range(150):
            lba, count = rng.choice(areas) + rng.randrange(30), 1 + rng.randrange(8)
            choice = rng.random()
            if choice < 0.75:
                family.put(lba, step + 1, count)
            elif choice < 0.9:
                assert family.discard(lba * 4096 + rng.randrange(4096), count * 4096) == 0
            elif choice < 0.94:
                assert family.discard(lba * 4096, 1 << rng.randrange(25, 38)) == 0
            elif choice < 0.97:
                family.checkpoint()
            else:
                family.run(0.3)
        if life == 1:
            family.close()
        else:
            family.crash(power=rng.random() < 0.5)
        family._begin()
        result = check_family(family.files, family.store, quick=False)
        assert found(result) == []
        assert result.blocks_verified == result.live_blocks
        family.open()


def test_records_behind_the_checkpoint_are_counted_not_blamed(family: RealFamily) -> None:
    family.open()
    for number in range(50):
        family.put(number, 7, 2)
    family.crash()
    result = checked(family.directory)
    assert found(result) == []
    assert (result.records_to_replay, result.blocks_to_replay) == (50, 100)


# --- damaged


def test_a_flipped_bit_in_a_live_block_is_found(family: RealFamily) -> None:
    flip(family.directory / segment_path(1), 200 * 4096)
    result = checked(family.directory)
    assert kinds(result) == {"data"}
    assert len(result.findings) == 1
    assert "MBA 0x1" in result.findings[0].sentence
    assert found(checked(family.directory, quick=True)) == []


def test_a_flipped_bit_in_a_record_header_is_found_even_by_a_quick_check(family: RealFamily) -> None:
    path = family.directory / segment_path(1)
    flip(path, path.read_bytes().find((0x314C444E).to_bytes(4, "little"), 60000) + 20)
    assert "chain" in kinds(checked(family.directory, quick=True))


def test_a_damaged_segment_header_is_found(family: RealFamily) -> None:
    flip(family.directory / segment_path(1), 9)
    assert kinds(checked(family.directory)) == {"chain"}


def test_a_missing_segment_file_is_found(family: RealFamily) -> None:
    (family.directory / segment_path(1)).unlink()
    result = checked(family.directory)
    assert "chain" in kinds(result)
    assert "segment 1" in result.findings[0].sentence


def test_a_truncated_segment_file_is_found(family: RealFamily) -> None:
    path = family.directory / segment_path(1)
    path.write_bytes(path.read_bytes()[:500000])
    assert {"chain", "data"} <= kinds(checked(family.directory))


@pytest.mark.parametrize("kind", [b"M", b"E"])
def test_a_value_with_a_wrong_checksum_is_found(family: RealFamily, kind: bytes) -> None:
    key = middle_key(family, FIRST_MBA) if kind == b"M" else kind
    with store_of(family) as store:
        value = bytearray(store.get(key) or b"")
        value[-1] ^= 1
        batch = store.batch()
        batch.put(key, bytes(value))
        store.write(batch)
    result = checked(family.directory)
    assert kinds(result) == {"value"}
    assert not result.is_complete


def test_a_replicas_damaged_splice_is_found() -> None:
    family = ReplicaFamily()
    family.own(1)
    for lba in range(20):
        family.put(lba, lba + 1)
    family.crash()
    family.open()
    family.close()
    (key,) = (key for key in family.table.values if key.startswith(b"J"))
    family.table.values[key] = family.table.values[key][:-1] + b"?"
    family._begin()
    result = check_family(family.files, family.store, quick=False)
    assert kinds(result) == {"value"}
    assert not result.is_complete


def test_a_key_of_no_kind_is_found(family: RealFamily) -> None:
    with store_of(family) as store:
        batch = store.batch()
        batch.put(b"Zebra", pack_value(b"Zebra", b""))
        store.write(batch)
    assert kinds(checked(family.directory)) == {"value"}


def test_a_lost_family_state_is_found(family: RealFamily) -> None:
    change(family, b"F", lambda _: None)
    assert kinds(checked(family.directory)) == {"family"}


def test_a_damaged_leveldb_table_is_found(family: RealFamily) -> None:
    # Closing leaves the newest values in LevelDB's log; opening again makes a table of them.
    with store_of(family):
        pass
    table = max((family.directory / "maps").glob("*.ldb"))
    flip(table, table.read_bytes().find(Maps(family.store, 0, print).logical.key_range(1 << 32)[0][:5]) + 40)
    assert "store" in kinds(checked(family.directory))


def test_an_lba_whose_block_lies_nowhere_is_found(family: RealFamily) -> None:
    change(family, middle_key(family, FIRST_MBA), edited("I", 5, 0))
    result = checked(family.directory)
    assert "logical-map" in kinds(result)
    assert any("which lies nowhere" in line for line in found(result))


def test_two_lbas_with_one_block_are_found(family: RealFamily) -> None:
    change(family, logical_key(family, 0), edited("Q", 3, FIRST_MBA + 4))
    assert any("as another LBA does" in line for line in found(checked(family.directory)))


def test_a_block_that_no_lba_points_to_is_found(family: RealFamily) -> None:
    change(family, logical_key(family, 0), edited("Q", 3, 0))
    result = checked(family.directory)
    assert kinds(result) == {"middle-map"}
    assert "no LBA points to 1 blocks" in result.findings[0].sentence


def test_two_blocks_in_one_place_are_found(family: RealFamily) -> None:
    offsets: list[int] = []

    def edit(payload: bytes) -> bytes:
        items = array("I", payload)
        items[256 + 3] = items[256 + 4]
        offsets.append(items[256 + 4])
        return items.tobytes()

    change(family, middle_key(family, FIRST_MBA), edit)
    assert any("lie in the same place" in line for line in found(checked(family.directory)))


def test_a_block_outside_what_was_written_is_found(family: RealFamily) -> None:
    change(family, middle_key(family, FIRST_MBA), edited("I", 256 + 3, (1 << 20) - 4096))
    assert any("outside what was written" in line for line in found(checked(family.directory)))


def test_a_block_in_a_segment_that_is_not_in_use_is_found(family: RealFamily) -> None:
    change(family, middle_key(family, FIRST_MBA), edited("I", 3, 77))
    assert any("segment 77, which is not in use" in line for line in found(checked(family.directory)))


def test_a_block_where_no_record_put_one_is_found(family: RealFamily) -> None:
    def edit(payload: bytes) -> bytes:
        items = array("I", payload)
        items[256 + 3] += 1
        return items.tobytes()

    change(family, middle_key(family, FIRST_MBA), edit)
    assert any("where no record put a block" in line for line in found(checked(family.directory, quick=True)))


def test_a_checksum_that_differs_from_the_records_is_found(family: RealFamily) -> None:
    change(family, middle_key(family, FIRST_MBA), edited("I", 512 + 3, 1))
    assert any("the record there has" in line for line in found(checked(family.directory, quick=True)))


def test_a_wrong_count_of_live_blocks_is_found(family: RealFamily) -> None:
    change(family, b"S" + (1).to_bytes(4, "big"), lambda payload: payload[:16] + b"\x09\0\0\0" + payload[20:])
    assert kinds(checked(family.directory)) == {"segment-table"}


def test_a_wrong_end_of_a_segment_is_found(family: RealFamily) -> None:
    def cut(payload: bytes) -> bytes:
        return payload[:20] + (int.from_bytes(payload[20:24], "little") - 100).to_bytes(4, "little") + payload[24:]

    change(family, b"S" + (1).to_bytes(4, "big"), cut)
    assert "segment-table" in kinds(checked(family.directory))


def test_a_hole_outside_the_volume_is_found(family: RealFamily) -> None:
    with store_of(family) as store:
        batch = store.batch()
        put_pending_holes(batch, [PendingHole(1, 1 << 40, 1 << 50, 1 << 32)], [])
        store.write(batch)
    assert kinds(checked(family.directory)) == {"family"}


def test_a_checkpoint_that_stands_elsewhere_is_found(family: RealFamily) -> None:
    with store_of(family) as store:
        state = read_checkpoint(store)
        batch = store.batch()
        put_checkpoint(batch, type(state)(**{**state.__dict__, "live_blocks": 1, "next_mba": 7, "offset": 5000}))
        store.write(batch)
    lines = found(checked(family.directory))
    assert any("counts 1 live blocks" in line for line in lines)
    assert any("never given out" in line for line in lines)
    assert any("does not stand at the end" in line for line in lines)


def test_damage_in_the_tail_below_what_was_durable_is_found(family: RealFamily) -> None:
    family.open()
    for number in range(5):
        family.put(number, 7)
    assert family.flush() == 0
    family.put(50, 8)  # its header knows the others durable
    offset, segment = family.disk.log.offset, family.disk.log.segment
    family.crash()
    flip(family.directory / segment_path(segment), offset - 3 * 4300)
    result = checked(family.directory)
    assert kinds(result) == {"log"}
    assert "durable" in result.findings[0].sentence


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(bytes(content))
