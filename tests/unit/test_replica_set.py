"""The registry's value of a replicated family: what it becomes when replicas come and go."""

import pytest

from metadata.replica_set import Member, ReplicaSet, ReplicaSetError


def value(in_sync: str, placement: str, leaving: str = "", owner: str = "a") -> ReplicaSet:
    members = tuple(Member(node, 1) for node in in_sync)
    return ReplicaSet(3, owner, members, tuple(placement), number=7, leaving=tuple(leaving))


def shown(found: ReplicaSet) -> tuple[str, str, str]:
    nodes = "".join(member.node for member in found.in_sync)
    return nodes, "".join(found.placement), "".join(found.leaving)


def test_it_is_read_as_it_was_written_and_an_older_one_has_nobody_leaving() -> None:
    written = value("abc", "abcd", "c")
    assert ReplicaSet.decode(written.encode()) == written
    older = value("ab", "ab").encode().replace(b'"leaving":[],', b"")
    assert b"leaving" not in older
    assert ReplicaSet.decode(older) == value("ab", "ab")
    with pytest.raises(ReplicaSetError):
        ReplicaSet.decode(b"{}")


@pytest.mark.parametrize(
    ("before", "nodes", "after"),
    [
        (value("abc", "abc"), "abc", ("abc", "abc", "")),
        (value("abc", "abc"), "abd", ("abc", "abdc", "c")),  # in sync: until d is too
        (value("ab", "abc"), "abd", ("ab", "abd", "")),  # c has nothing that counts
        (value("abc", "abc"), "a", ("abc", "abc", "bc")),
        (value("abc", "abdc", "c"), "abc", ("abc", "abc", "")),  # it was a mistake
    ],
)
def test_members_that_shall_go_are_leaving_and_others_go_at_once(
    before: ReplicaSet, nodes: str, after: tuple[str, str, str]
) -> None:
    placed = before.placed(tuple(nodes))
    assert shown(placed) == after
    assert placed.staying == tuple(nodes)
    assert placed.number == before.number + 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (value("abc", "abdc", "c"), None),
        (value("abcd", "abdc", "c"), ("abd", "abd", "")),
        (value("abc", "abc"), None),
        (value("abc", "abc", "a"), None),  # the owner
        (value("abc", "abc", "ab"), ("ac", "ac", "a")),
    ],
)
def test_who_is_leaving_is_let_go_when_all_others_are_in_sync_but_an_owner_never(
    before: ReplicaSet, after: tuple[str, str, str] | None
) -> None:
    assert before.can_let_go == (after is not None)
    if after is not None:
        assert shown(before.without_leaving()) == after


def test_who_is_removed_while_it_is_leaving_is_gone() -> None:
    assert shown(value("abc", "abdc", "c").without("c")) == ("ab", "abd", "")
    assert shown(value("abc", "abdc", "c").without("b")) == ("ac", "abdc", "c")
