"""An open family as clients see it: an export for each of its volumes and of their snapshots.

Theory: the family's log knows volumes by number; names and settings come from the control process, when it lets a
volume be served. A volume that is not served (it is being made or deleted) is there for nobody.

Rules
- `withdraw` comes before a volume is deleted: from then on no client can attach, so that nobody does between the
  question whether there are clients and the deletion.
- Changes answer an errno; 0 is durable. They can be repeated: deleting what is gone is done.
- A replicated family is served while this node owns it; when that ends, its clients leave for the next owner at once.
"""

import asyncio
import errno
from collections.abc import Iterable
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

from metadata.seams import Clock
from nbdserver.logdisk.disk import LogDisk
from nbdserver.node.open_family import NOT_OWNED, FamilyError, NotOwnedError, OpenFamily
from nbdserver.node.ownership import Ownership, answered
from nbdserver.node.snapshot_exports import SnapshotExports
from nbdserver.volume.admission import TlsMode, is_name_of_certificate
from nbdserver.volume.export import Export, ExportError, Exports
from nbdserver.volume.limits import Limits

VOLUMES_A_TURN = 50
"""So many are looked at before the loop serves clients again: well under 0.5 ms."""


@dataclass
class ServedVolume:
    """A volume that clients may attach to."""

    number: int
    export: Export
    snapshots: SnapshotExports


class ServedFamily:
    """The served volumes of one open family."""

    def __init__(self, family: OpenFamily, exports: Exports, clock: Clock, ownership: Ownership | None) -> None:
        """Without `ownership` another node orders what happens in it."""
        self.family = family
        self.ownership = ownership
        self._exports = exports
        self._clock = clock
        self._volumes: dict[int, ServedVolume] = {}

    @property
    def disk(self) -> LogDisk:
        return self.family.disk

    @property
    def volumes(self) -> list[ServedVolume]:
        """By number."""
        return [self._volumes[number] for number in sorted(self._volumes)]

    def owned(self) -> Ownership:
        """NotOwnedError if another node orders."""
        if self.ownership is None:
            raise NotOwnedError(NOT_OWNED)
        return self.ownership

    def give_up(self, reason: str) -> None:
        """Another node orders from now on."""
        self._withdraw_all(reason, has_moved=True)
        self.ownership = None

    def volume(self, number: int) -> ServedVolume:
        """One that is served. FamilyError."""
        self.owned()
        served = self._volumes.get(number)
        if served is None:
            raise FamilyError("this volume is not served; `nbdserver status` says why")
        return served

    def sizes_bytes(self) -> dict[int, int]:
        """Of each volume that the log has, by number."""
        return {row.volume: row.size_bytes for row in self.disk.volumes()}

    def serve(self, number: int, name: str, settings: dict[str, Any]) -> None:
        """Let clients attach to a volume and its snapshots."""
        ownership = self.owned()
        export = Export(
            name,
            ownership.device(self.disk.head(number)),
            description=settings["description"],
            read_only=settings["read_only"],
            shared=settings["shared"],
            allowed=settings["allowed_clients"],
            tls=TlsMode(settings["tls"]),
            lineage=lineage_of(self.family.id, number, ownership.generation(self.disk)),
        )
        export.limit(_limits(settings), self._clock)
        self._exports.add(export)
        snapshots = SnapshotExports(self.disk, number, export, self._exports, ownership)
        self._volumes[number] = ServedVolume(number, export, snapshots)

    def set(self, number: int, settings: dict[str, Any]) -> None:
        """Change a volume's settings, at once. ExportError."""
        served = self.volume(number)
        tls = TlsMode(settings["tls"])
        if not self._exports.have_tls and (
            (tls is not served.export.tls and tls in (TlsMode.ALLOWED, TlsMode.REQUIRED))
            or (not served.export.allowed.names and any(map(is_name_of_certificate, settings["allowed_clients"])))
        ):
            raise ExportError("this node has no certificate: set tls.certificate and tls.key in its settings first")
        served.export.change(
            description=settings["description"],
            read_only=settings["read_only"],
            shared=settings["shared"],
            allowed=settings["allowed_clients"],
            tls=tls,
        )
        served.export.limit(_limits(settings), self._clock)
        served.snapshots.volume_changed()

    def rename(self, number: int, name: str) -> None:
        """Give a volume another name, and its snapshots with it; clients go on. ExportError."""
        served = self.volume(number)
        self._exports.rename(served.export, name)
        served.snapshots.volume_changed()

    def withdraw(self, number: int, force: bool) -> int:
        """Let nobody attach any more. Returns how many clients keep it from that, unless `force`: then they are
        disconnected."""
        served = self.volume(number)
        clients = len(served.export.sessions) + served.snapshots.clients
        if clients and not force:
            return clients
        self._withdraw(served, "the volume is not served any more")
        return 0

    def _withdraw(self, served: ServedVolume, reason: str, has_moved: bool = False) -> None:
        del self._volumes[served.number]
        self._exports.remove(served.export.name, reason, has_moved)
        served.snapshots.close(reason, has_moved)

    def _withdraw_all(self, reason: str, has_moved: bool = False) -> None:
        for served in list(self._volumes.values()):
            self._withdraw(served, reason, has_moved)

    def snapshots(self, number: int = 0) -> list[dict[str, Any]]:
        """The snapshots of one volume, or of all, each volume's oldest first."""
        volumes = [self.volume(number)] if number else self.volumes
        return [self._with_names(found) for served in volumes for found in served.snapshots.listed()]

    def snapshot(self, number: int, name: str) -> dict[str, Any] | None:
        """One snapshot, without its clones, or None."""
        return self.volume(number).snapshots.find(name)

    async def clone(self, layer: int, number: int) -> int:
        """Make a volume of a snapshot's layer."""
        return await answered(self.owned(), lambda done: self.disk.clone(layer, number, done))

    async def delete(self, number: int) -> int:
        """Delete a volume that is not served, and its snapshots."""
        disk, ownership = self.disk, self.owned()
        try:
            disk.head(number)
        except LookupError:
            return 0
        deletions = [
            answered(ownership, lambda done, layer=row.layer: disk.delete_snapshot(layer, done))  # type: ignore[misc]
            for row in disk.snapshots_of(number)
        ]
        failed = [code for code in await asyncio.gather(*deletions) if code]
        return failed[0] if failed else await answered(ownership, lambda done: disk.delete_volume(number, done))

    async def resize(self, number: int, size_bytes: int) -> int:
        """Give a volume another size; EBUSY for making it smaller while it has clients."""
        export = self.volume(number).export
        if export.sessions and size_bytes < export.device.size_bytes:
            return errno.EBUSY
        if size_bytes < export.device.size_bytes:
            export.note_change("a resize")
        return await answered(self.owned(), lambda done: self.disk.resize(number, size_bytes, done))

    async def rollback(self, number: int, snapshot: str) -> int:
        """Go back to a snapshot; EBUSY while the volume has clients."""
        served = self.volume(number)
        if served.export.sessions:
            return errno.EBUSY
        served.export.note_change("a rollback")
        return await served.snapshots.rollback(snapshot)

    def status(self, number: int) -> dict[str, Any]:
        """What is live, of the disk and of one volume if it is served."""
        return {"disk": self._disk_status(), "volumes": self._volume_statuses([number])}

    async def whole_status(self) -> dict[str, Any]:
        """The same with all volumes. A thousand clones are not looked at in one turn of the loop."""
        volumes: dict[str, Any] = {}
        numbers = sorted(self._volumes)
        for first in range(0, len(numbers), VOLUMES_A_TURN):
            volumes |= self._volume_statuses(numbers[first : first + VOLUMES_A_TURN])
            await asyncio.sleep(0)
        return {"disk": self._disk_status(), "volumes": volumes}

    def _disk_status(self) -> dict[str, Any]:
        return self.disk.status() | {"damaged": self._damaged()}

    def _damaged(self) -> list[dict[str, Any]]:
        """{export: what shows it, lba} of each damaged block that is known."""
        found = []
        for block in self.disk.damage.listed():
            served = self._volumes.get(int(str(block["number"])))
            if served is not None:
                snapshot = f"@{block['snapshot']}" if block["snapshot"] else ""
                found.append(
                    {"volume": served.export.name, "export": served.export.name + snapshot, "lba": block["lba"]}
                )
        return found

    def figures(self) -> dict[str, dict[str, Any]]:
        """Counters and gauges by volume. Those of the disk, which the volumes share, stand at the oldest one."""
        found: dict[str, dict[str, Any]] = {
            served.export.name: {
                "counters": served.export.counters.as_dict(),
                "gauges": {
                    "clients": len(served.export.sessions),
                    "volume_failed": bool(self.disk.failure),
                    "volume_full": bool(self.disk.pool.full),
                },
            }
            for served in self.volumes
        }
        for first in list(found.values())[:1]:
            first["counters"].update(self.family.counters())
            for name, value in self.disk.counters().items():
                if name.endswith("_now"):
                    first["gauges"][f"disk_{name.removesuffix('_now')}"] = value
                else:
                    first["counters"][f"disk_{name}"] = value
            for name, now in self.disk.status().items():
                if isinstance(now, (int, float)):
                    first["gauges"][f"disk_{name}"] = now
        return found

    async def close(self) -> None:
        """Disconnect everybody and close the family for good."""
        self._withdraw_all("the volume is closed")
        await self.family.close()

    def _volume_statuses(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Of those that are served, by number; `traffic` of those that have had any, which keeps an answer about a
        thousand idle clones short."""
        found: dict[str, Any] = {}
        for number in numbers:
            served = self._volumes.get(number)
            if served is None:
                continue
            found[str(number)] = status = {
                "clients": len(served.export.sessions),
                "snapshots": len(served.snapshots),
                "base": self._base(number),
            }
            if (traffic := served.export.traffic)["requests"]:
                status["traffic"] = traffic
        return found

    def _base(self, number: int) -> str:
        row = self.disk.base(number)
        served = None if row is None else self._volumes.get(row.volume)
        return "" if row is None or served is None else f"{served.export.name}@{row.name}"

    def _with_names(self, found: dict[str, Any]) -> dict[str, Any]:
        names = [self._volumes[number].export.name for number in found["clones"] if number in self._volumes]
        return found | {"clones": sorted(names)}


def lineage_of(family: str, number: int, generation: int) -> int:
    """Of a volume: not 0. Another one when acknowledged writes may be gone, and for a volume that is made anew."""
    digest = blake2b(f"{family} {number} {generation}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") or 1


def _limits(settings: dict[str, Any]) -> Limits:
    return Limits(**{field.name: settings[field.name] for field in fields(Limits)})
