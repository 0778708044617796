"""Members whose disks fall behind what flushes wait for: who is told slow, for how long, and who is not."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdserver.replication.slow_disks import CALM_S, SLOW_S, SlowDisks

TICK_S = 0.25


class Rig:
    """An owner with the members n2 and n3."""

    def __init__(self) -> None:
        self.disks = SlowDisks()
        self.now_s = 100.0
        self.own_txid = 1
        self.links: dict[str, Any] = {
            node: SimpleNamespace(node=node, durable_txid=1, is_following=True) for node in ("n2", "n3")
        }
        self.members = ["n2", "n3"]
        self.removed: list[str] = []

    def ticks(self, duration_s: float, *keep_up: str) -> None:
        """Time goes by; each tick a client flushes, and these sync."""
        for _ in range(round(duration_s / TICK_S)):
            self.now_s += TICK_S
            self.own_txid += 1
            for node in keep_up:
                self.links[node].durable_txid = self.own_txid
            self.look()

    def look(self) -> None:
        members = [self.links[node] for node in self.members]
        slow = self.disks.look(self.now_s, self.own_txid, cast(Any, members), self.links)
        if slow:
            self.removed.append(slow)
            self.members.remove(slow)


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.ticks(10.0, "n2", "n3")
    assert rig.removed == []
    return rig


def test_one_whose_disk_stands_still_is_removed_once_all_others_have_synced_for_a_while(rig: Rig) -> None:
    rig.ticks(SLOW_S, "n2")
    assert rig.removed == []
    rig.ticks(2 * TICK_S, "n2")
    assert rig.removed == ["n3"]


def test_one_that_syncs_a_little_late_each_time_is_not_slow(rig: Rig) -> None:
    for _ in range(20):
        rig.ticks(SLOW_S - TICK_S, "n2")
        rig.links["n3"].durable_txid = rig.own_txid
    assert rig.removed == []


def test_two_that_are_behind_are_as_slow_as_each_other(rig: Rig) -> None:
    rig.ticks(10.0)
    assert rig.removed == []


def test_one_that_nobody_waits_for_is_not_slow(rig: Rig) -> None:
    rig.links["n3"].durable_txid = rig.own_txid
    for _ in range(40):
        rig.now_s += TICK_S
        rig.links["n2"].durable_txid += 1  # it syncs what no flush wants
        rig.look()
    assert rig.removed == []


def test_the_last_but_the_owner_can_be_slow_too(rig: Rig) -> None:
    rig.members = ["n3"]
    rig.ticks(SLOW_S + 2 * TICK_S)
    assert rig.removed == ["n3"]


def test_it_is_slow_until_it_has_kept_up_for_a_while(rig: Rig) -> None:
    rig.ticks(20.0, "n2")
    assert rig.disks.is_slow("n3")
    rig.ticks(CALM_S / 2, "n2", "n3")
    rig.ticks(1.0, "n2")
    rig.ticks(CALM_S - TICK_S, "n2", "n3")
    assert rig.disks.is_slow("n3"), "it was late again in between"
    rig.ticks(2 * TICK_S, "n2", "n3")
    assert not rig.disks.is_slow("n3")


def test_what_one_lacked_when_it_went_is_not_held_against_it_when_it_is_back(rig: Rig) -> None:
    rig.ticks(SLOW_S - TICK_S, "n2")
    rig.members.remove("n3")  # it is silent
    rig.ticks(10.0, "n2")
    rig.members.append("n3")
    rig.ticks(SLOW_S, "n2")  # its first sync takes a while
    assert rig.removed == []
    rig.ticks(2 * TICK_S, "n2")
    assert rig.removed == ["n3"]


def test_one_that_has_no_replica_any_more_is_forgotten(rig: Rig) -> None:
    rig.ticks(10.0, "n2")
    del rig.links["n3"]
    rig.ticks(TICK_S, "n2")
    assert not rig.disks.is_slow("n3")
