"""How two logs are compared by their histories."""

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from nbdserver.replication.replica_log import common_position, history_up_to, position_of
from protocol.peer import BEGINNING, Epochs, Position

steps = st.lists(st.integers(0, 2), max_size=8)


def line(rises: list[int], first_epoch: int) -> list[Position]:
    """A log: positions whose epochs rise by so much from one to the next."""
    found: list[Position] = []
    epoch = first_epoch
    for rise in rises:
        epoch += rise
        found.append(Position(epoch, len(found) + 1))
    return found


def history(log: list[Position]) -> Epochs:
    return tuple(list(same)[-1] for _, same in groupby(log, lambda position: position.epoch))


@given(steps, steps, steps)
def test_the_common_position_is_where_two_logs_part(shared: list[int], one: list[int], other: list[int]) -> None:
    begin = line(shared, 1)
    epoch = begin[-1].epoch if begin else 1
    # What follows belongs to owners of its own: even epochs here, odd ones there.
    ours = begin + [Position(2 * (epoch + p.epoch), len(begin) + p.txid) for p in line(one, 1)]
    theirs = begin + [Position(2 * (epoch + p.epoch) + 1, len(begin) + p.txid) for p in line(other, 1)]
    expected = begin[-1] if begin else BEGINNING
    assert common_position(history(ours), history(theirs)) == expected
    assert common_position(history(theirs), history(ours)) == expected
    assert common_position(history(ours), history(ours)) == (ours[-1] if ours else BEGINNING)


@given(steps, st.data())
def test_a_shorter_log_is_common_as_a_whole(rises: list[int], data: st.DataObject) -> None:
    log = line(rises, 1)
    shorter = log[: data.draw(st.integers(0, len(log)))]
    last = shorter[-1] if shorter else BEGINNING
    assert common_position(history(log), history(shorter)) == last
    assert history_up_to(history(log), last) == history(shorter)


@given(steps)
def test_a_txid_of_a_log_has_one_position(rises: list[int]) -> None:
    log = line(rises, 1)
    assert [position_of(history(log), position.txid) for position in log] == log
    assert position_of(history(log), len(log) + 1) == BEGINNING
