"""What the status page shows: the node's status, what was done lately, and the rows that were asked for.

Theory. Many may look, each every two seconds, also at a node with a thousand volumes. So there is one look at the data
process for all of them, at most one in SHORTEST_S, and one in SLOT_S where looking takes more than a part in LOOKS_COST
of the time; and everybody gets the rows that they asked for, not all. History is taken all the time: who opens the page
because something is slow sees what the last minutes were like.

In a cluster the rows are the volumes of all nodes, as far as the others have told them (volumes_told.py).

Rules
- Filtering, sorting and cutting are pure (`select`).
- A look that fails leaves what was seen before; `seen_s` says how old that is.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from metadata.registry import RegistryError
from nbdserver.node.activity import IDLE, SLOT_S, Activity, Rates
from nbdserver.node.errors import NodeError
from nbdserver.node.events import Event, EventLog
from nbdserver.node.replica_view import ELSEWHERE, UNOWNED
from nbdserver.node.volumes_told import Row, busiest, told

SHORTEST_S = 1.0
LOOKS_COST = 20
MOST_EVENTS = 30
MOST_SHOWN = 10
"""Of scrubs that are under way or failed, of replicas that are not in sync, and of volumes with a limit."""

TROUBLED = ("failed", "full", "unknown", "starting")
"""States of a volume that somebody should look at first, the worst first."""

COPIED = ("name", "state", "reason", "size_bytes", "base", "snapshots", "clients")

SORTS: dict[str, Callable[[Row], Any]] = {
    "trouble": lambda row: (*_trouble(row), row["name"]),
    "name": lambda row: row["name"],
    "node": lambda row: (row["node"], row["name"]),
    "size": lambda row: (-row["size_bytes"], row["name"]),
    "data": lambda row: (-(row["live_bytes"] or 0), row["name"]),
    "clients": lambda row: (-(row["clients"] or 0), row["name"]),
    "requests": lambda row: (-(row["requests_per_s"] or 0), row["name"]),
    "bytes": lambda row: (-(row["bytes_per_s"] or 0), row["name"]),
    "latency": lambda row: (-(row["latency_us"] or 0), row["name"]),
}
"""How volumes can be ordered: names from a to z, numbers from the largest, those that are not known last."""

Elsewhere = Callable[[], tuple[list[Row], int]]
"""The rows of volumes on other nodes, and how many there are."""


class Overview:
    """Of one node, for all who look."""

    def __init__(
        self,
        status: Callable[[], Awaitable[dict[str, Any]]],
        events: EventLog,
        now_s: Callable[[], float] = time.monotonic,
        elsewhere: Elsewhere = lambda: ([], 0),
    ) -> None:
        """`status` is `Node.status`."""
        self._status = status
        self._elsewhere = elsewhere
        self._events = events
        self._now_s = now_s
        self._activity = Activity()
        self._seen: dict[str, Any] = {}
        self._rows: list[Row] | None = None  # of `_seen`, once they are asked for, and those elsewhere
        self._total = 0
        self._seen_s = 0.0
        self._next_s = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._lines: list[Event] = []
        self._told_sequence = 0

    async def watch(self) -> None:
        """Take the history, for ever."""
        while True:
            with contextlib.suppress(NodeError, RegistryError, OSError):  # who looks is told of it
                await self._look()
                self._take()
            await asyncio.sleep(SLOT_S)

    async def show(self, match: str = "", sort: str = "trouble", limit: int = 50) -> dict[str, Any]:
        """What the page shows: of the volumes whose name or description has `match`, the first `limit` by one of
        SORTS."""
        if not self._seen or self._now_s() >= self._next_s:
            await self._look()
        seen = self._seen
        own = seen["volumes"]
        if self._rows is None:
            elsewhere, count = self._elsewhere()
            self._rows, self._total = [*map(self._row, own), *elsewhere], len(own) + count
        chosen = select(self._rows, match, sort)
        rows = [row | _history(self._activity.history(row["key"])) for row in chosen[:limit]]
        slots = self._activity.together()
        return {
            **seen,
            **_of_scrubs(seen["scrubs"]),
            "resync": seen["resync"][:MOST_SHOWN],
            "resync_count": len(seen["resync"]),
            "fills": _fullest(seen["fills"]),
            "seen_s": round(self._now_s() - self._seen_s, 1),
            "slot_s": SLOT_S,
            "states": _counted([volume["state"] for volume in own]),
            "clients": sum(volume["clients"] or 0 for volume in own),
            "traffic": _shown(slots[-1] if slots else IDLE) | _history(slots),
            "volumes": {"total": self._total, "matching": len(chosen), "rows": rows},
            "events": self._told(),
        }

    def _told(self) -> list[Event]:
        if self._events.last_sequence != self._told_sequence:
            self._lines, self._told_sequence = together(self._events.since(0)), self._events.last_sequence
        return self._lines

    def load(self) -> dict[str, Any]:
        """How busy the node is, as of the last slot."""
        slots = self._activity.together()
        traffic = _shown(slots[-1] if slots else IDLE)
        del traffic["bytes_per_s"]
        volumes = self._seen.get("volumes", ())
        clients = sum(volume["clients"] or 0 for volume in volumes)
        rows = [self._row(volume) for volume in volumes]
        return {"volumes": len(volumes), "clients": clients, **traffic, "busiest": busiest(rows)}

    def told(self) -> bytes:
        """What the other nodes are told of this one's volumes, those in trouble first; empty before the first look."""
        if not self._seen:
            return b""
        volumes = [volume for volume in self._seen["volumes"] if volume["state"] != UNOWNED]  # all know of these
        return told(select([self._row(volume) for volume in volumes], "", "trouble"))

    def _take(self) -> None:
        """A slot of the history ends."""
        self._activity.take(self._now_s(), {_key(volume): volume["traffic"] for volume in self._seen["volumes"]})
        self._rows = None

    async def _look(self) -> None:
        """Look, or wait for the look that is under way."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look_now())
        await asyncio.shield(self._looking)

    async def _look_now(self) -> None:
        began_s = self._now_s()
        try:
            seen = await self._status()
            here = [volume for volume in seen["volumes"] if volume["state"] != ELSEWHERE]  # who serves it tells of it
            self._seen, self._rows = seen | {"volumes": here}, None
            self._seen_s = self._now_s()
        finally:
            self._looking = None
            took_s = self._now_s() - began_s
            self._next_s = began_s + min(max(SHORTEST_S, LOOKS_COST * took_s), SLOT_S)

    def _row(self, volume: Mapping[str, Any]) -> Row:
        key = _key(volume)
        settings, disk = volume["settings"], volume["disk"]
        return {
            "key": key,
            "node": "" if volume["state"] == UNOWNED else (self._seen.get("cluster") or {}).get("node", ""),
            **{name: volume[name] for name in COPIED},
            "description": settings["description"],
            "read_only": settings["read_only"],
            "replicas": volume["replicas"]["wanted"],
            "in_sync": volume["replicas"]["in_sync"],
            "live_bytes": disk.get("live_bytes"),
            "shares_data": disk.get("volumes", 1) > 1,
            "damaged_blocks": sum(block["volume"] == volume["name"] for block in disk.get("damaged", ())),
            **_shown(self._activity.now(key)),
        }


def select(rows: Sequence[Row], match: str, sort: str) -> list[Row]:
    """The rows whose name, description or node has every word of `match`, whatever its case, in the order of `sort`."""
    words = match.casefold().split()
    return sorted((row for row in rows if not words or _matches(row, words)), key=SORTS[sort])


def _matches(row: Row, words: Sequence[str]) -> bool:
    text = f"{row['name']} {row['description']} {row['node']}".casefold()
    return all(word in text for word in words)


def together(events: Sequence[Event]) -> list[Event]:
    """The newest MOST_EVENTS lines, newest first. What happens to the same thing again and again is one line, with how
    often (`times`) and since when (`since`): a volume on the edge of being full does not hide what else there was."""
    lines: dict[tuple[str, ...], Event] = {}
    for event in reversed(events):
        host = str(event.get("peer", "")).rpartition(":")[0]  # of a client that connects again the port is another
        same = (host, *(str(event.get(field)) for field in ("kind", "volume", "export", "subject", "node", "reason")))
        line = lines.get(same)
        if line is not None:
            line["times"] += 1
            line["since"] = event["time"]
        elif len(lines) < MOST_EVENTS:
            lines[same] = {**event, "times": 1, "since": event["time"]}
    return list(lines.values())


def _trouble(row: Row) -> tuple[int, int]:
    state = row["state"]
    return TROUBLED.index(state) if state in TROUBLED else len(TROUBLED), -(row["damaged_blocks"] > 0)


def _key(volume: Mapping[str, Any]) -> str:
    """What a volume is called for as long as it lives; its name may change."""
    return f"{volume['family']}/{volume['number']}"


def _shown(rates: Rates) -> Row:
    return {
        "requests_per_s": round(rates.requests_per_s, 1),
        "bytes_per_s": round(rates.bytes_per_s),
        "read_bytes_per_s": round(rates.read_bytes_per_s),
        "write_bytes_per_s": round(rates.write_bytes_per_s),
        "latency_us": round(rates.latency_us),
    }


def _history(slots: Sequence[Rates]) -> Row:
    return {
        "requests_history": [round(slot.requests_per_s) for slot in slots],
        "bytes_history": [round(slot.bytes_per_s) for slot in slots],
    }


def _of_scrubs(scrubs: Sequence[Row]) -> Row:
    """Those that are under way or failed; how many are in each state; when the next one is due."""
    due = [scrub["next"] for scrub in scrubs if scrub["next"]]
    return {
        "scrubs": [scrub for scrub in scrubs if scrub["state"] in ("running", "failed")][:MOST_SHOWN],
        "scrub_states": _counted([scrub["state"] for scrub in scrubs]),
        "scrub_next": min(due, default=""),
    }


def _fullest(fills: Sequence[Row]) -> list[Row]:
    """The node's, and the volumes' that are the fullest."""
    volumes = [fill for fill in fills if fill["subject"].startswith("volume ")]
    node = [fill for fill in fills if not fill["subject"].startswith("volume ")]
    return node + sorted(volumes, key=lambda fill: -float(fill["percent"]))[:MOST_SHOWN]


def _counted(states: Sequence[str]) -> dict[str, int]:
    return {state: states.count(state) for state in sorted(set(states))}
