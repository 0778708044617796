"""Fill alarms at 80, 90 and 95 %: bytes in, crossings out.

    level  0 ──► 80 ──► 90 ──► 95       up as soon as so much is used
           0 ◄── 80 ◄── 90 ◄── 95       down when HYSTERESIS points less are used

Rules
- Nothing here asks for a time or a file: whoever looks says what is used and what there is.
- A level is left upwards at its threshold and downwards HYSTERESIS points below it, so that a level on the edge is told
  once. A jump over several thresholds crosses each of them.
- Where nothing limits (size 0) there is no alarm, and one that stood is over.
"""

from collections.abc import Iterator
from dataclasses import dataclass

THRESHOLDS = (80, 90, 95)
HYSTERESIS = 2  # percentage points

FILE_SYSTEM = "file system"
MAX_DATA = "max_data"
"""Of the node."""


@dataclass(frozen=True)
class Crossing:
    """A threshold that was crossed."""

    percent: int
    is_rising: bool


def cross(level: int, used_bytes: int, size_bytes: int) -> tuple[int, list[Crossing]]:
    """The level that stands now, after `level` (0 or a threshold), and what was crossed on the way, in order."""
    rising = [percent for percent in THRESHOLDS if percent > level and _is_reached(percent, used_bytes, size_bytes)]
    if rising:
        return rising[-1], [Crossing(percent, True) for percent in rising]
    falling = [percent for percent in _standing(level) if not _is_reached(percent - HYSTERESIS, used_bytes, size_bytes)]
    if falling:
        left = [percent for percent in _standing(level) if percent not in falling]
        return max(left, default=0), [Crossing(percent, False) for percent in falling]
    return level, []


def _standing(level: int) -> Iterator[int]:
    """The thresholds at or below a level, the highest first."""
    return (percent for percent in reversed(THRESHOLDS) if percent <= level)


def _is_reached(percent: int, used_bytes: int, size_bytes: int) -> bool:
    return size_bytes > 0 and used_bytes * 100 >= percent * size_bytes


@dataclass(frozen=True)
class Fill:
    """How full something is."""

    subject: str
    """FILE_SYSTEM, MAX_DATA, or "volume NAME" for its max-data."""
    used_bytes: int
    size_bytes: int
    """0: without limit."""

    @property
    def percent(self) -> float:
        """Rounded down to a tenth: 94.99 % is not shown as 95."""
        return self.used_bytes * 1000 // self.size_bytes / 10 if self.size_bytes else 0.0


class Alarms:
    """The levels of everything that can become full."""

    def __init__(self) -> None:
        self.fills: dict[str, Fill] = {}
        self._levels: dict[str, int] = {}

    def look(self, fills: list[Fill]) -> list[tuple[Fill, Crossing]]:
        """Take what everything is filled to now; what is not in it is forgotten. Returns what was crossed."""
        self.fills = {fill.subject: fill for fill in fills}
        self._levels = {subject: level for subject, level in self._levels.items() if subject in self.fills}
        crossed: list[tuple[Fill, Crossing]] = []
        for fill in fills:
            level, crossings = cross(self.level(fill.subject), fill.used_bytes, fill.size_bytes)
            self._levels[fill.subject] = level
            crossed += [(fill, crossing) for crossing in crossings]
        return crossed

    def level(self, subject: str) -> int:
        """The alarm that stands: 0 or a threshold."""
        return self._levels.get(subject, 0)
