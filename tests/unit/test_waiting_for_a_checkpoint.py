"""A replica's checkpoint waits for what is committed, and that may never be heard: whoever waits for it can go."""

import errno
from dataclasses import replace

import pytest

from nbdserver.block import Operation
from nbdserver.logdisk.checkpoint import Checkpointer
from nbdserver.logdisk.replica_append import Ordered
from protocol.peer import Modification
from tests.unit.families import BLOCK_BYTES, SETTINGS, block
from tests.unit.replica_rig import ReplicaFamily, taken

WRITES = 300  # each in another page of the maps, more than the smallest cache lets change before a checkpoint


def family(seed: int) -> ReplicaFamily:
    return ReplicaFamily(settings=replace(SETTINGS, cache_bytes=0), seed=seed)


def place(number: int) -> int:
    return number * 256 % (64 << 8)


def ordered(owner: ReplicaFamily) -> list[Modification]:
    """More than a replica can append without a checkpoint; the owner's is committed."""
    told: list[Modification] = []
    owner.own(1, told.append)
    for number in range(WRITES):
        owner.put(place(number) + number // 64, number + 1)
        owner.replica.set_committed(owner.replica.last.txid)
    return taken(told)


def held_up() -> tuple[ReplicaFamily, list[int]]:
    replica, answers = family(2), []
    replica.replica.append(ordered(family(1)), answers.append)
    replica.run(60.0)
    assert answers == []
    assert 0 < replica.replica.last.txid < WRITES
    return replica, answers


def test_an_append_goes_on_when_it_is_heard_what_is_committed() -> None:
    replica, answers = held_up()
    for _ in range(20):
        replica.replica.set_committed(replica.replica.last.txid)
        replica.run(1.0)
    assert answers == [0]
    assert replica.replica.last.txid == WRITES


def test_an_append_that_waits_is_given_up_when_the_log_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    replica, answers = held_up()
    assert replica.wait(replica.replica.settle) == (0,)
    assert answers == [errno.ECANCELED]
    last = replica.replica.last
    assert replica.cut(last._replace(txid=last.txid - 1)) == 0
    monkeypatch.setattr(Ordered, "give_up", lambda self: None)
    replica, answers = held_up()
    settled: list[int] = []
    replica.replica.settle(settled.append)
    replica.run(60.0)
    assert (answers, settled) == ([], [])


def test_what_a_deposed_owner_was_asked_for_does_not_hold_up_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def deposed() -> tuple[list[int], list[int]]:
        owner = family(1)
        owner.own(1, lambda modification: None)
        errors: list[int] = []
        for number in range(WRITES):
            data = block(number + 1)
            owner.device.later(
                Operation.WRITE, (place(number) + number // 64) * BLOCK_BYTES, BLOCK_BYTES, data,
                lambda error, _: errors.append(error),
            )  # fmt: skip
        owner.run(60.0)
        assert 0 < len(errors) < WRITES
        owner.replica.tap(None)
        cut: list[int] = []
        owner.replica.cut(owner.replica.last._replace(txid=owner.replica.last.txid - 1), cut.append)
        owner.run(60.0)
        return errors, cut

    errors, cut = deposed()
    assert (len(errors), cut) == (WRITES, [0])
    assert set(errors) == {0, errno.EIO}
    monkeypatch.setattr(Checkpointer, "look_again", lambda self: None)
    errors, cut = deposed()
    assert len(errors) < WRITES
    assert cut == []
