"""Snapshots are known on every node: what their owner tells, what others make of it, how much of it there may be."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from nbdserver.node import snapshots_told
from nbdserver.node.cluster_settings import SNAPSHOTS_PREFIX
from nbdserver.node.snapshots_told import TOLD_BYTES, Listings, SnapshotsTold, ToldSnapshot, read, told
from tests.unit.test_families import DB, SHARED, family, with_both

KEY = SNAPSHOTS_PREFIX + SHARED
MONDAY, TUESDAY = ToldSnapshot("monday", 100, 1 << 30), ToldSnapshot("tuesday", 200, 2 << 30)


class Directory:
    """What all nodes have; this one is its master."""

    def __init__(self, master: object | None = None) -> None:
        self.master = master
        self.values: dict[str, bytes] = {}
        self.published = 0

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        return sorted(item for item in self.values.items() if item[0].startswith(prefix))

    def publish(self, key: str, value: bytes | None) -> None:
        self.published += 1
        if value is None:
            self.values.pop(key, None)
        else:
            self.values[key] = value


class OneNode:
    """A node of the cluster with the volume db; it serves it if it `owns` it."""

    def __init__(self, directory: Directory, owns: bool) -> None:
        self.families = with_both()
        self.here: dict[str, dict[str, Any]] = {}
        self.owns = owns
        self.listed: Listings = {}
        self.notes = 0
        self.snapshots = SnapshotsTold(self.families, lambda family_id: self.owns, lambda: self.here, self._note)
        self.snapshots.directory = directory

    def _note(self, listings: Listings) -> None:
        assert len(listings) <= snapshots_told.LISTED_AT_ONCE
        self.notes += 1
        for name, listing in listings.items():
            if listing is None:
                del self.listed[name]
            else:
                self.listed[name] = listing

    def has(self, *snapshots: ToldSnapshot, volume: str = "db") -> None:
        """Its data processes say that they have these."""
        for name, created_s, size_bytes in snapshots:
            self.here[f"{volume}@{name}"] = {"created_s": created_s, "size_bytes": size_bytes, "description": ""}

    def known(self) -> list[ToldSnapshot]:
        return list(self.snapshots.of(family(), DB))


def test_what_the_owner_has_is_listed_by_other_nodes_and_what_is_deleted_is_not() -> None:
    directory = Directory()
    owner, other = OneNode(directory, True), OneNode(directory, False)
    owner.has(MONDAY, TUESDAY)
    owner.has(MONDAY, volume="disk0")  # the node's own: nobody else has it
    owner.has(MONDAY, volume="unknown")
    owner.snapshots.look()
    other.snapshots.look()
    assert other.known() == [MONDAY, TUESDAY]
    listing = {"description": "snapshot of db", "allowed": [], "tls": "inherit"}
    assert other.listed == {"db@monday": listing, "db@tuesday": listing}
    del owner.here["db@monday"]
    owner.snapshots.look()
    other.snapshots.look()
    assert (other.known(), list(other.listed)) == ([TUESDAY], ["db@tuesday"])
    owner.here.clear()
    owner.snapshots.look()
    other.snapshots.look()
    assert (other.known(), other.listed, directory.values) == ([], {}, {})


def test_nothing_is_said_when_nothing_has_changed() -> None:
    directory = Directory()
    owner = OneNode(directory, True)
    owner.has(MONDAY)
    for _ in range(3):
        owner.snapshots.look()
    assert (directory.published, owner.notes) == (1, 1)


def test_what_an_owner_that_is_lost_has_told_stays_known_until_the_next_one_tells() -> None:
    directory = Directory()
    old, new = OneNode(directory, True), OneNode(directory, False)
    old.has(MONDAY)
    old.snapshots.look()
    old.owns = False
    old.here.clear()
    for node in (old, new):
        node.snapshots.look()
        assert node.known() == [MONDAY]
    new.owns = True
    new.has(MONDAY, TUESDAY)
    new.snapshots.look()
    directory.values[KEY] = told({1: [MONDAY]})  # of one that did not know that it owns it no more
    new.snapshots.look()
    old.snapshots.look()
    assert old.known() == [MONDAY, TUESDAY]


def test_a_volume_that_is_renamed_takes_its_snapshots_along_and_one_that_is_restricted_too() -> None:
    directory = Directory()
    node = OneNode(directory, False)
    directory.values[KEY] = told({1: [MONDAY]})
    node.snapshots.look()
    renamed = asyncio.run(node.families.rename(family(), DB, "build"))
    (volume,) = renamed.volumes
    settings = replace(volume.settings, allowed_clients=("192.0.2.0/24",), tls="required")
    asyncio.run(node.families.change_volume(renamed, volume, settings=settings))
    node.snapshots.look()
    assert node.listed == {
        "build@monday": {"description": "snapshot of build", "allowed": ["192.0.2.0/24"], "tls": "required"}
    }


def test_the_master_forgets_families_that_there_are_not_any_more_and_knows_that_it_may_know_nothing() -> None:
    directory = Directory(master=object())
    node = OneNode(directory, False)
    gone = SNAPSHOTS_PREFIX + "ff" * 16
    directory.values |= {KEY: told({1: [MONDAY]}), gone: told({1: [MONDAY]})}
    shared, node.families.shared = node.families.shared, None
    node.snapshots.look()
    assert set(directory.values) == {KEY, gone}
    node.families.shared = shared
    node.snapshots.look()
    assert set(directory.values) == {KEY}


def test_a_node_that_has_left_the_cluster_goes_on_listing_what_it_knew_until_it_is_there_again() -> None:
    directory = Directory()
    node = OneNode(directory, False)
    directory.values[KEY] = told({1: [MONDAY]})
    node.snapshots.look()
    node.snapshots.directory = None
    node.snapshots.look()
    again: Listings = {}
    node.snapshots.list_again(again.update)
    assert set(node.listed) == set(again) == {"db@monday"}


def test_what_is_told_is_bounded_and_so_is_what_is_listed_and_the_newest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [ToldSnapshot(f"a-snapshot-of-the-day-{number}", number, 1 << 40) for number in range(5000)]
    value = told({1: many[::2], 2: many[1::2]})
    assert TOLD_BYTES - 100 < len(value) < TOLD_BYTES + 100
    found = read(value)
    assert set(found) == {1, 2}
    kept = sorted((*found[1], *found[2]), key=lambda each: each.created_s)
    assert kept == many[-len(kept) :]
    assert list(found[1]) == sorted(found[1], key=lambda each: each.created_s)

    monkeypatch.setattr(snapshots_told, "MOST_LISTED", 450)
    directory = Directory()
    node = OneNode(directory, False)
    directory.values[KEY] = told({1: many[:1000]})
    node.snapshots.look()
    assert set(node.listed) == {f"db@{each.name}" for each in many[550:1000]}
    assert node.notes == 3


@pytest.mark.parametrize(
    "said",
    [
        b"\xff",
        b"[1]",
        b'{"one": [], "1": 5}',
        b'{"1": [5, [], ["monday"], ["a/b", 1, 1], ["a@b", 1, 1], [5, 1, 1], ["x", 1.5, 1], ["x", 1, null]]}',
        json.dumps({"1": [["x" * 129, 1, 1]]}).encode(),
    ],
)
def test_what_a_node_says_wrongly_disturbs_nothing(said: bytes) -> None:
    assert not any(read(said).values())


def test_what_a_later_version_says_more_is_left_out() -> None:
    assert read(b'{"1": [["monday", 100, 1073741824, "with a note"]], "about": {"2": []}}') == {1: [MONDAY]}
