"""The history of epochs: which owner ordered what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.epochs import EpochHistory, pack_epochs, read_epochs, unpack_epochs
from protocol.disk import DamagedValueError, pack_value
from protocol.invariant import InvariantError
from protocol.peer import BEGINNING, EPOCHS_LIMIT, Position
from tests.simulation.faults import FaultMix
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import SimulatedClock, World

Log = list[int]
"""The epoch of each modification, txid 1 first."""
GROWTH = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=5)


def history_of(log: Log) -> EpochHistory:
    history = EpochHistory()
    for txid, epoch in enumerate(log, 1):
        history.note(epoch, txid)
    return history


def grown(growth: list[tuple[int, int]]) -> Log:
    """Further owners order some modifications each."""
    log: Log = []
    epoch = 1
    for pause, count in growth:
        epoch += 1 + pause
        log += [epoch] * count
    return log


@given(GROWTH)
def test_a_history_gives_each_txid_its_epoch_and_outlives_packing(growth: list[tuple[int, int]]) -> None:
    log = grown(growth)
    history = EpochHistory(unpack_epochs(pack_epochs(history_of(log).up_to(len(log)))))
    assert [history.epoch_of(txid) for txid in range(len(log) + 1)] == [0, *log]
    ends = history.ends(len(log))
    assert ends == tuple(Position(epoch, len(log) - log[::-1].index(epoch)) for epoch in sorted(set(log)))
    other = EpochHistory([(99, 1)])
    other.take_over(ends)
    assert other.up_to(len(log)) == history.up_to(len(log))


def test_an_epoch_that_ordered_nothing_is_not_in_the_history() -> None:
    history = EpochHistory()
    history.begin(1, 1)
    history.begin(2, 1)
    assert history.position(0) == BEGINNING
    assert history.up_to(0) == []
    history.begin(4, 8)
    history.begin(5, 8)
    assert history.up_to(8) == [(2, 1), (5, 8)]
    assert history.up_to(7) == [(2, 1)]


def test_an_epoch_that_is_not_later_is_refused() -> None:
    history = EpochHistory([(3, 1)])
    with pytest.raises(InvariantError):
        history.begin(3, 9)


def test_of_epochs_that_are_forgotten_nothing_is_said() -> None:
    mine = EpochHistory()
    for epoch in range(1, EPOCHS_LIMIT + 11):
        mine.begin(epoch, epoch)
    assert mine.epoch_of(10) == 0
    assert mine.epoch_of(11) == 11


def test_a_family_from_before_there_was_a_history_has_one() -> None:
    world = World(1)
    table = SimulatedTable(world)
    store = SimulatedStore(table, SimulatedClock(world), FaultMix(), lambda: False)
    assert read_epochs(store, 7, 0).position(0) == BEGINNING
    assert read_epochs(store, 7, 100).position(100) == Position(7, 100)
    table.values[b"E"] = pack_value(b"E", bytes(9))
    with pytest.raises(DamagedValueError):
        read_epochs(store, 7, 100)
