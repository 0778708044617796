"""The embedded registry: several keys swap together or not at all, survive, and are never believed when damaged."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.leveldb import LevelStore
from metadata.registry import ExportSettings, Families, Family, RegistryError
from metadata.registry_table import RegistryTable
from nbdserver.node.control import NO_THREADS
from protocol.disk import pack_value

ID = "0123456789abcdef" * 2


def family(volume: str = "disk0", family_id: str = ID) -> Family:
    return Family(id=family_id, volume=volume, size_bytes=1 << 30, segment_bytes=1 << 26, owner="")


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
    assert registry.compare_and_swap([("a", None, b"1"), ("b", None, b"2")])
    assert not registry.compare_and_swap([("a", b"1", b"3"), ("b", b"wrong", b"4")])
    assert (registry.get("a"), registry.get("b")) == (b"1", b"2")
    assert registry.compare_and_swap([("a", b"1", None), ("b", b"2", b"5"), ("c", None, b"6")])
    assert (registry.get("a"), registry.get("b"), registry.get("c")) == (None, b"5", b"6")


def test_absence_is_an_expectation_too(registry: RegistryTable) -> None:
    assert registry.compare_and_swap([("a", None, b"")])
    assert not registry.compare_and_swap([("a", None, b"2")])
    assert registry.get("a") == b""


def test_a_range_has_what_begins_with_the_prefix_in_order(registry: RegistryTable) -> None:
    registry.compare_and_swap([(key, None, key.encode()) for key in ("f/b", "f/a", "f", "f0", "g/a", "f/")])
    assert [key for key, _ in registry.range("f/")] == ["f/", "f/a", "f/b"]


def test_what_was_swapped_is_there_after_opening_again(open_store: Callable[[], LevelStore]) -> None:
    RegistryTable(open_store()).compare_and_swap([("a", None, b"1")])
    assert RegistryTable(open_store()).get("a") == b"1"


@pytest.mark.parametrize("position", range(12))
def test_a_flipped_bit_is_an_error_never_a_value(open_store: Callable[[], LevelStore], position: int) -> None:
    store = open_store()
    registry = RegistryTable(store)
    registry.compare_and_swap([("a", None, b"0123456789")])
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
    registry.compare_and_swap([("a", None, b"1")])
    batch = store.batch()
    batch.put(b"b", store.get(b"a") or b"")
    store.write(batch)
    with pytest.raises(OSError, match="damaged"):
        registry.get("b")


def test_a_newer_registry_is_refused(open_store: Callable[[], LevelStore]) -> None:
    store = open_store()
    batch = store.batch()
    batch.put(b"registry-version", pack_value(b"registry-version", b"2"))
    store.write(batch)
    with pytest.raises(RegistryError, match="version 2, this program knows 1"):
        RegistryTable(store)


@given(
    st.builds(
        Family,
        id=st.just(ID),
        volume=st.text(min_size=1),
        size_bytes=st.integers(0, 1 << 50),
        segment_bytes=st.integers(1, 1 << 30),
        owner=st.text(),
        epoch=st.integers(0, 1 << 63),
        generation=st.integers(1, 1 << 40),
        in_sync=st.lists(st.text()).map(tuple),
        settings=st.builds(ExportSettings, allowed_clients=st.lists(st.text()).map(tuple)),
    )
)
def test_a_family_is_read_back_as_it_was_written(written: Family) -> None:
    assert Family.decode(written.encode()) == written


def test_a_family_with_keys_of_a_newer_program_is_refused() -> None:
    with pytest.raises(RegistryError, match="newer"):
        Family.decode(family().encode().replace(b'"owner"', b'"columns":4,"owner"'))


def test_every_opening_for_writing_raises_the_epoch(registry: RegistryTable) -> None:
    families = Families(registry, owner="here")
    families.begin(ID)
    assert families.add(family())
    first = families.raise_epoch(family())
    second = families.raise_epoch(first)
    assert (first.epoch, second.epoch, second.owner, second.in_sync) == (1, 2, "here", ("here",))
    assert families.find("disk0") == second


def test_a_change_against_an_older_value_is_refused(registry: RegistryTable) -> None:
    families = Families(registry, owner="here")
    families.begin(ID)
    families.add(family())
    families.change(family(), generation=2)
    with pytest.raises(RegistryError, match="changed by another"):
        families.raise_epoch(family())


def test_a_name_is_given_once(registry: RegistryTable) -> None:
    families = Families(registry, owner="here")
    families.begin(ID)
    families.add(family())
    other = ID[::-1]
    families.begin(other)
    assert not families.add(family(family_id=other))
    assert families.scraps() == [other]
    assert [item.id for item in families.all()] == [ID]


def test_a_directory_is_a_scrap_before_it_is_a_family_and_after_it_was_one(registry: RegistryTable) -> None:
    families = Families(registry, owner="here")
    families.begin(ID)
    assert families.scraps() == [ID]
    families.add(family())
    assert families.scraps() == []
    families.remove(family())
    assert families.scraps() == [ID]
    assert families.find("disk0") is None
    families.scrapped(ID)
    assert families.scraps() == []


def test_a_family_keeps_its_name_and_id(registry: RegistryTable) -> None:
    families = Families(registry, owner="here")
    families.begin(ID)
    families.add(family())
    with pytest.raises(RegistryError, match="keeps its id"):
        families.change(family(), volume="other")
    assert families.find("disk0") == replace(family())
