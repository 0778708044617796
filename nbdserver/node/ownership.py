"""What it takes to tell clients and people what happened in a family: nothing on one node, the word of the other
replicas where it is replicated.

Rules
- A change of the tree of layers is told when it is durable wherever it has to be. When that is never known, because
  another node has taken the family over meanwhile, it is NotOwnedError.
"""

from collections.abc import Callable
from typing import Protocol

from metadata.seams import Done
from metadata.waiting import answer_of
from nbdserver.block import BlockDevice
from nbdserver.logdisk.disk import LogDisk
from nbdserver.node.open_family import NotOwnedError
from nbdserver.replication.device import ReplicatedDevice
from nbdserver.replication.owner import Owner


class Ownership(Protocol):
    """The right to order what happens in a family, and to tell it."""

    def device(self, inner: BlockDevice) -> BlockDevice:
        """What clients are served from: a head or view of the log disk, as it may be told."""

    def generation(self, disk: LogDisk) -> int:
        """Of the family; raised when acknowledged writes may be gone."""

    async def settled(self) -> None:
        """Wait until everything ordered so far is durable wherever it has to be. NotOwnedError if that is not known."""


class OneNode:
    """A family that is on this node alone."""

    def device(self, inner: BlockDevice) -> BlockDevice:
        """It speaks for itself."""
        return inner

    def generation(self, disk: LogDisk) -> int:
        """Its log knows."""
        return disk.opened.generation

    async def settled(self) -> None:
        """A change of the log disk is durable when it is told."""


class ReplicatedOwnership:
    """A replicated family, for as long as this node owns it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def device(self, inner: BlockDevice) -> BlockDevice:
        """It is told what the others have too."""
        return ReplicatedDevice(inner, self._owner)

    def generation(self, disk: LogDisk) -> int:
        """The registry knows."""
        return self._owner.value.generation

    async def settled(self) -> None:
        """All members have it, durably."""
        owner = self._owner
        await _told(lambda done: owner.when_committed(owner.ordered_txid, done))
        await _told(owner.flush)


async def _told(ask: Callable[[Done], None]) -> None:
    if await answer_of(ask):
        raise NotOwnedError("another node has taken this volume over; whether the change happened is to be seen there")


async def answered(ownership: Ownership, begin: Callable[[Done], None]) -> int:
    """Begin a change of the tree of layers and wait until its errno may be told."""
    errno = await answer_of(begin)
    if not errno:
        await ownership.settled()
    return errno
