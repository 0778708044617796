"""The watch counts turns of the loop that were too long, and can say where they were."""

import asyncio
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nbdserver.host.watching import HELD_S, WATCH_VARIABLE, LoopWatch


@pytest.fixture
def no_timer() -> Iterator[None]:
    """What `new_loop` may have set is taken back."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def hold() -> None:
    until_s = time.monotonic() + 4 * HELD_S
    while time.monotonic() < until_s:
        pass


async def turns() -> None:
    await asyncio.sleep(3 * HELD_S)  # waiting is not holding
    hold()
    await asyncio.sleep(0)


def watched(coroutine: Any) -> tuple[LoopWatch, list[tuple[str, dict[str, Any]]]]:
    watch = LoopWatch()
    reported: list[tuple[str, dict[str, Any]]] = []
    watch.report = lambda kind, fields: reported.append((kind, fields))
    with asyncio.Runner(loop_factory=watch.new_loop) as runner:
        runner.run(coroutine)
    return watch, reported


def test_a_turn_that_is_too_long_is_counted_and_waiting_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WATCH_VARIABLE, raising=False)
    watch, reported = watched(turns())
    assert watch.held >= 1
    assert watch.longest_s >= 4 * HELD_S
    assert reported == []


@pytest.mark.usefixtures("no_timer")
def test_a_watched_loop_says_what_held_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WATCH_VARIABLE, "1")
    _, reported = watched(turns())
    found = [
        fields for kind, fields in reported if kind == "loop-held" and "hold (test_watching.py" in fields["where"][-1]
    ]
    assert len(found) == 1
    assert found[0]["ms"] >= 4 * HELD_S * 1000
    assert 0 < found[0]["cpu_ms"] <= found[0]["ms"] + 1


@pytest.mark.usefixtures("no_timer")
def test_a_turn_in_which_the_process_did_not_run_shows_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    async def asleep() -> None:
        time.sleep(10 * HELD_S)
        await asyncio.sleep(0)

    monkeypatch.setenv(WATCH_VARIABLE, "1")
    _, reported = watched(asleep())
    (fields,) = [fields for _, fields in reported if "asleep (test_watching.py" in fields["where"][-1]]
    assert fields["ms"] >= 10 * HELD_S * 1000
    assert fields["cpu_ms"] < fields["ms"] / 2
