"""What is in the registry: who owns which family, under which epoch, and which volumes it has. How it is changed:
metadata/families.py.

Theory: everything that must not be decided twice is one value, changed by compare-and-swap against its old bytes.
On one node this looks like too much care; it is the same code path as with etcd, so nothing has to be rebuilt when
there are three nodes.

    family/<32 hex digits>      a Family with its volumes, as compact JSON
    volume/<name>               <family id>/<volume number>: whose name it is; makes names unique
    scrap/<32 hex digits>       a family directory that is being made or removed: to be deleted at the next start

of a node's own registry also

    replica/<32 hex digits>     a copy of the Family of the cluster of which this node has a replica
    set/<32 hex digits>         the newest ReplicaSet of it that this node has heard of
    deleted/<32 hex digits>     a family that was deleted while this node had a replica: a number that rises
    registry-seen               how far the shared registry was (registry_guard.py)

and of the one that a cluster shares

    replicas/<32 hex digits>    ReplicaSet (replica_set.py): who owns it, who is in sync, where it is
    removed/<32 hex digits>     nodes that have yet to delete their replica of a family that was deleted

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

from metadata.registry_calls import MAX_SWAP_BYTES

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
    replicas: int = 0
    """Of a family of the cluster: on how many nodes it shall be. Of such a one ReplicaSet has owner, epoch, generation,
    in-sync set and placement. 0: it is one node's own."""
    leave: tuple[str, ...] = ()
    """Nodes of the cluster that its replicas shall leave."""
    number: int = 0
    """Of this value, of a family of the cluster: it only rises."""

    @property
    def name(self) -> str:
        """What people know it by: its oldest volume."""
        return self.volumes[0].name

    @property
    def size_bytes(self) -> int:
        """Of all its volumes: what they promise."""
        return sum(volume.size_bytes for volume in self.volumes)

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
        if not self.replicas:  # as programs that know no others write it
            del content["replicas"], content["leave"], content["number"]
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
        for name in ("in_sync", "placement", "leave"):
            content[name] = tuple(content.get(name, ()))
        return Family(**content | {"volumes": tuple(map(Volume.decode, content["volumes"]))})


_FAMILY_KEYS = {item.name for item in fields(Family)}
