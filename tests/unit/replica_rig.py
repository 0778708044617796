"""Two log disks of one family under test, an owner and a replica, each with its own simulated machine."""

from collections.abc import Callable, Sequence
from typing import Any

from metadata.logical_map import LAYER_SHIFT
from metadata.pages import PAGE_SHIFT
from nbdserver.logdisk.check import check_family
from nbdserver.logdisk.disk import DiskSettings, LogDisk
from nbdserver.logdisk.opening import Replicated
from nbdserver.logdisk.replica import Replica
from protocol.disk import NAMELESS
from protocol.peer import Modification
from tests.unit.families import SETTINGS, SimulatedFamily

SIZE_BYTES = 64 << 20
Shown = dict[int, tuple[object, ...]]


class ReplicaFamily(SimulatedFamily):
    """A family whose disk is a Replica's."""

    replica: Replica

    def __init__(
        self, segment_bytes: int = 64 << 10, settings: DiskSettings = SETTINGS, seed: int = 1, **rest: Any
    ) -> None:
        super().__init__(SIZE_BYTES, segment_bytes, settings, seed=seed, replicated=Replicated(), **rest)

    def _open_disk(self) -> None:
        self.replica = Replica(self._open_family, self.files)
        self.look()

    def _open_family(self, replicated: Replicated) -> LogDisk:
        return LogDisk.open(
            self.files, self.store, self.clock, self.rng, self.settings, None, self.boot_id, self.report,
            replicated=replicated,
        )  # fmt: skip

    def look(self) -> None:
        """The disk may be another one."""
        self.disk = self.replica.disk
        self.device = self.disk.head(1)

    def own(self, epoch: int, tap: Callable[[Modification], None] | None = None) -> None:
        """Begin to order."""
        assert self.wait(lambda done: self.replica.promise(epoch, done)) == (0,)
        self.replica.begin_epoch(epoch)
        self.replica.tap(tap)

    def append(self, modifications: Sequence[Modification]) -> int:
        return int(self.wait(lambda done: self.replica.append(modifications, done))[0])

    def change(self, name: str, *arguments: Any) -> int:
        """One change of the tree."""
        return int(self.wait(lambda done: getattr(self.disk, name)(*arguments, done))[0])

    def page(self, number: int) -> list[int]:
        maps = self.disk.maps
        while (page := maps.page(number)) is None:
            self.wait(lambda done: maps.load([(maps.logical, number)], done))
        return list(page)

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
