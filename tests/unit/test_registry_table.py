"""The table of a registry on one node: several keys swap together or not at all, survive, and are never believed when
damaged."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata.leveldb import NO_THREADS, LevelStore
from metadata.registry import RegistryError
from metadata.registry_calls import Change
from metadata.registry_table import RegistryTable
from protocol.disk import pack_value


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[[], LevelStore]]:
    opened: list[LevelStore] = []

    def open_it() -> LevelStore:
        for store in opened:
            store.close()
        opened.append(LevelStore(str(tmp_path / "registry"), NO_THREADS, NO_THREADS))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def registry(open_store: Callable[[], LevelStore]) -> RegistryTable:
    return RegistryTable(open_store())


def test_a_swap_changes_all_of_its_keys_or_none(registry: RegistryTable) -> None:
    assert asyncio.run(registry.compare_and_swap([("a", None, b"1"), ("b", None, b"2")]))
    assert not asyncio.run(registry.compare_and_swap([("a", b"1", b"3"), ("b", b"wrong", b"4")]))
    assert (registry.get("a"), registry.get("b")) == (b"1", b"2")
    assert asyncio.run(registry.compare_and_swap([("a", b"1", None), ("b", b"2", b"5"), ("c", None, b"6")]))
    assert (registry.get("a"), registry.get("b"), registry.get("c")) == (None, b"5", b"6")


def test_absence_is_an_expectation_too(registry: RegistryTable) -> None:
    assert asyncio.run(registry.compare_and_swap([("a", None, b"")]))
    assert not asyncio.run(registry.compare_and_swap([("a", None, b"2")]))
    assert registry.get("a") == b""


def test_a_range_has_what_begins_with_the_prefix_in_order(registry: RegistryTable) -> None:
    asyncio.run(
        registry.compare_and_swap([(key, None, key.encode()) for key in ("f/b", "f/a", "f", "f0", "g/a", "f/")])
    )
    assert [key for key, _ in registry.range("f/")] == ["f/", "f/a", "f/b"]


def test_what_was_swapped_is_there_after_opening_again(open_store: Callable[[], LevelStore]) -> None:
    asyncio.run(RegistryTable(open_store()).compare_and_swap([("a", None, b"1")]))
    assert RegistryTable(open_store()).get("a") == b"1"


@pytest.mark.parametrize("position", range(12))
def test_a_flipped_bit_is_an_error_never_a_value(open_store: Callable[[], LevelStore], position: int) -> None:
    store = open_store()
    registry = RegistryTable(store)
    asyncio.run(registry.compare_and_swap([("a", None, b"0123456789")]))
    sealed = bytearray(store.get(b"a") or b"")
    sealed[position] ^= 0x10
    batch = store.batch()
    batch.put(b"a", bytes(sealed))
    store.write(batch)
    with pytest.raises(OSError, match="damaged"):
        registry.get("a")


def test_a_value_of_another_key_is_not_believed(open_store: Callable[[], LevelStore]) -> None:
    store = open_store()
    registry = RegistryTable(store)
    asyncio.run(registry.compare_and_swap([("a", None, b"1")]))
    batch = store.batch()
    batch.put(b"b", store.get(b"a") or b"")
    store.write(batch)
    with pytest.raises(OSError, match="damaged"):
        registry.get("b")


def test_a_newer_registry_is_refused(open_store: Callable[[], LevelStore]) -> None:
    store = open_store()
    batch = store.batch()
    batch.put(b"registry-version", pack_value(b"registry-version", b"3"))
    store.write(batch)
    with pytest.raises(RegistryError, match="version 3, this program knows 2"):
        RegistryTable(store)


def test_a_registry_from_before_is_marked_for_older_programs_to_refuse(
    open_store: Callable[[], LevelStore],
) -> None:
    store = open_store()
    batch = store.batch()
    batch.put(b"registry-version", pack_value(b"registry-version", b"1"))
    store.write(batch)
    RegistryTable(store)
    assert store.get(b"registry-version") == pack_value(b"registry-version", b"2")


def test_revisions_rise_across_openings_and_keys_stay_bound(open_store: Callable[[], LevelStore]) -> None:
    registry = RegistryTable(open_store())
    assert registry.swap([Change("a", None, b"1", 7), Change("b", None, b"2", 8), Change("c", None, b"3")])
    assert registry.swap([Change("c", b"3", b"3"), Change("d", None, None)]), "checks write nothing"
    opened = RegistryTable(open_store())
    assert (registry.revision, opened.revision) == (1, 1)
    assert (opened.bound_keys(7), sorted(opened.bound_keys())) == (["a"], ["a", "b"])
    assert opened.swap([Change("a", b"1", b"4")])
    opened.remove(opened.bound_keys())
    again = RegistryTable(open_store())
    assert (again.revision, again.bound_keys(), again.range("")) == (3, [], [("a", b"4"), ("c", b"3")])


def test_who_listens_hears_what_was_written_and_nothing_else(registry: RegistryTable) -> None:
    heard: list[tuple[int, object]] = []
    registry.changed = lambda revision, changes: heard.append((revision, changes))
    asyncio.run(registry.compare_and_swap([("a", None, b"1"), ("b", None, None)]))
    asyncio.run(registry.compare_and_swap([("a", None, b"2")]))
    asyncio.run(registry.compare_and_swap([("a", b"1", b"1")]))
    asyncio.run(registry.compare_and_swap([("a", b"1", None)]))
    registry.remove([])
    assert heard == [(1, [("a", b"1")]), (2, [("a", None)])]


def test_the_registrys_own_keys_are_nobodys(registry: RegistryTable) -> None:
    for key in ("registry-version", "\0revision"):
        with pytest.raises(ValueError):
            asyncio.run(registry.compare_and_swap([(key, None, b"9")]))
        with pytest.raises(ValueError):
            registry.get(key)
    assert registry.range("") == []
