"""The directory's state in a registry that is made whole: a table of what the nodes know."""

from collections.abc import Collection

import pytest

from metadata.directory.made_whole import Known, MissingVotersError, state_from
from metadata.directory.registry_keys import MasterState, Member
from protocol.directory import NodeKind

ME = Member(1, NodeKind.FIRST, "n1", "10.0.0.1:700", "10.0.0.1:701")
VOTERS = {1: "n1", 2: "n2", 3: "n3"}
BACKUP = MasterState(4, 2, 3, 77, "n3", "10.0.0.3:700", "10.0.0.3:701", VOTERS)
LATER = BACKUP.changed(epoch=5, master=2, name="n2", voters=VOTERS | {4: "n4"})


def known(node: int, epoch: int = 5, state: MasterState | None = None, is_first: bool = True) -> Known:
    return Known(node, f"n{node}", is_first, epoch, state)


def test_it_is_later_than_all_that_is_known_and_nobodys() -> None:
    state = state_from(ME, [known(1, 6), known(2, 5, LATER), known(3), known(9, 8, is_first=False)], BACKUP)
    assert (state.number, state.epoch, state.incarnation) == (LATER.number + 1, 9, 0)
    assert (state.master, state.voters) == (2, LATER.voters)


def test_what_the_registry_holds_counts_when_all_nodes_were_restarted() -> None:
    state = state_from(ME, [known(1), known(2), known(3)], BACKUP)
    assert (state.number, state.epoch, state.voters) == (5, 6, VOTERS)


def test_where_nothing_says_who_votes_all_nodes_of_the_site_do() -> None:
    state = state_from(ME, [known(1), known(2), known(9, is_first=False)], None)
    assert (state.epoch, state.name, state.streams, state.voters) == (6, "n1", ME.streams, {1: "n1", 2: "n2"})


def test_where_nobody_has_seen_an_epoch_the_directory_is_yet_to_begin() -> None:
    assert state_from(ME, [known(1, 0), known(2, 0), known(9, 0, is_first=False)], None) is None
    assert state_from(ME, [known(1, 0), known(2, 0), known(3, 0)], BACKUP) is not None


@pytest.mark.parametrize(
    ("answering", "without", "voters", "silent"),
    [
        ((1, 2), (), (1, 2, 3), ()),
        ((1,), (), (), ("n2", "n3")),
        ((1,), ("n2",), (), ("n3",)),
        ((1, 2), ("n3",), (1, 2), ()),
        ((1,), ("n2", "n3"), (1,), ()),
    ],
)
def test_a_majority_of_the_voters_that_are_not_given_up_has_to_answer(
    answering: Collection[int], without: Collection[str], voters: Collection[int], silent: Collection[str]
) -> None:
    told = [known(node) for node in answering]
    if silent:
        with pytest.raises(MissingVotersError, match=", ".join(silent)):
            state_from(ME, told, BACKUP, without)
    else:
        assert tuple(state_from(ME, told, BACKUP, without).voters) == voters
