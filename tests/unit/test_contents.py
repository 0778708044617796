"""Digests of what a family holds, against what its clients read."""

import random
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import pytest

from nbdserver.logdisk.contents import Contents, read_contents
from nbdserver.logdisk.disk import DiskSettings
from nbdserver.logdisk.segments import segment_path
from protocol.disk import BLOCK_BYTES
from protocol.peer import Modification
from tests.unit.families import RealFamily, SimulatedFamily, block
from tests.unit.replica_rig import ReplicaFamily
from tests.unit.test_layers import change

MIB = 1 << 20
SIZE_BYTES = 4 * MIB + 5 * BLOCK_BYTES
SETTINGS = DiskSettings(cache_bytes=0, checkpoint_bytes=512 << 10, checkpoint_interval_s=0.5)
NAMES = {1: "disk0"}


def contents(family: SimulatedFamily) -> Contents:
    """Of a family that is closed, or has crashed."""
    family._begin()
    return read_contents(family.files, family.store, NAMES)


def digests(family: SimulatedFamily) -> dict[str, str]:
    return {export.name: export.digest for export in contents(family).exports}


def digest_as_documented(size_bytes: int, read: Callable[[int, int], bytes]) -> str:
    """Of what `read(offset, length)` shows."""
    found = blake2b(size_bytes.to_bytes(8, "little"), digest_size=32)
    for number, offset in enumerate(range(0, size_bytes, MIB)):
        part = read(offset, min(MIB, size_bytes - offset)).ljust(MIB, b"\0")
        if any(part):
            found.update(number.to_bytes(8, "little") + blake2b(part, digest_size=32).digest())
    return found.hexdigest()


def digest_by_reading(family: SimulatedFamily, snapshot: str = "") -> str:
    """Of what its clients read."""
    if not snapshot:
        return digest_as_documented(family.size_bytes, family.read)
    row = family.disk.snapshot_row(1, snapshot)
    assert row is not None
    head, view = family.device, family.disk.view(row.layer)
    family.device = view  # type: ignore[assignment]  # it is read in the same way
    try:
        return digest_as_documented(row.size_bytes, family.read)
    finally:
        family.device = head
        view.close()


@pytest.mark.parametrize("seed", range(6))
def test_digests_are_of_what_clients_read_at_any_moment_of_random_work(seed: int) -> None:
    rng = random.Random(seed)
    family = SimulatedFamily(size_bytes=SIZE_BYTES, segment_bytes=128 << 10, settings=SETTINGS, seed=seed)
    snapshots: list[str] = []
    for life in range(3):
        for step in range(60):
            lba, count = rng.randrange(SIZE_BYTES // BLOCK_BYTES - 8), 1 + rng.randrange(8)
            choice = rng.random()
            if choice < 0.75:
                family.put(lba, step + 1, count)
            elif choice < 0.85:
                assert family.discard(lba * BLOCK_BYTES + rng.randrange(4096), count * 4096) == 0
            elif choice < 0.9:
                assert family.discard(0, rng.randrange(SIZE_BYTES)) == 0
            elif choice < 0.93:
                snapshots.append(f"s{life}-{step}")
                assert change(family, "snapshot", 1, snapshots[-1], 1_700_000_000) == 0
            else:
                family.run(0.3)
        expected = {"disk0": digest_by_reading(family)}
        expected |= {f"disk0@{name}": digest_by_reading(family, name) for name in snapshots}
        if life == 1:
            family.close()
        else:
            family.crash()
        assert digests(family) == expected
        family.open()


def test_replicas_that_wrote_and_cleaned_in_their_own_ways_have_one_digest() -> None:
    owner, replica = ReplicaFamily(seed=1), ReplicaFamily(SETTINGS, seed=2)
    ordered: list[Modification] = []
    owner.own(1, lambda modification: ordered.append(modification.kept()))
    rng = random.Random(3)
    for step in range(200):
        owner.put(rng.randrange(600), step + 1, 1 + rng.randrange(8))
    owner.change("snapshot", 1, "monday", 1_700_000_000)
    for step in range(100):
        owner.put(rng.randrange(600), step + 1000)
    assert replica.append(ordered) == 0
    replica.replica.set_committed(ordered[-3].txid)
    replica.run(5.0)
    replica.close()
    owner.crash()
    found = contents(owner)
    assert [export.name for export in found.exports] == ["disk0", "disk0@monday"]
    assert (found.epoch, found.txid, found.regions_to_fetch) == (1, ordered[-1].txid, 0)
    assert contents(replica) == found

    replica.open()
    assert replica.cut(ordered[-2].position) == 0
    replica.crash()
    cut = contents(replica)
    assert (cut.epoch, cut.txid) == ordered[-2].position
    assert cut.exports[0].digest != found.exports[0].digest
    assert cut.exports[1].digest == found.exports[1].digest


def test_a_long_discard_that_is_still_to_be_worked_in_counts() -> None:
    family = SimulatedFamily(size_bytes=48 * MIB, segment_bytes=MIB, settings=SETTINGS)
    family.put(0, 1, 256)
    family.put(5000, 1000, 256)
    family.put(12000, 2000, 200)
    family.checkpoint()
    assert family.discard(100 * BLOCK_BYTES, 40 * MIB) == 0
    family.put(7000, 3000)
    family.crash()
    found = digests(family)
    family.open()
    assert found == {"disk0": digest_by_reading(family)}


def test_zeros_that_were_written_are_as_what_was_never_written() -> None:
    written, empty = SimulatedFamily(seed=1), SimulatedFamily(seed=2)
    assert written.write(0, bytes(3 * BLOCK_BYTES)) == 0
    written.close()
    empty.close()
    assert digests(written) == digests(empty)


def test_what_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    family = RealFamily(tmp_path, segment_bytes=MIB)
    family.open()
    family.put(0, 1, 8)
    change(family, "snapshot", 1, "monday", 1_700_000_000)
    family.put(0, 2, 8)
    family.close()
    path = tmp_path / segment_path(1)
    data = bytearray(path.read_bytes())
    data[data.index(block(1)) + 100] ^= 1
    path.write_bytes(data)
    family._begin()
    head, monday = read_contents(family.files, family.store, NAMES).exports
    family.let_go()
    assert head.digest
    assert not head.problem
    assert (monday.name, monday.digest) == ("disk0@monday", "")
    assert "a block in segment 1 from byte" in monday.problem
