"""A replica that appends what an owner ordered has the owner's logical maps, contents, layers and regions."""

import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from metadata.pages import MIN_PAGES, PAGE_BLOCKS
from nbdserver.logdisk.maps import Need
from nbdserver.logdisk.ordering import Rule, disabled
from protocol.peer import Modification
from tests.unit.families import BLOCK_BYTES, block
from tests.unit.replica_rig import SIZE_BYTES, STEPS, Pair, Step, taken


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
    assert pair.replica.append([told[1]._replace(txid=3, epoch=0)]) == errno.ESTALE
    assert pair.replica.append([]) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m._replace(data=[block(1)[:-1]]),
        lambda m: m._replace(data=[]),
        lambda m: m._replace(body=m.body + b"x"),
        lambda m: m._replace(layer=9),
        lambda m: m._replace(kind=2),
        lambda m: m._replace(body=m.body[:8] + bytes(4) + m.body[12:]),
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


def test_what_waits_for_nothing_is_appended_at_once_and_its_buffers_are_free_again() -> None:
    pair = Pair()
    assert pair.replica.append(taken(written(pair, 3))) == 0
    told = taken(written(pair, 3))
    lent = [each._replace(data=[memoryview(bytearray(each.data[0]))]) for each in told]
    assert pair.replica.replica.append_now(lent) == 3
    for each in lent:
        each.data[0][:] = bytes(BLOCK_BYTES)  # type: ignore[index]
    assert [pair.replica.number_at(lba) for lba in range(3)] == [1, 2, 3]


def test_what_has_to_wait_is_left_and_what_comes_behind_it_is_not_appended_before_it() -> None:
    pair = Pair()
    told = taken(written(pair, 4))
    done: list[int] = []
    assert pair.replica.replica.append_now(told[:2]) == 0  # the maps' pages are not in memory yet
    pair.replica.replica.append(told[:2], done.append)
    assert pair.replica.replica.append_now(told[2:]) is None
    assert pair.replica.append([told[2]]) == 0
    assert pair.replica.replica.append_now([told[3], told[3]]) == 1  # it does not follow itself
    assert done == [0]
    assert pair.replica.replica.last == told[-1].position


def test_a_record_that_touches_more_pages_than_the_cache_holds_is_appended() -> None:
    pair = Pair(cache_bytes=64 << 20)
    for lba in range(0, 16384, 130):
        pair.owner.put(lba, lba + 1)
    pair.tell()
    pair.replica.checkpoint()
    pair.replica.disk.maps.set_cache_bytes(0)
    for lba in range(0, 16384, 130):
        if lba % 1300 < 1100:
            assert pair.owner.device.write(lba << 12, memoryview(block(lba + 2)))
    assert pair.owner.device.commit() == 0
    pair.tell()
    assert pair.replica.disk.maps.logical.limit_pages == MIN_PAGES  # not what it was opened with
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


def test_what_waits_behind_a_write_has_its_pages_brought_along(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    for lba in range(0, SIZE_BYTES // BLOCK_BYTES, PAGE_BLOCKS):
        pair.owner.put(lba, lba + 1)
        pair.owner.replica.set_committed(pair.owner.replica.last.txid)
    pages = len(pair.told)
    pair.replica.replica.set_committed(pages)
    maps = pair.replica.disk.maps
    loads: list[int] = []
    load = maps.load

    def counted(need: Need, done: Callable[[], None]) -> None:
        loads.append(len(need))
        load(need, done)

    monkeypatch.setattr(maps, "load", counted)
    assert pair.replica.append(taken(pair.told)) == 0
    assert sum(loads) == pages, "none is read twice"
    assert len(loads) <= pages // (maps.logical.limit_pages // 8) + 1
    pair.compare()


def test_what_waits_behind_a_write_and_is_not_sound_holds_up_nothing_before_it() -> None:
    pair = Pair()
    for lba in (0, PAGE_BLOCKS, 2 * PAGE_BLOCKS):
        pair.owner.put(lba, lba + 1)
    told = taken(pair.told)
    for damaged in (told[1]._replace(layer=9), told[1]._replace(body=b""), told[1]._replace(data=[])):
        pair = Pair()
        assert pair.replica.append([told[0], damaged, told[2]]) == errno.EBADMSG
        assert pair.replica.number_at(0) == 1
        assert pair.replica.append(told[1:]) == 0
