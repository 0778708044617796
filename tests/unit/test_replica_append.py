"""A replica that appends what an owner ordered has the owner's logical maps, contents, layers and regions."""

import errno
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdserver.logdisk.ordering import Rule, disabled
from protocol.peer import Modification
from tests.unit.families import BLOCK_BYTES, SETTINGS, block
from tests.unit.replica_rig import ReplicaFamily

BLOCKS = 600
Step = tuple[Any, ...]
LBA, COUNT = st.integers(0, BLOCKS - 1), st.sampled_from([1, 1, 1, 3, 40, 300])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 3), LBA, COUNT),
        st.tuples(st.just("write"), st.just(1), LBA, COUNT),
        st.tuples(st.just("discard"), st.integers(1, 2), LBA, st.sampled_from([1, 7, 300, 9000])),
        st.tuples(
            st.sampled_from(["snapshot", "snapshot", "delete", "rollback", "clone", "resize"]), st.integers(0, 5)
        ),
        st.tuples(st.sampled_from(["checkpoint", "rest", "crash"]), st.sampled_from(["owner", "replica"])),
        st.tuples(st.just("power"), st.just("replica")),
    ),
    max_size=30,
)


class Pair:
    """An owner and a replica that is told everything at once."""

    def __init__(self, cache_bytes: int = 0) -> None:
        small = replace(SETTINGS, cache_bytes=cache_bytes)
        self.owner = ReplicaFamily(settings=small, seed=1)
        self.replica = ReplicaFamily(settings=small, seed=2)
        self.told: list[Modification] = []
        self.epoch = 0
        self.number = 0
        self.own()

    def own(self) -> None:
        self.epoch += 1
        self.owner.own(self.epoch, self.told.append)

    def tell(self) -> None:
        if self.told:
            told = [replace(each, data=[bytes(buffer) for buffer in each.data]) for each in self.told]
            self.told.clear()
            assert self.replica.append(told) == 0
        for each in (self.owner, self.replica):
            each.replica.set_committed(self.owner.replica.last.txid)
        assert self.replica.replica.last == self.owner.replica.last
        assert self.replica.replica.epochs == self.owner.replica.epochs

    def do(self, step: Step) -> None:
        kind, which = step[0], step[1]
        owner = self.owner
        tree = owner.disk.maps.tree
        if kind in ("write", "discard"):
            if which not in tree.heads:
                return
            owner.device = owner.disk.head(which)
            _, _, lba, count = step
            self.number += count
            size = owner.device.size_bytes
            length = min(count * BLOCK_BYTES, size - lba * BLOCK_BYTES)
            if length > 0 and kind == "write":
                data = b"".join(block(self.number + index) for index in range(count))[:length]
                assert owner.write(lba * BLOCK_BYTES, data) == 0
            elif length > 0:
                assert owner.discard(lba * BLOCK_BYTES, length) == 0
            owner.look()
        elif kind in ("checkpoint", "rest", "crash", "power"):
            self.machine(kind, getattr(self, which))
        else:
            self.change(kind, which)
        self.tell()

    def machine(self, kind: str, family: ReplicaFamily) -> None:
        if kind == "checkpoint":
            family.checkpoint()
        elif kind == "rest":
            family.run(40.0)
        else:
            if kind == "power":
                family.wait(lambda done: family.replica.sync(done))
            family.crash(power=kind == "power")
            family.open()
            if family is self.owner:
                self.own()

    def change(self, kind: str, which: int) -> None:
        owner = self.owner
        snapshots = owner.disk.snapshots()
        if kind == "snapshot":
            assert owner.change("snapshot", 1, f"s{self.number}", which) in (0, errno.EEXIST)
            self.number += 1
        elif kind == "resize":
            owner.change("resize", 1, (BLOCKS - 97 * which) * BLOCK_BYTES)
        elif snapshots:
            layer = snapshots[which % len(snapshots)].layer
            if kind == "delete":
                assert owner.change("delete_snapshot", layer) == 0
            elif kind == "rollback":
                owner.change("rollback", 1, layer)
            else:
                owner.change("clone", layer, 2 + which % 2)
            owner.look()

    def compare(self) -> None:
        assert self.replica.shown() == self.owner.shown()
        assert self.replica.contents() == self.owner.contents()
        assert self.replica.region_txids() == self.owner.region_txids()
        for each in (self.owner, self.replica):
            each.run(60.0)
            assert each.findings() == []
        assert self.replica.shown() == self.owner.shown()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_a_replica_shows_what_its_owner_shows(steps: list[Step]) -> None:
    pair = Pair()
    for step in steps:
        pair.do(step)
    pair.compare()


def written(pair: Pair, count: int) -> list[Modification]:
    for lba in range(count):
        pair.owner.put(lba, lba + 1)
    return pair.told


def test_what_does_not_follow_is_refused() -> None:
    def appended() -> int:
        pair = Pair()
        told = written(pair, 3)
        assert pair.replica.append(told[:1]) == 0
        return pair.replica.append(told[2:])

    assert appended() == errno.ESTALE
    with disabled(Rule.APPEND_FOLLOWS_LAST):
        assert appended() == 0  # the log has a gap, and nothing says so

    pair = Pair()
    told = written(pair, 2)
    assert pair.replica.append(told) == 0
    assert pair.replica.append(told[1:]) == errno.ESTALE
    assert pair.replica.append([replace(told[1], txid=3, epoch=0)]) == errno.ESTALE
    assert pair.replica.append([]) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: replace(m, data=[block(77)]),
        lambda m: replace(m, data=[block(1)[:-1]]),
        lambda m: replace(m, data=[]),
        lambda m: replace(m, body=m.body + b"x"),
        lambda m: replace(m, layer=9),
        lambda m: replace(m, kind=2),
        lambda m: replace(m, body=m.body[:8] + bytes(4) + m.body[12:]),
    ],
)  # fmt: skip
def test_what_does_not_hold_together_is_refused_and_changes_nothing(damage: Any) -> None:
    pair = Pair()
    told = written(pair, 1)
    end = pair.replica.disk.log.lsn
    assert pair.replica.append([damage(told[0])]) == errno.EBADMSG
    assert pair.replica.disk.log.lsn == end
    assert pair.replica.append(told) == 0
    assert pair.replica.number_at(0) == 1


def test_a_record_that_touches_more_pages_than_the_cache_holds_is_appended() -> None:
    pair = Pair(cache_bytes=64 << 20)
    pair.replica.disk.maps.set_cache_bytes(0)
    for lba in range(0, 16384, 130):
        pair.owner.put(lba, lba + 1)
    pair.tell()
    pair.replica.checkpoint()
    for lba in range(0, 16384, 130):
        if lba % 1300 < 1100:
            assert pair.owner.device.write(lba << 12, memoryview(block(lba + 2)))
    assert pair.owner.device.commit() == 0
    pair.tell()
    pair.replica.disk.maps.set_cache_bytes(0)
    pair.compare()


def test_several_calls_keep_their_order_whatever_they_wait_for() -> None:
    pair = Pair()
    for lba in range(0, 16000, 300):
        pair.owner.put(lba, lba + 1)
    pair.tell()
    pair.replica.checkpoint()
    pair.replica.crash()
    pair.replica.open()
    for lba in range(0, 16000, 300):
        pair.owner.put(lba, lba + 2)
    answers: list[int] = []
    for each in list(pair.told):
        pair.replica.replica.append([each], lambda errno, txid=each.txid: answers.append(errno or txid))  # type: ignore[misc]
    pair.replica.replica.append([], lambda errno: answers.append(-1))
    last = pair.told[-1].txid
    pair.replica.run(10.0)
    assert answers == [*range(last + 1 - len(pair.told), last + 1), -1]
    pair.told.clear()
    pair.tell()
    pair.compare()
