"""Rot is repaired from another replica, whoever finds it; what comes from there is taken only if it is the block."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from nbdserver.logdisk.ordering import Rule, disabled
from nbdserver.logdisk.scrub import Progress
from nbdserver.replication.replica_log import BlockSource, Found
from protocol.disk import BLOCK_BYTES
from protocol.peer import BEGINNING, BLOCKS_LIMIT
from tests.unit.families import block
from tests.unit.replica_rig import Pair, ReplicaFamily

COUNT = 40


def source_of(family: ReplicaFamily, other: ReplicaFamily, before: Callable[[], None] = lambda: None) -> BlockSource:
    """Asks the other one at once, after `before`."""

    def ask(mbas: Sequence[int], done: Callable[[Found], None]) -> None:
        assert len(mbas) <= BLOCKS_LIMIT
        before()
        blocks: Mapping[int, bytes] = other.wait(lambda told: other.replica.read_blocks(mbas, False, told))[0]
        family.clock.call_soon(lambda: done({mba: ("other", data) for mba, data in blocks.items()}))

    return ask


def pair_with(count: int = COUNT) -> Pair:
    """Both have the blocks 1 to `count` at the LBAs from 0 on, and can ask each other; all is in a checkpoint."""
    pair = Pair()
    for first in range(0, count, 100):
        pair.owner.put(first, first + 1, min(100, count - first))
    pair.tell()
    for family, other in ((pair.owner, pair.replica), (pair.replica, pair.owner)):
        family.replica.repair_from(source_of(family, other))
        family.checkpoint()
    return pair


def numbers(family: ReplicaFamily, count: int = COUNT) -> list[int]:
    return [family.number_at(lba) for lba in range(count)]


@pytest.mark.parametrize("power", [None, False, True], ids=["running", "killed", "without power"])
def test_a_client_never_sees_what_another_replica_can_repair(power: bool | None) -> None:
    pair = pair_with()
    owner = pair.owner
    owner.rot(8)
    assert owner.device.read(0, COUNT * BLOCK_BYTES) is None
    assert owner.read(0, COUNT * BLOCK_BYTES) == b"".join(map(block, range(1, COUNT + 1)))
    assert (owner.disk.repairs.repaired_blocks, owner.disk.damage.listed()) == (1, [])
    (report,) = [fields for kind, fields in owner.events if kind == "block-repaired"]
    assert report["from"] == "other"
    assert "checksum-error" not in owner.kinds()
    if power is not None:
        owner.flush()
        owner.crash(power)
        owner.open()
        owner.replica.repair_from(None)
    assert numbers(owner) == list(range(1, COUNT + 1))


def test_a_block_of_which_a_part_is_written_is_repaired_first() -> None:
    pair = pair_with()
    pair.owner.rot(8)
    assert pair.owner.write(7 * BLOCK_BYTES, b"part") == 0
    assert pair.owner.read(7 * BLOCK_BYTES, BLOCK_BYTES) == b"part" + block(8)[4:]


def test_more_blocks_than_one_question_may_be_about_are_repaired() -> None:
    count = BLOCKS_LIMIT + 50
    pair = pair_with(count)
    for number in range(1, count + 1):
        pair.owner.rot(number)
    assert numbers(pair.owner, count) == list(range(1, count + 1))
    assert pair.owner.disk.repairs.repaired_blocks == count


def test_what_nobody_has_is_noted_until_somebody_has_it() -> None:
    pair = pair_with()
    pair.owner.rot(8)
    pair.owner.replica.repair_from(lambda mbas, done: pair.owner.clock.call_soon(lambda: done({})))
    with pytest.raises(OSError):
        pair.owner.number_at(7)
    assert pair.owner.disk.damage.listed() == [{"number": 1, "snapshot": "", "lba": 7}]
    pair.owner.replica.repair_from(source_of(pair.owner, pair.replica))
    assert pair.owner.number_at(7) == 8
    assert pair.owner.disk.damage.listed() == []


def read_with_another_moments_content() -> int:
    """The other replica has an older content under the same MBA."""
    pair = pair_with()
    pair.owner.put(7, 700)
    pair.owner.rot(700)
    return pair.owner.number_at(7)


def test_what_comes_is_taken_only_if_it_is_the_block() -> None:
    with pytest.raises(OSError):
        read_with_another_moments_content()
    with disabled(Rule.REPAIR_IS_WHAT_WAS_THERE):
        # What the client wrote is undone, under a record that says that it is right.
        pair = pair_with()
        pair.owner.put(7, 700)
        bad = pair.owner.place_of(7)
        assert pair.owner.disk.repairs.repair_block(bad, block(8), "other")
        with pytest.raises(OSError):
            pair.owner.number_at(7)


def test_a_block_that_is_overwritten_meanwhile_is_left_alone() -> None:
    pair = pair_with()
    pair.owner.rot(8)
    pair.owner.replica.repair_from(source_of(pair.owner, pair.replica, lambda: pair.owner.put(7, 700)))
    assert pair.owner.number_at(7) == 700
    assert pair.owner.disk.repairs.repaired_blocks == 0


def test_the_scrub_repairs() -> None:
    pair = pair_with()
    for number in (3, 8):
        pair.replica.rot(number)
    ends: list[str] = []
    pair.replica.disk.start_scrub(Progress(), 1 << 40, lambda: 0, ends.append)
    assert pair.replica.clock.run_until(lambda: bool(ends), 600.0)
    assert (ends, pair.replica.disk.repairs.repaired_blocks) == ([""], 2)
    scrub = pair.replica.disk.scrub
    assert scrub is not None
    assert scrub.progress.damaged_blocks == 0
    assert numbers(pair.replica) == list(range(1, COUNT + 1))


def test_the_cleaner_repairs_and_its_victim_gets_free() -> None:
    pair = pair_with(200)
    owner = pair.owner
    owner.rot(8)
    victim = owner.place_of(7).segment
    owner.put(8, 1000, 192)
    for lba in range(200, 550):
        owner.put(lba, lba + 1)
    pair.tell()
    owner.replica.set_committed(owner.replica.last.txid)
    cleaner = owner.disk.cleaner
    cleaner.urgent = True
    while cleaner.choose() and owner.place_of(7).segment == victim:
        cleaner.start()
        owner.run(10.0)
    owner.run(60.0)
    assert owner.disk.repairs.repaired_blocks == 1
    assert owner.number_at(7) == 8
    assert not owner.disk.maps.segments.live[victim]


def test_what_is_copied_is_repaired_first() -> None:
    pair = pair_with()
    pair.owner.rot(8)
    error, copy = pair.owner.wait(lambda done: pair.owner.replica.read_region(0, None, done))
    assert error == 0
    assert block(8) in b"".join(copy.data)
    assert pair.owner.disk.repairs.repaired_blocks == 1


def test_what_is_read_back_from_the_log_is_repaired() -> None:
    pair = pair_with()
    pair.owner.rot(8)
    replica = pair.owner.replica
    assert pair.owner.wait(lambda done: replica.modifications(BEGINNING, 1 << 20, done)) == (0, None)
    pair.owner.run(1.0)
    assert pair.owner.disk.repairs.repaired_blocks == 1


@pytest.mark.parametrize("is_patient", [False, True])
def test_who_is_asked_repairs_its_own_first_if_it_is_the_owner(is_patient: bool) -> None:
    pair = pair_with()
    pair.owner.rot(8)
    mbas = [pair.owner.place_of(lba).mba for lba in (6, 7)]
    found = pair.owner.wait(lambda done: pair.owner.replica.read_blocks([*mbas, 0, 1 << 62], is_patient, done))[0]
    assert sorted(found.values()) == sorted([block(7), block(8)] if is_patient else [block(7)])
    pair.owner.run(1.0)
    assert pair.owner.disk.repairs.repaired_blocks == 1


def test_a_checkpoint_follows_when_the_log_is_rotten_where_a_replay_reads() -> None:
    pair = pair_with()
    pair.owner.put(7, 700)
    pair.tell()
    pair.owner.rot(700)
    assert pair.owner.number_at(7) == 700
    pair.owner.run(1.0)
    pair.owner.crash()
    pair.owner.open()
    assert pair.owner.number_at(7) == 700


def test_a_log_that_ends_leaves_nobody_waiting() -> None:
    pair = pair_with()
    pair.owner.rot(8)
    pair.owner.replica.repair_from(lambda mbas, done: None)
    bad = pair.owner.place_of(7)
    told: list[bool] = []
    pair.owner.disk.repairs.want(bad, told.append)
    pair.owner.disk.repairs.want(bad, told.append)
    pair.owner.run(1.0)
    assert told == []
    pair.owner.close()
    assert told == [False, False]
