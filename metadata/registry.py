"""What is in the registry: who owns which family, under which epoch, and what the family is.

Theory: everything that must not be decided twice is one value, changed by compare-and-swap against its old bytes.
On one node this looks like too much care; it is the same code path as with etcd, so nothing has to be rebuilt when
there are three nodes.

    family/<32 hex digits>      a Family, as compact JSON
    volume/<name>               the id of the family whose head has this name; makes names unique
    scrap/<32 hex digits>       a family directory that is being made or removed: to be deleted at the next start

Rules
- Whoever opens a family for writing raises its epoch here first (`raise_epoch`), at every start, on one node too.
- A family's directory is named by `scrap/` before it is made and before it is deleted, so that a crash in between
  leaves nothing that no one knows.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace

from metadata.seams import LocalRegistry

FAMILY_ID_BYTES = 16


class RegistryError(Exception):
    """The registry cannot be used, or a change lost against another; one line."""


@dataclass(frozen=True)
class ExportSettings:
    """What a volume says about its export; changed while it is served."""

    read_only: bool = False
    description: str = ""
    shared: bool = False
    allowed_clients: tuple[str, ...] = ()
    """CIDRs; empty means everybody."""
    iops: int = 0
    """Operations a second that its clients may do together; 0: without limit."""
    iops_burst: int = 0
    """Operations that may be done at once after a pause; 0: one second's worth."""
    bandwidth: int = 0
    """Bytes a second, read and written; 0: without limit."""
    bandwidth_burst: int = 0


@dataclass(frozen=True)
class Family:
    """A family's one value in the registry."""

    id: str
    """32 hex digits; also the name of its directory."""
    volume: str
    size_bytes: int
    segment_bytes: int
    owner: str
    epoch: int = 0
    """0: never opened for writing."""
    generation: int = 1
    """Raised when acknowledged writes may have been lost."""
    in_sync: tuple[str, ...] = ()
    placement: tuple[str, ...] = ()
    settings: ExportSettings = field(default_factory=ExportSettings)

    def encode(self) -> bytes:
        """Return the value; equal families give equal bytes."""
        return json.dumps({"version": 1, **asdict(self)}, separators=(",", ":"), sort_keys=True).encode()

    @staticmethod
    def decode(value: bytes) -> "Family":
        """Return the family. Raises RegistryError for a value of a newer program."""
        content = json.loads(value)
        version = content.pop("version")
        known = {item.name for item in fields(Family)}
        settings = content.pop("settings")
        if version != 1 or set(content) - known or set(settings) - {item.name for item in fields(ExportSettings)}:
            raise RegistryError(
                f"a family has version {version} and keys that this program does not know; use a newer one"
            )
        settings["allowed_clients"] = tuple(settings.get("allowed_clients", ()))
        for name in ("in_sync", "placement"):
            content[name] = tuple(content[name])
        return Family(settings=ExportSettings(**settings), **content)


class Families:
    """The families in a registry, and the swaps that change them."""

    def __init__(self, registry: LocalRegistry, owner: str) -> None:
        self._registry = registry
        self._owner = owner

    def all(self) -> list[Family]:
        """Return every family, by volume name."""
        return sorted(
            (Family.decode(value) for _, value in self._registry.range("family/")), key=lambda item: item.volume
        )

    def find(self, volume: str) -> Family | None:
        """Return the family whose head is called `volume`, or None."""
        family_id = self._registry.get(f"volume/{volume}")
        if family_id is None:
            return None
        value = self._registry.get(f"family/{family_id.decode()}")
        if value is None:
            raise RegistryError(f"volume {volume} names family {family_id.decode()}, which the registry does not have")
        return Family.decode(value)

    def scraps(self) -> list[str]:
        """Return the ids whose directories are to be deleted."""
        return [key.removeprefix("scrap/") for key, _ in self._registry.range("scrap/")]

    def begin(self, family_id: str) -> None:
        """Name a directory that is about to be made."""
        if not self._registry.compare_and_swap([(f"scrap/{family_id}", None, b"")]):
            raise RegistryError(f"family {family_id} is being made already")

    def add(self, family: Family) -> bool:
        """The directory is made: take the family in. False if the name is taken (its directory stays a scrap)."""
        changes = [
            (f"scrap/{family.id}", b"", None),
            (f"volume/{family.volume}", None, family.id.encode()),
            (f"family/{family.id}", None, family.encode()),
        ]
        return self._registry.compare_and_swap(changes)

    def change(self, family: Family, **values: object) -> Family:
        """Swap `family` for itself with `values`. Raises RegistryError if it changed meanwhile."""
        changed = replace(family, **values)  # type: ignore[arg-type]
        if changed.volume != family.volume or changed.id != family.id:
            raise RegistryError("a family keeps its id and volume name")
        if not self._registry.compare_and_swap([(f"family/{family.id}", family.encode(), changed.encode())]):
            raise RegistryError(f"volume {family.volume} was changed by another at the same time; try again")
        return changed

    def raise_epoch(self, family: Family) -> Family:
        """Become the owner of `family` under a new epoch: before every opening for writing."""
        return self.change(family, epoch=family.epoch + 1, owner=self._owner, in_sync=(self._owner,))

    def remove(self, family: Family) -> None:
        """Forget `family` and its name; its directory becomes a scrap. Raises RegistryError if it changed meanwhile."""
        changes = [
            (f"family/{family.id}", family.encode(), None),
            (f"volume/{family.volume}", family.id.encode(), None),
            (f"scrap/{family.id}", None, b""),
        ]
        if not self._registry.compare_and_swap(changes):
            raise RegistryError(f"volume {family.volume} was changed by another at the same time; try again")

    def scrapped(self, family_id: str) -> None:
        """The directory is gone: forget it."""
        self._registry.compare_and_swap([(f"scrap/{family_id}", b"", None)])
