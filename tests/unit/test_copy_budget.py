"""Turns to copy regions: in order, bounded, at a pace that clients slow down, with a reason for who waits."""

from metadata.region_table import REGION_BYTES
from nbdserver.logdisk.pacing import BUSY_SHARE
from nbdserver.replication.copy_budget import LEAST_BYTES, MEMORY_BYTES, MOST_AT_ONCE, CopyBudget, Turn
from tests.simulation.world import SimulatedClock, World

AT_ONCE = MEMORY_BYTES // REGION_BYTES


class Rig:
    def __init__(self, bytes_per_s: int = 1 << 40) -> None:
        self.clock = SimulatedClock(World(1))
        self.moved_bytes = 0
        self.budget = CopyBudget(self.clock, lambda: self.moved_bytes, bytes_per_s)
        self.begun: list[str] = []

    def ask(self, name: str) -> Turn:
        return self.budget.ask(lambda: self.begun.append(name))


def test_turns_are_given_in_the_order_in_which_they_are_asked_for_and_so_many_at_once() -> None:
    rig = Rig()
    turns = [rig.ask(str(number)) for number in range(AT_ONCE + 3)]
    assert rig.begun == []
    rig.clock.run(1.0)
    assert rig.begun == [str(number) for number in range(AT_ONCE)]
    assert [turn.reason for turn in turns[-2:]] == ["other resyncs of this node come before it"] * 2
    turns[AT_ONCE].give_back()  # it does not want any more
    turns[0].give_back(REGION_BYTES)
    turns[0].give_back(REGION_BYTES)
    rig.clock.run(1.0)
    assert rig.begun[AT_ONCE:] == [str(AT_ONCE + 1)]
    assert (turns[-2].reason, turns[-1].reason != "") == ("", True)


def test_two_families_get_their_turns_in_turn() -> None:
    rig = Rig()
    left = {"a": 20, "b": 20}

    def want(name: str) -> None:
        if left[name]:
            left[name] -= 1
            turn = rig.budget.ask(lambda: begin(name))
            turns[name].append(turn)

    def begin(name: str) -> None:
        rig.begun.append(name)
        turn = turns[name][-1]
        want(name)
        rig.clock.call_later(0.01, lambda: turn.give_back(REGION_BYTES))

    turns: dict[str, list[Turn]] = {"a": [], "b": []}
    want("a")
    want("b")
    rig.clock.run(5.0)
    assert rig.begun == ["a", "b"] * 20


def copies_in(rig: Rig, duration_s: float, moved_bytes: int) -> int:
    """How many regions are copied while clients move so much for each."""
    done = 0

    def begin() -> None:
        nonlocal turn
        rig.clock.call_later(0.001, finish)

    def finish() -> None:
        nonlocal turn, done
        done += 1
        rig.moved_bytes += moved_bytes
        turn.give_back(REGION_BYTES)
        turn = rig.budget.ask(begin)

    turn = rig.budget.ask(begin)
    rig.clock.run(duration_s)
    found = done
    rig.clock.run(0.02)  # somebody waits again
    return found


def test_the_rate_is_kept_and_an_eighth_of_it_while_clients_are_busy() -> None:
    quiet, busy = Rig(64 << 20), Rig(64 << 20)
    assert 155 <= copies_in(quiet, 10.0, 0) <= 165
    assert quiet.budget.reason == "resyncs of this node are at their rate"
    assert 155 * BUSY_SHARE <= copies_in(busy, 10.0, 2 * REGION_BYTES) <= 165 * BUSY_SHARE
    assert busy.budget.reason == "clients are busy"


def test_turns_of_what_hardly_differs_are_many_and_cost_something() -> None:
    rig = Rig(64 << 20)
    turns = [rig.ask(str(number)) for number in range(MOST_AT_ONCE + AT_ONCE)]
    for _ in range(MOST_AT_ONCE):
        rig.clock.run(0.01)
        for turn in turns:
            if turn.is_given:
                turn.shrink(4096)
                turn.shrink(REGION_BYTES)  # it never grows
    assert len(rig.begun) == MOST_AT_ONCE
    for turn in turns[:MOST_AT_ONCE]:
        turn.give_back(4096)
        turn.shrink(1)  # too late
    rig.clock.run(MOST_AT_ONCE * LEAST_BYTES / (64 << 20) - 0.1)
    assert len(rig.begun) == MOST_AT_ONCE + 1  # the first one was slow
    rig.clock.run(0.2)
    assert len(rig.begun) == MOST_AT_ONCE + AT_ONCE
