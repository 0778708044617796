"""The cluster's registry as one node has it: etcd, what is held of it, and the desk at which data processes ask.

Rules: it is there before the node takes part in the cluster and for as long as data processes run: replicas change who
is in sync also while nothing else of the cluster is reached.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable

from metadata.etcd_registry import EtcdRegistry
from metadata.families import Families
from metadata.registry_guard import RegistryGuard
from metadata.registry_mirror import RegistryMirror
from nbdserver.host.clock import HostClock
from nbdserver.node.channel_registry import RegistryDesk
from nbdserver.node.cluster_files import read_etcd_settings
from nbdserver.node.cluster_settings import ClusterSettings

REMEMBER_S = 5.0
SETTLE_S = 0.5  # for the lease of a master that leaves to be given back: the others need not wait for its end


class SharedRegistry:
    """See above."""

    def __init__(self, settings: ClusterSettings, families: Families, changed: Callable[[], None]) -> None:
        """Begin to connect, on the running loop; `families` get what is held of it as soon as that is known.
        `changed()` is called after every change. WrongInputError for files that cannot be used."""
        loop = asyncio.get_running_loop()
        clock = HostClock(loop)
        self._families = families
        self._changed = changed
        self.guard = RegistryGuard(families.registry_past())
        self.registry = EtcdRegistry(read_etcd_settings(settings), clock, random.SystemRandom(), loop, self.guard)
        self.desk = RegistryDesk(self.registry, families)
        self._remembered = self.guard.past
        self._is_another = asyncio.Event()
        self._mirror = RegistryMirror(self.registry, clock, self._heard)

    async def watch(self) -> None:
        """Remember how far the registry is, for ever; at once when it is another one, or in another life."""
        while True:
            await self._remember()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_another.wait(), REMEMBER_S)

    async def _remember(self) -> None:
        self._is_another.clear()
        past = self.guard.past
        if past is not None:
            await self._families.remember(past)
            self._remembered = past

    def _heard(self, keys: object) -> None:
        self._families.shared = self._mirror
        if self.guard.past is not None and self.guard.past.is_another_than(self._remembered):
            self._is_another.set()
        self._changed()

    async def close(self) -> None:
        """Give everything back. What was known of the families is known no more."""
        self._families.shared = None
        await self._remember()
        self._mirror.close()
        self.desk.close()
        await self.registry.settle(SETTLE_S)
        self.registry.close()
        await self.registry.wait_closed()
