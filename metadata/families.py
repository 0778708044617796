"""The families that a node knows: its own, in its own registry, and the cluster's, in the registry that nodes share.

Theory: one way of finding and changing for both. What is there is read at once, from the own registry or from what is
held of the shared one; a change is a swap, and the code that makes it need not know how far it travels.

Of each family of the cluster of which this node has a replica, its own registry keeps a copy of the value
(`replica/ID`). So a node that starts while the shared registry cannot be reached knows what it has. The copies only
stand in: nothing is decided on them.

Rules
- Each change raises RegistryError if another was faster, or if the registry that has to take it cannot be reached.
- A name is free only if neither registry has it. (A node's own name and one of the cluster that are given in the same
  moment may be the same: then the own one is found. Names of the cluster's are unique.)
- Every change of a shared family raises its `number`: bytes that were replaced do not come back, so that a swap whose
  answer was lost can be settled.
- What this node knows of a replica set is kept here (`set/ID`) before the data process hears of it: who owns a family
  has written down what it acts on, so that nodes can tell it if the shared registry is lost. What would add a member is
  kept (`asked/ID`) before the shared registry is asked for it: that member may go on without anybody else.
- A shared family that is deleted leaves `removed/ID`, which names the nodes that have a replica of it until they have
  deleted that. No replica is deleted because a key is missing.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from metadata.registry import (
    FIRST_VOLUME,
    Change,
    ExportSettings,
    Family,
    RegistryError,
    Volume,
    VolumeState,
)
from metadata.registry_calls import MAX_CHANGES
from metadata.registry_guard import RegistryPast
from metadata.replica_set import ReplicaSet, ReplicaSetError, replica_set_key
from metadata.seams import HeldRegistry

OF_REPLICA = b"replica"
"""What stands at `scrap/ID` if the directory is a replica of a family of the cluster."""

REMOVE_TRIES = 5

MOST_DELETED = 1000

MOST_SHARED = MAX_CHANGES - 2
"""Volumes of a family that becomes the cluster's: all of its names are taken at once. It may have more later."""


class Families:
    """The families in both registries, and the swaps that change them."""

    def __init__(self, own: HeldRegistry, owner: str) -> None:
        """`owner` is what this node calls itself in its own registry."""
        self.shared: HeldRegistry | None = None
        """What is held of the cluster's registry, once it is known."""
        self._own = own
        self._owner = owner
        self._decoded: dict[str, tuple[bytes, Family]] = {}  # what was read last
        self._sets: dict[str, tuple[bytes, ReplicaSet]] = {}  # of these too

    # --- looking ---

    def all(self) -> list[Family]:
        """Return every family, by the name of its oldest volume."""
        return _by_name([*self.own(), *self.of_cluster()])

    def own(self) -> list[Family]:
        """Those that are this node's alone."""
        return [family for family in self._in_own_registry() if not family.replicas]

    def being_shared(self) -> list[Family]:
        """Those that were this node's alone, and are on their way to the shared registry."""
        return [family for family in self._in_own_registry() if family.replicas]

    def _in_own_registry(self) -> list[Family]:
        return _by_name([self._decode(key, value) for key, value in self._own.range("family/")])

    def of_cluster(self) -> list[Family]:
        """Those of the cluster, as far as they are known: where the shared registry is not, the ones with a replica
        here."""
        found = {family.id: family for family in self._copies()}
        if self.shared is not None:
            found |= {
                family.id: family
                for family in (self._decode(key, value) for key, value in self.shared.range("family/"))
            }
        return _by_name(list(found.values()))

    def here(self) -> list[Family]:
        """Those of which this node has the data: its own and its replicas."""
        return _by_name([*self.own(), *self.replicas()])

    def replicas(self) -> list[Family]:
        """Those of the cluster of which this node has a replica."""
        return [self.get(copy.id) or copy for copy in self._copies()]

    def has_replica(self, family_id: str) -> bool:
        """Whether this node has a replica of a family of the cluster."""
        return self._own.get(f"replica/{family_id}") is not None

    def _copies(self) -> list[Family]:
        return [self._decode(key, value) for key, value in self._own.range("replica/")]

    def get(self, family_id: str) -> Family | None:
        """The family of this id, from wherever it is known best."""
        for registry, prefix in ((self._own, "family"), (self.shared, "family"), (self._own, "replica")):
            key = f"{prefix}/{family_id}"
            value = registry.get(key) if registry is not None else None
            if value is not None:
                return self._decode(key, value)
        return None

    def find(self, name: str) -> tuple[Family, Volume] | None:
        """Return the volume of this name and its family, or None."""
        for registry in (self._own, self.shared):
            value = registry.get(f"volume/{name}") if registry is not None else None
            if value is not None:
                family_id, _, number = value.decode().partition("/")
                return self._volume(name, family_id, int(number or FIRST_VOLUME))
        for family in self._copies():  # the shared registry does not have it, or is not known
            for volume in family.volumes:
                if volume.name == name and (self.shared is None or self.shared.get(f"family/{family.id}") is None):
                    return family, volume
        return None

    def _volume(self, name: str, family_id: str, number: int) -> tuple[Family, Volume]:
        family = self.get(family_id)
        if family is None:
            raise RegistryError(f"volume {name} names family {family_id}, which the registry does not have")
        try:
            return family, family.volume(number)
        except LookupError as error:
            raise RegistryError(f"volume {name}: {error}") from error

    def replica_set(self, family_id: str) -> ReplicaSet | None:
        """Who owns a family of the cluster and who is in sync; None if that is not known. RegistryError."""
        value = self.shared.get(_set_key(family_id)) if self.shared is not None else None
        if value is None:
            self._sets.pop(family_id, None)
            return None
        known = self._sets.get(family_id)
        if known is None or known[0] != value:
            try:
                known = self._sets[family_id] = (value, ReplicaSet.decode(value))
            except ReplicaSetError as error:
                raise RegistryError(f"who owns family {family_id} cannot be read: {error}") from error
        return known[1]

    def scraps(self) -> list[str]:
        """Return the ids whose directories are to be deleted."""
        return self._scraps(b"")

    def replica_scraps(self) -> list[str]:
        """The ids of directories that are to be deleted unless the shared registry says that they are in sync."""
        return self._scraps(OF_REPLICA)

    def _scraps(self, kind: bytes) -> list[str]:
        return [key.removeprefix("scrap/") for key, value in self._own.range("scrap/") if value == kind]

    # --- directories ---

    async def begin(self, family_id: str, kind: bytes = b"") -> None:
        """Name a directory that is about to be made."""
        if not await self._own.compare_and_swap([(f"scrap/{family_id}", None, kind)]):
            raise RegistryError(f"family {family_id} is being made already")

    async def scrapped(self, family_id: str) -> None:
        """The directory is gone: forget it."""
        keys = (f"scrap/{family_id}", _kept(family_id), _asked(family_id))
        await self._own.compare_and_swap([(key, self._own.get(key), None) for key in keys])

    async def keep_replica(self, family: Family) -> None:
        """The directory of a replica is made, or the family's value has changed: keep the copy that says so."""
        key, scrap = f"replica/{family.id}", f"scrap/{family.id}"
        before, value = self._own.get(key), family.encode()
        if before != value or self._own.get(scrap) is not None:
            await self._own.compare_and_swap([(key, before, value), (scrap, self._own.get(scrap), None)])

    async def drop_replica(self, family_id: str, was_deleted: bool = False) -> None:
        """The directory of a replica is about to be deleted; `was_deleted`: the family was, which is remembered."""
        keys = (f"replica/{family_id}", _kept(family_id), _asked(family_id))
        changes: list[Change] = [(key, self._own.get(key), None) for key in keys]
        if was_deleted:
            changes += self._note_deleted(family_id)
        if not await self._own.compare_and_swap([*changes, (f"scrap/{family_id}", None, b"")]):
            raise RegistryError(f"the replica of family {family_id} is being made")

    def _note_deleted(self, family_id: str) -> list[Change]:
        known = sorted(self._own.range("deleted/"), key=lambda item: int(item[1]))
        number = int(known[-1][1]) + 1 if known else 1
        oldest = known[:1] if len(known) >= MOST_DELETED else []
        key = f"deleted/{family_id}"
        return [(key, self._own.get(key), str(number).encode()), *((old, value, None) for old, value in oldest)]

    def deleted(self) -> list[str]:
        """Ids of families of the cluster that were deleted while this node had a replica: the newest MOST_DELETED."""
        return [key.removeprefix("deleted/") for key, _ in self._own.range("deleted/")]

    # --- what this node has seen of the shared registry ---

    def registry_past(self) -> RegistryPast | None:
        """How far it was; None if nothing was seen."""
        value = self._own.get("registry-seen")
        return None if value is None else RegistryPast.decode(value)

    async def remember(self, past: RegistryPast) -> None:
        """It is so far."""
        before, value = self._own.get("registry-seen"), past.encode()
        if before != value:
            await self._own.compare_and_swap([("registry-seen", before, value)])

    def kept_set(self, family_id: str) -> ReplicaSet | None:
        """The newest replica set of a family that this node has heard of and keeps; None if there is none that can be
        read."""
        return self._own_set(_kept(family_id))

    def asked_set(self, family_id: str) -> ReplicaSet | None:
        """The last one with a new member that was asked for here; None if there is none that can be read."""
        return self._own_set(_asked(family_id))

    def _own_set(self, key: str) -> ReplicaSet | None:
        value = self._own.get(key)
        try:
            return None if value is None else ReplicaSet.decode(value)
        except ReplicaSetError:
            return None

    async def note_asked(self, family_id: str, value: bytes) -> None:
        """The registry is about to be asked for this replica set, which has a new member."""
        key = _asked(family_id)
        before = self._own.get(key)
        if before != value:
            await self._own.compare_and_swap([(key, before, value)])

    async def keep_set(self, family_id: str, value: bytes) -> bool:
        """The registry has this replica set, of a family of which there is a replica here or is about to be. False if a
        newer one is kept: nothing is changed. ReplicaSetError for what cannot be read."""
        before, number = self._own.get(_kept(family_id)), ReplicaSet.decode(value).number
        kept = self.kept_set(family_id)
        if kept is None or number > kept.number:
            await self._own.compare_and_swap([(_kept(family_id), before, value)])
        return kept is None or number >= kept.number

    def removed(self) -> dict[str, list[str]]:
        """By id of a deleted family of the cluster: the nodes that still have a replica."""
        items = self.shared.range("removed/") if self.shared is not None else []
        return {key.removeprefix("removed/"): list(json.loads(value)) for key, value in items}

    async def has_removed(self, family_id: str, node: str) -> None:
        """The replica of a deleted family on that node is gone."""
        shared, key = self._demand_shared(), f"removed/{family_id}"
        value = shared.get(key)
        if value is not None:
            left = [name for name in json.loads(value) if name != node]
            await shared.compare_and_swap([(key, value, json.dumps(left).encode() if left else None)])

    # --- changing ---

    async def add(self, family: Family) -> bool:
        """The directory is made: take the family in. False if the name is taken (its directory stays a scrap)."""
        changes = [(f"scrap/{family.id}", b"", None), (_family_key(family), None, family.encode())]
        changes += [_take_name(family, volume) for volume in family.volumes]
        return await self._own.compare_and_swap(changes)

    async def add_shared(self, family: Family, replica_set: ReplicaSet) -> bool:
        """Take a family, of at most MOST_SHARED volumes, into the shared registry. False if a name is taken."""
        changes: list[Change] = [(key, None, value) for key, value in shared_entries(family, replica_set).items()]
        return await self._demand_shared().compare_and_swap(changes)

    async def begin_sharing(self, family: Family, replicas: int) -> Family:
        """Note that a family of this node's own is about to become the cluster's. 0: it is not, after all."""
        key, changed = _family_key(family), replace(family, replicas=replicas)
        if not await self._own.compare_and_swap([(key, family.encode(), changed.encode())]):
            raise _changed_by_another(family)
        return changed

    async def end_sharing(self, family: Family) -> None:
        """The shared registry has the family: keep a copy."""
        key = _family_key(family)
        copied: Change = (f"replica/{family.id}", self._own.get(f"replica/{family.id}"), family.encode())
        names = [f"volume/{volume.name}" for volume in family.volumes]
        gone: list[Change] = [(each, self._own.get(each), None) for each in (key, *names)]
        if not await self._own.compare_and_swap([copied, *gone]):
            raise _changed_by_another(family)

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
        """Become the owner of `family`, this node's own, under a new epoch: before every opening for writing."""
        return await self.change(family, epoch=family.epoch + 1, owner=self._owner, in_sync=(self._owner,))

    async def remove(self, family: Family) -> None:
        """Forget `family` and its names; its directory, or each of its replicas', is to be deleted."""
        registry = self._of(family)
        names = [self._forget_name(family, volume) for volume in family.volumes]
        last = MAX_CHANGES - 3
        while len(names) > last:  # a thousand volumes: their names go before the family does
            if not await registry.compare_and_swap(names[-last:]):
                raise _changed_by_another(family)
            del names[-last:]
        if not family.replicas:
            await self._swap(family, None, *names, (f"scrap/{family.id}", None, b""))
            return
        for attempt in range(REMOVE_TRIES):  # the owner may change the replica set in the same moment
            try:
                await self._swap(family, None, *names, *self._remove_set(family))
                return
            except RegistryError:
                if attempt == REMOVE_TRIES - 1:
                    raise

    def _remove_set(self, family: Family) -> list[Change]:
        replica_set, key = self.replica_set(family.id), _set_key(family.id)
        nodes = list(replica_set.placement) if replica_set is not None else []
        named = (f"removed/{family.id}", None, json.dumps(nodes).encode() if nodes else None)
        return [(key, self._demand_shared().get(key), None), named]

    # --- how ---

    def _demand_shared(self) -> HeldRegistry:
        if self.shared is None:
            raise RegistryError("the cluster's registry has not answered yet; nbdserver status says why")
        return self.shared

    def _of(self, family: Family) -> HeldRegistry:
        return self._demand_shared() if family.replicas else self._own

    def _decode(self, key: str, value: bytes) -> Family:
        known = self._decoded.get(key)
        if known is None or known[0] != value:
            known = self._decoded[key] = (value, Family.decode(value))
        return known[1]

    def _forget_name(self, family: Family, volume: Volume) -> Change:
        """The name is free; nothing changes if it is another's by now."""
        key = f"volume/{volume.name}"
        value = self._of(family).get(key)
        is_its = value == _whose(family, volume) or value == family.id.encode()  # the latter of an older program
        return key, value, None if is_its else value

    async def _swap(self, family: Family, changed: Family | None, *others: Change) -> Family:
        registry, key = self._of(family), _family_key(family)
        if changed is not None and family.replicas:
            changed = replace(changed, number=family.number + 1)
        before = registry.get(key)
        is_same = before is not None and self._decode(key, before) == family
        new = None if changed is None else changed.encode()
        if not is_same or not await registry.compare_and_swap([(key, before, new), *others]):
            raise _changed_by_another(family)
        if changed is None or new is None:
            self._decoded.pop(key, None)
            return family
        self._decoded[key] = (new, changed)
        return changed


def shared_entries(family: Family, replica_set: ReplicaSet) -> dict[str, bytes]:
    """What the shared registry has of a family, by key."""
    names = {f"volume/{volume.name}": _whose(family, volume) for volume in family.volumes}
    return {_family_key(family): family.encode(), _set_key(family.id): replica_set.encode(), **names}


def _by_name(families: Sequence[Family]) -> list[Family]:
    return sorted(families, key=lambda family: family.name)


def _changed_by_another(family: Family) -> RegistryError:
    return RegistryError(f"volume {family.name} was changed by another at the same time; try again")


def _family_key(family: Family) -> str:
    return f"family/{family.id}"


def _kept(family_id: str) -> str:
    return f"set/{family_id}"


def _asked(family_id: str) -> str:
    return f"asked/{family_id}"


def _set_key(family_id: str) -> str:
    return replica_set_key(bytes.fromhex(family_id))


def _take_name(family: Family, volume: Volume) -> Change:
    """The name is the volume's, which has to be free."""
    return f"volume/{volume.name}", None, _whose(family, volume)


def _whose(family: Family, volume: Volume) -> bytes:
    return f"{family.id}/{volume.number}".encode()
