"""What is in the registry: who owns which family, under which epoch, and which volumes it has.

Theory: everything that must not be decided twice is one value, changed by compare-and-swap against its old bytes.
On one node this looks like too much care; it is the same code path as with etcd, so nothing has to be rebuilt when
there are three nodes.

    family/<32 hex digits>      a Family with its volumes, as compact JSON
    volume/<name>               <family id>/<volume number>: whose name it is; makes names unique
    scrap/<32 hex digits>       a family directory that is being made or removed: to be deleted at the next start

A family is one value. Its log knows its volumes by number only; names and settings are here. Where a volume is made or
deleted within a family, both have to change, and a crash may come in between. So the intent stands here first
(`VolumeState`), then comes the record in the log, synced, then the end of it here. Whoever opens the family afterwards
sees which volumes its log has, and finishes what was begun (`Families.settled`). Nothing is ever deleted because a name
is missing.

Rules
- Whoever opens a family for writing raises its epoch here first (`raise_epoch`), at every start, on one node too.
- A family's directory is named by `scrap/` before it is made and before it is deleted, so that a crash in between
  leaves nothing that no one knows.
- A number is given to one volume of a family for ever; a name is free when its volume is gone from the log.
- What an older program wrote is read, and written anew at the next change: the swap is against the bytes that are
  there.
- A family's value has at most MOST_FAMILY_BYTES: the old one and the new one fit into one swap.

Known weakness: the value of a family of a thousand clones is some 60 KiB, and is written whole for each new one.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

from metadata.registry_calls import MAX_CHANGES, MAX_SWAP_BYTES
from metadata.seams import HeldRegistry

_VERSION = 2

FAMILY_ID_BYTES = 16

FIRST_VOLUME = 1
"""Number of the volume that a family is made with."""

MOST_FAMILY_BYTES = MAX_SWAP_BYTES // 2 - (32 << 10)

Change = tuple[str, bytes | None, bytes | None]
"""(key, what it has to be now, what it shall be); None: absent."""


class RegistryError(Exception):
    """The registry cannot be used, or a change lost against another; one line."""


@dataclass(frozen=True)
class ExportSettings:
    """What a volume says about its export; changed while it is served."""

    read_only: bool = False
    description: str = ""
    shared: bool = False
    allowed_clients: tuple[str, ...] = ()
    """CIDRs and `cert:NAME`; empty means everybody."""
    iops: int = 0
    """Operations a second that its clients may do together; 0: without limit."""
    iops_burst: int = 0
    """Operations that may be done at once after a pause; 0: one second's worth."""
    bandwidth: int = 0
    """Bytes a second, read and written; 0: without limit."""
    bandwidth_burst: int = 0
    tls: str = "inherit"
    """off, allowed, required, or inherit: as the node says."""

    def for_clone(self) -> "ExportSettings":
        """What a clone begins with: no one may attach to it who may not attach to its base, and it can be written."""
        return replace(self, read_only=False, shared=False, description="")


class VolumeState(Enum):
    """How far a volume is between the registry and its family's log."""

    THERE = "there"
    MAKING = "making"
    """Its record may be in the log or not."""
    DELETING = "deleting"
    """It may still be in the log."""


@dataclass(frozen=True)
class Volume:
    """A volume of a family."""

    number: int
    """In the family's tree of layers."""
    name: str
    size_bytes: int
    settings: ExportSettings = field(default_factory=ExportSettings)
    state: VolumeState = VolumeState.THERE

    @cached_property
    def encoded(self) -> str:
        """As JSON. There may be a thousand volumes: settings that are as usual are left out, and what was encoded once
        is kept."""
        content: dict[str, Any] = {"number": self.number, "name": self.name, "size_bytes": self.size_bytes}
        if self.settings != _USUAL_SETTINGS:
            usual, settings = asdict(_USUAL_SETTINGS), asdict(self.settings)
            content["settings"] = {key: value for key, value in settings.items() if value != usual[key]}
        if self.state != VolumeState.THERE:
            content["state"] = self.state.value
        return json.dumps(content, separators=(",", ":"), sort_keys=True)

    @staticmethod
    def decode(content: dict[str, Any]) -> "Volume":
        """Return the volume; RegistryError for keys that are not known."""
        if set(content) - _VOLUME_KEYS:
            raise RegistryError("a volume has keys that this program does not know; use a newer one")
        state = VolumeState(content.get("state", VolumeState.THERE.value))
        settings = _decode_settings(content.get("settings", {}))
        return Volume(content["number"], content["name"], content["size_bytes"], settings, state)


def _decode_settings(content: dict[str, Any]) -> ExportSettings:
    if not content:
        return _USUAL_SETTINGS
    if set(content) - _SETTING_KEYS:
        raise RegistryError("a volume has settings that this program does not know; use a newer one")
    if "allowed_clients" in content:
        content["allowed_clients"] = tuple(content["allowed_clients"])
    return ExportSettings(**content)


_USUAL_SETTINGS = ExportSettings()
_SETTING_KEYS = {item.name for item in fields(ExportSettings)}
_VOLUME_KEYS = {item.name for item in fields(Volume)}


@dataclass(frozen=True)
class Family:
    """A family's one value in the registry."""

    id: str
    """32 hex digits; also the name of its directory."""
    segment_bytes: int
    owner: str
    volumes: tuple[Volume, ...]
    """By number."""
    next_volume: int = FIRST_VOLUME + 1
    """The lowest number that no volume ever had."""
    epoch: int = 0
    """0: never opened for writing."""
    generation: int = 1
    """Raised when acknowledged writes may have been lost."""
    in_sync: tuple[str, ...] = ()
    placement: tuple[str, ...] = ()
    max_data: int = 0
    """Bytes that its segment files may take; 0: without limit."""

    @property
    def name(self) -> str:
        """What people know it by: its oldest volume."""
        return self.volumes[0].name

    def volume(self, number: int) -> Volume:
        """Return one of its volumes. LookupError."""
        for volume in self.volumes:
            if volume.number == number:
                return volume
        raise LookupError(f"family {self.id} has no volume {number}")

    def with_volume(self, volume: Volume) -> "Family":
        """Return the family with this volume as the one of its number."""
        others = [other for other in self.volumes if other.number != volume.number]
        return replace(self, volumes=tuple(sorted((*others, volume), key=lambda each: each.number)))

    def encode(self) -> bytes:
        """Return the value; equal families give equal bytes. RegistryError if there are too many."""
        content = {name: getattr(self, name) for name in _FAMILY_KEYS - {"volumes"}} | {"version": _VERSION}
        rest = json.dumps(content, separators=(",", ":"), sort_keys=True)
        value = f'{rest[:-1]},"volumes":[{",".join(volume.encoded for volume in self.volumes)}]}}'.encode()
        if len(value) > MOST_FAMILY_BYTES:
            raise RegistryError(
                f"{self.name} and what was cloned from it have {len(self.volumes)} volumes, whose names and settings "
                f"take more than {MOST_FAMILY_BYTES} bytes; delete some of them, or shorten descriptions"
            )
        return value

    @staticmethod
    def decode(value: bytes) -> "Family":
        """Return the family. Raises RegistryError for a value of a newer program."""
        content = json.loads(value)
        version = content.pop("version")
        if version == 1:  # one volume
            parts = {key: content.pop(key) for key in ("size_bytes", "settings") if key in content}
            content["volumes"] = [{"number": FIRST_VOLUME, "name": content.pop("volume"), **parts}]
        if version not in (1, _VERSION) or set(content) - _FAMILY_KEYS:
            raise RegistryError(
                f"a family has version {version} and keys that this program does not know; use a newer one"
            )
        for name in ("in_sync", "placement"):
            content[name] = tuple(content[name])
        return Family(**content | {"volumes": tuple(map(Volume.decode, content["volumes"]))})


_FAMILY_KEYS = {item.name for item in fields(Family)}


class Families:
    """The families in a registry, and the swaps that change them. Each raises RegistryError if another was faster."""

    def __init__(self, registry: HeldRegistry, owner: str) -> None:
        self._registry = registry
        self._owner = owner
        self._decoded: dict[str, tuple[bytes, Family]] = {}  # what was read last

    def all(self) -> list[Family]:
        """Return every family, by the name of its oldest volume."""
        found = [self._decode(key, value) for key, value in self._registry.range("family/")]
        return sorted(found, key=lambda family: family.name)

    def find(self, name: str) -> tuple[Family, Volume] | None:
        """Return the volume of this name and its family, or None."""
        value = self._registry.get(f"volume/{name}")
        if value is None:
            return None
        family_id, _, number = value.decode().partition("/")
        family = self._get(family_id)
        if family is None:
            raise RegistryError(f"volume {name} names family {family_id}, which the registry does not have")
        try:
            return family, family.volume(int(number or FIRST_VOLUME))
        except LookupError as error:
            raise RegistryError(f"volume {name}: {error}") from error

    def scraps(self) -> list[str]:
        """Return the ids whose directories are to be deleted."""
        return [key.removeprefix("scrap/") for key, _ in self._registry.range("scrap/")]

    async def begin(self, family_id: str) -> None:
        """Name a directory that is about to be made."""
        if not await self._registry.compare_and_swap([(f"scrap/{family_id}", None, b"")]):
            raise RegistryError(f"family {family_id} is being made already")

    async def add(self, family: Family) -> bool:
        """The directory is made: take the family in. False if the name is taken (its directory stays a scrap)."""
        changes = [(f"scrap/{family.id}", b"", None), (_family_key(family), None, family.encode())]
        changes += [_take_name(family, volume) for volume in family.volumes]
        return await self._registry.compare_and_swap(changes)

    async def change(self, family: Family, **values: object) -> Family:
        """Swap `family` for itself with `values`; names and numbers of its volumes stay."""
        changed = replace(family, **values)  # type: ignore[arg-type]
        before = [(volume.number, volume.name) for volume in family.volumes]
        if [(volume.number, volume.name) for volume in changed.volumes] != before or changed.id != family.id:
            raise RegistryError("a family keeps its id and the names of its volumes")
        return await self._swap(family, changed)

    async def change_volume(self, family: Family, volume: Volume, **values: object) -> Family:
        """Swap one of its volumes for itself with `values`."""
        changed = replace(volume, **values)  # type: ignore[arg-type]
        return await self.change(family, volumes=family.with_volume(changed).volumes)

    async def add_volume(
        self, family: Family, name: str, size_bytes: int, settings: ExportSettings
    ) -> tuple[Family, Volume]:
        """Note that a volume is about to be made in the family, under a number that is new."""
        volume = Volume(family.next_volume, name, size_bytes, settings, VolumeState.MAKING)
        changed = replace(family.with_volume(volume), next_volume=family.next_volume + 1)
        return await self._swap(family, changed, _take_name(changed, volume)), volume

    async def rename(self, family: Family, volume: Volume, name: str) -> Family:
        """Give a volume another name, which must be free."""
        renamed = replace(volume, name=name)
        changed = family.with_volume(renamed)
        return await self._swap(family, changed, self._forget_name(family, volume), _take_name(family, renamed))

    async def remove_volume(self, family: Family, volume: Volume) -> Family:
        """Forget one of several volumes: the family's log does not have it (any more)."""
        changed = replace(family, volumes=tuple(other for other in family.volumes if other.number != volume.number))
        return await self._swap(family, changed, self._forget_name(family, volume))

    async def settled(self, family: Family, sizes_bytes: dict[int, int]) -> Family:
        """Bring the family up to what its log has, `sizes_bytes` by volume number: what was being made is there or is
        forgotten, what was being deleted and is gone is forgotten, sizes are the log's. Volumes whose deletion has
        still to be done stay in state DELETING; those that should be there and are not stay as they are."""
        for volume in family.volumes:
            size_bytes = sizes_bytes.get(volume.number)
            if size_bytes is None:
                if volume.state != VolumeState.THERE and len(family.volumes) > 1:
                    family = await self.remove_volume(family, volume)
            elif volume.state == VolumeState.MAKING or size_bytes != volume.size_bytes:
                state = VolumeState.DELETING if volume.state == VolumeState.DELETING else VolumeState.THERE
                family = await self.change_volume(family, volume, size_bytes=size_bytes, state=state)
        return family

    async def raise_epoch(self, family: Family) -> Family:
        """Become the owner of `family` under a new epoch: before every opening for writing."""
        return await self.change(family, epoch=family.epoch + 1, owner=self._owner, in_sync=(self._owner,))

    async def remove(self, family: Family) -> None:
        """Forget `family` and its names; its directory becomes a scrap."""
        names = [self._forget_name(family, volume) for volume in family.volumes]
        last = MAX_CHANGES - 2
        while len(names) > last:  # a thousand volumes: their names go before the family does
            if not await self._registry.compare_and_swap(names[-last:]):
                raise RegistryError(f"volume {family.name} was changed by another at the same time; try again")
            del names[-last:]
        await self._swap(family, None, *names, (f"scrap/{family.id}", None, b""))

    async def scrapped(self, family_id: str) -> None:
        """The directory is gone: forget it."""
        await self._registry.compare_and_swap([(f"scrap/{family_id}", b"", None)])

    def _get(self, family_id: str) -> Family | None:
        key = f"family/{family_id}"
        value = self._registry.get(key)
        return None if value is None else self._decode(key, value)

    def _decode(self, key: str, value: bytes) -> Family:
        known = self._decoded.get(key)
        if known is None or known[0] != value:
            known = self._decoded[key] = (value, Family.decode(value))
        return known[1]

    def _forget_name(self, family: Family, volume: Volume) -> Change:
        """The name is free; nothing changes if it is another's by now."""
        key = f"volume/{volume.name}"
        value = self._registry.get(key)
        is_its = value == _whose(family, volume) or value == family.id.encode()  # the latter of an older program
        return key, value, None if is_its else value

    async def _swap(self, family: Family, changed: Family | None, *others: Change) -> Family:
        key = _family_key(family)
        before = self._registry.get(key)
        is_same = before is not None and self._decode(key, before) == family
        new = None if changed is None else changed.encode()
        if not is_same or not await self._registry.compare_and_swap([(key, before, new), *others]):
            raise RegistryError(f"volume {family.name} was changed by another at the same time; try again")
        if changed is None or new is None:
            self._decoded.pop(key, None)
            return family
        self._decoded[key] = (new, changed)
        return changed


def _family_key(family: Family) -> str:
    return f"family/{family.id}"


def _take_name(family: Family, volume: Volume) -> Change:
    """The name is the volume's, which has to be free."""
    return f"volume/{volume.name}", None, _whose(family, volume)


def _whose(family: Family, volume: Volume) -> bytes:
    return f"{family.id}/{volume.number}".encode()
