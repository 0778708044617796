"""Events: what happened on this node that an operator may ask about later.

A ring in memory answers `nbdserver events`; the same lines go to DATA/events.jsonl, which is turned over to
events.1.jsonl when it has grown, so that both are bounded. A kind that comes too often (a client that reconnects in
a loop) is thinned: at most BURST of a kind and RATE_PER_S after that; the next one that passes says how many were
left out.

Known weakness: lines are not synced; a power cut may take the last ones. They tell, nothing decides by them.
"""

import json
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_EVENTS = 2000
MAX_FILE_BYTES = 4 << 20
BURST = 50
RATE_PER_S = 1.0

Event = dict[str, Any]


class Thinning:
    """How many events of each kind may still pass: a bucket of BURST, filled at RATE_PER_S. Time is an argument."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float, int]] = {}

    def admit(self, kind: str, now_s: float) -> int | None:
        """None: leave it out. Otherwise how many of this kind were left out before it."""
        level, filled_s, left_out = self._buckets.get(kind, (float(BURST), now_s, 0))
        level = min(float(BURST), level + (now_s - filled_s) * RATE_PER_S)
        if level < 1:
            self._buckets[kind] = (level, now_s, left_out + 1)
            return None
        self._buckets[kind] = (level - 1, now_s, 0)
        return left_out


class EventLog:
    """The ring and its file. Sequence numbers go on where the file ends."""

    def __init__(self, path: Path, now_s: Callable[[], float]) -> None:
        self._path = path
        self._now_s = now_s
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._thinning = Thinning()
        self._followers: set[Callable[[], None]] = set()
        for part in (self._turned_path, path):
            self._events.extend(_read(part))
        self._sequence = self._events[-1]["sequence"] if self._events else 0
        self._file = path.open("ab", buffering=0)
        self._torn = self._file.tell() > 0  # perhaps: an empty line ends what a crash tore, and is skipped

    @property
    def _turned_path(self) -> Path:
        return self._path.with_suffix(".1.jsonl")

    @property
    def last_sequence(self) -> int:
        return int(self._sequence)

    def add(self, kind: str, fields: dict[str, Any]) -> None:
        """Record an event; `fields` is what JSON can hold."""
        left_out = self._thinning.admit(kind, self._now_s())
        if left_out is None:
            return
        self._sequence += 1
        event: Event = {"sequence": self._sequence, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        event |= {"kind": kind, **fields}
        if left_out:
            event["left_out"] = left_out
        self._events.append(event)
        self._write(event)
        for wake in tuple(self._followers):
            wake()

    def since(self, sequence: int, limit: int = MAX_EVENTS) -> list[Event]:
        """Return the newest `limit` events after `sequence`, oldest first."""
        found = [event for event in self._events if event["sequence"] > sequence]
        return found[-limit:] if limit else []

    def follow(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` after each event; returns what ends that."""
        self._followers.add(wake)
        return lambda: self._followers.discard(wake)

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        try:
            line = b"\n" * self._torn + json.dumps(event, default=str).encode() + b"\n"
            self._torn = self._file.write(line) < len(line)
            if self._file.tell() > MAX_FILE_BYTES:
                self._file.close()
                self._path.rename(self._turned_path)
                self._file = self._path.open("ab", buffering=0)
        except OSError:
            self._torn = True  # a full disk must not stop the node from saying, in memory, that the disk is full


def _read(path: Path) -> list[Event]:
    try:
        lines = path.read_bytes().splitlines()[-MAX_EVENTS:]
    except OSError:
        return []
    events: list[Event] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a crash
        if isinstance(event, dict) and isinstance(event.get("sequence"), int):
            events.append(event)
    return events
