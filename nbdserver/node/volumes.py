"""Volumes, from the control process: create, list, show, set, delete.

Theory: the registry says what exists; the data process serves it. A change goes first to where it can be refused,
then to the registry, then to the data process; after a crash in between, the next start does the rest from the
registry alone.

Rules: one change at a time (`_lock`). A name, a size and a setting are checked here before anything is changed;
every refusal is one line. A family is opened only under an epoch that was raised for that opening.
"""

import asyncio
import ipaddress
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

from metadata.registry import FAMILY_ID_BYTES, ExportSettings, Families, Family, RegistryError
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError
from nbdserver.node.sizes import SizeError, check_volume_size, format_size, parse_size
from protocol.invariant import invariant

MAX_VOLUMES = 1024
"""Each open family costs an open LevelDB, its share of the cache and a segment of ballast."""

MAX_NAME_LENGTH = 128
MAX_DESCRIPTION_BYTES = 4096  # NBD's longest string
MAX_ALLOWED_CLIENTS = 256

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

LIMIT_KEYS = ("iops", "iops-burst", "bandwidth", "bandwidth-burst")
SETTING_KEYS = ("read-only", "description", "shared", "allowed-clients", *LIMIT_KEYS)
MAX_RATE = 1 << 40
"""Operations or bytes a second; more is no limit to anything."""

Call = Callable[..., Any]
"""`Channel.call` of the running data process."""


def check_name(name: str) -> str:
    """Return `name` if a volume may have it. Raises WrongInputError."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise WrongInputError(
            f"{name!r:.60} cannot be a volume's name; use 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 _ . - "
            "and begin with a letter or digit"
        )
    return name


def change_settings(settings: ExportSettings, key: str, value: str) -> ExportSettings:
    """Return `settings` with one `key=value` as written on the command line. Raises WrongInputError."""
    match key.replace("_", "-"):
        case "read-only":
            return replace(settings, read_only=_parse_bool(key, value))
        case "shared":
            return replace(settings, shared=_parse_bool(key, value))
        case "description":
            if len(value.encode()) > MAX_DESCRIPTION_BYTES or "\0" in value:
                raise WrongInputError(f"the description is longer than {MAX_DESCRIPTION_BYTES} bytes; shorten it")
            return replace(settings, description=value)
        case "allowed-clients":
            return replace(settings, allowed_clients=_parse_networks(value))
        case "iops" | "iops-burst" | "bandwidth" | "bandwidth-burst" as limit:
            return _change_limit(settings, limit, value)
        case "tls":
            raise WrongInputError("TLS is not available yet; limit who may attach with allowed-clients=CIDR,CIDR")
        case "size":
            raise WrongInputError("a size is not a setting: nbdserver volume resize NAME --size SIZE")
    raise WrongInputError(f"{key!r:.60} is not a setting of a volume; known are {', '.join(SETTING_KEYS)}")


def _change_limit(settings: ExportSettings, key: str, value: str) -> ExportSettings:
    example = "100M or none" if key.startswith("bandwidth") else "1000 or none"
    field = key.replace("-", "_")
    if value.lower() in ("none", "0", ""):
        rate = 0
    elif key.startswith("iops") and not value.isdecimal():
        raise WrongInputError(f"{key}={value!s:.40} is not a number of operations; write {key}={example}")
    else:
        try:
            rate = parse_size(value)
        except SizeError as error:
            raise WrongInputError(f"{key}: {error}; write {key}={example}") from None
    if rate > MAX_RATE:
        raise WrongInputError(f"{key}={value!s:.40} is more than {MAX_RATE}; write {key}=none for no limit")
    changed = replace(settings, **{field: rate})  # type: ignore[arg-type]
    for limit in ("iops", "bandwidth"):
        if getattr(changed, f"{limit}_burst") and not getattr(changed, limit):
            if field != limit or rate:
                raise WrongInputError(f"{limit}-burst needs a limit that it is the burst of; set {limit} too")
            changed = replace(changed, **{f"{limit}_burst": 0})  # type: ignore[arg-type]
    return changed


def _parse_bool(key: str, value: str) -> bool:
    lowered = value.lower()
    if lowered in ("true", "yes", "on", "1"):
        return True
    if lowered in ("false", "no", "off", "0"):
        return False
    raise WrongInputError(f"{key}={value!s:.40} is not true or false; write {key}=true or {key}=false")


def _parse_networks(value: str) -> tuple[str, ...]:
    words = [word.strip() for word in value.split(",") if word.strip()]
    if words == ["all"]:
        return ()
    if len(words) > MAX_ALLOWED_CLIENTS:
        raise WrongInputError(
            f"allowed-clients has {len(words)} networks, at most {MAX_ALLOWED_CLIENTS}; write larger ones"
        )
    networks: list[str] = []
    for word in words:
        try:
            networks.append(str(ipaddress.ip_network(word)))
        except ValueError as error:
            try:
                hint = str(ipaddress.ip_network(word, strict=False))
            except ValueError:
                hint = "10.0.0.0/8,fd00::/8"
            raise WrongInputError(
                f"allowed-clients: {word!r:.60} is not a network ({error}); write for example {hint}"
            ) from None
    return tuple(networks)


class Volumes:
    """The volumes of this node."""

    def __init__(
        self,
        directory: DataDirectory,
        families: Families,
        call: Call,
        event: Callable[[str, dict[str, Any]], None],
        segment_bytes: int,
        admit: Callable[[str, int], Awaitable[None]],
    ) -> None:
        """`admit(what, more_bytes)` raises ConflictError if so much more may not be promised."""
        self._directory = directory
        self._families = families
        self._call = call
        self.event = event
        self._segment_bytes = segment_bytes
        self.admit = admit
        self.lock = asyncio.Lock()
        self._failed: dict[str, str] = {}

    @property
    def changing(self) -> asyncio.Lock:
        """Held while a change is made: who has it knows that none is half done."""
        return self.lock

    async def remove_scraps(self) -> None:
        """Delete the directories of families that were being made or removed when the node stopped."""
        for family_id in self._families.scraps():
            await asyncio.to_thread(self._directory.remove_family, family_id)
            self._families.scrapped(family_id)

    async def open_all(self) -> None:
        """Open every family in the data process. One that fails is reported and stays closed; the others are served."""
        async with self.lock:
            self._failed.clear()
            for family in self._families.all():
                try:
                    await self._open(family)
                except (NodeError, RegistryError, OSError) as error:
                    self._failed.setdefault(family.id, str(error))
                    continue  # noted in `_failed`, as an event and in `status`

    async def create(self, name: str, size_bytes: int, exist_ok: bool = False) -> dict[str, Any]:
        """Make an empty volume and serve it. `exist_ok`: one that is there is fine; it keeps its size."""
        check_name(name)
        try:
            check_volume_size(size_bytes)
        except SizeError as error:
            raise WrongInputError(str(error)) from None
        async with self.lock:
            there = self._families.find(name)
            if there is not None:
                if exist_ok:
                    return self._describe(there, {})
                raise ConflictError(
                    f"volume {name} exists already, with size {format_size(there.size_bytes)}; "
                    f"choose another name, or nbdserver volume delete {name} first"
                )
            if len(self._families.all()) >= MAX_VOLUMES:
                raise ConflictError(f"this node has {MAX_VOLUMES} volumes, the most it takes; delete one first")
            await self.admit(f"volume {name} of {format_size(size_bytes)}", size_bytes)
            family = Family(
                id=secrets.token_hex(FAMILY_ID_BYTES),
                volume=name,
                size_bytes=size_bytes,
                segment_bytes=self._segment_bytes,
                owner="",
            )
            self._families.begin(family.id)
            try:
                await self._call(
                    "format",
                    directory=str(self._directory.family(family.id)),
                    family=family.id,
                    size_bytes=size_bytes,
                    segment_bytes=family.segment_bytes,
                )
            except BaseException:
                await self._scrap(family.id)
                raise
            # If this fails, only the registry knows whether the directory is a family or a scrap; the next start asks.
            invariant(
                self._families.add(family), "a name that was free is taken, although one change is made at a time"
            )
            family = await self._open(family)
            self.event("volume-created", {"volume": name, "size_bytes": size_bytes})
            return self._describe(family, (await self._live()).get(family.id, {}))

    async def list(self) -> list[dict[str, Any]]:
        """Return every volume with what the data process says of it."""
        live = await self._live()
        return [self._describe(family, live.get(family.id, {})) for family in self._families.all()]

    async def show(self, name: str) -> dict[str, Any]:
        """Return one volume. Raises NotFoundError."""
        family = self._find(name)
        return self._describe(family, (await self._live()).get(family.id, {}))

    async def set(self, name: str, changes: dict[str, str]) -> dict[str, Any]:
        """Change settings, all of `changes` or none, live."""
        async with self.lock:
            family = self._find(name)
            settings = family.settings
            for key, value in changes.items():
                settings = change_settings(settings, key, value)
            if settings != family.settings:
                if family.id not in self._failed:
                    await self._call("set", family=family.id, settings=asdict(settings))  # may refuse
                family = self._families.change(family, settings=settings)
                self.event("volume-changed", {"volume": name, "changes": changes})
            return self._describe(family, (await self._live()).get(family.id, {}))

    async def delete(self, name: str, force: bool = False) -> None:
        """Delete a volume and its data. Raises ConflictError while clients are attached, unless `force`."""
        async with self.lock:
            family = self._find(name)
            if family.id not in self._failed:
                snapshots = await self._call("snapshots", family=family.id)
                if snapshots:
                    names = ", ".join(found["name"] for found in snapshots[:5])
                    more = f" and {len(snapshots) - 5} more" if len(snapshots) > 5 else ""
                    raise ConflictError(
                        f"volume {name} has snapshots: {names}{more}; delete them first "
                        f"(nbdserver snapshot delete {name}@{snapshots[0]['name']})"
                    )
                count = await self._call("close", family=family.id, force=force)
                if count:
                    raise ConflictError(
                        f"volume {name} has {count} client connection{'s' if count > 1 else ''}; "
                        "detach first, or add --force to disconnect"
                    )
            try:
                self._families.remove(family)
            except (OSError, RegistryError) as error:
                self._failed[family.id] = f"closed to be deleted, which failed ({error}); the next start opens it again"
                raise
            self._failed.pop(family.id, None)
            await self._scrap(family.id)
            self.event("volume-deleted", {"volume": name})

    async def ask(self, request: str, name: str, **arguments: Any) -> Any:
        """A request to the data process about an open volume. Raises NotFoundError, NodeError."""
        family = self._find(name)
        if family.id in self._failed:
            raise ConflictError(f"volume {name} is not open: {self._failed[family.id]}")
        return await self._call(request, family=family.id, **arguments)

    def note_size(self, name: str, size_bytes: int) -> None:
        """The family has this size now."""
        family = self._find(name)
        if family.size_bytes != size_bytes:
            self._families.change(family, size_bytes=size_bytes)

    async def _open(self, family: Family) -> Family:
        raised = self._families.raise_epoch(family)
        try:
            answer = await self._call(
                "open",
                directory=str(self._directory.family(raised.id)),
                family=raised.id,
                volume=raised.volume,
                epoch=raised.epoch,
                settings=asdict(raised.settings),
            )
        except NodeError as error:
            self._failed[family.id] = str(error)
            self.event("volume-not-opened", {"volume": family.volume, "reason": str(error)})
            raise
        if answer["size_bytes"] != raised.size_bytes:
            # Resized or rolled back, and stopped before the registry knew.
            raised = self._families.change(raised, size_bytes=answer["size_bytes"])
        if answer["generation"] > raised.generation:
            raised = self._families.change(raised, generation=answer["generation"])
        return raised

    async def _scrap(self, family_id: str) -> None:
        await asyncio.to_thread(self._directory.remove_family, family_id)
        self._families.scrapped(family_id)

    async def _live(self) -> dict[str, dict[str, Any]]:
        try:
            live: dict[str, dict[str, Any]] = await self._call("volumes")
        except NodeError:
            return {}
        return live

    def _find(self, name: str) -> Family:
        family = self._families.find(name)
        if family is None:
            names = ", ".join(item.volume for item in self._families.all()[:5]) or "none yet"
            raise NotFoundError(f"there is no volume {name!r:.60}; this node has: {names}")
        return family

    def _describe(self, family: Family, live: dict[str, Any]) -> dict[str, Any]:
        disk = live.get("disk", {})
        reason = self._failed.get(family.id) or disk.get("failure", "")
        if reason:
            state = "failed"
        elif not disk:
            state = "starting"
        else:
            state = "full" if disk["state"] == "full" else "serving"
        return {
            "name": family.volume,
            "size_bytes": family.size_bytes,
            "state": state,
            "reason": reason,
            "generation": family.generation,
            "epoch": family.epoch,
            "family": family.id,
            "settings": asdict(family.settings),
            "clients": live.get("clients", 0),
            "disk": disk,
        }
