"""Who is probably dead: the failure detector.

Theory: like a doctor who listens to a pulse: how long a silence is alarming depends on how regular the beats were.
The mean of the intervals and their mean deviation are kept as moving averages; silence beyond the mean plus six mean
deviations is suspicious, within bounds of six and twelve nominal intervals, so that a few lost beats alarm nobody and
a very irregular pulse does not hide a death for ever.

Rule: a suspicion is a reason to look, ask or choose another. It takes nothing away from anybody; only an epoch does.
"""

WEIGHT = 1 / 8  # of the newest interval: about the last ten count
DEVIATIONS = 6
LOW = 6  # nominal intervals: five beats lost in a row still alarm nobody; at 30 % loss that is one in 1,400
HIGH = 12


class Suspicion:
    """Of one node, whose beats come every `nominal_s` or so."""

    __slots__ = ("_deviation_s", "_heard_s", "_mean_s", "_nominal_s")

    def __init__(self, nominal_s: float, now_s: float) -> None:
        self._nominal_s = nominal_s
        self._heard_s = now_s
        self._mean_s = nominal_s
        self._deviation_s = 0.0

    def heard(self, now_s: float) -> None:
        """A sign of life."""
        interval_s = now_s - self._heard_s
        self._heard_s = now_s
        # A long silence is not a pulse: it says nothing about the next one.
        if interval_s < HIGH * self._nominal_s:
            self._deviation_s += WEIGHT * (abs(interval_s - self._mean_s) - self._deviation_s)
            self._mean_s += WEIGHT * (interval_s - self._mean_s)

    @property
    def suspect_at_s(self) -> float:
        """When silence becomes suspicious."""
        patience_s = self._mean_s + DEVIATIONS * self._deviation_s
        return self._heard_s + min(max(patience_s, LOW * self._nominal_s), HIGH * self._nominal_s)

    def suspects(self, now_s: float) -> bool:
        return now_s >= self.suspect_at_s
