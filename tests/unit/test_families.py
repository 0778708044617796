"""Families of one node and of the cluster, found and changed in one way."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from metadata.families import OF_REPLICA, Families
from metadata.registry import ExportSettings, Family, RegistryError, Volume
from metadata.replica_set import Member, ReplicaSet

OWN, SHARED = "aa" * 16, "bb" * 16
DB = Volume(1, "db", 1 << 30)
SET = ReplicaSet(epoch=0, owner="n1", in_sync=(Member("n1", 1),), placement=("n1", "n2"))


class Held:
    """`HeldRegistry` in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        return sorted(item for item in self.values.items() if item[0].startswith(prefix))

    async def compare_and_swap(self, changes: Sequence[tuple[str, bytes | None, bytes | None]]) -> bool:
        if any(self.values.get(key) != expected for key, expected, _ in changes):
            return False
        for key, _, new in changes:
            if new is None:
                self.values.pop(key, None)
            else:
                self.values[key] = new
        return True


def family(family_id: str = SHARED, name: str = "db", replicas: int = 2) -> Family:
    return Family(family_id, 1 << 26, "", (replace(DB, name=name),), replicas=replicas)


def with_both() -> Families:
    """disk0 of the node's own, db of the cluster."""
    families = Families(Held(), owner="local")
    families.shared = Held()
    asyncio.run(families.begin(OWN))
    assert asyncio.run(families.add(family(OWN, "disk0", 0)))
    assert asyncio.run(families.add_shared(family(), SET))
    return families


def test_a_shared_family_is_read_back_as_it_was_written_and_an_own_one_as_older_programs_write_it() -> None:
    assert Family.decode(family().encode()) == family()
    assert b"replicas" not in family(replicas=0).encode()
    assert Family.decode(family(replicas=0).encode()) == family(replicas=0)


def test_volumes_of_both_are_found_by_name_and_a_name_is_given_once() -> None:
    families = with_both()
    assert [each.name for each in families.all()] == ["db", "disk0"]
    assert [each.name for each in families.own()] == ["disk0"]
    found = families.find("db")
    assert found is not None
    assert (found[0].id, families.replica_set(SHARED)) == (SHARED, SET)
    assert not asyncio.run(families.add_shared(family("cc" * 16), SET))


def test_every_change_of_a_shared_family_has_a_number_of_its_own() -> None:
    families = with_both()
    there = family()
    renamed = asyncio.run(families.rename(there, DB, "build"))
    back = asyncio.run(families.rename(renamed, renamed.volumes[0], "db"))
    assert (renamed.number, back.number) == (1, 2)
    assert back.encode() != there.encode()
    with pytest.raises(RegistryError, match="changed by another"):
        asyncio.run(families.rename(there, DB, "build"))


def test_a_copy_stands_in_while_the_shared_registry_is_not_known() -> None:
    families = with_both()
    asyncio.run(families.begin(SHARED, OF_REPLICA))
    assert (families.replica_scraps(), families.scraps()) == ([SHARED], [])
    asyncio.run(families.keep_replica(family()))
    assert families.replica_scraps() == []
    shared, families.shared = families.shared, None
    assert [each.name for each in families.here()] == ["db", "disk0"]
    found = families.find("db")
    assert found is not None
    assert found[1] == DB
    assert families.replica_set(SHARED) is None
    with pytest.raises(RegistryError, match="has not answered yet"):
        asyncio.run(families.change(family(), max_data=5))
    families.shared = shared
    changed = asyncio.run(families.change(family(), max_data=5))
    assert [each.max_data for each in families.replicas()] == [5]
    asyncio.run(families.keep_replica(changed))
    families.shared = None
    assert [each.max_data for each in families.replicas()] == [5]


def test_a_deleted_family_names_the_nodes_that_have_yet_to_delete_it() -> None:
    families = with_both()
    asyncio.run(families.begin(SHARED, OF_REPLICA))
    asyncio.run(families.keep_replica(family()))
    two, _ = asyncio.run(families.add_volume(family(), "web", 1 << 30, ExportSettings()))
    asyncio.run(families.remove(two))
    assert (families.removed(), families.replica_set(SHARED)) == ({SHARED: ["n1", "n2"]}, None)
    assert families.shared is not None
    assert families.shared.range("volume/") == []
    assert families.has_replica(SHARED)
    asyncio.run(families.drop_replica(SHARED))
    assert (families.has_replica(SHARED), families.scraps()) == (False, [SHARED])
    asyncio.run(families.has_removed(SHARED, "n1"))
    assert families.removed() == {SHARED: ["n2"]}
    asyncio.run(families.has_removed(SHARED, "n2"))
    assert families.removed() == {}
