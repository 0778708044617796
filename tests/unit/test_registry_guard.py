"""A registry that has gone back is told from one that has not."""

import pytest

from metadata.registry_guard import RegistryGuard, RegistryPast

SEEN = RegistryPast(life=1, cluster_id=7, revision=40)


@pytest.mark.parametrize(
    ("there", "why_not"),
    [
        (SEEN, ""),
        (RegistryPast(1, 7, 41), ""),
        (RegistryPast(1, 7, 39), "at revision 39, and this node has seen 40"),
        (RegistryPast(1, 8, 90), "another etcd cluster"),
        (RegistryPast(0, 7, 90), "empty, or from before it was recovered"),
        (RegistryPast(2, 8, 3), ""),
    ],
)
def test_what_is_less_far_than_what_was_seen_is_refused(there: RegistryPast, why_not: str) -> None:
    guard = RegistryGuard(SEEN)
    refused = guard.admit(there, there.cluster_id)
    assert why_not in refused
    assert bool(refused) == bool(why_not)
    assert guard.refused == refused
    assert guard.past == (SEEN if why_not else there)


def test_who_has_seen_nothing_takes_what_is_there_and_remembers_how_far_it_goes() -> None:
    guard = RegistryGuard(None)
    assert guard.admit(SEEN, 7) == ""
    guard.saw(50)
    guard.saw(45)
    assert guard.past == RegistryPast(1, 7, 50)
    assert RegistryPast.decode(RegistryPast(1, 7, 50).encode()) == guard.past
    assert guard.admit(SEEN, 7) != ""
    assert guard.admit(RegistryPast(1, 7, 50), 7) == ""
    assert guard.refused == ""


def test_what_was_restored_from_a_backup_is_refused_by_everybody_until_it_is_made_whole() -> None:
    for past in (None, SEEN, RegistryPast(0, 7, 90)):
        guard = RegistryGuard(past)
        assert "restored from a backup" in guard.admit(RegistryPast(1, 8, 20), 7)
        assert guard.past == past
        assert RegistryGuard(past, is_recovering=True).admit(RegistryPast(1, 8, 20), 7) == ""
        assert guard.admit(RegistryPast(2, 8, 21), 8) == ""


def test_another_life_or_etcd_cluster_is_another_registry_and_more_of_the_same_is_not() -> None:
    assert SEEN.is_another_than(None)
    assert SEEN.is_another_than(RegistryPast(0, 7, 40))
    assert SEEN.is_another_than(RegistryPast(1, 6, 40))
    assert not SEEN.is_another_than(RegistryPast(1, 7, 3))
