"""Snapshots and sizes of volumes, from the control process.

Theory: a snapshot is a layer of the volume's family, so the family itself remembers its name; the registry knows
nothing of it. Only a size is noted in the registry too, afterwards; at the next opening the family's own counts.

Of volumes of the cluster that other nodes serve it is known what these have told (snapshots_told.py).

Rules: what is refused is refused in one line that names what is in the way, and changed nothing. A change is durable
when it is answered.
"""

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from metadata.registry import Family, Volume
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError, counted, listed
from nbdserver.node.sizes import SizeError, check_volume_size, format_size
from nbdserver.node.snapshots_told import ToldSnapshot
from nbdserver.node.volume_settings import MAX_NAME_LENGTH, is_snapshot_name
from nbdserver.node.volumes import Volumes, change_error


def check_snapshot_name(name: str) -> str:
    """Return `name` if a snapshot may have it. Raises WrongInputError."""
    if not is_snapshot_name(name):
        raise WrongInputError(
            f"{name!r:.60} cannot be a snapshot's name; use 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 _ . - "
            "and begin with a letter or digit"
        )
    return name


class Snapshots:
    """Snapshots of this node's volumes, and their sizes."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    async def create(self, volume: str, name: str) -> dict[str, Any]:
        """Keep what the volume holds now under a name."""
        check_snapshot_name(name)
        async with self._volumes.lock:
            if await self._ask("snapshot", volume, snapshot=name):
                raise ConflictError(
                    f"volume {volume} has a snapshot {name} already; choose another name, "
                    f"or nbdserver snapshot delete {volume}@{name} first"
                )
            self._check(await self._ask("snapshot_create", volume, snapshot=name), f"making {volume}@{name}")
            self._volumes.event("snapshot-created", {"volume": volume, "snapshot": name})
            return await self._find(volume, name)

    async def listed(self, volume: str = "") -> list[dict[str, Any]]:
        """Return the snapshots of one volume, or of all, each volume's oldest first. Of volumes that other nodes serve
        it is known what these have told."""
        if volume:
            family, found = self._volumes.find(volume)
            if family.replicas and not self._volumes.is_served(family):
                return self._told(family, [found])
            return [_described(each) for each in await self._ask("snapshots", volume)]
        snapshots: list[dict[str, Any]] = []
        for family in self._volumes.families():
            if self._volumes.is_served(family):
                with contextlib.suppress(NodeError):  # its volumes say why
                    snapshots += map(_described, await self._volumes.call("snapshots", family=family.id))
            elif family.replicas:
                snapshots += self._told(family, family.volumes)
        return snapshots

    def _told(self, family: Family, volumes: Sequence[Volume]) -> list[dict[str, Any]]:
        told = self._volumes.told_snapshots
        return [_of_others(volume.name, snapshot) for volume in volumes for snapshot in told(family, volume)]

    async def delete(self, volume: str, name: str, force: bool = False) -> None:
        """Delete a snapshot. Refused while clients are attached to it, unless `force`. Clones of it go on."""
        async with self._volumes.lock:
            clients = (await self._find(volume, name))["clients"]
            if clients and not force:
                raise ConflictError(
                    f"snapshot {volume}@{name} has {counted(clients, 'client connection')}; "
                    "detach first, or add --force to disconnect"
                )
            self._check(await self._ask("snapshot_delete", volume, snapshot=name), f"deleting {volume}@{name}")
            self._volumes.event("snapshot-deleted", {"volume": volume, "snapshot": name})

    async def rollback(self, volume: str, name: str) -> dict[str, Any]:
        """Let the volume hold what the snapshot holds. Refused while clients are attached to the volume."""
        async with self._volumes.lock:
            snapshot = await self._find(volume, name)
            await self._refuse_clients(volume, "rolled back")
            self._check(await self._ask("snapshot_rollback", volume, snapshot=name), f"rolling {volume} back")
            await self._volumes.note_size(volume, snapshot["size_bytes"])
            self._volumes.event("volume-rolled-back", {"volume": volume, "snapshot": name})
        return await self._volumes.show(volume)

    async def resize(self, volume: str, size_bytes: int, force: bool = False) -> dict[str, Any]:
        """Give a volume another size. Making it smaller needs `force` and no clients: what is cut off is gone."""
        try:
            check_volume_size(size_bytes)
        except SizeError as error:
            raise WrongInputError(str(error)) from None
        async with self._volumes.lock:
            found = await self._volumes.show(volume)
            if size_bytes < found["size_bytes"]:
                await self._refuse_clients(volume, "made smaller")
                if not force:
                    raise ConflictError(
                        f"volume {volume} has {format_size(found['size_bytes'])}; what lies behind "
                        f"{format_size(size_bytes)} would be lost: shrink its file system first, then add --force"
                    )
            more_bytes = size_bytes - found["size_bytes"]
            await self._volumes.admit(f"{volume} with {format_size(size_bytes)}", more_bytes)
            self._check(await self._ask("resize", volume, size_bytes=size_bytes), f"resizing {volume}")
            await self._volumes.note_size(volume, size_bytes)
            self._volumes.event("volume-resized", {"volume": volume, "size_bytes": size_bytes})
        return await self._volumes.show(volume)

    async def _refuse_clients(self, volume: str, done: str) -> None:
        clients = (await self._volumes.show(volume))["clients"]
        if clients:
            raise ConflictError(
                f"volume {volume} has {counted(clients, 'client connection')} and cannot be {done}; "
                "detach first (nbdserver client list, client disconnect)"
            )

    async def _ask(self, request: str, volume: str, **arguments: Any) -> Any:
        return await self._volumes.ask(request, volume, **arguments)

    async def _find(self, volume: str, name: str) -> dict[str, Any]:
        found = await self._ask("snapshot", volume, snapshot=name)
        if found is None:
            names = [there["name"] for there in await self._ask("snapshots", volume)]
            raise NotFoundError(
                f"there is no snapshot {name!r:.60} of volume {volume}; it has: {listed(names[::-1]) or 'none yet'}"
            )
        return _described(found)

    @staticmethod
    def _check(errno: int, doing: str) -> None:
        if errno:
            raise change_error(errno, doing)


def _described(found: dict[str, Any]) -> dict[str, Any]:
    """A snapshot as people see it."""
    told = ToldSnapshot(found["name"], found["created_s"], found["size_bytes"])
    return _of_others(found["volume"], told) | {"clients": found["clients"], "clones": found.get("clones", [])}


def _of_others(volume: str, told: ToldSnapshot) -> dict[str, Any]:
    """One of a volume that another node serves; who uses it is known there."""
    return {
        "volume": volume,
        "name": told.name,
        "export": f"{volume}@{told.name}",
        "size_bytes": told.size_bytes,
        "created": datetime.fromtimestamp(told.created_s, UTC).isoformat(),
        "clients": None,
        "clones": None,
    }
