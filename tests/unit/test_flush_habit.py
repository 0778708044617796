"""When a flush is expected: after some modifications that were each followed by one."""

from nbdserver.replication.flush_habit import HABIT_FLUSHES, FlushHabit


def after(flushes: int) -> tuple[FlushHabit, int]:
    """A client that has flushed so often, each time after one modification; the last txid."""
    habit = FlushHabit()
    for txid in range(1, flushes + 1):
        habit.expects_flush(txid)
        habit.flushed(txid)
    return habit, flushes


def test_a_flush_is_expected_when_it_has_become_a_habit() -> None:
    habit, txid = after(HABIT_FLUSHES - 1)
    assert not habit.expects_flush(txid + 1)
    habit, txid = after(HABIT_FLUSHES)
    assert habit.expects_flush(txid + 1)


def test_one_modification_that_was_not_flushed_ends_it() -> None:
    habit, txid = after(HABIT_FLUSHES)
    assert habit.expects_flush(txid + 1)
    assert not habit.expects_flush(txid + 2)
    habit.flushed(txid + 2)
    assert not habit.expects_flush(txid + 3)


def test_a_flush_after_several_modifications_or_none_is_no_habit() -> None:
    habit, txid = after(HABIT_FLUSHES)
    habit.flushed(txid)
    assert not habit.expects_flush(txid + 1)
    habit, txid = after(HABIT_FLUSHES)
    habit.flushed(txid + 16)
    assert not habit.expects_flush(txid + 17)
