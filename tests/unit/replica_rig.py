"""Two log disks of one family under test, an owner and a replica, each with its own simulated machine."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hypothesis import strategies as st

from metadata.logical_map import LAYER_SHIFT
from metadata.pages import PAGE_MASK, PAGE_SHIFT
from nbdserver.logdisk.check import check_family
from nbdserver.logdisk.disk import DiskError, DiskSettings, LogDisk
from nbdserver.logdisk.maps import OFFSET
from nbdserver.logdisk.opening import Replicated
from nbdserver.logdisk.repair import BadBlock
from nbdserver.logdisk.replica import Replica
from nbdserver.replication.replica_log import ReplicaLog
from protocol.disk import NAMELESS
from protocol.peer import Copy, Modification, Position, RegionState
from tests.unit.families import BLOCK_BYTES, SETTINGS, SimulatedFamily, block

SIZE_BYTES = 64 << 20
Shown = dict[int, tuple[object, ...]]


class ReplicaFamily(SimulatedFamily):
    """A family whose disk is a Replica's."""

    replica: Replica
    opening_s = 0.0  # how long a disk that was cut takes to be there

    def __init__(self, settings: DiskSettings = SETTINGS, seed: int = 1, **rest: Any) -> None:
        super().__init__(SIZE_BYTES, 64 << 10, settings, seed=seed, replicated=Replicated(), **rest)

    def _open_disk(self) -> None:
        self.replica = Replica(self._open_family(Replicated()), self._open_again, self.files)
        self.log: ReplicaLog = self.replica  # it is one
        self.look()

    def _open_family(self, replicated: Replicated) -> LogDisk:
        return LogDisk.open(
            self.files, self.store, self.clock, self.rng, self.settings, None, self.boot_id, self.report,
            replicated=replicated,
        )  # fmt: skip

    def _open_again(self, replicated: Replicated, done: Callable[[LogDisk | DiskError], None]) -> None:
        try:
            opened: LogDisk | DiskError = self._open_family(replicated)
        except DiskError as error:
            opened = error
        self.clock.call_later(self.opening_s, lambda: done(opened))

    def look(self) -> None:
        """The disk may be another one."""
        self.disk = self.replica.disk
        self.device = self.disk.head(1)

    def own(self, epoch: int, tap: Callable[[Modification], None] = lambda modification: None) -> None:
        """Begin to order."""
        assert self.wait(lambda done: self.replica.promise(epoch, done)) == (0,)
        self.replica.begin_epoch(epoch)
        self.replica.tap(tap)

    def append(self, modifications: Sequence[Modification]) -> int:
        return int(self.wait(lambda done: self.replica.append(modifications, done))[0])

    def cut(self, after: Position) -> int:
        return int(self.wait(lambda done: self.replica.cut(after, done))[0])

    def apply_copy(self, copy: Copy) -> int:
        return int(self.wait(lambda done: self.replica.apply_copy(copy, done))[0])

    def change(self, name: str, *arguments: Any) -> int:
        """One change of the tree."""
        return int(self.wait(lambda done: getattr(self.disk, name)(*arguments, done))[0])

    def page(self, number: int) -> list[int]:
        maps = self.disk.maps
        while (page := maps.page(number)) is None:
            self.wait(lambda done: maps.load([(maps.logical, number)], done))
        return list(page)

    def place_of(self, lba: int) -> BadBlock:
        """Where the first volume's block lies."""
        maps = self.disk.maps
        mba = self.page(self.device.layer << LAYER_SHIFT | lba >> PAGE_SHIFT)[lba & PAGE_MASK]
        while (page := maps.middle.get(mba >> PAGE_SHIFT)) is None:
            self.wait(lambda done: maps.load([(maps.middle, mba >> PAGE_SHIFT)], done))
        return BadBlock(mba, page[mba & PAGE_MASK], page[OFFSET + (mba & PAGE_MASK)])

    def shown(self) -> Shown:
        """What each layer with a name is and shows, MBA by MBA."""
        found: Shown = {}
        for number, layer in sorted(self.disk.maps.tree.layers.items()):
            row = layer.row
            if row.kind != NAMELESS:
                pages = range((row.size_bytes >> 12 >> PAGE_SHIFT) + 1)
                shown = tuple((page, mbas) for page in pages if any(mbas := self.page(number << LAYER_SHIFT | page)))
                found[number] = (row.kind, row.volume, row.size_bytes, row.name, row.created_s, shown)
        return found

    def contents(self) -> dict[int, dict[int, bytes]]:
        """What each layer with a name holds, block by block."""
        found: dict[int, dict[int, bytes]] = {}
        tree = self.disk.maps.tree
        for number, layer in sorted(tree.layers.items()):
            row = layer.row
            if row.kind == NAMELESS:
                continue
            is_head = tree.heads.get(row.volume) == number
            self.device = self.disk.head(row.volume) if is_head else self.disk.view(number)  # type: ignore[assignment]
            lbas = [
                page << PAGE_SHIFT | index
                for page in range((row.size_bytes >> 12 >> PAGE_SHIFT) + 1)
                for index, mba in enumerate(self.page(number << LAYER_SHIFT | page))
                if mba
            ]
            found[number] = {lba: self.read(lba << 12, 4096) for lba in lbas}
            if not is_head:
                self.device.close()  # type: ignore[attr-defined]
        self.look()
        return found

    def states(self) -> list[RegionState]:
        """Of all regions, as they are compared."""
        regions = range((SIZE_BYTES >> 22) + 1)
        return [self.wait(partial(self.replica.check_region, region))[0] for region in regions]

    def region_txids(self) -> list[int]:
        return [self.disk.maps.regions.txid_of(region) for region in range((SIZE_BYTES >> 22) + 1)]

    def findings(self) -> list[str]:
        """Of an offline check, after a clean end; the family is open again afterwards."""
        self.replica.set_committed(self.replica.last.txid)
        self.close()
        self._begin()
        result = check_family(self.files, self.store, quick=False)
        self.open()
        return [finding.sentence for finding in result.findings]


BLOCKS = 600
Step = tuple[Any, ...]
LBA, COUNT = st.integers(0, BLOCKS - 1), st.sampled_from([1, 1, 1, 3, 40, 300])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 3), LBA, COUNT),
        st.tuples(st.just("write"), st.just(1), LBA, COUNT),
        st.tuples(st.just("discard"), st.integers(1, 2), LBA, st.sampled_from([1, 7, 300, 9000])),
        st.tuples(
            st.sampled_from(["snapshot", "snapshot", "delete", "rollback", "clone", "resize"]), st.integers(0, 5)
        ),
        st.tuples(st.sampled_from(["checkpoint", "rest", "crash"]), st.sampled_from(["owner", "replica"])),
        st.tuples(st.just("power"), st.just("replica")),
    ),
    max_size=30,
)


def taken(told: list[Modification]) -> list[Modification]:
    """What was told, with buffers of its own, as another machine gets it; nothing is left."""
    found = [each.kept() for each in told]
    told.clear()
    return found


class Pair:
    """An owner and a replica that is told everything at once."""

    def __init__(self, cache_bytes: int = 0, scale: int = 1) -> None:
        """Addresses of the steps are multiplied by `scale`."""
        self.scale = scale
        small = replace(SETTINGS, cache_bytes=cache_bytes)
        self.owner = ReplicaFamily(settings=small, seed=1)
        self.replica = ReplicaFamily(settings=small, seed=2)
        self.told: list[Modification] = []
        self.is_away = False  # the replica, which hears nothing
        self.epoch = 0
        self.number = 0
        self.own()

    def own(self) -> None:
        self.epoch += 1
        self.owner.own(self.epoch, self.told.append)

    def tell(self) -> None:
        if self.is_away:
            self.owner.replica.set_committed(self.owner.replica.last.txid)
            return
        if self.told:
            assert self.replica.append(taken(self.told)) == 0
        for each in (self.owner, self.replica):
            each.replica.set_committed(self.owner.replica.last.txid)
        assert self.replica.replica.last == self.owner.replica.last
        assert self.replica.replica.epochs == self.owner.replica.epochs

    def do(self, step: Step) -> None:
        kind, which = step[0], step[1]
        owner = self.owner
        tree = owner.disk.maps.tree
        if kind in ("write", "discard"):
            if which not in tree.heads:
                return
            owner.device = owner.disk.head(which)
            lba, count = step[2] * self.scale, step[3]
            self.number += count
            size = owner.device.size_bytes
            length = min(count * BLOCK_BYTES, size - lba * BLOCK_BYTES)
            if length > 0 and kind == "write":
                data = b"".join(block(self.number + index) for index in range(count))[:length]
                assert owner.write(lba * BLOCK_BYTES, data) == 0
            elif length > 0:
                assert owner.discard(lba * BLOCK_BYTES, length) == 0
            owner.look()
        elif kind in ("checkpoint", "rest", "crash", "power"):
            self.machine(kind, getattr(self, which))
        else:
            self.change(kind, which)
        self.tell()

    def machine(self, kind: str, family: ReplicaFamily) -> None:
        if kind == "checkpoint":
            family.replica.set_committed(family.replica.last.txid)  # both have all that a replica has
            family.checkpoint()
        elif kind == "rest":
            family.run(40.0)
        else:
            if kind == "power":
                family.wait(lambda done: family.replica.sync(done))
            family.crash(power=kind == "power")
            family.open()
            if family is self.owner:
                self.own()

    def change(self, kind: str, which: int) -> None:
        owner = self.owner
        snapshots = owner.disk.snapshots()
        if kind == "snapshot":
            assert owner.change("snapshot", 1, f"s{self.number}", which) in (0, errno.EEXIST)
            self.number += 1
        elif kind == "resize":
            owner.change("resize", 1, (BLOCKS - 97 * which) * self.scale * BLOCK_BYTES)
        elif snapshots:
            layer = snapshots[which % len(snapshots)].layer
            if kind == "delete":
                assert owner.change("delete_snapshot", layer) == 0
            elif kind == "rollback":
                owner.change("rollback", 1, layer)
            else:
                owner.change("clone", layer, 2 + which % 2)
            owner.look()

    def compare(self) -> None:
        assert self.replica.shown() == self.owner.shown()
        assert self.replica.states() == self.owner.states()
        assert self.replica.contents() == self.owner.contents()
        assert self.replica.region_txids() == self.owner.region_txids()
        for each in (self.owner, self.replica):
            each.run(60.0)
            assert each.findings() == []
        assert self.replica.shown() == self.owner.shown()
