"""How much of the node's map cache each open family may fill.

Theory. A node may have a thousand volumes of which three are used, and nobody knows which. So shares follow use. Every
LOOK_S each family is looked at: one that fills its share, and has read pages or appended since, asks for twice as much;
another busy one for a little more than it holds, and one at rest for what it holds. The busy ones are served first,
max-min fairly (as in A. Demers et al., "Analysis and Simulation of a Fair Queueing Algorithm", 1989): nobody gets less
than an equal part unless he asks for less, and what he leaves goes to those that ask for more. What nobody asks for is
everybody's, in equal parts.

Rules
- What all hold, and what they may add to it until the next look, is no more than the cache: who is to grow at the cost
  of another one grows as that one shrinks. But one that is opened between two looks begins with an equal part.
- Whatever its share, a family may hold the few pages that one step of it needs (MIN_PAGES in metadata/pages.py).

Known weakness: a family whose reads are all answered from memory counts as one at rest. If another one asks for its
room it loses some, misses it, and is busy from then on.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nbdserver.logdisk.disk import LogDisk

LOOK_S = 2.0
_FULL = 0.75  # of its share is held: it might hold more
_MARGIN = 0.25  # of what is held
_AT_ONCE = 64  # families that are looked at while clients wait: 0.3 ms


class Use(NamedTuple):
    """What a family makes of its share."""

    held_bytes: int
    share_bytes: int
    is_busy: bool


class CacheShares:
    """Looks at the families of one process from time to time."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}  # what of a family changes when it is busy

    async def look(self, cache_bytes: int, disks: Mapping[str, LogDisk]) -> None:
        """Give each open family its share until the next look. Some may be closed meanwhile."""
        uses: list[Use] = []
        seen = {}
        for family, disk in disks.items():
            maps = disk.maps
            seen[family] = now = (disk.log.txid, maps.logical.loads + maps.middle.loads)
            uses.append(Use(maps.held_bytes, maps.cache_bytes, self._seen.get(family, now) != now))
            if len(uses) % _AT_ONCE == 0:
                await asyncio.sleep(0)
        self._seen = seen
        given = shares(cache_bytes, uses)
        await asyncio.sleep(0)
        for place, (disk, use, share_bytes) in enumerate(zip(disks.values(), uses, given, strict=True)):
            disk.maps.set_cache_bytes(share_bytes)
            if use.held_bytes > share_bytes:
                disk.background.stir()  # which lets go of pages
            if place % _AT_ONCE == 0:
                await asyncio.sleep(0)


def shares(cache_bytes: int, uses: Sequence[Use]) -> list[int]:
    """The share of each, in bytes."""
    busy = _fair(cache_bytes, [_wanted(use) if use.is_busy else 0 for use in uses])
    at_rest = _fair(cache_bytes - sum(busy), [0 if use.is_busy else use.held_bytes for use in uses])
    left_bytes = (cache_bytes - sum(busy) - sum(at_rest)) // max(1, len(uses))
    targets = [one + other + left_bytes for one, other in zip(busy, at_rest, strict=True)]
    growths = [max(0, target - use.held_bytes) for target, use in zip(targets, uses, strict=True)]
    free_bytes = max(0, cache_bytes - sum(use.held_bytes for use in uses))
    part = min(1.0, free_bytes / max(1, sum(growths)))
    return [
        min(target, use.held_bytes) + int(growth * part)
        for target, use, growth in zip(targets, uses, growths, strict=True)
    ]


def _wanted(use: Use) -> int:
    """By a busy one."""
    if use.held_bytes >= _FULL * use.share_bytes:
        return 2 * max(use.held_bytes, use.share_bytes)
    return int(use.held_bytes * (1 + _MARGIN))


def _fair(total_bytes: int, asked: Sequence[int]) -> list[int]:
    """Max-min fair parts of a total: what each asks for, but no more than a level that is the same for all."""
    left_bytes, level_bytes = total_bytes, 0
    for place, ask in enumerate(sorted(asked)):
        level_bytes = left_bytes // (len(asked) - place)
        if ask > level_bytes:
            break
        left_bytes -= ask
        level_bytes = ask
    return [min(ask, level_bytes) for ask in asked]
