"""The snapshots of an open family, in the data process: made, taken away, and exported read-only as VOLUME@NAME.

Rules: every snapshot of the volume has an export as long as it has a name, so that clients can list them; an export
has the volume's settings for who may attach, and shares its limits. Changes answer an errno; 0 is durable.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from metadata.layers import Row
from metadata.seams import Done
from nbdserver.logdisk.devices import View
from nbdserver.logdisk.disk import LogDisk
from nbdserver.volume.export import Export, Exports

VOLUME_NUMBER = 1
"""Of the one volume in its family."""


class SnapshotExports:
    """The snapshots of one volume, whose own export is `volume`."""

    def __init__(self, disk: LogDisk, volume: Export, exports: Exports) -> None:
        self._disk = disk
        self._volume = volume
        self._exports = exports
        self._open: dict[str, tuple[Row, View, Export]] = {}
        for row in disk.snapshots():
            self._add(row)

    def listed(self) -> list[dict[str, Any]]:
        """What there is, oldest first."""
        return [
            {
                "name": row.name,
                "size_bytes": row.size_bytes,
                "created_s": row.created_s,
                "clients": len(export.sessions),
            }
            for row, _, export in sorted(self._open.values(), key=lambda item: item[0].layer)
        ]

    @property
    def clients(self) -> int:
        return sum(len(export.sessions) for _, _, export in self._open.values())

    async def create(self, name: str) -> int:
        """Keep what the volume holds now, all that was acknowledged, under this name."""
        created_s = int(time.time())
        errno = await _answer(lambda done: self._disk.snapshot(VOLUME_NUMBER, name, created_s, done))
        if not errno:
            self._add(next(row for row in self._disk.snapshots() if row.name == name))
        return errno

    async def delete(self, name: str) -> int:
        """Take the name away; clients are disconnected."""
        row, view, export = self._open.pop(name)
        self._exports.remove(export.name)
        view.close()
        errno = await _answer(lambda done: self._disk.delete_snapshot(row.layer, done))
        if errno and not self._disk.failure:
            self._add(row)
        return errno

    async def rollback(self, name: str) -> int:
        """Let the volume hold what the snapshot holds. Nobody may be attached to the volume."""
        return await _answer(lambda done: self._disk.rollback(VOLUME_NUMBER, self._open[name][0].layer, done))

    def settings_changed(self) -> None:
        """The volume's settings changed."""
        for _, _, export in self._open.values():
            export.change(allowed=[str(network) for network in self._volume.allowed])
            export.throttle = self._volume.throttle

    def close(self) -> None:
        """Disconnect everybody; the family is being closed."""
        for _, view, export in self._open.values():
            self._exports.remove(export.name)
            view.close()
        self._open.clear()

    def _add(self, row: Row) -> None:
        view = self._disk.view(row.layer)
        export = Export(
            f"{self._volume.name}@{row.name}",
            view,
            description=f"snapshot of {self._volume.name}",
            read_only=True,
            allowed=[str(network) for network in self._volume.allowed],
        )
        export.throttle = self._volume.throttle
        self._exports.add(export)
        self._open[row.name] = (row, view, export)


async def resize(disk: LogDisk, size_bytes: int) -> int:
    """Give the volume another size. Returns an errno."""
    return await _answer(lambda done: disk.resize(VOLUME_NUMBER, size_bytes, done))


async def _answer(begin: Callable[[Done], None]) -> int:
    answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    begin(answered.set_result)
    return await answered
