"""Making and opening families in the data process, and what is known of those that could not be opened.

Theory: a family is opened before its volumes are served. In between, what the registry says of them and what the log
has is brought together: what was being made counts if the log has it, what was being deleted is deleted
(metadata/registry.py).

Rules: a family is opened only under an epoch that was raised for that opening. Why a family is not open, or a volume
not there, is one line in `failed` and `missing`, until it is opened again.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from metadata.families import Families
from metadata.registry import Family, RegistryError, Volume, VolumeState
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError

Call = Callable[..., Any]
"""`Channel.call` of the running data process."""


class Opening:
    """Which families are open."""

    def __init__(
        self, directory: DataDirectory, families: Families, call: Call, event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self.failed: dict[str, str] = {}  # by family
        self.missing: dict[tuple[str, int], str] = {}  # volumes that an open family does not have
        self._directory = directory
        self._families = families
        self._call = call
        self._event = event

    def why_not(self, family: Family, volume: Volume) -> str:
        """Why the data process cannot be asked about a volume, or ""."""
        return self.failed.get(family.id) or self.missing.get((family.id, volume.number), "")

    async def format(self, family: Family, kind: bytes = b"") -> None:
        """Make the directory of a family, which is a scrap of that kind until the registry has the family. NodeError:
        it is gone."""
        await self._families.begin(family.id, kind)
        try:
            await self._call(
                "format",
                directory=str(self._directory.family(family.id)),
                family=family.id,
                size_bytes=family.volumes[0].size_bytes,
                segment_bytes=family.segment_bytes,
            )
        except BaseException:
            await self.scrap(family.id)
            raise

    async def open_all(self, families: Sequence[Family]) -> None:
        """Open families. One that fails is reported and stays closed; the others are served."""
        for family in families:
            self.failed.pop(family.id, None)
            self.missing = {key: reason for key, reason in self.missing.items() if key[0] != family.id}
            try:
                await self.open(family)
            except (NodeError, RegistryError, OSError) as error:
                self.failed.setdefault(family.id, str(error))
                continue  # noted in `failed`, as an event and in `status`

    async def open(self, family: Family) -> None:
        """Open a family and serve its volumes. Raises NodeError."""
        raised = await self._families.raise_epoch(family)
        is_open = False
        try:
            answer = await self._call(
                "open",
                directory=str(self._directory.family(raised.id)),
                family=raised.id,
                volume=raised.name,
                epoch=raised.epoch,
                max_data_bytes=raised.max_data,
            )
            is_open = True
            if answer["generation"] > raised.generation:
                raised = await self._families.change(raised, generation=answer["generation"])
            await self.settle_and_serve(raised, {int(key): size for key, size in answer["sizes_bytes"].items()})
        except NodeError as error:
            self.failed[family.id] = str(error)
            for volume in family.volumes:
                self._event("volume-not-opened", {"volume": volume.name, "reason": str(error)})
            if is_open:
                with contextlib.suppress(NodeError):
                    await self._call("close", family=family.id)
            raise

    async def settle_and_serve(self, family: Family, sizes_bytes: dict[int, int]) -> None:
        """Serve the volumes of a family that is open, whose log has them with these sizes. NodeError."""
        settled = await self._settle(family, sizes_bytes)
        there = [volume for volume in settled.volumes if volume.state == VolumeState.THERE]
        await self.serve(settled, [volume for volume in there if not self.why_not(settled, volume)])

    async def _settle(self, family: Family, sizes_bytes: dict[int, int]) -> Family:
        """Finish what was begun in the family when the node stopped, and see that every volume is there."""
        settled = await self._families.settled(family, sizes_bytes)
        for volume in settled.volumes:
            if volume.number not in sizes_bytes:
                reason = "its family's log does not have it: the data directory is damaged or not of one moment"
                self.missing[family.id, volume.number] = reason
                self._event("volume-not-opened", {"volume": volume.name, "reason": reason})
            elif volume.state == VolumeState.DELETING:
                try:
                    settled = await self.delete_from_log(settled, volume)
                    self._event("volume-deleted", {"volume": volume.name})
                except NodeError as error:
                    self._event("volume-not-deleted", {"volume": volume.name, "reason": str(error)})
        for number in sorted(set(sizes_bytes) - {volume.number for volume in settled.volumes}):
            if number not in {volume.number for volume in family.volumes}:
                self._event("volume-without-name", {"family": family.id, "number": number, "volume": family.name})
        return settled

    async def serve(self, family: Family, volumes: Sequence[Volume]) -> None:
        """Let clients attach to volumes of an open family."""
        wanted = [
            {"number": volume.number, "name": volume.name, "settings": asdict(volume.settings)} for volume in volumes
        ]
        await self._call("serve", family=family.id, volumes=wanted)

    async def delete_from_log(self, family: Family, volume: Volume) -> Family:
        """Finish the deletion of one of several volumes; returns the family without it. Raises NodeError."""
        errno = await self._call("delete", family=family.id, number=volume.number)
        if errno:
            raise NodeError(
                f"deleting {volume.name} was begun and not finished ({os.strerror(errno)}); the next start goes on"
            )
        return await self._families.remove_volume(family, volume)

    async def scrap(self, family_id: str) -> None:
        """Delete the directory of a family that the registry names as a scrap."""
        await asyncio.to_thread(self._directory.remove_family, family_id)
        await self._families.scrapped(family_id)
