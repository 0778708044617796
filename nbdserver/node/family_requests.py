"""What the control process asks the data process about families: each `do_NAME` is a request of the channel.

Order of a family's life here: `open`, `serve` for the volumes that clients shall see, changes, `close`. Between `open`
and `serve` the control process finishes what was begun in the family when the node stopped (volumes.py).

Rules: a family and a volume's number name a volume; a name only tells people. What is refused is FamilyError or
ExportError with one line, or an errno where the log disk refuses.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from nbdserver.host.clock import HostClock
from nbdserver.logdisk.budget import Budget
from nbdserver.logdisk.disk import DiskError, DiskSettings, LogDisk
from nbdserver.logdisk.scrub import Progress
from nbdserver.node.cache_shares import LOOK_S, CacheShares
from nbdserver.node.garbage import collect_garbage
from nbdserver.node.open_family import (
    FamilyError,
    LocalFamily,
    OpenFamily,
    Room,
    StoreThreads,
    format_family,
    open_disk,
    open_room,
)
from nbdserver.node.open_replica import OpenReplica
from nbdserver.node.ownership import OneNode, Ownership
from nbdserver.node.served_family import ServedFamily
from nbdserver.volume.export import Exports

Report = Callable[[str, dict[str, Any]], None]


class _Scrubbed:
    """The scrub that was started last."""

    def __init__(self, family: str, disk: LogDisk) -> None:
        self.family = family
        self.disk = disk
        self._is_over = False
        self._failure = ""

    def ended(self, failure: str) -> None:
        self._is_over, self._failure = True, failure

    def describe(self) -> dict[str, Any]:
        progress = asdict(self.disk.scrub.progress) if self.disk.scrub is not None else {}
        return {"family": self.family, "progress": progress, "is_over": self._is_over, "failure": self._failure}


FAMILIES_A_PAGE = 16

_STOPPING = "the node is stopping"
OneFamily = TypeVar("OneFamily", bound=OpenFamily)


class FamilyRequests:
    """The open families."""

    def __init__(
        self, exports: Exports, threads: StoreThreads, clock: HostClock, report: Report, budget: Budget
    ) -> None:
        """`budget` is that of all families of the node."""
        self.settings = DiskSettings()
        self.budget = budget
        self._exports = exports
        self._threads = threads
        self._clock = clock
        self._report = report
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._families: dict[str, ServedFamily] = {}
        self._scrubbed: _Scrubbed | None = None
        self._is_closed = False
        self._cache_shares = CacheShares()
        self._sharing: asyncio.Future[None] | None = None
        clock.call_later(LOOK_S, self._begin_to_share_cache)

    def disks(self) -> list[LogDisk]:
        """Of all open families."""
        return [family.disk for family in self._families.values()]

    async def figures(self, after: str) -> tuple[dict[str, Any], str]:
        """Counters and gauges of each volume of a page of families."""
        found: dict[str, Any] = {}
        families, last = self._page(after)
        for family_id in families:
            if family_id in self._families:
                found |= self._families[family_id].figures()
            await asyncio.sleep(0)
        return found, last

    def _page(self, after: str) -> tuple[list[str], str]:
        """The ids of the next few families behind `after`, and the last of them if there are more. A thousand at once
        would keep clients waiting: for what is told of each, and for one long answer."""
        rest = sorted(family_id for family_id in self._families if family_id > after)
        page = rest[:FAMILIES_A_PAGE]
        return page, page[-1] if len(rest) > len(page) else ""

    async def close(self) -> dict[str, str]:
        """Close every family for good; {volume: why its family was not closed cleanly}. Their exports stay."""
        self._is_closed = True
        if self._sharing is not None:
            self._sharing.cancel()
        families = list(self._families.values())
        self._families.clear()
        await asyncio.gather(*[family.family.close() for family in families])
        return {
            served.export.name: f"{family.volumes[0].export.name}: {family.disk.failure}"
            for family in families
            for served in family.volumes
            if family.disk.failure
        }

    # -- families

    async def do_format(self, directory: str, family: str, size_bytes: int, segment_bytes: int) -> None:
        """Make an empty family."""
        await asyncio.to_thread(format_family, directory, self._threads, family, size_bytes, segment_bytes)

    async def do_open(self, directory: str, family: str, volume: str, epoch: int, max_data_bytes: int) -> Any:
        """Open a family, whose oldest volume is called `volume`; returns its generation, which recovery may have
        raised, and the size of each volume by its number."""
        room = await self._room(directory)
        report = self._reporter(family, volume)
        try:
            disk = await open_disk(room, self._clock, self.settings, epoch, self._boot_id, report)
        except DiskError as error:
            room.close()
            raise FamilyError(str(error)) from error
        opened = await self._unless_closed(LocalFamily(family, room, self._clock, disk))
        opened.disk.pool.budget.limit_bytes = max_data_bytes
        opened.disk.pool.share_budget(self.budget)
        served = self._opened(opened, OneNode())
        sizes_bytes = {str(number): size_bytes for number, size_bytes in served.sizes_bytes().items()}
        return {"generation": served.disk.opened.generation, "sizes_bytes": sizes_bytes}

    async def _room(self, directory: str) -> Room:
        """Where a family lies. It takes LevelDB some milliseconds, in a thread, to write what it needs. FamilyError."""
        room = await asyncio.to_thread(open_room, directory, self._threads)
        if self._is_closed:
            room.close()
            raise FamilyError(_STOPPING)
        return room

    async def open_replica(self, directory: str, family: str, volume: str, max_data_bytes: int) -> ServedFamily:
        """Open a family of which others have replicas too, owned by none of them as yet. FamilyError."""

        def opened(disk: LogDisk) -> None:
            served = self._families.get(family)
            limit_bytes = max_data_bytes if served is None else served.disk.pool.budget.limit_bytes
            disk.pool.budget.limit_bytes = limit_bytes
            disk.pool.share_budget(self.budget)
            self._begin_with_cache(disk)

        room = await self._room(directory)
        report = self._reporter(family, volume)
        replica = OpenReplica(family, room, self._clock, self._boot_id, self.settings, report, opened)
        await replica.open()
        return self._opened(await self._unless_closed(replica), None)

    async def _unless_closed(self, family: OneFamily) -> OneFamily:
        """An open one; FamilyError, and it is closed, if the node stops by now."""
        if self._is_closed:
            await family.close()
            raise FamilyError(_STOPPING)
        return family

    def _opened(self, family: OpenFamily, ownership: Ownership | None) -> ServedFamily:
        served = self._families[family.id] = ServedFamily(family, self._exports, self._clock, ownership)
        self._begin_with_cache(served.disk)
        collect_garbage()
        return served

    async def do_serve(self, family: str, volumes: list[dict[str, Any]]) -> None:
        """Let clients attach to volumes, each {number, name, settings}."""
        for volume in volumes:
            self.family(family).serve(**volume)

    async def do_close(self, family: str) -> None:
        """Disconnect everybody and close a family for good."""
        await self._families.pop(family).close()

    async def do_volumes(self, after: str = "") -> dict[str, Any]:
        """What is live of a page of the open families; `last` is what the next page comes after, if there is one."""
        found: dict[str, Any] = {}
        families, last = self._page(after)
        for family_id in families:
            if family_id in self._families:
                found[family_id] = await self._families[family_id].whole_status()
            await asyncio.sleep(0)
        return {"families": found, "last": last}

    async def do_limit_data(self, max_data_bytes: int, family: str = "") -> None:
        """Change what the segment files of a family may take, or those of all together; 0: no limit."""
        disks = [self.family(family).disk] if family else self.disks()
        budget = disks[0].pool.budget if family else self.budget
        budget.limit_bytes = max_data_bytes
        for disk in disks:
            disk.background.stir()

    async def do_room(self) -> dict[str, dict[str, int]]:
        """Of each open family: what its segment files take, and what of that cannot be cleaned away."""
        return {
            family_id: {
                "allocated_bytes": family.disk.pool.budget.used_bytes,
                "filled_bytes": family.disk.filled_bytes,
            }
            for family_id, family in self._families.items()
        }

    # -- scrubbing

    async def do_scrub_start(self, family: str, begin: dict[str, int], bytes_per_s: int) -> None:
        """Read a family's data, or go on with that; one at a time."""
        if self._scrubbed is not None:
            await self.do_scrub_stop(self._scrubbed.family)
        opened = self.family(family).family
        disk = opened.disk
        if disk.failure or disk.is_closed:
            raise FamilyError(disk.failure or "the volume is being opened; try again in a moment")
        scrubbed = self._scrubbed = _Scrubbed(family, disk)

        def has_read(failure: str) -> None:
            if failure:
                scrubbed.ended(failure)
            else:
                opened.compare_replicas(bytes_per_s, scrubbed.ended)

        disk.start_scrub(Progress(**begin), bytes_per_s, self.moved_bytes, has_read)

    async def do_scrub_progress(self, family: str, bytes_per_s: int) -> dict[str, Any] | None:
        """How far the scrub of this family is, which goes on at this rate; None if it is not the last one here."""
        scrubbed = self._scrubbed
        if scrubbed is None or scrubbed.family != family or family not in self._families:
            return None
        if scrubbed.disk.scrub is None:
            return None
        scrubbed.disk.scrub.pace.bytes_per_s = bytes_per_s
        return scrubbed.describe()

    async def do_scrub_stop(self, family: str) -> dict[str, Any] | None:
        """Stop that of this family; returns how far it was."""
        scrubbed = self._scrubbed
        if scrubbed is None or scrubbed.family != family:
            return None
        self._scrubbed = None
        if family not in self._families or scrubbed.disk.scrub is None:
            return None
        scrubbed.disk.scrub.stop()
        self._families[family].family.stop_comparing()
        return scrubbed.describe()

    def moved_bytes(self) -> int:
        """By clients and cleaners, in all families."""
        return sum(family.disk.moved_bytes for family in self._families.values())

    # -- volumes

    async def do_volume(self, family: str, number: int) -> dict[str, Any]:
        """What is live of a volume's family, and of the volume."""
        return self.family(family).status(number)

    async def do_set(self, family: str, number: int, settings: dict[str, Any]) -> None:
        """Change a volume's settings, at once."""
        self.family(family).set(number, settings)

    async def do_rename(self, family: str, number: int, new_name: str) -> None:
        """Give a volume another name; clients go on."""
        self.family(family).rename(number, new_name)

    async def do_resize(self, family: str, number: int, size_bytes: int) -> int:
        """Give the volume another size; returns an errno, EBUSY for making it smaller while it has clients."""
        return await self.family(family).resize(number, size_bytes)

    async def do_clone(self, family: str, layer: int, number: int) -> int:
        """Make a volume of a snapshot's layer, which is not served yet; returns an errno."""
        return await self.family(family).clone(layer, number)

    async def do_withdraw(self, family: str, number: int, force: bool) -> int:
        """Serve a volume no more. Returns how many client connections keep it from that, unless `force`."""
        return self.family(family).withdraw(number, force)

    async def do_delete(self, family: str, number: int) -> int:
        """Delete a volume that is not served, and its snapshots; returns an errno."""
        return await self.family(family).delete(number)

    # -- snapshots

    async def do_snapshots(self, family: str, number: int = 0) -> list[dict[str, Any]]:
        """The snapshots of one volume, or of all of the family."""
        return self.family(family).snapshots(number)

    async def do_snapshot(self, family: str, number: int, snapshot: str) -> dict[str, Any] | None:
        """One snapshot, without its clones, or None."""
        return self.family(family).snapshot(number, snapshot)

    async def do_snapshot_create(self, family: str, number: int, snapshot: str) -> int:
        """Make a snapshot; returns an errno."""
        return await self.family(family).volume(number).snapshots.create(snapshot)

    async def do_snapshot_delete(self, family: str, number: int, snapshot: str) -> int:
        """Delete a snapshot, disconnecting its clients; returns an errno."""
        return await self.family(family).volume(number).snapshots.delete(snapshot)

    async def do_snapshot_rollback(self, family: str, number: int, snapshot: str) -> int:
        """Go back to a snapshot; returns an errno, EBUSY while the volume has clients."""
        return await self.family(family).rollback(number, snapshot)

    def family(self, family: str) -> ServedFamily:
        """One that is open. FamilyError."""
        served = self._families.get(family)
        if served is None:
            raise FamilyError("this volume is not open; `nbdserver status` says why")
        return served

    def _begin_with_cache(self, disk: LogDisk) -> None:
        """An equal part until the next look at all families."""
        disk.maps.set_cache_bytes(self.settings.cache_bytes // max(1, len(self._families)))

    def _begin_to_share_cache(self) -> None:
        if not self._is_closed:
            self._sharing = asyncio.ensure_future(self._share_cache())

    async def _share_cache(self) -> None:
        disks = {family_id: family.disk for family_id, family in self._families.items()}
        try:
            await self._cache_shares.look(self.settings.cache_bytes, disks)
        finally:
            self._clock.call_later(LOOK_S, self._begin_to_share_cache)

    def _reporter(self, family: str, name: str) -> Report:
        def report(kind: str, fields: dict[str, Any]) -> None:
            """What a family reports goes by the name that a volume has by now: the one of a number, or the oldest."""
            served = self._families.get(family)
            names = {volume.number: volume.export.name for volume in served.volumes} if served is not None else {}
            oldest = next(iter(names.values()), name)
            volume = names.get(fields.pop("number", 0), oldest)
            self._report(kind, {"family": family, "volume": volume, **fields})

        return report
