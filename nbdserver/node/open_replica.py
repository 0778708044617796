"""A replica that is open in the data process: the log disk of a family that others have too, and its part in that.

Theory. `Replica` (nbdserver/logdisk/replica.py) has the log disk opened again whenever the log has to be cut; so the
disk is asked for each time, and what a data process has set for it is set again (`opened`). `ReplicatedFamily`
(nbdserver/replication/family.py) follows whoever owns the family, or owns it.

Rules
- Who closes it waits for a disk that is being opened: the thread that does so has the files.
- An owner whose disk has failed is none any more: its clients go on at another node.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from metadata.replica_set import ReplicaSets
from metadata.seams import Network
from nbdserver.host.clock import HostClock
from nbdserver.logdisk.disk import DiskError, DiskSettings, LogDisk
from nbdserver.logdisk.opening import Replicated
from nbdserver.logdisk.replica import Replica
from nbdserver.node.open_family import FamilyError, OpenFamily, Report, Room, open_disk
from nbdserver.replication.copy_budget import CopyBudget
from nbdserver.replication.copying import CopyCounts
from nbdserver.replication.family import ReplicatedFamily

LOOK_S = 0.01


class OpenReplica(OpenFamily):
    """A family of which this node has one replica of several."""

    def __init__(
        self,
        family_id: str,
        room: Room,
        clock: HostClock,
        boot_id: str,
        settings: DiskSettings,
        report: Report,
        opened: Callable[[LogDisk], None],
    ) -> None:
        """To be opened with `open`. `opened` gets the disk each time."""
        super().__init__(family_id, room, clock)
        self._boot_id = boot_id
        self._settings = settings
        self._report = report
        self._opened = opened
        self._family: ReplicatedFamily | None = None
        self.ended: Callable[[], object] = lambda: None
        """Called when it is closed."""
        self._opening: asyncio.Task[None] | None = None
        self.replica: Replica

    async def open(self) -> None:
        """Open its log disk. FamilyError, and it is closed."""
        try:
            disk = await self._open_disk(Replicated())
        except DiskError as error:
            self._room.close()
            raise FamilyError(str(error)) from error
        self.replica = Replica(disk, self._open_again, self._room.files)

    @property
    def disk(self) -> LogDisk:
        return self.replica.disk

    @property
    def family(self) -> ReplicatedFamily:
        """Its part in who owns it, once it takes part."""
        if self._family is None:
            raise FamilyError("the replica does not take part in its family yet")
        return self._family

    def take_part(
        self,
        network: Network,
        registry: ReplicaSets,
        node: str,
        address_of: Callable[[str], str],
        budget: CopyBudget,
    ) -> None:
        """Obey whoever owns the family, from now on."""
        self._family = ReplicatedFamily(
            self._clock, network, registry, self.replica, bytes.fromhex(self.id), node, address_of, self._report,
            budget,
        )  # fmt: skip

    def _disk_reports(self, kind: str, fields: dict[str, Any]) -> None:
        self._report(kind, fields)
        if kind == "family-failed":
            self._clock.call_soon(self._disk_failed)  # it may be in the middle of a client's request

    def _disk_failed(self) -> None:
        if self._family is not None and self._family.owner is not None:
            self._family.owner.depose("its disk has failed here")

    def counters(self) -> dict[str, int]:
        copied = CopyCounts() if self._family is None else self._family.copied
        return {**super().counters(), "resync_bytes_sent": copied.sent_bytes, "resync_bytes_saved": copied.saved_bytes}

    def compare_replicas(self, bytes_per_s: int, done: Callable[[str], None]) -> None:
        self.family.compare(bytes_per_s, done)

    def stop_comparing(self) -> None:
        if self._family is not None:
            self._family.stop_comparing("it was stopped")

    async def close(self) -> None:
        """Obey and order no more, and close it. Whoever serves clients from it has ended that, or lets them wait."""
        self.ended()
        if self._family is not None:
            self._family.gave_up = lambda reason: None
            self._family.close()
        while self.replica.is_being_cut:
            await asyncio.sleep(LOOK_S)
        await super().close()

    def _open_again(self, replicated: Replicated, done: Callable[[LogDisk | DiskError], None]) -> None:
        async def open_again() -> None:
            try:
                opened: LogDisk | DiskError = await self._open_disk(replicated)
            except DiskError as error:
                opened = error
            done(opened)

        def opened(opening: asyncio.Task[None]) -> None:
            if not opening.cancelled():
                opening.result()  # what nobody foresaw is the loop's to see, as in any callback

        self._opening = asyncio.get_running_loop().create_task(open_again())
        self._opening.add_done_callback(opened)

    async def _open_disk(self, replicated: Replicated) -> LogDisk:
        disk = await open_disk(
            self._room, self._clock, self._settings, None, self._boot_id, self._disk_reports, replicated
        )
        self._opened(disk)
        return disk
