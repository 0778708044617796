"""What is known of each family's scrub, and which is next: pure, and as a file that survives restarts.

    (never) ──► waiting ──► running ──► done          running ──► stopped: on demand
                   ▲                      │           waiting, running ──► failed: the volume cannot be read
                   └──────────────────────┘  when `interval` has gone by, or on demand

Rules
- The wall clock is an argument. It says when the next scrub is due and nothing else; one that was set back makes a
  scrub due too early, not too late.
- The interval counts from the end of the last scrub, finished or not, or from when the family was first seen: a new
  volume is not scrubbed at once.
- A file that cannot be understood is as if there was none: what it says can be found out again.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

VERSION = 1

NEVER, WAITING, RUNNING, DONE, STOPPED, FAILED = "never", "waiting", "running", "done", "stopped", "failed"


@dataclass(frozen=True)
class ScrubState:
    """Of one family. Times are seconds of the wall clock, 0: never."""

    state: str = NEVER
    reason: str = ""
    """Why it failed."""
    sequence: int = 0
    """See logdisk/scrub.py's Progress, here and below."""
    stop: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    damaged_blocks: int = 0
    since_s: float = 0.0
    """From when the interval counts."""
    began_s: float = 0.0
    completed_s: float = 0.0

    @property
    def is_active(self) -> bool:
        return self.state in (WAITING, RUNNING)

    def waiting(self) -> "ScrubState":
        """From the beginning."""
        return ScrubState(state=WAITING, since_s=self.since_s, completed_s=self.completed_s)

    def running(self, now_s: float) -> "ScrubState":
        return replace(self, state=RUNNING, began_s=self.began_s or now_s)

    def ended(self, state: str, now_s: float, reason: str = "") -> "ScrubState":
        """It is over: DONE, STOPPED or FAILED."""
        completed_s = now_s if state == DONE else self.completed_s
        return replace(self, state=state, reason=reason, since_s=now_s, completed_s=completed_s)


def due(state: ScrubState, interval_s: float, now_s: float) -> bool:
    """Whether the next one should begin by itself; `interval_s` 0: never."""
    if not interval_s or state.is_active:
        return False
    return not 0 <= now_s - state.since_s < interval_s


class ScrubPlan:
    """The states by family, in the order in which they wait."""

    def __init__(self, text: str = "") -> None:
        """Take what `encode` returned; anything else is nothing."""
        self._states = _decode(text)

    def encode(self) -> str:
        """Return the file's text."""
        families = {family: asdict(state) for family, state in self._states.items()}
        return json.dumps({"version": VERSION, "families": families}, indent=1) + "\n"

    def state(self, family: str) -> ScrubState:
        return self._states.get(family, ScrubState())

    def change(self, family: str, state: ScrubState) -> None:
        """One that begins to wait goes to the end of the line."""
        if state.state == WAITING and self.state(family).state != WAITING:
            self._states.pop(family, None)
        self._states[family] = state

    def know(self, families: Iterable[str], now_s: float) -> None:
        """These are all there are: forget others, and count the interval of new ones from now."""
        there = dict.fromkeys(families)
        self._states = {family: state for family, state in self._states.items() if family in there}
        for family in there:
            self._states.setdefault(family, ScrubState(since_s=now_s))

    def schedule(self, interval_s: float, now_s: float) -> list[str]:
        """Let wait what is due; returns it, the longest overdue first."""
        found = [family for family, state in self._states.items() if due(state, interval_s, now_s)]
        found.sort(key=lambda family: self._states[family].since_s)
        for family in found:
            self.change(family, self.state(family).waiting())
        return found

    def next(self) -> str:
        """The family that runs, or else the one that has waited longest, or ""."""
        for wanted in (RUNNING, WAITING):
            for family, state in self._states.items():
                if state.state == wanted:
                    return family
        return ""

    def active(self) -> list[str]:
        """Those that run or wait."""
        return [family for family, state in self._states.items() if state.is_active]


def _decode(text: str) -> dict[str, ScrubState]:
    try:
        content: Any = json.loads(text)
        if content["version"] != VERSION:
            return {}
        known = {item.name: type(item.default) for item in fields(ScrubState)}
        states = {}
        for family, values in content["families"].items():
            for name, value in values.items():
                if not isinstance(value, known[name]) and not (known[name] is float and isinstance(value, int)):
                    return {}
            states[str(family)] = ScrubState(**values)
        return states
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
