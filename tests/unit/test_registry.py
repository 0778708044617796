"""The families in a registry: who owns them, which volumes they have, and what was begun with those."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.families import Families
from metadata.leveldb import NO_THREADS, LevelStore
from metadata.registry import ExportSettings, Family, RegistryError, Volume, VolumeState
from metadata.registry_table import RegistryTable

ID = "0123456789abcdef" * 2


DISK0 = Volume(1, "disk0", 1 << 30)


def family(family_id: str = ID, settings: ExportSettings | None = None) -> Family:
    volume = DISK0 if settings is None else replace(DISK0, settings=settings)
    return Family(id=family_id, segment_bytes=1 << 26, owner="", volumes=(volume,))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RegistryTable]:
    registry = RegistryTable(LevelStore(str(tmp_path / "registry"), NO_THREADS, NO_THREADS))
    yield registry
    registry.close()


@pytest.fixture
def families(registry: RegistryTable) -> Families:
    """With one family."""
    families = Families(registry, owner="here")
    asyncio.run(families.begin(ID))
    assert asyncio.run(families.add(family()))
    return families


NAMES = st.text(st.characters(codec="utf-8"), min_size=1)
SETTINGS = st.builds(
    ExportSettings,
    read_only=st.booleans(),
    iops=st.integers(0, 1 << 40),
    description=st.text(),
    allowed_clients=st.lists(st.text()).map(tuple),
)
VOLUMES = st.lists(
    st.builds(
        Volume, st.integers(1, 1 << 31), NAMES, st.integers(0, 1 << 50), SETTINGS, st.sampled_from(list(VolumeState))
    ),
    min_size=1,
    unique_by=lambda volume: volume.number,
)


@given(
    st.builds(
        Family,
        id=st.just(ID),
        volumes=VOLUMES.map(lambda volumes: tuple(sorted(volumes, key=lambda volume: volume.number))),
        next_volume=st.integers(2, 1 << 32),
        segment_bytes=st.integers(1, 1 << 30),
        owner=st.text(),
        epoch=st.integers(0, 1 << 63),
        generation=st.integers(1, 1 << 40),
        in_sync=st.lists(st.text()).map(tuple),
    )
)
def test_a_family_is_read_back_as_it_was_written(written: Family) -> None:
    assert Family.decode(written.encode()) == written


@pytest.mark.parametrize("place", [b'"owner"', b'"name"', b'"iops"'])
def test_a_family_with_keys_of_a_newer_program_is_refused(place: bytes) -> None:
    written = family(settings=ExportSettings(iops=5)).encode()
    with pytest.raises(RegistryError, match="newer"):
        Family.decode(written.replace(place, b'"columns":4,' + place))


def test_every_opening_for_writing_raises_the_epoch(families: Families) -> None:
    first = asyncio.run(families.raise_epoch(family()))
    second = asyncio.run(families.raise_epoch(first))
    assert (first.epoch, second.epoch, second.owner, second.in_sync) == (1, 2, "here", ("here",))
    assert families.find("disk0") == (second, DISK0)


def test_a_change_against_an_older_value_is_refused(families: Families) -> None:
    asyncio.run(families.change(family(), generation=2))
    with pytest.raises(RegistryError, match="changed by another"):
        asyncio.run(families.raise_epoch(family()))


def test_a_name_is_given_once(families: Families) -> None:
    other = ID[::-1]
    asyncio.run(families.begin(other))
    assert not asyncio.run(families.add(family(family_id=other)))
    assert families.scraps() == [other]
    assert [item.id for item in families.all()] == [ID]
    with_clone, clone = asyncio.run(families.add_volume(family(), "disk1", 1 << 30, ExportSettings()))
    for change in (
        lambda: asyncio.run(families.add_volume(with_clone, "disk0", 1 << 30, ExportSettings())),
        lambda: asyncio.run(families.rename(with_clone, clone, "disk0")),
    ):
        with pytest.raises(RegistryError, match="changed by another"):
            change()
    assert families.all() == [with_clone]


def test_a_directory_is_a_scrap_before_it_is_a_family_and_after_it_was_one(registry: RegistryTable) -> None:
    families = Families(registry, owner="here")
    asyncio.run(families.begin(ID))
    assert families.scraps() == [ID]
    asyncio.run(families.add(family()))
    assert families.scraps() == []
    asyncio.run(families.add_volume(family(), "disk1", 1 << 30, ExportSettings()))
    asyncio.run(families.remove(families.all()[0]))
    assert families.scraps() == [ID]
    assert (families.find("disk0"), families.find("disk1")) == (None, None)
    asyncio.run(families.scrapped(ID))
    assert families.scraps() == []


def test_names_and_id_are_not_changed_by_the_way(families: Families) -> None:
    with pytest.raises(RegistryError, match="keeps its id"):
        asyncio.run(families.change(family(), volumes=(replace(DISK0, name="other"),)))
    with pytest.raises(RegistryError, match="keeps its id"):
        asyncio.run(families.change_volume(family(), DISK0, name="other"))
    assert families.find("disk0") == (family(), DISK0)


def test_a_family_of_more_volumes_than_a_swap_has_changes_can_be_removed(
    families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = family()
    for number in range(7):
        many, _ = asyncio.run(families.add_volume(many, f"clone-{number}", 1 << 40, ExportSettings()))
    for module in ("families", "registry_calls"):
        monkeypatch.setattr(f"metadata.{module}.MAX_CHANGES", 5)
    asyncio.run(families.remove(many))
    assert (families.all(), families.scraps()) == ([], [ID])
    assert [families.find(volume.name) for volume in many.volumes] == [None] * 8


def test_volumes_of_a_family_have_numbers_of_their_own_for_ever(families: Families) -> None:
    two, disk1 = asyncio.run(families.add_volume(family(), "disk1", 1 << 30, ExportSettings()))
    assert (disk1.number, disk1.state) == (2, VolumeState.MAKING)
    one = asyncio.run(families.remove_volume(two, disk1))
    assert families.find("disk1") is None
    again, disk2 = asyncio.run(families.add_volume(one, "disk1", 1 << 30, ExportSettings()))
    assert disk2.number == 3
    assert asyncio.run(families.remove_volume(again, DISK0)).volumes == (disk2,)
    assert families.find("disk0") is None


def test_a_volume_is_found_by_its_new_name_only(families: Families) -> None:
    renamed = asyncio.run(families.rename(family(), DISK0, "build"))
    assert families.find("disk0") is None
    assert families.find("build") == (renamed, replace(DISK0, name="build"))
    back = asyncio.run(families.rename(renamed, renamed.volumes[0], "disk0"))
    assert families.find("disk0") == (back, DISK0)


@pytest.mark.parametrize(
    ("state", "size_bytes", "left"),
    [
        (VolumeState.MAKING, None, None),
        (VolumeState.MAKING, 5 << 20, VolumeState.THERE),
        (VolumeState.THERE, 5 << 20, VolumeState.THERE),
        (VolumeState.THERE, None, VolumeState.THERE),
        (VolumeState.DELETING, None, None),
        (VolumeState.DELETING, 5 << 20, VolumeState.DELETING),
    ],
)
def test_what_was_begun_is_settled_by_what_the_log_has(
    families: Families, state: VolumeState, size_bytes: int | None, left: VolumeState | None
) -> None:
    two, disk1 = asyncio.run(families.add_volume(family(), "disk1", 1 << 20, ExportSettings()))
    two = asyncio.run(families.change_volume(two, disk1, state=state))
    sizes = {1: 1 << 30} | ({} if size_bytes is None else {2: size_bytes})
    settled = asyncio.run(families.settled(two, sizes))
    assert families.all() == [settled]
    assert [volume.state for volume in settled.volumes[1:]] == ([] if left is None else [left])
    assert (families.find("disk1") is None) == (left is None)
    if left is not None:
        assert settled.volumes[1].size_bytes == (size_bytes or 1 << 20)
    assert asyncio.run(families.settled(settled, sizes)) == settled


def test_what_the_program_before_wrote_is_read_and_written_anew(registry: RegistryTable) -> None:
    old = (
        b'{"epoch":4,"generation":2,"id":"%b","in_sync":["local"],"owner":"local","placement":[],"segment_bytes":67108864,'
        b'"settings":{"allowed_clients":["10.0.0.0/8"],"description":"d","read_only":true,"shared":false},'
        b'"size_bytes":1073741824,"version":1,"volume":"disk0"}' % ID.encode()
    )
    asyncio.run(registry.compare_and_swap([(f"family/{ID}", None, old), ("volume/disk0", None, ID.encode())]))
    families = Families(registry, owner="here")
    expected = Volume(1, "disk0", 1 << 30, ExportSettings(True, "d", allowed_clients=("10.0.0.0/8",)))
    found = families.find("disk0")
    assert found is not None
    assert found[1] == expected
    assert (found[0].epoch, found[0].generation, found[0].next_volume) == (4, 2, 2)
    raised = asyncio.run(families.raise_epoch(found[0]))
    assert registry.get(f"family/{ID}") == raised.encode()
    renamed = asyncio.run(families.rename(raised, expected, "build"))
    assert families.find("build") == (renamed, replace(expected, name="build"))
    asyncio.run(families.remove(renamed))
    assert families.all() == []


def test_a_thousand_clones_are_one_value_and_too_much_is_refused() -> None:
    clones = [Volume(number, f"clone-{number:04}", 1 << 40) for number in range(2, 1002)]
    many = replace(family(), volumes=(DISK0, *clones), next_volume=1002)
    assert len(many.encode()) < 70_000
    assert Family.decode(many.encode()) == many
    long = ExportSettings(description="x" * 1000)
    with pytest.raises(RegistryError, match="1001 volumes, whose names and settings"):
        replace(many, volumes=tuple(replace(volume, settings=long) for volume in many.volumes)).encode()
