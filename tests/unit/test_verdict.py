"""Which replicas are right when they hold different things."""

import pytest

from nbdserver.replication.verdict import right_nodes
from protocol.peer import RegionState

A, B, C = (RegionState(7, bytes([number]) * 16) for number in (1, 2, 3))
OLD = RegionState(6, A.digest)


@pytest.mark.parametrize(
    ("states", "right"),
    [
        ([A], "1"),
        ([A, A], "12"),
        ([A, A, A], "123"),
        ([A, A, B], "12"),
        ([B, A, A], "23"),
        ([A, B], ""),
        ([A, B, C], ""),
        ([A, A, B, B], ""),
        ([A, A, A, B, C], "123"),
        ([A, A, B, B, C], ""),
        # The higher txid is right, however few have it; but of those that have it most must agree.
        ([A, OLD, OLD], "1"),
        ([OLD, OLD, B], "3"),
        ([A, A, OLD], "12"),
        ([A, B, OLD], ""),
        ([A, B, A, OLD], "13"),
    ],
)
def test_who_is_right(states: list[RegionState], right: str) -> None:
    assert right_nodes({str(number): state for number, state in enumerate(states, 1)}) == frozenset(right)
