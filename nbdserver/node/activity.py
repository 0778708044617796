"""How much is done lately, by volume: totals that only grow in, rates and their history out.

    totals    12  12  40  41  41  55        taken every SLOT_S
    history      0  28   1   0  14          of the last KEPT slots: what a sparkline shows

Theory. The data process counts (volume/counters.py); whoever wants rates compares two moments. That is done here, once,
for all who look, so that somebody who opens the status page sees at once what the last minutes were like.

Rules
- Time is an argument. A slot is as long as it was: rates are divided by what passed, not by what should have.
- Totals that have fallen are those of a data process that was started again: what they show is what came since.
- A key that is not among the totals any more is forgotten. Where a total is not known (a data process hangs) nothing is
  known to have been done.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

SLOT_S = 5.0
KEPT = 60


class Traffic(TypedDict):
    """What clients have done so far; numbers that only grow."""

    requests: int
    read_bytes: int
    write_bytes: int
    answers: int
    """Requests that were answered."""
    latency_us: int
    """Of all of these together."""


NO_TRAFFIC: Traffic = {"requests": 0, "read_bytes": 0, "write_bytes": 0, "answers": 0, "latency_us": 0}


@dataclass(frozen=True, slots=True)
class Rates:
    """What was done in a slot."""

    requests_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    write_bytes_per_s: float = 0.0
    latency_us: float = 0.0
    """Mean of its requests; 0.0 without any."""

    @property
    def bytes_per_s(self) -> float:
        return self.read_bytes_per_s + self.write_bytes_per_s


IDLE = Rates()


class Activity:
    """Of many volumes, by key."""

    def __init__(self) -> None:
        self._taken_s: float | None = None
        self._totals: Mapping[str, Traffic] = {}
        self._slots: dict[str, deque[Rates]] = {}
        self._together: deque[Rates] = deque(maxlen=KEPT)

    def take(self, now_s: float, told: Mapping[str, Traffic | None]) -> None:
        """Take what everything adds up to now: a slot ends. Of what is None nothing is known."""
        before, before_s = self._totals, self._taken_s
        totals = {key: total or before.get(key, NO_TRAFFIC) for key, total in told.items()}
        self._totals, self._taken_s = totals, now_s
        if before_s is None or now_s <= before_s:
            return
        slots: dict[str, deque[Rates]] = {}
        for key, total in totals.items():
            rates = _rates(before.get(key), total, now_s - before_s)
            kept = self._slots.get(key)
            if kept is None and rates is IDLE:
                continue  # most of a thousand volumes do nothing, and cost nothing
            kept = deque(maxlen=KEPT) if kept is None else kept
            kept.append(rates)
            if any(slot is not IDLE for slot in kept):
                slots[key] = kept
        self._slots = slots
        self._together.append(_added_up([kept[-1] for kept in slots.values()]))

    def now(self, key: str) -> Rates:
        """What was done in the last slot."""
        kept = self._slots.get(key)
        return kept[-1] if kept else IDLE

    def history(self, key: str) -> Sequence[Rates]:
        """The last slots, oldest first, at most KEPT; empty if nothing was done in any."""
        return tuple(self._slots.get(key, ()))

    def together(self) -> Sequence[Rates]:
        """All keys' slots added up."""
        return tuple(self._together)


def _rates(before: Traffic | None, total: Traffic, took_s: float) -> Rates:
    if before is None or total["requests"] < before["requests"]:
        before = NO_TRAFFIC
    if total == before:
        return IDLE
    answers = total["answers"] - before["answers"]
    return Rates(
        requests_per_s=(total["requests"] - before["requests"]) / took_s,
        read_bytes_per_s=(total["read_bytes"] - before["read_bytes"]) / took_s,
        write_bytes_per_s=(total["write_bytes"] - before["write_bytes"]) / took_s,
        latency_us=(total["latency_us"] - before["latency_us"]) / answers if answers else 0.0,
    )


def _added_up(rates: Sequence[Rates]) -> Rates:
    requests_per_s = sum(rate.requests_per_s for rate in rates)
    weighted = sum(rate.latency_us * rate.requests_per_s for rate in rates)
    return Rates(
        requests_per_s=requests_per_s,
        read_bytes_per_s=sum(rate.read_bytes_per_s for rate in rates),
        write_bytes_per_s=sum(rate.write_bytes_per_s for rate in rates),
        latency_us=weighted / requests_per_s if requests_per_s else 0.0,
    )
