"""Volumes, from the control process: create, clone, list, show, set, rename, delete.

Theory: the registry says what exists; the data process serves it. A change goes first to where it can be refused,
then to the registry, then to the data process; after a crash in between, the next start does the rest. What is made or
deleted within a family, beside other volumes, stands in its log as well (metadata/registry.py, opening.py):

    clone     registry: MAKING  ─►  log  ─►  registry: THERE  ─►  served
    delete    no client can attach any more  ─►  registry: DELETING  ─►  log  ─►  registry: forgotten

Rules: one change at a time (`lock`). A name, a size and a setting are checked before anything is changed; every refusal
is one line that names what is in the way.
"""

import asyncio
import errno as errnos
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from metadata.families import Families
from metadata.registry import (
    FAMILY_ID_BYTES,
    FIRST_VOLUME,
    Family,
    RegistryError,
    Volume,
    VolumeState,
)
from nbdserver.node.asking import SILENT
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, WrongInputError, counted, listed
from nbdserver.node.opening import Call, Opening
from nbdserver.node.replicas import Replicas
from nbdserver.node.sizes import SizeError, check_volume_size, format_size
from nbdserver.node.snapshots_told import ToldSnapshot
from nbdserver.node.volume_settings import (
    MAX_DATA,
    REPLICAS,
    change_settings,
    check_name,
    parse_max_data,
    parse_replicas,
)
from nbdserver.node.volume_view import STARTING, UNKNOWN, described, state_of_others
from protocol.invariant import invariant

MAX_FAMILIES = 1024
"""Each open one costs an open LevelDB, its share of the cache and a segment of ballast. Clones are of their base's."""

Found = tuple[Family, Volume]


class Volumes:
    """The volumes of this node."""

    def __init__(
        self,
        directory: DataDirectory,
        families: Families,
        call: Call,
        ask: Call,
        event: Callable[[str, dict[str, Any]], None],
        segment_bytes: int,
        admit: Callable[[str, int], Awaitable[None]],
    ) -> None:
        """`ask` is a `call` that is answered soon or not at all (asking.py). `admit(what, more_bytes)` raises
        ConflictError if so much more may not be promised."""
        self._families = families
        self.call = call
        self._ask_soon = ask
        self.event = event
        self.segment_bytes = segment_bytes
        self.admit = admit
        self.lock = asyncio.Lock()
        self.opening = Opening(directory, families, call, event)
        self.replicas: Replicas | None = None
        """Of a node that belongs to a cluster."""
        self.share: Callable[[Family, int], Awaitable[None]] = _no_cluster
        """Makes one of this node's own families the cluster's."""
        self.is_up: Callable[[str], bool] = lambda node: False
        """Whether a node of the cluster is heard."""
        self.told_snapshots: Callable[[Family, Volume], Sequence[ToldSnapshot]] = lambda family, volume: ()
        """What snapshots others have told of, of a volume that they serve."""

    @property
    def changing(self) -> asyncio.Lock:
        """Held while a change is made: who has it knows that none is half done."""
        return self.lock

    async def remove_scraps(self) -> None:
        """Delete the directories of families that were being made or removed when the node stopped."""
        for family_id in self._families.scraps():
            await self.opening.scrap(family_id)

    async def open_all(self, groups: Sequence[Sequence[Family]]) -> None:
        """Open families, each group in a data process of its own. One that fails is reported and stays closed; the
        others are served."""
        async with self.lock:
            await asyncio.gather(*(self.opening.open_all(group) for group in groups))

    # -- making

    async def create(self, name: str, size_bytes: int, exist_ok: bool = False) -> dict[str, Any]:
        """Make an empty volume and serve it. `exist_ok`: one that is there is fine; it keeps its size."""
        async with self.lock:
            there = self._families.find(name)
            if there is not None and exist_ok and there[1].state == VolumeState.THERE:
                return self._describe(*there, {}, STARTING)
            await self.admit_new(name, size_bytes)
            family = Family(
                id=secrets.token_hex(FAMILY_ID_BYTES),
                segment_bytes=self.segment_bytes,
                owner="",
                volumes=(Volume(FIRST_VOLUME, name, size_bytes),),
            )
            await self.opening.format(family)
            # If this fails, only the registry knows whether the directory is a family or a scrap; the next start asks.
            invariant(
                await self._families.add(family), "a name that was free is taken, although one change is made at a time"
            )
            await self.opening.open(family)
            self.event("volume-created", {"volume": name, "size_bytes": size_bytes})
            return await self._shown(name)

    async def clone(self, base: str, snapshot: str, name: str) -> dict[str, Any]:
        """Make a volume that holds what a snapshot holds, and serve it. Who may attach to it is as with its base."""
        check_name(name)
        async with self.lock:
            self._refuse_taken(name)
            family, volume = self.find(base)
            found = await self.ask("snapshot", base, snapshot=snapshot)
            if found is None:
                raise NotFoundError(f"there is no snapshot {snapshot!r:.60} of volume {base}")
            size_bytes = found["size_bytes"]
            await self.admit(f"clone {name} of {format_size(size_bytes)}", size_bytes)
            settings = volume.settings.for_clone()
            family, made = await self._families.add_volume(family, name, size_bytes, settings)
            errno = await self.call("clone", family=family.id, layer=found["layer"], number=made.number)
            if errno:
                # It was refused; after a failure of the family the next start finds out what its log has.
                if not (await self.call("volume", family=family.id, number=made.number))["disk"].get("failure"):
                    await self._families.remove_volume(family, made)
                raise change_error(errno, f"cloning {base}@{snapshot}")
            family = await self._families.change_volume(family, made, state=VolumeState.THERE)
            await self.opening.serve(family, [family.volume(made.number)])
            self.event("clone-created", {"volume": name, "base": f"{base}@{snapshot}"})
            return await self._shown(name)

    # -- looking

    async def list(self) -> list[dict[str, Any]]:
        """Return every volume with what the data processes say of it, by name."""
        live, silent = await self._live()
        found = [
            self._describe(family, volume, live.get(family.id, {}), UNKNOWN if family.id in silent else STARTING)
            for family in self._families.all()
            for volume in family.volumes
            if volume.state == VolumeState.THERE
        ]
        return sorted(found, key=lambda shown: str(shown["name"]))

    def names(self) -> Sequence[str]:
        """Of all volumes, in order."""
        volumes = [volume for family in self._families.all() for volume in family.volumes]
        return sorted(volume.name for volume in volumes if volume.state == VolumeState.THERE)

    async def show(self, name: str) -> dict[str, Any]:
        """Return one volume. Raises NotFoundError."""
        self.find(name)
        return await self._shown(name)

    def owned_families(self) -> Sequence[Family]:
        """Those whose volumes this node has to serve: its own, and of its replicas those that it owns."""
        return [family for family in self._families.here() if self._is_owned(family)]

    def open_families(self) -> Sequence[Family]:
        """Those whose volumes are served here."""
        return [family for family in self._families.here() if self.is_served(family)]

    def families(self) -> Sequence[Family]:
        """All that are known here, by the name of their oldest volume."""
        return self._families.all()

    def _is_owned(self, family: Family) -> bool:
        return not family.replicas or (self.replicas is not None and self.replicas.owns(family.id))

    def is_served(self, family: Family) -> bool:
        """Whether its volumes are served here."""
        return family.id not in self.opening.failed and self._is_owned(family)

    # -- changing

    async def set(self, name: str, changes: dict[str, str]) -> dict[str, Any]:
        """Change settings, all of `changes` or none, live."""
        async with self.lock:
            family, volume = self.find(name)
            settings, max_data, replicas = volume.settings, family.max_data, family.replicas
            for key, value in changes.items():
                if key == REPLICAS:
                    replicas = parse_replicas(value)
                elif key.replace("_", "-") == MAX_DATA:
                    max_data = parse_max_data(value, family.segment_bytes)
                else:
                    settings = change_settings(settings, key, value)
            if replicas and not family.replicas:
                if len(changes) > 1:
                    raise WrongInputError("replicas of a volume that is one node's own cannot be set with others")
                await self.share(family, replicas)
            elif (settings, max_data, replicas) != (volume.settings, family.max_data, family.replicas):
                if not self.opening.why_not(family, volume):
                    await self.call("set", family=family.id, number=volume.number, settings=asdict(settings))
                    await self.call("limit_data", family=family.id, max_data_bytes=max_data)
                changed = replace(volume, settings=settings)
                volumes = family.with_volume(changed).volumes
                await self._families.change(family, volumes=volumes, max_data=max_data, replicas=replicas)
                self.event("volume-changed", {"volume": name, "changes": changes})
            return await self._shown(name)

    async def rename(self, name: str, new_name: str) -> dict[str, Any]:
        """Give a volume another name, and its snapshots with it. Attached clients go on."""
        check_name(new_name)
        async with self.lock:
            family, volume = self.find(name)
            self._refuse_taken(new_name)
            await self._families.rename(family, volume, new_name)
            if not self.opening.why_not(family, volume):
                await self.call("rename", family=family.id, number=volume.number, new_name=new_name)
            self.event("volume-renamed", {"volume": name, "new_name": new_name})
            return await self._shown(new_name)

    async def delete(self, name: str, force: bool = False) -> None:
        """Delete a volume and its data. ConflictError while it has clients or snapshots, unless `force`, and while
        there are clones of its snapshots."""
        async with self.lock:
            family, volume = self.find(name)
            others = [each for each in family.volumes if each != volume and each.state == VolumeState.THERE]
            is_served = not self.opening.why_not(family, volume)
            if is_served:
                await self._refuse_dependents(family, volume, force)
                clients = await self.call("withdraw", family=family.id, number=volume.number, force=force)
                if clients:
                    raise ConflictError(
                        f"volume {name} has {counted(clients, 'client connection')}; "
                        "detach first, or add --force to disconnect"
                    )
            try:
                if others:
                    family = await self._families.change_volume(family, volume, state=VolumeState.DELETING)
                else:
                    if family.id not in self.opening.failed and not family.replicas:
                        await self.call("close", family=family.id)
                    await self._families.remove(family)
            except (OSError, RegistryError) as error:
                reason = f"closed to be deleted, which failed ({error}); the next start opens it again"
                if others:
                    self.opening.missing[family.id, volume.number] = reason
                else:
                    self.opening.failed[family.id] = reason
                raise
            if not others:
                self.opening.failed.pop(family.id, None)
                await self._delete_data(family)
            elif family.id not in self.opening.failed:
                await self.opening.delete_from_log(family, volume)
            self.opening.missing.pop((family.id, volume.number), None)
            self.event("volume-deleted", {"volume": name})

    async def _delete_data(self, family: Family) -> None:
        if family.replicas:
            assert self.replicas is not None
            await self.replicas.forget(family.id)
        else:
            await self.opening.scrap(family.id)

    async def ask(self, request: str, name: str, **arguments: Any) -> Any:
        """A request to the data process about an open volume. Raises NotFoundError, NodeError."""
        family, volume = self.find(name)
        if reason := self.opening.why_not(family, volume):
            raise ConflictError(f"volume {name} is not open: {reason}")
        return await self.call(request, family=family.id, number=volume.number, **arguments)

    async def note_size(self, name: str, size_bytes: int) -> None:
        """The volume has this size now."""
        family, volume = self.find(name)
        if volume.size_bytes != size_bytes:
            await self._families.change_volume(family, volume, size_bytes=size_bytes)

    # -- refusing and describing

    async def admit_new(self, name: str, size_bytes: int) -> None:
        """Raise WrongInputError or ConflictError if this node cannot make such a volume."""
        check_name(name)
        try:
            check_volume_size(size_bytes)
        except SizeError as error:
            raise WrongInputError(str(error)) from None
        self._refuse_taken(name)
        if len(self._families.here()) >= MAX_FAMILIES:
            raise ConflictError(
                f"this node has {MAX_FAMILIES} volumes besides clones, the most it takes; delete one first"
            )
        await self.admit(f"volume {name} of {format_size(size_bytes)}", size_bytes)

    def _refuse_taken(self, name: str) -> None:
        there = self._families.find(name)
        if there is None:
            return
        _, volume = there
        if volume.state != VolumeState.THERE:
            begun = "deleted" if volume.state == VolumeState.DELETING else "made"
            raise ConflictError(f"volume {name} was being {begun}, which the next start finishes; choose another name")
        raise ConflictError(
            f"volume {name} exists already, with size {format_size(volume.size_bytes)}; "
            f"choose another name, or nbdserver volume delete {name} first"
        )

    async def _refuse_dependents(self, family: Family, volume: Volume, force: bool) -> None:
        name = volume.name
        snapshots = await self.call("snapshots", family=family.id, number=volume.number)
        clones = sorted({clone for found in snapshots for clone in found["clones"]})
        if clones:
            raise ConflictError(
                f"volume {name} has snapshots of which there are clones: {listed(clones)}; delete the clones first, or "
                f"the snapshots, without which clones go on (nbdserver snapshot delete {name}@{snapshots[0]['name']})"
            )
        if snapshots and not force:
            raise ConflictError(
                f"volume {name} has snapshots: {listed([found['name'] for found in snapshots])}; delete them first "
                f"(nbdserver snapshot delete {name}@{snapshots[0]['name']}), or add --force to delete them too"
            )

    async def _live(self) -> tuple[dict[str, dict[str, Any]], Collection[str]]:
        """What the data processes say of each family, and the families of those that do not answer in time."""
        live: dict[str, dict[str, Any]] = {}
        silent: set[str] = set()
        last = ""
        try:
            while True:
                page = await self._ask_soon("volumes", after=last)
                live |= page["families"]
                silent.update(page.get("silent", ()))
                last = page["last"]
                if not last:
                    return live, silent
        except NodeError as error:
            if getattr(error, "kind", "") == SILENT:
                silent.update(family.id for family in self._families.all())
            return live, silent

    def find(self, name: str) -> Found:
        """A volume and its family. NotFoundError."""
        found = self._families.find(name)
        if found is None or found[1].state != VolumeState.THERE:
            names = listed(sorted(volume.name for family in self._families.all() for volume in family.volumes))
            raise NotFoundError(f"there is no volume {name!r:.60}; this node has: {names or 'none yet'}")
        return found

    async def _shown(self, name: str) -> dict[str, Any]:
        family, volume = self.find(name)
        live: dict[str, Any] = {}
        otherwise = STARTING
        if self.is_served(family):
            try:
                live = await self._ask_soon("volume", family=family.id, number=volume.number)
            except NodeError as error:
                otherwise = UNKNOWN if getattr(error, "kind", "") == SILENT else STARTING
        return self._describe(family, volume, live, otherwise)

    def _describe(self, family: Family, volume: Volume, live: dict[str, Any], otherwise: str) -> dict[str, Any]:
        """`otherwise` is its state if nothing is live of it."""
        reason = self.opening.why_not(family, volume)
        if not family.replicas:
            return described(family, volume, live, otherwise, reason)
        value = self._families.replica_set(family.id)
        snapshots = 0
        if not self.is_served(family):
            snapshots = len(self.told_snapshots(family, volume))
            me = self.replicas.me if self.replicas is not None else ""
            live, otherwise, reason = {}, state_of_others(value, me, self.is_up), ""
        return described(family, volume, live, otherwise, reason, value, self.is_up, snapshots)


async def _no_cluster(family: Family, replicas: int) -> None:
    raise ConflictError("this node stands alone, replicas need a cluster; nbdserver cluster init makes one")


def change_error(errno: int, doing: str) -> NodeError:
    """What to tell about a change of a family that was answered with an errno."""
    if errno == errnos.EMLINK:
        return ConflictError(f"{doing}: there are as many snapshots and clones as there can be; delete some first")
    if errno == errnos.ENOSPC:
        return ConflictError(f"{doing}: the disk is full; free some room first")
    return NodeError(f"{doing} failed: {os.strerror(errno)}; nbdserver events says more")
