"""Limits of a volume: never more than the rate and the burst, never less than was promised, in turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.volume.limits import Limits, Throttle, TokenBucket
from protocol.agreement import ReplyStyle
from protocol.nbd import Command
from tests.unit.session_rig import HandClock, Rig, Wire, make_rig

rates = st.integers(1, 1_000_000)


@given(rates, st.integers(0, 10_000), st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5000)), max_size=40))
def test_no_window_holds_more_than_rate_and_burst(rate: int, burst: int, steps: list[tuple[float, int]]) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    now_s = 0.0
    taken: list[tuple[float, int]] = []
    for pause_s, wanted in steps:
        now_s += pause_s
        got = bucket.available(now_s, wanted)
        bucket.take(got)
        taken.append((now_s, got))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            window_s = taken[last][0] - taken[first][0]
            assert sum(got for _, got in taken[first : last + 1]) <= rate * window_s + (burst or rate) + 1


@given(rates, st.integers(0, 10_000), st.integers(0, 100_000))
def test_after_the_wait_there_is_a_token(rate: int, burst: int, debt: int) -> None:
    bucket = TokenBucket(rate, burst, 5.0)
    bucket.take((burst or rate) + debt)
    wait_s = bucket.wait_s(5.0)
    assert wait_s == pytest.approx((debt + 1) / rate)
    assert bucket.available(5.0 + wait_s / 2, 10) == 0
    assert bucket.available(5.0 + wait_s, 10) >= 1


def test_a_rate_of_none_limits_nothing() -> None:
    bucket = TokenBucket(0, 0, 0.0)
    bucket.take(1 << 50)
    assert bucket.available(0.0, 77) == 77
    assert bucket.wait_s(0.0) == 0


def limited(limits: Limits) -> Rig:
    rig = make_rig()
    rig.export.limit(limits, rig.clock)
    return rig


def reads(wire: Wire, count: int, length: int = 512) -> None:
    """Let a client have `count` reads under way; it is read only while the server wants to."""
    wire.feed(b"".join(wire.request(Command.READ, 0, length)[1] for _ in range(count)))


@pytest.mark.parametrize("style", list(ReplyStyle))
@pytest.mark.parametrize("length", [512, 4096])
def test_a_deep_queue_is_answered_at_the_rate_after_the_burst(style: ReplyStyle, length: int) -> None:
    rig = limited(Limits(iops=10, iops_burst=20))
    wire = rig.wire(style)
    reads(wire, 100, length)
    rig.clock.run()
    assert len(wire.answers()) == 20
    assert not wire.connection.reading
    answered = 0
    for second in range(1, 9):
        rig.clock.advance(1.0)
        answered += len(wire.answers())
        assert answered == second * 10
        assert wire.connection.reading == (answered == 80)
    assert wire.session.counters.throttled_us == pytest.approx(8e6, rel=0.01)


def test_bytes_that_were_moved_too_early_are_waited_for() -> None:
    rig = limited(Limits(bandwidth=64 << 10))
    wire = rig.wire()
    big, small = wire.request(Command.READ, 0, 256 << 10)[1], wire.request(Command.READ, 0, 512)[1]
    wire.feed(big + small)
    assert len(wire.answers()) == 1
    rig.clock.advance(2.9)
    assert not wire.answers()
    rig.clock.advance(0.2)
    assert len(wire.answers()) == 1


def test_connections_of_one_volume_are_served_in_turn() -> None:
    rig = limited(Limits(iops=10, iops_burst=1))
    deep, shallow = rig.wire(), rig.wire()
    reads(deep, 60)
    reads(shallow, 5)
    rig.clock.advance(1.0)
    assert abs(len(deep.answers()) - len(shallow.answers())) <= 2


def test_another_volume_does_not_wait() -> None:
    limits = Throttle(Limits(iops=1), HandClock())
    rig = limited(Limits())
    assert rig.export.throttle is None
    assert limits.allowance(5, 5) == (1, 5)
    wire = rig.wire()
    reads(wire, 100)
    assert len(wire.answers()) == 100


def test_a_limit_that_is_taken_away_lets_everybody_go_on() -> None:
    rig = limited(Limits(iops=1))
    wire = rig.wire()
    reads(wire, 50)
    assert len(wire.answers()) == 1
    rig.export.limit(Limits(), rig.clock)
    rig.clock.run()
    assert len(wire.answers()) == 49
    assert wire.connection.reading


def test_a_client_that_leaves_while_it_waits_is_forgotten() -> None:
    rig = limited(Limits(iops=1))
    gone, stays = rig.wire(), rig.wire()
    reads(gone, 5)
    reads(stays, 5)
    gone.answers()
    stays.answers()
    gone.session.lost("left")
    answered = 0
    for _ in range(40):
        rig.clock.advance(0.1)
        answered += len(stays.answers())
    assert answered == 4
    assert not gone.answers()
