"""Opening a replica: its checkpoint waits for the others, its log is cut where they part, and it knows what it may have
lost."""

import random

import pytest

from metadata.replica_state import REPLICA_KEY, ReplicaState, read_replica_state
from metadata.seams import Done
from nbdserver.logdisk.disk import DiskError
from nbdserver.logdisk.opening import Replicated
from nbdserver.logdisk.ordering import Rule, disabled, hooked
from protocol.disk import REPLICA_STATE, pack_value
from protocol.peer import BEGINNING, INCARNATIONS_LIMIT, Position
from tests.simulation.world import SimulatedCrash
from tests.unit.families import SimulatedFamily
from tests.unit.replica_rig import ReplicaFamily


def replica(segment_bytes: int = 64 << 10, seed: int = 1) -> SimulatedFamily:
    return SimulatedFamily(segment_bytes=segment_bytes, replicated=Replicated(), seed=seed)


def opened(family: SimulatedFamily, cut_at: Position | None = None) -> None:
    family.replicated = Replicated(cut_at)
    family.open()
    family.replicated = Replicated()


def numbers(family: SimulatedFamily, count: int) -> list[int]:
    return [family.number_at(lba) for lba in range(count)]


def written(family: SimulatedFamily, count: int, first: int = 1) -> list[Position]:
    positions = []
    for lba in range(count):
        family.put(lba, first + lba)
        positions.append(family.disk.log.last)
    return positions


def test_a_checkpoint_waits_until_what_it_holds_is_committed() -> None:
    def cut_back() -> list[int]:
        family = replica()
        for number in range(1, 60):
            family.put(number % 3, number)
        family.disk.log.committed.reach(30)
        third = family.disk.log.history.position(30)
        family.disk.checkpointer.start()
        family.run(60.0)
        family.crash()
        opened(family, third)
        return numbers(family, 3)

    assert cut_back() == [30, 28, 29]
    with disabled(Rule.CHECKPOINT_BEHIND_COMMIT), pytest.raises(DiskError, match="cannot be cut"):
        cut_back()


def test_nothing_that_is_not_committed_frees_a_segment() -> None:
    family = replica()
    for number in range(1, 200):
        family.put(number % 4, number)
    family.run(60.0)
    assert family.disk.pool.recycled == 0
    family.disk.log.committed.reach(family.disk.log.txid)
    family.run(60.0)
    for number in range(200, 300):
        family.put(number % 4, number)
    assert family.disk.pool.recycled > 0


def test_a_log_that_was_cut_stays_cut() -> None:
    def shown(power: bool) -> list[int]:
        family = replica()
        positions = written(family, 30)
        assert family.flush() == 0
        family.crash()
        opened(family, positions[4])
        assert numbers(family, 30) == [1, 2, 3, 4, 5] + [0] * 25
        assert family.disk.log.last == positions[4]
        family.crash(power)
        opened(family)
        return numbers(family, 30)

    for power in (False, True):
        assert shown(power) == [1, 2, 3, 4, 5] + [0] * 25
    with disabled(Rule.CUT_IS_DURABLE_FIRST):
        assert shown(False) == list(range(1, 31))


def test_what_is_written_after_a_cut_is_all_that_follows_it() -> None:
    family = replica()
    positions = written(family, 40)
    assert family.flush() == 0
    family.crash()
    opened(family, positions[2])
    written(family, 20, first=101)
    assert family.flush() == 0
    assert family.disk.log.last == Position(2, 23)
    family.crash(power=True)
    opened(family)
    assert numbers(family, 40) == list(range(101, 121)) + [0] * 20
    family.crash()
    opened(family, Position(2, 10))
    assert numbers(family, 40) == list(range(101, 108)) + [0] * 33
    family.disk.log.committed.reach(10)
    family.checkpoint()
    family.close()
    opened(family)
    assert numbers(family, 40) == list(range(101, 108)) + [0] * 33
    assert not [key for key in family.table.values if key.startswith(b"J")]


def test_what_is_asked_of_a_replica_while_its_log_is_cut_comes_after_the_cut() -> None:
    """An epoch that is promised meanwhile would be gone with what the closed disk knew."""
    family = ReplicaFamily()
    family.own(1)
    positions = written(family, 4)
    family.replica.tap(None)
    family.opening_s = 5.0
    answers: list[tuple[str, int]] = []

    def told(name: str) -> Done:
        return lambda errno: answers.append((name, errno))

    family.replica.cut(positions[1], told("cut"))
    family.replica.promise(7, told("promise"))
    family.run(2.0)
    assert family.replica.is_being_cut
    family.replica.settle(told("settle"))
    family.replica.sync(told("sync"))
    family.replica.cut(positions[0], told("cut again"))
    assert family.replica.append_now([]) is None
    assert answers == []
    family.run(30.0)
    names = [name for name, errno in answers if not errno]
    assert (names[0], sorted(names[1:4]), names[4]) == ("cut", ["promise", "settle", "sync"], "cut again")
    assert not family.replica.is_being_cut
    assert (family.replica.last, family.replica.promised_epoch) == (positions[0], 7)
    family.look()
    family.close()
    family.open()
    assert (family.replica.last, family.replica.promised_epoch) == (positions[0], 7)


def test_a_log_can_be_cut_to_nothing() -> None:
    family = replica()
    written(family, 20)
    family.crash()
    opened(family, BEGINNING)
    assert numbers(family, 20) == [0] * 20
    family.put(3, 33)
    family.crash()
    opened(family)
    assert numbers(family, 20) == [0, 0, 0, 33] + [0] * 16


@pytest.mark.parametrize("point", ["replay-after-tail", "splice-before-store", "splice-after-store"])
def test_a_crash_while_a_log_is_cut_does_no_harm(point: str) -> None:
    family = replica()
    positions = written(family, 30)
    assert family.flush() == 0
    family.crash()

    def crash(name: str) -> None:
        if name == point:
            raise SimulatedCrash

    with hooked(crash), pytest.raises(SimulatedCrash):
        opened(family, positions[4])
    family.crash(power=True)
    opened(family, positions[4])
    assert numbers(family, 30) == [1, 2, 3, 4, 5] + [0] * 25
    family.crash(power=True)
    opened(family)
    assert numbers(family, 30) == [1, 2, 3, 4, 5] + [0] * 25


def test_a_log_is_not_cut_below_its_checkpoint_nor_where_it_has_another_past() -> None:
    family = replica()
    written(family, 10)
    family.disk.log.committed.reach(5)
    family.crash()
    opened(family)
    family.disk.log.committed.reach(10)
    family.checkpoint()
    family.crash()
    with pytest.raises(DiskError, match="its checkpoint is at txid 10"):
        opened(family, Position(1, 9))
    opened(family, Position(1, 10))
    written(family, 5)
    family.crash()
    with pytest.raises(DiskError, match="cannot be cut"):
        opened(family, Position(1, 12))
    opened(family, family.disk.log.last)
    assert family.disk.log.txid == 15


def test_uncommitted_writes_outlive_a_clean_end_without_a_checkpoint() -> None:
    family = replica()
    positions = written(family, 20)
    before = family.disk.replica_state
    family.close()
    family.boot_id += "+"
    opened(family)
    assert before is not None
    assert family.disk.replica_state is not None
    assert family.disk.replica_state.incarnations[:-1] == before.incarnations
    assert numbers(family, 20) == list(range(1, 21))
    family.crash()
    opened(family, positions[9])
    assert numbers(family, 20) == [*range(1, 11), *[0] * 10]


def test_a_replaced_disk_is_not_taken_for_the_one_that_was_there() -> None:
    states = [replica(seed=seed).disk.replica_state for seed in (1, 2)]
    assert states[0] is not None
    assert states[1] is not None
    assert abs(states[0].incarnation - states[1].incarnation) > 1000


KEPT = [*range(41, 61), *range(21, 41)] + [0] * 20


def kept_more(family: SimulatedFamily) -> None:
    """A checkpoint has what a cut would have to take back; KEPT is what it shows."""
    written(family, 40)
    assert family.flush() == 0
    family.disk.log.committed.reach(40)
    family.checkpoint()
    written(family, 20, first=41)
    assert family.flush() == 0
    family.crash()


def started_over(family: SimulatedFamily) -> None:
    family.replicated = Replicated(starts_over=True)
    family.open()
    family.replicated = Replicated()


def test_a_replica_that_starts_over_is_an_empty_one_and_another() -> None:
    family = replica()
    before = family.disk.replica_state
    kept_more(family)
    started_over(family)
    after = family.disk.replica_state
    assert before is not None
    assert after is not None
    assert after.incarnations == (after.incarnation,)
    assert abs(after.incarnation - before.incarnation) > 1000
    assert (family.disk.log.last, family.disk.maps.live_blocks) == (BEGINNING, 0)
    assert len(family.disk.pool.spare) >= 4, "what it had is room now"
    assert numbers(family, 60) == [0] * 60
    written(family, 30, first=101)
    assert family.flush() == 0
    family.crash(power=True)
    opened(family)
    assert numbers(family, 60) == list(range(101, 131)) + [0] * 30


@pytest.mark.parametrize("point", ["start-over-before-batch", "start-over-after-batch"])
def test_a_crash_finds_all_of_a_replica_that_starts_over_or_nothing(point: str) -> None:
    def shown() -> list[int]:
        family = replica()
        kept_more(family)

        def crash(name: str) -> None:
            if name == point:
                raise SimulatedCrash

        with hooked(crash), pytest.raises(SimulatedCrash):
            started_over(family)
        family.crash(power=True)
        opened(family)
        return numbers(family, 60)

    assert shown() == (KEPT if point == "start-over-before-batch" else [0] * 60)
    if point == "start-over-before-batch":
        with disabled(Rule.STARTS_OVER_IN_ONE_BATCH), pytest.raises(IndexError):
            shown()


def test_a_replica_says_since_when_it_can_have_lost_nothing() -> None:
    family = replica()
    written(family, 3)
    first = family.disk.replica_state
    assert first is not None
    assert first.incarnations == (first.incarnation,)
    family.crash(power=True)
    incarnations = []
    for _ in range(3):
        opened(family)
        assert family.disk.replica_state is not None
        incarnations.append(family.disk.replica_state.incarnation)
        assert family.disk.replica_state.incarnations == tuple(incarnations)
        assert family.disk.opened.generation == 1, "whether the generation rises is not decided by one replica"
        family.crash()
    assert sorted({first.incarnation, *incarnations}) == [first.incarnation, *incarnations]


def test_a_replica_that_is_put_back_from_a_copy_is_in_no_incarnation_that_it_was_in_since() -> None:
    rng = random.Random(7)
    copied = ReplicaState().opened(rng, may_have_lost=False)
    since = copied.opened(rng, may_have_lost=False)
    put_back = copied.opened(rng, may_have_lost=False)
    assert copied.incarnation in put_back.incarnations
    assert since.incarnation not in put_back.incarnations


def test_a_replica_remembers_a_bounded_number_of_incarnations() -> None:
    rng = random.Random(7)
    first = state = ReplicaState().opened(rng, may_have_lost=False)
    for _ in range(INCARNATIONS_LIMIT - 1):
        state = state.opened(rng, may_have_lost=False)
    assert (len(state.incarnations), state.incarnations[0]) == (INCARNATIONS_LIMIT, first.incarnation)
    state = state.opened(rng, may_have_lost=False)
    assert len(state.incarnations) == INCARNATIONS_LIMIT
    assert first.incarnation not in state.incarnations


def test_incarnations_that_an_older_program_has_counted_are_known() -> None:
    family = replica()
    batch = family.store.batch()
    payload = REPLICA_STATE.pack(7, 3, 9, 0, 11)  # with what a newer one had kept before it
    batch.put(REPLICA_KEY, pack_value(REPLICA_KEY, payload))
    family.store.write(batch)
    assert read_replica_state(family.store) == ReplicaState(7, (3, 4, 5, 6, 7), 9, 11)


def test_a_family_on_one_node_becomes_a_replicated_one_and_keeps_its_past() -> None:
    family = SimulatedFamily(segment_bytes=64 << 10)
    written(family, 10)
    family.close()
    opened(family)
    written(family, 5, first=101)
    assert family.disk.log.history.up_to(15) == [(1, 1), (2, 11)]
    family.crash()
    opened(family, Position(1, 10))
    assert numbers(family, 10) == list(range(1, 11))
