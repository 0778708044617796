"""What the registry is to hold, from what the nodes say: a table of who says what."""

from dataclasses import replace

import pytest

from metadata.registry import Family, Volume
from metadata.replica_set import Member, ReplicaSet
from nbdserver.node.recovered import NUMBERS, Word, verdict, with_free_names
from protocol.peer import Position

FAMILY = Family("ab" * 16, 1 << 26, "", (Volume(1, "db", 1 << 30),), replicas=3)
ALL = ReplicaSet(3, "n1", (Member("n1", 1), Member("n2", 2), Member("n3", 3)), ("n1", "n2", "n3"), number=7)
TWO = ALL.without("n3")
"""n3 was removed, and knows nothing of it."""


def word(
    kept: ReplicaSet | None, incarnation: int = 1, txid: int = 10, promised: int = 3, resync_regions: int = 0
) -> Word:
    return Word(FAMILY, kept, incarnation, Position(3, txid), promised, resync_regions)


WELL = {"n1": word(TWO), "n2": word(ALL), "n3": word(ALL, txid=5)}


def taken(value: ReplicaSet) -> ReplicaSet:
    return replace(value, number=value.number + NUMBERS)


def test_the_newest_that_is_told_is_taken_but_for_its_number() -> None:
    assert verdict(FAMILY, WELL, None, ()).value == taken(TWO)
    assert verdict(FAMILY, {"n1": word(ALL), "n2": word(ALL)}, TWO, ()).value == taken(TWO), "the registry tells too"


def test_a_member_that_somebody_has_asked_for_has_to_tell_unless_a_later_set_is_known() -> None:
    """It may have been added and gone on, and whoever has asked does not know."""
    asked = TWO.with_member(Member("n4", 9))
    words = {"n1": replace(word(TWO), asked=asked), "n2": word(TWO)}
    told = verdict(FAMILY, words, None, ())
    assert (told.value, told.problem) == (None, "it needs the word of n4, which may have gone on without others")
    assert verdict(FAMILY, words | {"n4": word(TWO)}, None, ()).value == taken(TWO), "it was never added"
    assert verdict(FAMILY, words | {"n4": word(asked)}, None, ()).value == taken(asked)
    later = TWO.changed(epoch=4)
    assert verdict(FAMILY, words | {"n2": word(later)}, None, ()).value == taken(later)
    given_up = verdict(FAMILY, words, None, ("n4",)).value
    assert given_up is not None
    assert (given_up.in_sync, given_up.generation) == (TWO.in_sync, TWO.generation + 1)


@pytest.mark.parametrize("silent", ["n1", "n2"])
def test_a_member_of_the_newest_set_has_to_tell(silent: str) -> None:
    words = {node: each for node, each in WELL.items() if node != silent} | {"n4": word(TWO)}
    told = verdict(FAMILY, words, None, ())
    assert told.value is None
    assert told.problem == f"it needs the word of {silent}, which may have gone on without others"
    assert not told.is_final
    assert verdict(FAMILY, words | {silent: word(TWO, incarnation=0)}, None, ()).value is None, "it is not open"


def test_who_was_removed_need_not_tell() -> None:
    assert verdict(FAMILY, {"n1": word(TWO), "n2": word(ALL)}, None, ()).value == taken(TWO)


def test_a_member_that_is_given_up_is_left_out_and_the_generation_rises() -> None:
    words = {"n2": word(TWO), "n3": word(ALL, txid=5, promised=4)}
    told = verdict(FAMILY, words, None, ("n1",))
    assert told.value is not None
    assert (told.value.owner, told.value.in_sync) == ("n2", (Member("n2", 2),))
    assert (told.value.generation, told.value.number) == (TWO.generation + 1, TWO.number + 1 + NUMBERS)
    assert told.value.epoch == 5, "later than any that a replica obeys"
    assert told.loss == "what n1 acknowledged and n2 had not heard of is lost"


def test_if_all_members_are_given_up_the_longest_complete_log_is_taken() -> None:
    alone = TWO.without("n2")
    words = {"n2": word(alone, 20, txid=8), "n3": word(ALL, 30, txid=9), "n4": word(None, 40, 99, resync_regions=1)}
    told = verdict(FAMILY, words, None, ("n1",))
    assert told.value is not None
    assert (told.value.owner, told.value.in_sync) == ("n3", (Member("n3", 30),))
    none = verdict(FAMILY, {"n4": words["n4"]}, alone, ("n1",))
    assert (none.value, none.is_final) == (None, True)


def test_an_epoch_that_nobody_tells_of_is_that_of_somebody_who_is_away() -> None:
    words = {node: replace(each, promised_epoch=9) for node, each in WELL.items()}
    assert "obeys epoch 9" in verdict(FAMILY, words, None, ()).problem
    told = verdict(FAMILY, words, None, ("n4",))
    assert told.value is not None
    assert (told.value.epoch, told.value.generation) == (10, 2)


def test_what_nobody_keeps_cannot_be_told() -> None:
    words = {"n1": word(None)}
    assert verdict(FAMILY, words, None, ()).problem == "no node keeps who was in sync"
    assert verdict(FAMILY, words, None, ("n2",)).is_final


def test_a_name_is_given_once() -> None:
    other = replace(FAMILY, id="cd" * 16)
    names = [volume.name for family in with_free_names([FAMILY, other]) for volume in family.volumes]
    assert names == ["db", "db-cdcdcdcd"]
