"""Rates and their history, out of totals that only grow."""

from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.activity import IDLE, KEPT, Activity, Rates, Traffic


def total(requests: int, read_bytes: int = 0, write_bytes: int = 0, latency_us: int = 0) -> Traffic:
    return {
        "requests": requests,
        "read_bytes": read_bytes,
        "write_bytes": write_bytes,
        "answers": requests,
        "latency_us": latency_us,
    }


def test_rates_are_by_the_time_that_passed() -> None:
    activity = Activity()
    activity.take(100.0, {"a": total(10)})
    assert activity.now("a") is IDLE
    activity.take(104.0, {"a": total(30, 4096, 8192, 2000)})
    assert activity.now("a") == Rates(5.0, 1024.0, 2048.0, 100.0)
    assert activity.now("a").bytes_per_s == 3072.0


def test_totals_that_fell_are_those_of_a_new_start() -> None:
    activity = Activity()
    activity.take(0.0, {"a": total(1000)})
    activity.take(5.0, {"a": total(10)})
    assert activity.now("a").requests_per_s == 2.0


def test_a_volume_that_is_new_has_done_all_of_it_lately() -> None:
    activity = Activity()
    activity.take(0.0, {})
    activity.take(5.0, {"a": total(10)})
    assert activity.now("a").requests_per_s == 2.0


def test_what_is_gone_and_what_rests_is_forgotten() -> None:
    activity = Activity()
    for second, totals in enumerate(({"a": total(0), "b": total(0)}, {"a": total(1), "b": total(1)}, {"a": total(2)})):
        activity.take(second, totals)
    assert len(activity.history("a")) == 2
    assert activity.history("b") == ()
    for second in range(KEPT):
        activity.take(10 + second, {"a": total(2)})
    assert activity.history("a") == ()
    assert len(activity.together()) == KEPT


def test_together_the_latency_is_that_of_the_requests() -> None:
    activity = Activity()
    activity.take(0.0, {"a": total(0), "b": total(0)})
    activity.take(1.0, {"a": total(90, latency_us=900), "b": total(10, latency_us=1000)})
    assert activity.together()[-1] == Rates(100.0, 0.0, 0.0, 19.0)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 1 << 40)), max_size=2 * KEPT))
def test_nothing_is_negative_and_nothing_grows_without_end(moments: list[dict[str, int]]) -> None:
    activity = Activity()
    for second, totals in enumerate(moments):
        activity.take(second * 5.0, {key: total(count, count, count, count) for key, count in totals.items()})
        for slots in (activity.together(), *(activity.history(key) for key in "abc")):
            assert len(slots) <= KEPT
            assert all(slot.requests_per_s >= 0 and slot.latency_us >= 0 for slot in slots)
