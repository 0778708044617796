"""Snapshots and sizes of volumes, from the control process.

Theory: a snapshot is a layer of the volume's family, so the family itself remembers its name; the registry knows
nothing of it. Only a size is noted in the registry too, afterwards; at the next opening the family's own counts.

Rules: what is refused is refused in one line that names what is in the way, and changed nothing. A change is durable
when it is answered.
"""

from datetime import UTC, datetime
from typing import Any

from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError, counted, listed
from nbdserver.node.sizes import SizeError, check_volume_size, format_size
from nbdserver.node.volume_settings import NAME
from nbdserver.node.volumes import Volumes, change_error

MAX_NAME_BYTES = 128


def check_snapshot_name(name: str) -> str:
    """Return `name` if a snapshot may have it. Raises WrongInputError."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES:
        raise WrongInputError(
            f"{name!r:.60} cannot be a snapshot's name; use 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ . - "
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
        """Return the snapshots of one volume, or of all, oldest first."""
        if volume:
            return [_described(found) for found in await self._ask("snapshots", volume)]
        snapshots: list[dict[str, Any]] = []
        for family in self._volumes.open_families():
            try:
                snapshots += map(_described, await self._volumes.call("snapshots", family=family.id))
            except NodeError:
                continue  # its volumes say why
        return snapshots

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
    return {
        "volume": found["volume"],
        "name": found["name"],
        "export": f"{found['volume']}@{found['name']}",
        "size_bytes": found["size_bytes"],
        "created": datetime.fromtimestamp(found["created_s"], UTC).isoformat(),
        "clients": found["clients"],
        "clones": found.get("clones", []),
    }
