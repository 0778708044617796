"""The event log: bounded in memory and on disk, thinned, and whole after a restart or a torn line."""

import json
from pathlib import Path

import pytest

from nbdserver.node import events
from nbdserver.node.events import BURST, EventLog, Thinning


def test_a_burst_passes_and_then_one_a_second_that_says_how_many_were_left_out() -> None:
    thinning = Thinning()
    assert [thinning.admit("x", 0.0) for _ in range(BURST)] == [0] * BURST
    assert [thinning.admit("x", 0.0) for _ in range(3)] == [None] * 3
    assert thinning.admit("y", 0.0) == 0
    assert thinning.admit("x", 1.0) == 3
    assert thinning.admit("x", 1.5) is None


def test_events_are_there_after_opening_again_and_numbers_go_on(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", lambda: 0.0)
    log.add("one", {"volume": "disk0"})
    log.close()
    again = EventLog(tmp_path / "events.jsonl", lambda: 0.0)
    again.add("two", {})
    assert [(event["sequence"], event["kind"]) for event in again.since(0)] == [(1, "one"), (2, "two")]
    assert [event["kind"] for event in again.since(1)] == ["two"]
    again.close()


def test_a_line_that_a_crash_tore_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"sequence":1,"kind":"one"}\n{"sequence":2,"ki')
    log = EventLog(path, lambda: 0.0)
    log.add("three", {})
    log.close()
    again = EventLog(path, lambda: 0.0)
    assert [event["kind"] for event in again.since(0)] == ["one", "three"]
    again.close()


def test_the_file_is_turned_over_and_never_more_than_two_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_FILE_BYTES", 1000)
    seconds = iter(range(10_000))
    log = EventLog(tmp_path / "events.jsonl", lambda: float(next(seconds)))
    for number in range(200):
        log.add("x", {"number": number})
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"events.jsonl", "events.1.jsonl"}
    assert max(sizes.values()) < 1200
    again = EventLog(tmp_path / "events.jsonl", lambda: 0.0)
    assert again.last_sequence == 200
    again.close()


def test_followers_are_woken_until_they_stop_following(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", lambda: 0.0)
    woken: list[int] = []
    unfollow = log.follow(lambda: woken.append(1))
    log.add("x", {})
    unfollow()
    log.add("x", {})
    assert woken == [1]
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["kind"] == "x"
    log.close()
