"""The snapshots of one volume, in the data process: made, taken away, and exported read-only as VOLUME@NAME.

Rules: every snapshot of the volume has an export as long as it has a name, so that clients can list them; an export
has the volume's settings for who may attach, and shares its limits. Changes answer an errno; 0 is durable.
"""

import time
from typing import Any

from metadata.layers import Row
from nbdserver.logdisk.devices import View
from nbdserver.logdisk.disk import LogDisk
from nbdserver.node.ownership import Ownership, answered
from nbdserver.volume.export import Export, Exports, snapshot_description


class SnapshotExports:
    """The snapshots of the family's volume `number`, whose own export is `volume`."""

    def __init__(self, disk: LogDisk, number: int, volume: Export, exports: Exports, ownership: Ownership) -> None:
        self._disk = disk
        self._ownership = ownership
        self._number = number
        self._volume = volume
        self._exports = exports
        self._open: dict[str, tuple[Row, View, Export]] = {}
        for row in disk.snapshots_of(number):
            self._add(row)

    def __len__(self) -> int:
        return len(self._open)

    @property
    def clients(self) -> int:
        return sum(len(export.sessions) for _, _, export in self._open.values())

    def listed(self) -> list[dict[str, Any]]:
        """What there is, oldest first; `clones` are numbers of volumes."""
        rows = sorted((row for row, _, _ in self._open.values()), key=lambda row: row.layer)
        return [
            self._described(row, self._open[row.name][2]) | {"clones": sorted(self._disk.clones(row.layer))}
            for row in rows
        ]

    def find(self, name: str) -> dict[str, Any] | None:
        """One of them, or None; without its clones, of which there may be a thousand."""
        found = self._open.get(name)
        return None if found is None else self._described(found[0], found[2])

    async def create(self, name: str) -> int:
        """Keep what the volume holds now, all that was acknowledged, under this name."""
        created_s = int(time.time())
        errno = await answered(self._ownership, lambda done: self._disk.snapshot(self._number, name, created_s, done))
        row = self._disk.snapshot_row(self._number, name)
        if not errno and row is not None:
            self._add(row)
        return errno

    async def delete(self, name: str) -> int:
        """Take the name away; clients are disconnected."""
        row, view, export = self._open.pop(name)
        self._exports.remove(export.name)
        view.close()
        errno = await answered(self._ownership, lambda done: self._disk.delete_snapshot(row.layer, done))
        if errno and not self._disk.failure:
            self._add(row)
        return errno

    async def rollback(self, name: str) -> int:
        """Let the volume hold what the snapshot holds. Nobody may be attached to the volume."""
        return await answered(
            self._ownership, lambda done: self._disk.rollback(self._number, self._open[name][0].layer, done)
        )

    def volume_changed(self) -> None:
        """The volume has other settings, or another name."""
        for row, _, export in self._open.values():
            if export.name != self._name(row):
                self._exports.rename(export, self._name(row))
            volume = self._volume
            export.change(allowed=volume.allowed.texts, tls=volume.tls, description=snapshot_description(volume.name))
            export.throttle = self._volume.throttle

    def close(self, reason: str, has_moved: bool) -> None:
        """The volume is not served any more: disconnect everybody, or let them go on where it `has_moved`."""
        for _, view, export in self._open.values():
            self._exports.remove(export.name, reason, has_moved)
            view.close()
        self._open.clear()

    def _add(self, row: Row) -> None:
        view = self._disk.view(row.layer)
        export = Export(
            self._name(row),
            self._ownership.device(view),
            description=snapshot_description(self._volume.name),
            read_only=True,
            allowed=self._volume.allowed.texts,
            tls=self._volume.tls,
            created_s=row.created_s,
            lineage=self._volume.lineage,
        )
        export.throttle = self._volume.throttle
        self._exports.add(export)
        self._open[row.name] = (row, view, export)

    def _name(self, row: Row) -> str:
        return f"{self._volume.name}@{row.name}"

    def _described(self, row: Row, export: Export) -> dict[str, Any]:
        return {
            "volume": self._volume.name,
            "name": row.name,
            "layer": row.layer,
            "size_bytes": row.size_bytes,
            "created_s": row.created_s,
            "clients": len(export.sessions),
        }
