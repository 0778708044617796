"""The registry of several nodes: the Registry seam on etcd.

Theory: a swap is one etcd transaction, a read is a linearizable range, a lease is etcd's lease kept by KeptLease, a
watch is an EtcdWatch. Each call is a task that answers by its deadline; what went wrong on the way decides between
UNKNOWN and NOT_DONE, and EtcdConnection says which.

Rules
- A swap is sent once. It is repeated only if the first one was certainly not carried out (a refused token, no leader).
- Reads are repeated until they are answered or their time is over. A long range is read in pages as of one revision,
  and anew if that is compacted meanwhile.
- A lease that has ended here is revoked there, so that its keys do not outlive it by more than is unavoidable.
- Callbacks come from the loop, never from inside a call.
- See metadata/etcd_grpc.py for what is loaded, and what must not be forked.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from metadata.etcd_connection import EtcdConnection, expectation
from metadata.etcd_grpc import EtcdError, rpc
from metadata.etcd_settings import EtcdSettings
from metadata.etcd_watch import EtcdWatch, decode_key
from metadata.kept_lease import KeptLease
from metadata.registry_calls import (
    HIDDEN_KEYS,
    MAX_LEASES,
    MAX_PENDING_CALLS,
    MAX_RANGE_BYTES,
    MAX_WATCHES,
    NO_LEASE,
    Change,
    Event,
    Health,
    Outcome,
    Reading,
    Swap,
    Unavailable,
    check_changes,
    check_key,
    check_prefix,
    check_ttl,
    end_of_prefix,
)
from metadata.registry_guard import RegistryGuard
from metadata.seams import Clock, Lease

_PAGE_ITEMS = 512
_CLOSED = "the registry is closed"

_A = TypeVar("_A")


class EtcdRegistry:
    """A registry that other nodes share."""

    def __init__(
        self,
        settings: EtcdSettings,
        clock: Clock,
        rng: random.Random,
        loop: asyncio.AbstractEventLoop,
        guard: RegistryGuard | None = None,
    ) -> None:
        """Begin to connect, on `loop`; `rng` spreads the endpoints and pauses of many nodes. `guard` refuses a registry
        that has gone back; None: nothing was seen of it before."""
        self._connection = EtcdConnection(settings, clock, rng, loop, guard or RegistryGuard(None))
        self._clock = clock
        self._namespace = settings.namespace
        self._loop = loop
        self._is_closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[Any]] = set()
        self._watches: set[EtcdWatch] = set()
        self._leases: dict[int, KeptLease] = {}

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        """See `Registry`."""
        check_key(key)
        self._begin(self._get(key), done, Unavailable)

    def range_later(self, prefix: str, done: Callable[[Reading | Unavailable], None]) -> None:
        """See `Registry`."""
        check_prefix(prefix)
        self._begin(self._range(prefix), done, Unavailable)

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        """See `Registry`."""
        check_changes(changes)
        self._begin(self._swap(tuple(changes)), done, lambda reason: Swap(Outcome.NOT_DONE, reason=reason))

    def grant_later(self, ttl_s: float, lost: Callable[[], None], done: Callable[[Lease | Unavailable], None]) -> None:
        """See `Registry`."""
        check_ttl(ttl_s)
        self._begin(self._grant(ttl_s, lost), done, Unavailable)

    def watch(self, prefix: str, changed: Callable[[Event], None], after: int | None = None) -> EtcdWatch:
        """See `Registry`."""
        check_prefix(prefix)
        if len(self._watches) >= MAX_WATCHES:
            raise ValueError(f"there are {MAX_WATCHES} watches already")
        watch = EtcdWatch(self._connection, self._clock, self._loop, self._read_range, prefix, changed, after)
        self._watches.add(watch)
        watch.task.add_done_callback(lambda _: self._watches.discard(watch))
        if self._is_closed:
            watch.cancel()
        return watch

    def health(self) -> Health:
        """See `Registry`."""
        return self._connection.health(len(self._calls))

    def close(self) -> None:
        """See `Registry`. `wait_closed` waits until the connection is gone."""
        if self._is_closed:
            return
        self._is_closed = True
        for lease in self._leases.values():
            lease.drop()
        for watch in self._watches:
            watch.cancel()
        for task in self._calls | self._background:
            task.cancel()
        self._background.add(self._loop.create_task(self._connection.close()))

    async def settle(self, timeout_s: float) -> None:
        """Wait until what nobody waits for is done (revoked leases), at most so long: before `close` gives it up."""
        if self._background:
            await asyncio.wait(self._background, timeout=timeout_s)

    async def wait_closed(self) -> None:
        """Wait until everything that `close` ends has ended."""
        tasks = [*self._calls, *self._background, *(watch.task for watch in self._watches)]
        await asyncio.gather(*tasks, return_exceptions=True)

    # Calls

    def _begin(self, work: Coroutine[Any, Any, _A], done: Callable[[_A], None], refuse: Callable[[str], _A]) -> None:
        """Run `work` and give its answer to `done`."""
        reason = ""
        if self._is_closed:
            reason = _CLOSED
        elif len(self._calls) >= MAX_PENDING_CALLS:
            reason = f"{MAX_PENDING_CALLS} calls are waiting already"
        if reason:
            work.close()
            answer = refuse(reason)
            self._clock.call_soon(lambda: done(answer))
            return

        def finish(task: asyncio.Task[_A]) -> None:
            self._calls.discard(task)
            done(refuse(_CLOSED) if task.cancelled() else task.result())

        task = self._loop.create_task(work)
        self._calls.add(task)
        task.add_done_callback(finish)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` that nobody waits for."""
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _get(self, key: str) -> Reading | Unavailable:
        request = rpc.RangeRequest(key=self._encode(key))
        try:
            response = await self._connection.call("kv", "Range", request, self._connection.deadline(), True)
        except EtcdError as error:
            return Unavailable(str(error))
        return Reading(response.header.revision, tuple((key, item.value) for item in response.kvs))

    async def _range(self, prefix: str) -> Reading | Unavailable:
        try:
            return await self._read_range(prefix)
        except EtcdError as error:
            return Unavailable(str(error))

    async def _read_range(self, prefix: str) -> Reading:
        deadline = self._connection.deadline()
        while True:
            try:
                return await self._read_pages(prefix, deadline)
            except EtcdError as error:
                if not error.is_compacted:
                    raise

    async def _read_pages(self, prefix: str, deadline: float) -> Reading:
        """Read a range as of one revision; EtcdError (`is_compacted`) if that is lost on the way."""
        items: list[tuple[str, bytes]] = []
        size_bytes, revision, page_items = 0, 0, _PAGE_ITEMS
        start = self._encode(prefix)
        end = end_of_prefix(start)
        while True:
            request = rpc.RangeRequest(
                key=start, range_end=end, limit=page_items, revision=revision, sort_order=rpc.RangeRequest.ASCEND
            )
            try:
                response = await self._connection.call("kv", "Range", request, deadline, True)
            except EtcdError as error:
                if not error.is_too_large or page_items == 1:
                    raise
                page_items //= 2  # the page is larger than a message may be
                continue
            revision = revision or response.header.revision
            for item in response.kvs:
                items.append((decode_key(self._namespace, item.key), item.value))
                size_bytes += len(item.key) + len(item.value)
            if size_bytes > MAX_RANGE_BYTES:
                raise EtcdError(f"what begins with {prefix!r} is more than {MAX_RANGE_BYTES} bytes", False)
            if not response.more:
                return Reading(revision, tuple(item for item in items if item[0] not in HIDDEN_KEYS))
            start = response.kvs[-1].key + b"\0"

    async def _swap(self, changes: Sequence[Change]) -> Swap:
        for change in changes:
            if change.lease_id != NO_LEASE and change.lease_id not in self._leases:
                return Swap(Outcome.NOT_DONE, reason=f"the lease for {change.key} has ended")
        request = rpc.TxnRequest(
            compare=[expectation(self._encode(change.key), change.expected) for change in changes],
            success=[self._write(change) for change in changes if not change.is_check],
        )
        try:
            response = await self._connection.call("kv", "Txn", request, self._connection.deadline())
        except EtcdError as error:
            return Swap(Outcome.UNKNOWN if error.may_have_happened else Outcome.NOT_DONE, reason=str(error))
        except asyncio.CancelledError:
            return Swap(Outcome.UNKNOWN, reason=_CLOSED)
        return Swap(Outcome.SWAPPED, response.header.revision) if response.succeeded else Swap(Outcome.LOST)

    def _write(self, change: Change) -> Any:
        key = self._encode(change.key)
        if change.new is None:
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
        return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=change.new, lease=change.lease_id))

    # Leases

    async def _grant(self, ttl_s: float, lost: Callable[[], None]) -> Lease | Unavailable:
        deadline = self._connection.deadline()
        request = rpc.LeaseGrantRequest(TTL=math.ceil(ttl_s))
        try:
            await self._connection.link(deadline)
            if len(self._leases) >= MAX_LEASES:
                return Unavailable(f"there are {MAX_LEASES} leases already")
            sent_s = self._clock.now()
            response = await self._connection.call("lease", "LeaseGrant", request, deadline)
        except EtcdError as error:
            return Unavailable(str(error))
        lease_id = response.ID
        ttl_s = min(ttl_s, response.TTL)

        def renew(answered: Callable[[float | None], None]) -> None:
            self._do(self._renew(lease_id, ttl_s / 3, answered))

        def ended(was_lost: bool) -> None:
            del self._leases[lease_id]
            if self._is_closed:
                return
            self._do(self._revoke(lease_id, ttl_s))
            if was_lost:
                lost()

        self._leases[lease_id] = lease = KeptLease(self._clock, lease_id, ttl_s, sent_s, renew, ended)
        return lease

    async def _renew(self, lease_id: int, timeout_s: float, answered: Callable[[float | None], None]) -> None:
        deadline = self._loop.time() + timeout_s
        good_for_s = None
        try:
            good_for_s = await self._connection.keep_alive(lease_id, deadline)
        except EtcdError as error:
            self._connection.note(f"renewing a lease: {error}")
        if not self._is_closed:
            answered(good_for_s)

    async def _revoke(self, lease_id: int, timeout_s: float) -> None:
        deadline = self._loop.time() + timeout_s
        # Refused: it has run out already. Not reached in time: it will have.
        with contextlib.suppress(EtcdError):
            await self._connection.call("lease", "LeaseRevoke", rpc.LeaseRevokeRequest(ID=lease_id), deadline, True)

    def _encode(self, key: str) -> bytes:
        return (self._namespace + key).encode()
