"""A thousand snapshots, a thousand clones: what each costs, counted by work and not by the clock."""

import errno
from typing import Any

import pytest

import metadata.layers
from tests.unit.families import BLOCK_BYTES, SimulatedFamily
from tests.unit.test_layers import SMALL_CACHE, change, check, numbers, put, seen, settled, snapshot

MANY = 1000


def work(family: SimulatedFamily) -> dict[str, int]:
    """What was done so far that costs something."""
    counters = family.disk.counters()
    names = ("map_page_loads", "map_pages_derived", "logical_map_updates", "middle_map_updates", "log_bytes_appended")
    return {name: counters[name] for name in names}


def cost(family: SimulatedFamily, before: dict[str, int]) -> dict[str, int]:
    return {name: value - before[name] for name, value in work(family).items()}


def test_a_thousand_snapshots_of_a_written_volume() -> None:
    family = SimulatedFamily(size_bytes=64 << 20, segment_bytes=1 << 20)
    put(family, 1, 0, 1, 1000)
    costs = []
    layers = []
    for number in range(MANY):
        before = work(family)
        layers.append(snapshot(family, f"{number}"))
        costs.append(cost(family, before))
        put(family, 1, number, 10_000 + number)
    assert all(each == costs[0] for each in costs), "a snapshot costs the same however many there are"
    assert costs[0]["log_bytes_appended"] == 56 + 2 * 168

    def content(number: int) -> list[int]:
        return [*range(10_000, 10_000 + number), *range(number + 1, 1001)]

    assert numbers(family, family.disk.head(1), 0, 1000) == content(MANY)
    family.close()
    family._begin()
    check(family)
    family.open()
    # Each page of the head lies under a thousand layers: it is read through all of them once, then never again.
    assert numbers(family, family.disk.head(1), 0, 1000) == content(MANY)
    for number in (0, 1, 500, 998, 999):
        assert seen(family, layers[number], 0, 1000) == content(number)
    put(family, 1, 5, 77)
    family.checkpoint()
    family.close()
    family.open()
    layers_read = []
    real = family.store.range_later

    def range_later(asked: Any, done: Any, limit: int = 0) -> None:
        layers_read.append(sum(first[:1] == b"L" for first, _ in asked))
        real(asked, done, limit)

    family.store.range_later = range_later  # type: ignore[method-assign]
    assert numbers(family, family.disk.head(1), 0, 1000) == [*content(MANY)[:5], 77, *content(MANY)[6:]]
    assert max(layers_read) <= 8
    for layer in layers:
        assert change(family, "delete_snapshot", layer) == 0
    settled(family)
    assert len(family.disk.maps.tree.layers) == 1
    assert family.disk.maps.live_blocks == 1000
    assert numbers(family, family.disk.head(1), 0, 1000) == [*content(MANY)[:5], 77, *content(MANY)[6:]]
    family.crash()
    family._begin()
    check(family)
    family.open()
    assert numbers(family, family.disk.head(1), 6, 994) == content(MANY)[6:]


def test_what_changed_through_many_snapshots_asks_for_each_layer_once_and_again_only_where_it_was_met() -> None:
    family = SimulatedFamily(size_bytes=1 << 40, segment_bytes=1 << 20)
    first = snapshot(family, "first")
    for number in range(100):
        put(family, 1, (number * 7919 % 100_000) * 256, number + 1)
        snapshot(family, f"{number}")
    family.checkpoint()
    family.close()
    family.open()
    asked: list[int] = []
    real = family.store.range_later

    def count(ranges: Any, done: Any, limit: int = 0) -> None:
        asked.append(len(ranges) if limit == 1 else 0)
        real(ranges, done, limit)

    family.store.range_later = count  # type: ignore[method-assign]
    errno_, extents = family.wait(lambda done: family.disk.head(1).changed(first, 0, 1 << 40, 512, done))
    assert errno_ == 0
    assert sum(dirty for _, dirty in extents) == 100
    assert sum(length for length, dirty in extents if dirty) == 100 * BLOCK_BYTES
    assert sum(asked) < 102 + 3 * 100


def test_a_thousand_clones_of_one_snapshot() -> None:
    family = SimulatedFamily(size_bytes=64 << 20, segment_bytes=1 << 20)
    put(family, 1, 0, 1, 600)
    layer = snapshot(family, "base")
    costs = []
    for number in range(2, MANY + 2):
        before = work(family)
        assert change(family, "clone", layer, number) == 0
        costs.append(cost(family, before))
        put(family, number, number % 600, 10_000 + number)
    assert all(each == costs[0] for each in costs)
    assert costs[0]["log_bytes_appended"] == 56 + 168
    assert family.disk.maps.live_blocks == 600 + MANY
    family.crash()
    family._begin()
    check(family)
    family.open()
    for number in range(2, MANY + 2, 7):
        own = number % 600
        assert numbers(family, family.disk.head(number), max(0, own - 1), 2)[own > 0] == 10_000 + number
    assert family.disk.clones(layer) == set(range(2, MANY + 2))
    for number in range(2, MANY + 2):
        assert change(family, "delete_volume", number) == 0
    settled(family)
    assert family.disk.maps.live_blocks == 600


def test_layers_and_volumes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SimulatedFamily(size_bytes=64 << 20)
    layer = snapshot(family, "first")
    monkeypatch.setattr("nbdserver.logdisk.tree_changes.MOST_LAYERS", 4)
    snapshot(family, "second")
    assert change(family, "clone", layer, 2) == 0
    for operation, arguments in (("snapshot", (1, "third", 0)), ("clone", (layer, 3)), ("rollback", (1, layer))):
        assert change(family, operation, *arguments) == errno.EMLINK
    assert change(family, "delete_volume", 2) == 0
    settled(family)
    monkeypatch.setattr("nbdserver.logdisk.tree_changes.MOST_VOLUMES", 1)
    assert change(family, "clone", layer, 3) == errno.EMLINK


def test_the_pages_that_young_layers_remember_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metadata.layers._STORED_PAGES", 3)
    family = SimulatedFamily(size_bytes=64 << 20, settings=SMALL_CACHE)
    put(family, 1, 0, 1, 256 * 6)
    snapshot(family, "one")
    for page in range(6):
        put(family, 1, page * 256, 9000 + page)
    family.checkpoint()
    tree = family.disk.maps.tree
    assert tree.layers[tree.heads[1]].stored is None
    assert tree._stored_pages <= metadata.layers._STORED_PAGES
    assert [numbers(family, family.disk.head(1), page * 256, 2) for page in range(6)] == [
        [9000 + page, page * 256 + 2] for page in range(6)
    ]


def test_discards_beyond_the_bound_of_cuts_are_written_as_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdserver.logdisk.maps.MOST_CUTS", 2)
    family = SimulatedFamily(size_bytes=1 << 30)
    for start in range(0, 60_000, 600):
        put(family, 1, start, start + 1, 1)
    layer = snapshot(family, "one")
    device = family.disk.head(1)
    for start in (0, 10_000, 20_000, 30_000):
        if not device.discard(start * BLOCK_BYTES, 5000 * BLOCK_BYTES):
            assert (
                family.wait(
                    lambda done, at=start: device.later(2, at * BLOCK_BYTES, 5000 * BLOCK_BYTES, None, done)  # type: ignore[misc]
                )[0]
                == 0
            )
        assert device.commit() == 0
        family.run(5.0)
    tree = family.disk.maps.tree
    assert len(tree.layers[tree.heads[1]].cut) == 2
    for end in (False, True):
        if end:
            family.crash()
            family.open()
        for start in range(0, 60_000, 600):
            gone = start < 40_000 and start % 10_000 < 5000
            assert numbers(family, family.disk.head(1), start, 1) == [0 if gone else start + 1]
        assert seen(family, layer, 600, 1) == [601]


def test_a_page_under_more_layers_than_are_walked_at_a_time_is_found() -> None:
    family = SimulatedFamily(size_bytes=64 << 20, segment_bytes=1 << 20, settings=SMALL_CACHE)
    put(family, 1, 0, 1, 10)
    for number in range(1300):
        snapshot(family, f"{number}")
    assert numbers(family, family.disk.head(1), 0, 10) == list(range(1, 11))
    for number in range(100):  # beyond the cache: the pages of the lowest layers go
        put(family, 1, 256 * (number + 1), 1)
    family.checkpoint()
    for number in range(100):
        assert numbers(family, family.disk.head(1), 256 * (number + 1), 1) == [1]
    assert numbers(family, family.disk.head(1), 0, 10) == list(range(1, 11))
    put(family, 1, 3, 99)
    assert numbers(family, family.disk.head(1), 2, 3) == [3, 99, 5]
