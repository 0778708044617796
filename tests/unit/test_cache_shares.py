"""Who may fill how much of the node's map cache: tables, and what holds whatever families do."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from metadata.pages import PAGE_BLOCKS
from nbdserver.node.cache_shares import LOOK_S, CacheShares, Use, shares
from tests.unit.families import SimulatedFamily

CACHE = 1000
MIB = 1 << 20


def test_one_family_has_all_of_it() -> None:
    assert shares(CACHE, [Use(0, 0, False)]) == [CACHE]
    assert shares(CACHE, [Use(900, CACHE, True)]) == [CACHE]
    assert shares(CACHE, []) == []


def test_who_needs_it_gets_what_the_others_do_not_hold_look_by_look() -> None:
    held, share = 1, 1
    for _ in range(12):
        (share, *others) = shares(CACHE, [Use(held, share, True)] + [Use(0, 1, False)] * 500)
        held = share
    assert share > 0.9 * CACHE
    assert max(others) <= 1


def test_one_at_rest_gives_way_as_far_as_it_shrinks() -> None:
    resting, busy = shares(CACHE, [Use(900, 900, False), Use(100, 100, True)])
    assert (resting, busy) == (800, 100)  # nothing is free yet
    resting, busy = shares(CACHE, [Use(800, 800, False), Use(100, 100, True)])
    assert (resting, busy) == (800, 200)


def test_two_that_want_all_have_a_half_each_and_a_modest_one_what_it_asks_for() -> None:
    assert shares(CACHE, [Use(500, 500, True), Use(500, 500, True)]) == [500, 500]
    modest, *greedy = shares(CACHE, [Use(40, 400, True), Use(475, 475, True), Use(475, 475, True)])
    assert modest == 50
    assert greedy == [475, 475]


@given(st.lists(st.tuples(st.integers(0, CACHE // 4), st.integers(0, CACHE), st.booleans()), min_size=1, max_size=4))
def test_what_all_hold_and_may_add_is_no_more_than_the_cache(families: list[tuple[int, int, bool]]) -> None:
    uses = [Use(*family) for family in families]
    given_out = shares(CACHE, uses)
    assert sum(max(share, use.held_bytes) for share, use in zip(given_out, uses, strict=True)) <= CACHE
    part = CACHE // len(uses)
    for share, use in zip(given_out, uses, strict=True):
        assert share >= 0
        if use.is_busy and use.held_bytes <= part:
            assert share >= use.held_bytes  # nobody takes an equal part from who uses it


def test_a_used_family_keeps_in_memory_what_it_uses_and_gives_it_back_at_rest() -> None:
    first, second = SimulatedFamily(size_bytes=64 << 30), SimulatedFamily(size_bytes=64 << 30)
    cache = CacheShares()

    def use(family: SimulatedFamily) -> int:
        """Touch 2,000 pages again and again; how many pages are read from LevelDB in the last turn."""
        maps = family.disk.maps
        for _ in range(24):
            before = maps.logical.loads + maps.middle.loads
            for number in range(0, 4000, 2):
                assert family.number_at(number * PAGE_BLOCKS) == number + 1
            for each in (first, second):
                each.run(LOOK_S)
            asyncio.run(cache.look(16 * MIB, {"first": first.disk, "second": second.disk}))
        return maps.logical.loads + maps.middle.loads - before

    for family in (first, second):
        family.disk.maps.set_cache_bytes(8 * MIB)
        for number in range(0, 4000, 2):
            family.put(number * PAGE_BLOCKS, number + 1)
        family.checkpoint()
    assert use(first) == 0
    assert first.disk.maps.cache_bytes > 10 * MIB
    assert use(second) == 0
    assert second.disk.maps.cache_bytes > 10 * MIB
    assert first.disk.maps.held_bytes < 8 * MIB


def test_pages_that_are_held_stay_whatever_the_share_is() -> None:
    maps = SimulatedFamily().disk.maps
    maps.hold(500)
    maps.set_cache_bytes(0)
    assert maps.middle.limit_pages == 1000
    maps.let_go()
    assert maps.middle.limit_pages < 500
