"""Room for what an owner orders: who has to wait for it, and who is told that there is none."""

import errno
from types import SimpleNamespace
from typing import cast

import pytest

from nbdserver.replication.link import Link
from nbdserver.replication.replica_log import ReplicaLog
from nbdserver.replication.room import BURST_BYTES, NO_ROOM_S, RESERVE_BYTES, Room
from tests.unit.session_rig import HandClock

SIZE_BYTES = 1 << 20
PLENTY_BYTES = 1 << 30


class Rig:
    def __init__(self) -> None:
        self.clock = HandClock()
        self.log = SimpleNamespace(room_bytes=PLENTY_BYTES)
        self.link = SimpleNamespace(room_bytes=PLENTY_BYTES, backlog_bytes=0, unsent_bytes=0, is_congested=False)
        self.room = Room(self.clock, cast(ReplicaLog, self.log))
        self.room.needed = [cast(Link, self.link)]
        self.told: list[int] = []

    def ask(self, count: int = 1) -> None:
        for _ in range(count):
            self.room.ask(SIZE_BYTES, self.told.append)
        assert not self.told, "never from inside the call"
        self.clock.run()

    def wait(self, duration_s: float) -> None:
        self.clock.advance(duration_s)
        self.room.look()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_whoever_finds_room_goes_on(rig: Rig) -> None:
    rig.ask(3)
    assert rig.told == [0, 0, 0]


def test_the_least_room_of_all_counts_less_a_reserve_and_what_is_under_way(rig: Rig) -> None:
    rig.log.room_bytes = 3 * SIZE_BYTES + RESERVE_BYTES
    rig.link.room_bytes, rig.link.backlog_bytes = 4 * SIZE_BYTES + RESERVE_BYTES, 2 * SIZE_BYTES
    assert rig.room.room_bytes() == 2 * SIZE_BYTES
    rig.ask(3)
    assert rig.told == [0, 0]


def test_congestion_holds_back_however_long_it_lasts_and_is_no_lack_of_room(rig: Rig) -> None:
    rig.link.is_congested = True
    assert rig.room.room_bytes() == 0
    rig.ask(2)
    for _ in range(10):
        rig.wait(NO_ROOM_S)
    assert rig.told == []
    rig.link.is_congested = False
    rig.room.look()
    assert rig.told == [0, 0]


def test_what_a_replica_has_yet_to_be_sent_counts_and_is_no_lack_of_room(rig: Rig) -> None:
    rig.link.room_bytes, rig.link.unsent_bytes = 3 * SIZE_BYTES + RESERVE_BYTES, 2 * SIZE_BYTES
    assert rig.room.room_bytes() == SIZE_BYTES
    rig.link.unsent_bytes = 3 * SIZE_BYTES
    rig.ask()
    for _ in range(10):
        rig.wait(NO_ROOM_S)
    assert rig.told == []
    rig.link.unsent_bytes = 0
    rig.room.look()
    assert rig.told == [0]


def test_who_waited_for_congestion_does_not_come_all_at_once(rig: Rig) -> None:
    rig.link.is_congested = True
    rig.ask(40)
    rig.link.is_congested = False
    rig.room.look()
    assert len(rig.told) == BURST_BYTES // SIZE_BYTES
    for _ in range(4):
        rig.room.look()
    assert rig.told == [0] * 40


def test_what_cleaning_gains_in_time_is_waited_for(rig: Rig) -> None:
    rig.link.room_bytes = 0
    rig.ask()
    rig.wait(NO_ROOM_S / 2)
    assert rig.told == []
    rig.link.room_bytes = PLENTY_BYTES
    rig.room.look()
    assert rig.told == [0]


def test_a_full_replica_is_told_after_a_while_and_then_at_once(rig: Rig) -> None:
    rig.link.room_bytes = 0
    rig.ask()
    rig.wait(NO_ROOM_S)
    assert rig.told == [errno.ENOSPC]
    rig.told.clear()
    rig.ask()
    assert rig.told == [errno.ENOSPC]
    rig.told.clear()
    rig.link.room_bytes = PLENTY_BYTES
    rig.ask()
    assert rig.told == [0]
    rig.told.clear()
    rig.link.room_bytes = 0
    rig.ask()
    assert rig.told == [], "there was room meanwhile"


def test_nobody_is_told_when_it_is_over(rig: Rig) -> None:
    rig.link.is_congested = True
    rig.ask()
    rig.room.close()
    rig.link.is_congested = False
    rig.wait(NO_ROOM_S)
    assert rig.told == []


def test_a_little_room_that_stays_is_none_for_what_needs_more(rig: Rig) -> None:
    rig.link.room_bytes = RESERVE_BYTES + SIZE_BYTES // 2
    rig.ask(2)
    for _ in range(10):
        assert rig.told == []
        rig.wait(NO_ROOM_S / 10)
    assert rig.told == [errno.ENOSPC] * 2
    rig.room.ask(SIZE_BYTES // 4, rig.told.append)
    rig.clock.run()
    assert rig.told[2:] == [0], "for less there is some"
    rig.told.clear()
    rig.ask()
    assert rig.told == [errno.ENOSPC]
