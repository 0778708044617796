"""The registry of one node: the Registry seam over a RegistryTable.

Theory: the registry and everyone who uses it are one process. A lease can be lost only by that process standing still
for too long, and all leases end with it: their keys are removed at the next opening.

Rules
- Callbacks come from the clock, in the order of the calls and changes, never from inside a call.
- What another user of the table changes is heard by watchers too.

Known weakness: what changed before a watch began is not kept; a watcher that asks for it gets a reset.
"""

from collections.abc import Callable, Sequence

from metadata.kept_lease import KeptLease
from metadata.registry_calls import (
    MAX_LEASES,
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
)
from metadata.registry_table import RegistryTable
from metadata.seams import Clock, Lease

_RETRY_S = 1.0
_CLOSED = "the registry is closed"


class EmbeddedWatch:
    """`Watch`."""

    def __init__(self, prefix: str, changed: Callable[[Event], None], ended: Callable[["EmbeddedWatch"], None]) -> None:
        self.prefix = prefix
        self._changed: Callable[[Event], None] | None = changed
        self._ended = ended

    def cancel(self) -> None:
        if self._changed:
            self._changed = None
            self._ended(self)

    def deliver(self, event: Event) -> None:
        """Hand over an event, unless it was cancelled meanwhile."""
        if self._changed:
            self._changed(event)


class EmbeddedRegistry:
    """One node, one process."""

    def __init__(self, table: RegistryTable, clock: Clock) -> None:
        """Take a table whose former user has ended; its leases have ended too. OSError if their keys cannot go."""
        self._table = table
        self._clock = clock
        self._opened_s = clock.now()
        self._last_error = ""
        self._is_closed = False
        self._watches: list[EmbeddedWatch] = []
        self._leases: dict[int, KeptLease] = {}
        self._last_lease_id = NO_LEASE
        table.remove(table.bound_keys())
        table.changed = self._tell

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        """See `Registry`."""
        check_key(key)

        def read() -> list[tuple[str, bytes]]:
            value = self._table.get(key)
            return [] if value is None else [(key, value)]

        self._read_later(read, done)

    def range_later(self, prefix: str, done: Callable[[Reading | Unavailable], None]) -> None:
        """See `Registry`."""
        check_prefix(prefix)
        self._read_later(lambda: self._table.range(prefix), done)

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        """See `Registry`."""
        check_changes(changes)
        answer = self._swap(changes)
        self._clock.call_soon(lambda: done(answer))

    def grant_later(self, ttl_s: float, lost: Callable[[], None], done: Callable[[Lease | Unavailable], None]) -> None:
        """See `Registry`."""
        check_ttl(ttl_s)
        answer = self._refuse() or self._grant(ttl_s, lost)
        self._clock.call_soon(lambda: done(answer))

    def watch(self, prefix: str, changed: Callable[[Event], None], after: int | None = None) -> EmbeddedWatch:
        """See `Registry`. OSError when a value below `prefix` is damaged."""
        check_prefix(prefix)
        if len(self._watches) >= MAX_WATCHES:
            raise ValueError(f"there are {MAX_WATCHES} watches already")
        watch = EmbeddedWatch(prefix, changed, self._watches.remove)
        if self._is_closed:
            return watch
        if after != self._table.revision:
            reset = Event(self._table.revision, True, tuple(self._table.range(prefix)))
            self._deliver_later(watch, reset)
        self._watches.append(watch)
        return watch

    def health(self) -> Health:
        """See `Registry`."""
        return Health(not self._is_closed, self._opened_s, "", self._last_error, 0)

    def close(self) -> None:
        """See `Registry`. Keys that are bound to leases go at the next opening."""
        if self._is_closed:
            return
        self._is_closed = True
        for lease in self._leases.values():
            lease.drop()
        for watch in tuple(self._watches):
            watch.cancel()
        self._table.close()

    def _read_later(
        self, read: Callable[[], list[tuple[str, bytes]]], done: Callable[[Reading | Unavailable], None]
    ) -> None:
        answer: Reading | Unavailable
        try:
            answer = Unavailable(_CLOSED) if self._is_closed else Reading(self._table.revision, tuple(read()))
        except OSError as error:
            answer = Unavailable(self._note(error))
        self._clock.call_soon(lambda: done(answer))

    def _swap(self, changes: Sequence[Change]) -> Swap:
        if self._is_closed:
            return Swap(Outcome.NOT_DONE, reason=_CLOSED)
        for change in changes:
            if change.lease_id != NO_LEASE and change.lease_id not in self._leases:
                return Swap(Outcome.NOT_DONE, reason=f"the lease for {change.key} has ended")
        try:
            if not self._table.swap(changes):
                return Swap(Outcome.LOST)
        except OSError as error:
            return Swap(Outcome.UNKNOWN, reason=self._note(error))
        return Swap(Outcome.SWAPPED, self._table.revision)

    def _refuse(self) -> Unavailable | None:
        if self._is_closed:
            return Unavailable(_CLOSED)
        if len(self._leases) >= MAX_LEASES:
            return Unavailable(f"there are {MAX_LEASES} leases already")
        return None

    def _grant(self, ttl_s: float, lost: Callable[[], None]) -> KeptLease:
        self._last_lease_id += 1
        lease_id = self._last_lease_id

        def renew(answered: Callable[[float | None], None]) -> None:
            self._clock.call_soon(lambda: answered(ttl_s))

        def ended(was_lost: bool) -> None:
            del self._leases[lease_id]
            self._remove_bound(lease_id)
            if was_lost and not self._is_closed:
                lost()

        lease = KeptLease(self._clock, lease_id, ttl_s, self._clock.now(), renew, ended)
        self._leases[lease_id] = lease
        return lease

    def _remove_bound(self, lease_id: int) -> None:
        """Remove the keys of a lease that ended; again and again if the Store cannot."""
        if self._is_closed:
            return
        try:
            self._table.remove(self._table.bound_keys(lease_id))
        except OSError as error:
            self._note(error)
            self._clock.call_later(_RETRY_S, lambda: self._remove_bound(lease_id))

    def _tell(self, revision: int, changes: Sequence[tuple[str, bytes | None]]) -> None:
        for watch in self._watches:
            seen = tuple(change for change in changes if change[0].startswith(watch.prefix))
            if seen:
                self._deliver_later(watch, Event(revision, False, seen))

    def _deliver_later(self, watch: EmbeddedWatch, event: Event) -> None:
        self._clock.call_soon(lambda: watch.deliver(event))

    def _note(self, error: OSError) -> str:
        self._last_error = str(error)
        return self._last_error
