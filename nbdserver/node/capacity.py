"""How full the node is: fill alarms, and how much may be promised.

Theory. Three things become full: the file system of the data directory, the node's `max_data`, and a volume's
`max-data`. Of the file system `df`'s figures count, whoever uses it. Of a limit counts what cannot be cleaned away (the
live data and the reserve): what overwriting leaves behind would otherwise raise an alarm that goes by itself. Volumes
are thin, so their sizes are promises; `overcommit` says how many times the room there is may be promised.

Rules
- Every crossing of a threshold (alarms.py) is one event. What stands when a node starts is told again.
- The room there is: what is free and what the segment files of this node take already, at most `max_data`.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metadata.registry import Family, RegistryError
from nbdserver.node.alarms import FILE_SYSTEM, MAX_DATA, Alarms, Crossing, Fill
from nbdserver.node.config import NodeSettings
from nbdserver.node.errors import ConflictError, NodeError
from nbdserver.node.sizes import round_size

LOOK_S = 5.0

Call = Callable[..., Any]
"""`Asking.ask` of the running data process."""


class Capacity:
    """What there is, what is used and what is promised."""

    def __init__(
        self,
        directory: Path,
        settings: Callable[[], NodeSettings],
        families: Callable[[], list[Family]],
        call: Call,
        event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._families = families
        self._call = call
        self._event = event
        self._alarms = Alarms()
        self._room: dict[str, dict[str, int]] = {}

    async def watch(self) -> None:
        """Look every LOOK_S, for ever."""
        while True:
            try:
                await self.look()
            except (OSError, RegistryError) as error:
                self._event("capacity-not-known", {"reason": str(error)})
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """See how full everything is, and tell what was crossed."""
        try:
            self._room = await self._call("room")
        except NodeError:
            pass  # what was known last; the file system is looked at all the same
        for fill, crossing in self._alarms.look(self._fills()):
            self._tell(fill, crossing)

    def fills(self) -> list[dict[str, Any]]:
        """What has a limit and how full it is, as of the last look."""
        alarms = self._alarms
        return [
            {**asdict(fill), "percent": fill.percent, "alarm": alarms.level(fill.subject)}
            for fill in alarms.fills.values()
        ]

    def describe(self) -> dict[str, Any]:
        """What there is and what is promised, in bytes."""
        file_system = self.file_system()
        return {
            "size_bytes": file_system.size_bytes,
            "free_bytes": file_system.size_bytes - file_system.used_bytes,
            "allocated_bytes": self._allocated_bytes(),
            "max_data_bytes": self._settings().max_data,
            "room_bytes": self._room_bytes(),
            "provisioned_bytes": self._provisioned_bytes(),
            "overcommit": self._settings().overcommit,
        }

    def gauges(self) -> dict[str, float]:
        """The same for metrics."""
        file_system = self._alarms.fills.get(FILE_SYSTEM) or self.file_system()
        return {
            "filesystem_size_bytes": file_system.size_bytes,
            "filesystem_used_bytes": file_system.used_bytes,
            "filesystem_alarm_percent": self._alarms.level(FILE_SYSTEM),
            "max_data_bytes": self._settings().max_data,
            "max_data_alarm_percent": self._alarms.level(MAX_DATA),
            "allocated_bytes": self._allocated_bytes(),
            "room_bytes": self._room_bytes(),
            "provisioned_bytes": self._provisioned_bytes(),
            "overcommit": self._settings().overcommit,
        }

    async def admit(self, what: str, more_bytes: int) -> None:
        """Raise ConflictError if volumes that are `more_bytes` larger promise more than `overcommit` allows."""
        ratio = self._settings().overcommit
        if not ratio or more_bytes <= 0:
            return
        await self.look()
        room_bytes, promised_bytes = self._room_bytes(), self._provisioned_bytes() + more_bytes
        if promised_bytes > ratio * room_bytes:
            raise ConflictError(
                f"{what} would make {round_size(promised_bytes)} of volumes on {round_size(room_bytes)} of room, and "
                f"overcommit: {ratio:g} allows {round_size(ratio * room_bytes)}; "
                f"choose a smaller size, delete something, or raise overcommit in node.yaml"
            )

    def promisable_bytes(self) -> int | None:
        """So much larger the volumes may be together, as of the last look; None: without limit."""
        ratio = self._settings().overcommit
        return max(0, int(ratio * self._room_bytes()) - self._provisioned_bytes()) if ratio else None

    def _fills(self) -> list[Fill]:
        fills = [self.file_system()]
        max_data_bytes = self._settings().max_data
        if max_data_bytes:
            filled_bytes = sum(room["filled_bytes"] for room in self._room.values())
            fills.append(Fill(MAX_DATA, filled_bytes, max_data_bytes))
        for family in self._families():
            if family.max_data and family.id in self._room:
                fills.append(Fill(_subject(family), self._room[family.id]["filled_bytes"], family.max_data))
        return fills

    def file_system(self) -> Fill:
        """As `df` shows it: what is reserved for root is neither used nor there."""
        statistics = os.statvfs(self._directory)
        used_bytes = (statistics.f_blocks - statistics.f_bfree) * statistics.f_frsize
        return Fill(FILE_SYSTEM, used_bytes, used_bytes + statistics.f_bavail * statistics.f_frsize)

    def _allocated_bytes(self) -> int:
        return sum(room["allocated_bytes"] for room in self._room.values())

    def _room_bytes(self) -> int:
        file_system = self.file_system()
        room_bytes = file_system.size_bytes - file_system.used_bytes + self._allocated_bytes()
        return min(room_bytes, self._settings().max_data or room_bytes)

    def _provisioned_bytes(self) -> int:
        return sum(family.size_bytes for family in self._families())

    def volume_gauges(self, family: Family) -> dict[str, float]:
        """Of a family, for the metrics of its oldest volume."""
        return {
            "volume_max_data_bytes": family.max_data,
            "volume_alarm_percent": self._alarms.level(_subject(family)),
        }

    def _tell(self, fill: Fill, crossing: Crossing) -> None:
        self._event(
            "fill-alarm" if crossing.is_rising else "fill-alarm-over",
            {
                "subject": fill.subject,
                "threshold_percent": crossing.percent,
                "percent": fill.percent,
                "used_bytes": fill.used_bytes,
                "size_bytes": fill.size_bytes,
            },
        )


def _subject(family: Family) -> str:
    """A volume is named; its clones count with it."""
    return f"volume {family.name}"
