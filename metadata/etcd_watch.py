"""A watch on etcd that survives what happens to its stream.

Theory: a watcher knows everything up to one revision. It begins by reading its range, which tells it that revision;
from there a stream tells it what follows. Whatever ends the stream (the link broke, the member lost its leader, a token
was refused), the next one begins one revision later than the last that was delivered. Only if etcd has compacted that
revision away is the range read anew.

Rules
- What is delivered has a higher revision than what was delivered before: what comes twice is dropped.
- One event holds all changes of one revision. etcd sends a revision in one response, or in fragments of one; so a
  response is complete before any of it is delivered.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import groupby
from typing import Any

from metadata.etcd_connection import EtcdConnection, Link
from metadata.etcd_grpc import EtcdError, rpc, translated
from metadata.registry_calls import HIDDEN_KEYS, Event, Reading, end_of_prefix
from metadata.seams import Clock

_PUT = 0


class _CompactedError(Exception):
    """What follows the last revision is not known any more."""


class EtcdWatch:
    """`Watch`."""

    def __init__(
        self,
        connection: EtcdConnection,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        read_range: Callable[[str], Awaitable[Reading]],
        prefix: str,
        changed: Callable[[Event], None],
        after: int | None,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._loop = loop
        self._read_range = read_range
        self._prefix = prefix
        self._changed: Callable[[Event], None] | None = changed
        self._last = after
        self._life = connection.life
        self._failures = 0
        self.task = loop.create_task(self._run())

    def cancel(self) -> None:
        self._changed = None
        self.task.cancel()

    async def _run(self) -> None:
        while True:
            try:
                link = await self._connection.link(None)
                if self._life != self._connection.life:  # what was known is of a registry that is no more
                    self._life, self._last = self._connection.life, None
                if self._last is None or await self._is_ahead(self._last):
                    reading = await self._read_range(self._prefix)
                    self._tell(Event(reading.revision, True, reading.items))
                await self._follow(link)
            except _CompactedError:
                self._last = None
            except EtcdError as error:
                self._connection.note(f"watching {self._prefix!r}: {error}")
            self._failures += 1
            await self._connection.pause(self._failures)

    async def _is_ahead(self, last: int) -> bool:
        """True if etcd has not come to that revision: it has been put back to an older state, and would stay silent."""
        connection = self._connection
        request = rpc.RangeRequest(key=connection.version_key, count_only=True)
        response = await connection.call("kv", "Range", request, connection.deadline(), True)
        revision: int = response.header.revision
        return revision < last

    async def _follow(self, link: Link) -> None:
        """Deliver what follows the last revision; raises when the stream ends."""
        assert self._last is not None
        start = (self._connection.settings.namespace + self._prefix).encode()
        request = rpc.WatchRequest(
            create_request=rpc.WatchCreateRequest(
                key=start,
                range_end=end_of_prefix(start),
                start_revision=self._last + 1,
                progress_notify=True,
                fragment=True,
            )
        )
        metadata = link.metadata
        call = link.watch.Watch(metadata=metadata)
        events: list[Any] = []
        began_s = self._loop.time()
        try:
            with translated():
                await call.write(request)
                async for response in call:
                    if response.canceled:
                        await self._canceled(link, metadata, response)
                    events += response.events
                    if response.created or response.fragment:
                        continue
                    self._deliver(events, response.header.revision)
                    events = []
            raise EtcdError("the stream has ended", False)
        finally:
            call.cancel()
            if self._loop.time() - began_s > self._connection.settings.backoff_max_s:
                self._failures = 0

    async def _canceled(self, link: Link, metadata: tuple[tuple[str, str], ...], response: Any) -> None:
        """etcd ends a watch: the revision is compacted, or it does not believe who we are."""
        if response.compact_revision:
            raise _CompactedError
        if self._connection.settings.user is not None:
            await self._connection.log_in_again(link, metadata)
        raise EtcdError(response.cancel_reason or "etcd has cancelled it", False)

    def _deliver(self, events: list[Any], revision: int) -> None:
        assert self._last is not None
        settings = self._connection.settings
        for mod_revision, group in groupby(events, lambda event: event.kv.mod_revision):
            changes = tuple(
                (decode_key(settings.namespace, event.kv.key), event.kv.value if event.type == _PUT else None)
                for event in group
            )
            changes = tuple(change for change in changes if change[0] not in HIDDEN_KEYS)
            if mod_revision > self._last and changes:
                self._tell(Event(mod_revision, False, changes))
        if not events:
            # Progress: nothing of ours up to there.
            self._last = max(self._last, revision)

    def _tell(self, event: Event) -> None:
        self._last = event.revision
        self._clock.call_soon(lambda: self._hand_over(event))

    def _hand_over(self, event: Event) -> None:
        if self._changed:
            self._changed(event)


def decode_key(namespace: str, key: bytes) -> str:
    """Return our name of etcd's key; what is no UTF-8 (none of ours) stays tellable."""
    return key[len(namespace.encode()) :].decode(errors="surrogateescape")
