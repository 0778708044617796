"""Scrubs, from the control process: begin, watch, stop, and begin again what a restart cut off.

Theory. The data process reads (logdisk/scrub.py); here it is decided what and when, one family at a time, and kept in
DATA/scrub.json how far it is. While one runs the data process is asked every ACTIVE_S. If it does not know of the scrub
that should run (it, or the node, was started again), the scrub goes on where it was: at most NOTE_S of reading are done
twice.

Rules
- The file is replaced whole, when a state changes and every NOTE_S of progress. It is a convenience: without it a scrub
  begins at the beginning.
- What is found damaged is the data process's to report; how many blocks stands in the state.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from metadata.registry import Family, RegistryError
from nbdserver.host.whole_files import replace_file
from nbdserver.node.config import ScrubSettings
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError
from nbdserver.node.scrub_plan import DONE, FAILED, RUNNING, STOPPED, ScrubPlan

ACTIVE_S = 1.0
IDLE_S = 60.0
NOTE_S = 30.0
RATE_OVER_S = 30.0
"""The rate that is shown is that of about so long."""

Call = Callable[..., Any]
"""`Channel.call` of the running data process."""


class Scrubs:
    """The scrubs of this node."""

    def __init__(
        self,
        path: Path,
        settings: Callable[[], ScrubSettings],
        families: Callable[[], Sequence[Family]],
        call: Call,
        event: Callable[[str, dict[str, Any]], None],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._settings = settings
        self._families = families
        self._call = call
        self._event = event
        self._now_s = now_s
        self._plan = ScrubPlan(_read(path))
        self._wake = asyncio.Event()
        self._noted = self._plan.encode()
        self._noted_s = now_s()
        self._marks: list[tuple[float, int]] = []  # (when, bytes done) of the one that runs, lately

    # -- asked by people

    def start(self, volume: str = "") -> list[dict[str, Any]]:
        """Let a volume's family be read, or all; returns what waits and runs. NotFoundError, ConflictError."""
        families = [self._find(volume)] if volume else list(self._families())
        idle = [family for family in families if not self._plan.state(family.id).is_active]
        if not idle and families:
            running = ", ".join(family.name for family in families[:5])
            raise ConflictError(f"{running} is being scrubbed already; nbdserver scrub status shows how far it is")
        for family in idle:
            self._plan.change(family.id, self._plan.state(family.id).waiting())
        self._wake.set()
        return [shown for shown in self.status() if shown["state"] in ("waiting", "running")]

    async def stop(self) -> list[str]:
        """Stop what runs, forget what waits; returns the volumes."""
        names = {family.id: family.name for family in self._families()}
        stopped = self._plan.active()
        for family in stopped:
            if self._plan.state(family).state == RUNNING:
                with contextlib.suppress(NodeError):  # a data process that is gone reads nothing
                    await self._update(await self._call("scrub_stop", family=family))
            self._end(family, STOPPED)
        self._note()
        return [names.get(family, family) for family in stopped]

    def status(self) -> list[dict[str, Any]]:
        """How far each family is, by the name of its oldest volume."""
        return [self._describe(family) for family in self._families()]

    def gauges(self, family: Family) -> dict[str, float]:
        """Of a family, for the metrics of its oldest volume."""
        state = self._plan.state(family.id)
        return {
            "scrub_running": state.state == RUNNING,
            "scrub_done_bytes": state.done_bytes,
            "scrub_total_bytes": state.total_bytes,
            "scrub_damaged_blocks": state.damaged_blocks,
            "scrub_completed_time_seconds": state.completed_s,
        }

    # -- going on

    async def watch(self) -> None:
        """Begin what is due, follow what runs, for ever."""
        while True:
            try:
                await self.step()
            except (OSError, RegistryError) as error:
                self._event("scrub-not-noted", {"reason": str(error)})
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ACTIVE_S if self._plan.next() else IDLE_S):
                    await self._wake.wait()

    async def step(self) -> None:
        """Look once."""
        now_s = self._now_s()
        self._plan.know([family.id for family in self._families()], now_s)
        for family in self._plan.schedule(self._settings().interval, now_s):
            self._event("scrub-due", {"volume": self._name(family)})
        wanted = self._plan.next()
        if wanted:
            await self._follow(wanted)
        if self._plan.encode() != self._noted and now_s - self._noted_s >= NOTE_S:
            self._note()

    async def note(self) -> None:
        """Ask how far it is, for the last time: the node ends."""
        running = self._plan.next()
        with contextlib.suppress(NodeError, OSError):  # what was noted last is less, and right
            if running:
                await self._update(await self._ask(running))
            self._note()

    async def _follow(self, family: str) -> None:
        try:
            found = await self._ask(family)
            if not found or self._plan.state(family).state != RUNNING:
                await self._begin(family)  # what it knows of is another one, or the last one of this family
            else:
                await self._update(found)
        except NodeError as error:
            if getattr(error, "kind", "") == "FamilyError":
                self._end(family, FAILED, str(error))
                self._note()
            # Otherwise the data process is being started again: it goes on then.

    async def _ask(self, family: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = await self._call(
            "scrub_progress", family=family, bytes_per_s=self._settings().rate
        )
        return found

    async def _begin(self, family: str) -> None:
        state = self._plan.state(family)
        self._marks = []
        await self._call(
            "scrub_start",
            family=family,
            bytes_per_s=self._settings().rate,
            begin={
                "sequence": state.sequence,
                "stop": state.stop,
                "done_bytes": state.done_bytes,
                "total_bytes": state.total_bytes,
                "damaged_blocks": state.damaged_blocks,
            },
        )
        if state.state != RUNNING:
            self._event("scrub-started", {"volume": self._name(family)})
        self._plan.change(family, state.running(self._now_s()))
        self._note()

    async def _update(self, found: dict[str, Any] | None) -> None:
        """What the data process says of its scrub: {family, progress, is_over, failure}, None if there is none."""
        if not found or self._plan.state(found["family"]).state != RUNNING:
            return
        family, progress = found["family"], found["progress"]
        self._plan.change(family, replace(self._plan.state(family), **progress))
        self._mark(progress["done_bytes"])
        if found["is_over"]:
            self._end(family, FAILED if found["failure"] else DONE, found["failure"])
            self._note()

    def _end(self, family: str, state: str, reason: str = "") -> None:
        now_s = self._now_s()
        before = self._plan.state(family)
        ended = before.ended(state, now_s, reason)
        self._plan.change(family, ended)
        self._marks = []
        if before.state == RUNNING or state == FAILED:
            fields: dict[str, Any] = {
                "volume": self._name(family),
                "bytes": ended.done_bytes,
                "damaged_blocks": ended.damaged_blocks,
                "took_s": round(now_s - ended.began_s, 1) if ended.began_s else 0.0,
            }
            self._event(f"scrub-{state}", {**fields, "reason": reason} if reason else fields)

    # -- describing

    def _describe(self, family: Family) -> dict[str, Any]:
        state = self._plan.state(family.id)
        rate = self._rate() if state.state == RUNNING else 0.0
        left_bytes = state.total_bytes - state.done_bytes
        interval_s = self._settings().interval
        return {
            "volume": family.name,
            "volumes": [volume.name for volume in family.volumes],
            "state": state.state,
            "reason": state.reason,
            "done_bytes": state.done_bytes,
            "total_bytes": state.total_bytes,
            "damaged_blocks": state.damaged_blocks,
            "rate_bytes_per_s": round(rate),
            "left_s": round(left_bytes / rate) if rate else None,
            "completed": _date(state.completed_s),
            "next": _date(state.since_s + interval_s) if interval_s and not state.is_active else "",
        }

    def _mark(self, done_bytes: int) -> None:
        now_s = self._now_s()
        self._marks = [mark for mark in self._marks if now_s - mark[0] <= RATE_OVER_S]
        self._marks.append((now_s, done_bytes))

    def _rate(self) -> float:
        """Bytes a second, lately; 0: not known yet."""
        if len(self._marks) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        return max(0.0, (last - first) / (last_s - first_s)) if last_s > first_s else 0.0

    def _find(self, volume: str) -> Family:
        for family in self._families():
            if volume in [each.name for each in family.volumes]:
                return family
        raise NotFoundError(f"there is no volume {volume!r:.60}; nbdserver volume list shows them")

    def _name(self, family: str) -> str:
        return next((each.name for each in self._families() if each.id == family), family)

    def _note(self) -> None:
        self._noted = self._plan.encode()
        self._noted_s = self._now_s()
        replace_file(self._path, self._noted.encode())


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else ""
