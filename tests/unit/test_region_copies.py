"""A replica that was away skips to its owner's position, and copies of regions make it show what the owner shows."""

import errno
import gc
from array import array
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from metadata.region_table import REGION_BLOCKS
from nbdserver.logdisk.ordering import Rule, disabled
from nbdserver.logdisk.region_copies import distinct, pack_views, unpack_views
from protocol.peer import BEGINNING, Copy
from protocol.peer_decoding import decode
from protocol.peer_frames import encode
from tests.unit.replica_rig import SIZE_BYTES, STEPS, Pair, Step, taken

READERS = ("BlocksReading", "RegionDigests", "RegionReading", "_Walk")
"""Each has what it reads in its hands."""


def returned(pair: Pair, crash: bool = False) -> None:
    """The replica, which was told nothing for a while, comes back."""
    owner, replica = pair.owner.replica, pair.replica
    pair.told.clear()
    lacks = owner.regions_after(replica.replica.last.txid)
    to, epochs, tree = owner.last, owner.epochs, owner.tree
    assert replica.wait(lambda done: replica.replica.skip(to, epochs, lacks, tree, done)) == (0,)
    if crash:
        replica.crash()
        replica.open()
    assert replica.replica.last == to
    pair.tell()


def copied(pair: Pair, region: int, compares: bool = True) -> Copy:
    known = pair.replica.wait(lambda done: pair.replica.replica.digest_region(region, done))[0] if compares else None
    error, copy = pair.owner.wait(lambda done: pair.owner.replica.read_region(region, known, done))
    assert error == 0
    on_the_wire = decode(b"".join(encode(copy)))
    assert isinstance(on_the_wire, Copy)
    return on_the_wire


def fetched(pair: Pair, region: int) -> None:
    """One region is copied, in the stream."""
    copy = copied(pair, region)
    pair.tell()
    replica = pair.replica
    assert replica.apply_copy(copy) == 0
    assert replica.wait(lambda done: replica.replica.sync(done)) == (0,)
    assert replica.wait(lambda done: replica.replica.resync_done(((region, 1),), done)) == (0,)


def complete(pair: Pair) -> None:
    while pair.replica.replica.resync:
        fetched(pair, pair.replica.replica.resync[0][0])


@settings(deadline=None, max_examples=60, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, STEPS, STEPS, st.booleans())
def test_a_replica_that_was_away_becomes_its_owners_like(
    before: list[Step], away: list[Step], after: list[Step], crash: bool
) -> None:
    pair = Pair(scale=5)
    for step in before[:12]:
        pair.do(step)
    pair.is_away = True
    for step in away:
        pair.do(step)
    pair.is_away = False
    returned(pair, crash)
    for step in after[:12]:
        pair.do(step)
        if pair.replica.replica.resync:
            fetched(pair, pair.replica.replica.resync[-1][0])
    complete(pair)
    pair.compare()


def gone_and_back() -> Pair:
    pair = Pair()
    for lba in range(0, 3000, 100):
        pair.owner.put(lba, lba + 1)
    pair.tell()
    pair.is_away = True
    for lba in range(0, 2000, 100):
        pair.owner.put(lba, lba + 2)
    pair.owner.discard(100 * 4096, 4096)
    pair.is_away = False
    return pair


def test_what_a_volume_was_cut_off_does_not_come_back_at_a_replica_that_has_skipped_the_merge_of_its_layers() -> None:
    pair = Pair()
    owner = pair.owner
    owner.put(REGION_BLOCKS * 3 + 5, 1)
    assert owner.change("snapshot", 1, "gone", 0) == 0
    assert owner.change("resize", 1, 8 << 20) == 0
    pair.tell()
    pair.is_away = True
    for name in ("gone too", "kept"):
        assert owner.change("snapshot", 1, name, 0) == 0
    for snapshot in owner.disk.snapshots()[:2]:
        assert owner.change("delete_snapshot", snapshot.layer) == 0
    owner.look()
    pair.tell()
    owner.run(60.0)
    assert len(owner.disk.maps.tree.layers) == 2
    pair.is_away = False
    returned(pair)
    complete(pair)
    assert owner.change("resize", 1, SIZE_BYTES) == 0
    pair.tell()
    pair.compare()


def test_only_the_regions_that_changed_are_to_be_fetched() -> None:
    pair = gone_and_back()
    returned(pair)
    assert pair.replica.replica.resync == ((0, 2),)
    assert pair.replica.replica.resync_count == 2
    fetched(pair, 1)
    assert pair.replica.replica.resync == ((0, 1),)
    pair.replica.crash(power=True)
    pair.replica.open()
    assert pair.replica.replica.resync == ((0, 1),)
    pair.tell()
    complete(pair)
    pair.compare()


def test_an_empty_replica_fetches_what_was_ever_written_whatever_became_of_the_layers() -> None:
    def to_fetch(is_empty: bool) -> int:
        pair = Pair()
        pair.is_away = is_empty
        pair.owner.put(0, 1)
        pair.tell()
        pair.is_away = True
        assert pair.owner.change("snapshot", 1, "gone", 0) == 0
        pair.owner.put(5000, 2)
        (snapshot,) = pair.owner.disk.snapshots()
        assert pair.owner.change("delete_snapshot", snapshot.layer) == 0
        pair.owner.replica.set_committed(pair.owner.replica.last.txid)
        pair.owner.checkpoint()
        assert pair.owner.clock.run_until(lambda: len(pair.owner.disk.maps.tree.layers) == 1)
        pair.is_away = False
        returned(pair)
        count = pair.replica.replica.resync_count
        complete(pair)
        pair.compare()
        return count

    assert to_fetch(is_empty=True) == 2
    assert to_fetch(is_empty=False) == (SIZE_BYTES >> 22) + 1  # it may show anything of the layer that has gone


def test_what_is_lacking_is_noted_in_the_batch_of_the_skip() -> None:
    def noted() -> int:
        pair = gone_and_back()
        returned(pair, crash=True)
        return pair.replica.replica.resync_count

    assert noted() == 2
    with disabled(Rule.SKIP_NOTES_WHAT_IS_LACKING):
        assert noted() == 0  # and nobody would ever fetch them


def test_a_copy_that_comes_late_is_refused() -> None:
    def late() -> tuple[int, int]:
        pair = gone_and_back()
        returned(pair)
        copy = copied(pair, 0)
        pair.owner.put(0, 77)
        pair.tell()
        answer = pair.replica.apply_copy(copy)
        return answer, pair.replica.number_at(0)

    assert late() == (errno.ESTALE, 77)
    with disabled(Rule.REPLACED_WHERE_IT_WAS_READ):
        assert late() == (0, 2)  # an acknowledged write went back


def test_a_log_is_not_cut_below_what_was_committed_when_a_region_was_fetched() -> None:
    """Its copy may be what would go, and nobody would fetch it again."""
    pair = gone_and_back()
    returned(pair)
    pair.owner.put(0, 77)
    pair.tell()
    complete(pair)
    replica = pair.replica
    last = replica.replica.last
    before = replica.replica.epochs[0]._replace(txid=last.txid - 1)
    replica.crash()
    replica.open()
    assert replica.cut(before) == errno.ENOENT
    assert replica.replica.last == last
    assert replica.cut(BEGINNING) == 0
    replica.look()
    assert (replica.replica.last, replica.number_at(0)) == (BEGINNING, 0)
    returned(pair)
    complete(pair)
    pair.compare()


def test_a_copy_right_behind_where_a_log_is_cut_stays() -> None:
    pair = gone_and_back()
    returned(pair)
    complete(pair)
    at, replica = pair.replica.replica.last, pair.replica
    pair.owner.put(0, 77)
    assert replica.append(taken(pair.told)) == 0
    assert replica.number_at(0) == 77
    assert replica.cut(at) == 0
    replica.look()
    assert (replica.replica.last, replica.number_at(0), replica.number_at(100)) == (at, 2, 0)
    assert (replica.number_at(1900), replica.number_at(2000)) == (1902, 2001)


def test_what_is_written_while_a_region_is_read_is_in_the_copy() -> None:
    pair = gone_and_back()
    returned(pair)
    owner = pair.owner
    owner.disk.maps.set_cache_bytes(0)
    answers: list[tuple[int, Copy | None]] = []
    for count in range(40):
        owner.replica.read_region(0, None, lambda error, copy: answers.append((error, copy)))
        for lba in (count, 100, 500):
            owner.put(lba, 10_000 + count)
        while not answers:
            owner.clock.step()
            if count % 3 == 0 and not answers:
                owner.put(500, 20_000 + count)
        error, copy = answers.pop()
        assert error == 0
        assert copy is not None
        assert copy.txid == owner.replica.last.txid
        pair.tell()
        assert pair.replica.apply_copy(copy) == 0
    complete(pair)
    pair.compare()


def test_a_rotten_block_is_not_copied() -> None:
    pair = gone_and_back()
    returned(pair)
    pair.owner.rot(502)
    error, copy = pair.owner.wait(lambda done: pair.owner.replica.read_region(0, None, done))
    assert (error, copy) == (errno.EIO, None)


def test_a_copy_that_does_not_hold_together_is_refused() -> None:
    pair = gone_and_back()
    returned(pair)
    copy = copied(pair, 0, compares=False)
    replica = pair.replica
    end = replica.disk.log.lsn
    for damaged in (
        replace(copy, entries=copy.entries[:-1]),
        replace(copy, entries=copy.entries[24:]),
        replace(copy, checksums=copy.checksums[:-4]),
        replace(copy, data=copy.data[1:]),
        replace(copy, data=copy.data[:-1]),
        replace(copy, data=[*copy.data, bytes(4096)]),
        replace(copy, data=[*copy.data[:-1], bytes(4096)]),
    ):
        assert replica.apply_copy(damaged) == errno.EBADMSG
    assert replica.disk.log.lsn == end


@given(st.dictionaries(st.integers(1, 9), st.lists(st.integers(0, 5), min_size=20, max_size=20), max_size=3))
def test_views_outlive_packing(views: dict[int, list[int]]) -> None:
    arrays = {layer: array("Q", mbas) for layer, mbas in views.items()}
    assert unpack_views(pack_views(arrays), 20) == arrays
    assert distinct(arrays) == sorted({mba for mbas in views.values() for mba in mbas} - {0})


def test_runs_that_lead_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match="half a run"):
        unpack_views(b"x", REGION_BLOCKS)


# --- what does not travel


def block_count(copy: Copy) -> int:
    return sum(map(len, copy.data)) // 4096


def test_only_what_differs_travels() -> None:
    pair = gone_and_back()
    pair.owner.put(0, 1)  # as the replica has it
    returned(pair)
    whole, copy = copied(pair, 0, compares=False), copied(pair, 0)
    assert (whole.kept, whole.parts) == (b"", ())
    alike = int.from_bytes(copy.kept, "little").bit_count()
    assert (alike, block_count(copy)) == (1, block_count(whole) - 1)
    complete(pair)
    pair.compare()


def test_a_region_that_is_alike_costs_its_digests() -> None:
    pair = gone_and_back()
    returned(pair)
    complete(pair)
    copy = copied(pair, 0)
    assert (block_count(copy), list(copy.parts)) == (0, [])
    end = pair.replica.disk.maps.live_blocks
    assert pair.replica.apply_copy(copy) == 0
    assert pair.replica.disk.maps.live_blocks == end
    pair.compare()


@pytest.mark.parametrize("power", [False, True])
def test_what_was_left_out_is_there_after_a_crash(power: bool) -> None:
    pair = gone_and_back()
    returned(pair)
    replica = pair.replica
    for region in (0, 1):
        fetched(pair, region)
        copy = copied(pair, region)
        assert copy.kept
        assert replica.apply_copy(copy) == 0
    replica.wait(lambda done: replica.replica.sync(done))
    replica.crash(power)
    replica.open()
    pair.tell()
    pair.compare()


def test_a_block_that_was_left_out_and_is_not_there_is_asked_for() -> None:
    pair = gone_and_back()
    returned(pair)
    complete(pair)
    copy = copied(pair, 0)
    bad = replace(copy, checksums=bytes(4) + copy.checksums[4:])
    end = pair.replica.disk.log.lsn
    assert pair.replica.apply_copy(bad) == errno.ENOENT
    assert pair.replica.disk.log.lsn == end


def test_what_has_rotted_at_the_replica_travels() -> None:
    pair = gone_and_back()
    returned(pair)
    complete(pair)
    pair.replica.rot(502)
    copy = copied(pair, 0)
    assert block_count(copy) == 1
    assert pair.replica.apply_copy(copy) == 0
    assert pair.replica.number_at(500) == 502


def test_what_changes_while_it_is_compared_and_packed_travels_as_it_is_by_then() -> None:
    pair = gone_and_back()
    returned(pair)
    complete(pair)
    owner, replica = pair.owner, pair.replica
    (known,) = replica.wait(lambda done: replica.replica.digest_region(0, done))
    for count in range(20):
        answers: list[tuple[int, Copy | None]] = []
        owner.replica.read_region(0, known, lambda error, copy, told=answers: told.append((error, copy)))  # type: ignore[misc]
        for _ in range(count):
            if not answers:
                owner.clock.step()
        if not answers:
            owner.put(500, 5000 + count)
            owner.put(501, 6000 + count)
        assert owner.clock.run_until(lambda told=answers: bool(told))  # type: ignore[misc]
        error, copy = answers[0]
        assert error == 0
        assert copy is not None
        again = decode(b"".join(encode(copy)))
        pair.tell()
        assert replica.apply_copy(again) == 0
        assert [replica.number_at(lba) for lba in (500, 501)] == [owner.number_at(lba) for lba in (500, 501)]
    pair.compare()


def test_of_a_region_that_hardly_differs_the_part_that_does_and_the_last_one_are_logged() -> None:
    pair = Pair()
    for lba in range(0, REGION_BLOCKS, 100):
        pair.owner.put(lba, lba + 1)
    pair.tell()
    pair.is_away = True
    pair.owner.put(300, 77)
    pair.is_away = False
    returned(pair)
    copy, replica = copied(pair, 0), pair.replica
    assert block_count(copy) == 1
    pair.tell()
    records = replica.disk.log.records
    order: list[int] = []
    replica.replica.apply_copy(copy, order.append)
    assert replica.disk.log.records - records == 2  # at once
    assert replica.clock.run_until(lambda: order == [0])
    assert replica.disk.log.records - records == 2
    pair.tell()
    pair.compare()


def test_what_comes_while_a_copy_is_applied_waits_for_its_end() -> None:
    pair = gone_and_back()
    returned(pair)
    copy, replica = copied(pair, 0), pair.replica
    pair.tell()
    pair.owner.put(0, 77)
    order: list[tuple[str, int]] = []
    replica.replica.apply_copy(copy, lambda error: order.append(("copy", error)))
    replica.replica.append(taken(pair.told), lambda error: order.append(("append", error)))
    before = replica.disk.log.records
    replica.clock.step()
    assert replica.disk.log.records - before < 8  # a part of it
    assert replica.clock.run_until(lambda: len(order) == 2)
    assert order == [("copy", 0), ("append", 0)]
    assert (replica.number_at(0), replica.number_at(500)) == (77, 502)


def test_what_was_read_for_a_replica_is_not_left_to_a_collector_that_never_runs() -> None:
    pair = gone_and_back()
    gc.disable()
    try:
        returned(pair)
        complete(pair)
        after = BEGINNING
        while found := pair.owner.wait(lambda done: pair.owner.replica.modifications(after, 1, done))[1]:  # noqa: B023
            after = found[-1].position
        assert after == pair.owner.replica.last
        del found
        assert [each for each in gc.get_objects() if type(each).__name__ in READERS] == []
    finally:
        gc.enable()
