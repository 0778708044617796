"""The snapshots of the cluster's volumes as every node knows them, so that they are listed wherever somebody asks.

    snapshots/FAMILY   {"1": [["monday", 1795678501, 1073741824], ...]}
                         number of the volume: name, made at, size in bytes; the oldest first

Theory: the names of snapshots stand in their family's tree. Replicas have that, other nodes have nothing of it, and a
client's question for a list is answered at once. So whoever serves a family publishes in the directory what snapshots
it has, when that has changed; every node has that in its copy, and lets its data processes know. It stays there until
another owner says otherwise: an owner that is lost takes no name along.

Rules
- Who serves a family makes its key say what is true, also when somebody else has changed it: an owner that was
  superseded and did not know it.
- The master deletes the keys of families that the registry does not have.
- A value is at most TOLD_BYTES, and at most MOST_LISTED snapshots are made known to data processes: the newest.
- What others say is read leniently: a newer version may say more.

Known weakness: it is known a moment later than at the owner, or as late as the directory is. What is not listed as yet
can be attached all the same: that is settled at the owner.
"""

import asyncio
import contextlib
import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from metadata.families import Families
from metadata.registry import Family, RegistryError, Volume, VolumeState
from nbdserver.node.cluster_settings import SNAPSHOTS_PREFIX
from nbdserver.node.volume_settings import is_snapshot_name
from nbdserver.volume.export import snapshot_description

TOLD_BYTES = 128 << 10
MOST_LISTED = 2048
"""A list of so many takes a data process some milliseconds."""
LISTED_AT_ONCE = 200
LOOK_S = 10.0
PAUSE_S = 0.2
"""Between two looks: what changes meanwhile is told together."""

Listings = dict[str, dict[str, Any] | None]
"""By name of the export, as ExportTable has them."""


class ToldSnapshot(NamedTuple):
    """One snapshot of a volume, as its owner tells of it."""

    name: str
    created_s: int
    size_bytes: int


OfFamily = Mapping[int, Sequence[ToldSnapshot]]
"""By number of the volume, the oldest first."""


class Directory(Protocol):
    """The directory as a node has it (metadata/directory/node.py)."""

    @property
    def master(self) -> object | None: ...
    def get(self, key: str) -> bytes | None: ...
    def range(self, prefix: str) -> list[tuple[str, bytes]]: ...
    def publish(self, key: str, value: bytes | None) -> None: ...


class SnapshotsTold:
    """What one node tells and hears of snapshots."""

    def __init__(
        self,
        families: Families,
        owns: Callable[[str], bool],
        here: Callable[[], Mapping[str, Mapping[str, Any]]],
        note: Callable[[Listings], None],
    ) -> None:
        """`owns(family_id)`: whether this node serves it; `here()` are the listings of the snapshots that its data
        processes have, `note` tells these of others."""
        self.directory: Directory | None = None
        """While this node takes part in the cluster."""
        self._families = families
        self._owns = owns
        self._here = here
        self._note = note
        self._listed: Listings = {}
        self._read: dict[str, tuple[bytes, OfFamily]] = {}
        self._changed = asyncio.Event()

    def stir(self) -> None:
        """Something that is told or listed may have changed."""
        self._changed.set()

    async def watch(self) -> None:
        """Tell and list what has changed, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_S)
            self._changed.clear()
            with contextlib.suppress(RegistryError):  # a value that cannot be read: whoever serves it says so
                self.look()
            await asyncio.sleep(PAUSE_S)

    def look(self) -> None:
        """Do what is to be done now; what is listed stays while nothing can be heard. RegistryError."""
        if self.directory is not None:
            families = self._families.of_cluster()
            self._tell(self.directory, families)
            self._list(families)

    def of(self, family: Family, volume: Volume) -> Sequence[ToldSnapshot]:
        """What is known of a volume's snapshots, the oldest first."""
        value = self.directory.get(SNAPSHOTS_PREFIX + family.id) if self.directory is not None else None
        if value is None:
            self._read.pop(family.id, None)
            return ()
        known = self._read.get(family.id)
        if known is None or known[0] != value:
            known = self._read[family.id] = (value, read(value))
        return known[1].get(volume.number, ())

    def list_again(self, note: Callable[[Listings], None]) -> None:
        """Tell a data process that was started all that the others know."""
        _in_pieces(self._listed, note)

    # --- what is told ---

    def _tell(self, directory: Directory, families: Sequence[Family]) -> None:
        here = self._served_here()
        for family in families:
            key = SNAPSHOTS_PREFIX + family.id
            if self._owns(family.id):
                value = told(here[family.id]) if family.id in here else None
                if value != directory.get(key):
                    directory.publish(key, value)
        if directory.master is not None and self._families.shared is not None:
            known = {SNAPSHOTS_PREFIX + family.id for family in families}
            for key, _ in directory.range(SNAPSHOTS_PREFIX):
                if key not in known:
                    directory.publish(key, None)

    def _served_here(self) -> dict[str, dict[int, list[ToldSnapshot]]]:
        found: dict[str, dict[int, list[ToldSnapshot]]] = {}
        for export, listing in self._here().items():
            volume, _, name = export.partition("@")
            there = self._families.find(volume)
            if there is not None:
                family, number = there[0].id, there[1].number
                snapshot = ToldSnapshot(name, listing["created_s"], listing["size_bytes"])
                found.setdefault(family, {}).setdefault(number, []).append(snapshot)
        return found

    # --- what is listed ---

    def _list(self, families: Sequence[Family]) -> None:
        known = (
            (snapshot, family, volume)
            for family in families
            for volume in family.volumes
            if volume.state == VolumeState.THERE
            for snapshot in self.of(family, volume)
        )
        newest = heapq.nlargest(MOST_LISTED, known, key=lambda each: each[0].created_s)
        listed: Listings = {
            f"{volume.name}@{snapshot.name}": {
                "description": snapshot_description(volume.name),
                "allowed": list(volume.settings.allowed_clients),
                "tls": volume.settings.tls,
            }
            for snapshot, _, volume in newest
        }
        changes: Listings = {name: None for name in self._listed if name not in listed}
        changes |= {name: listing for name, listing in listed.items() if self._listed.get(name) != listing}
        self._listed = listed
        _in_pieces(changes, self._note)


def _in_pieces(listings: Listings, note: Callable[[Listings], None]) -> None:
    """A data process serves clients between two of them."""
    names = list(listings)
    for first in range(0, len(names), LISTED_AT_ONCE):
        note({name: listings[name] for name in names[first : first + LISTED_AT_ONCE]})


def told(family: OfFamily) -> bytes:
    """The value for a family with these snapshots, of which there is one: the newest of them, as many as it takes."""
    every = [(snapshot, number) for number, snapshots in family.items() for snapshot in snapshots]
    every.sort(key=lambda each: each[0].created_s)
    size_bytes = 0
    kept: dict[int, list[str]] = {}
    for snapshot, number in reversed(every):
        row = json.dumps(snapshot, separators=(",", ":"))
        size_bytes += len(row) + 1
        if size_bytes > TOLD_BYTES:
            break
        kept.setdefault(number, []).append(row)
    volumes = [f'"{number}":[{",".join(reversed(rows))}]' for number, rows in sorted(kept.items())]
    return f"{{{','.join(volumes)}}}".encode()


def read(value: bytes) -> OfFamily:
    """What such a value says, as far as it is understood."""
    try:
        content = json.loads(value)
    except ValueError:
        return {}
    found: dict[int, list[ToldSnapshot]] = {}
    for number, rows in content.items() if isinstance(content, dict) else ():
        if number.isdecimal() and isinstance(rows, list):
            found[int(number)] = [ToldSnapshot(*row[:3]) for row in rows if _is_snapshot(row)]
    return found


def _is_snapshot(row: object) -> bool:
    if not isinstance(row, list) or len(row) < len(ToldSnapshot._fields):
        return False
    name, created_s, size_bytes = row[:3]
    return isinstance(name, str) and is_snapshot_name(name) and type(created_s) is int and type(size_bytes) is int
