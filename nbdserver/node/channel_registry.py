"""The registry as a data process has it: the control process asks it on its behalf, over the channel.

Theory. A data process never speaks to etcd: it asks (`ChannelRegistry`), the control process passes that on to whatever
registry it has (`RegistryDesk`) and passes back what it is told, events too. One watch of the replica sets serves all
families of all data processes, of which each hears only what it watches.

Rules
- Values are bytes to the registry and hexadecimal in JSON.
- A swap whose answer got lost is UNKNOWN, whatever the reason; a read is Unavailable.
- When a data process ends, its watches go (`RegistryVisit.close`).
- A replica set that was swapped or read is kept by this node before the data process hears of it: what it acts on is
  written down. One that is older than what is kept is not passed on as the truth.
- One that adds a member is noted before it is asked for: if no answer comes, that member may have gone on alone.
- When what is kept was told, for the registry to be made whole from it, what was asked of the registry before is
  answered as if its answer had got lost (`has_told`).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from metadata.registry_calls import Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.replica_set import REPLICA_SETS, ReplicaSet, ReplicaSetError
from metadata.seams import Registry, Watch
from metadata.waiting import answer_of
from nbdserver.node.channel import ChannelError, RemoteError

Call = Callable[..., Awaitable[Any]]
"""`Channel.call`."""

Notify = Callable[[str, dict[str, Any]], None]
"""`Channel.notify`."""

EVENT = "registry_event"

_RECOVERED = "the registry is being made whole from what the nodes know"


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)


class _ChannelWatch:
    """`Watch`."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel: Callable[[], None] | None = cancel

    def cancel(self) -> None:
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()


class ChannelRegistry:
    """`ReplicaSets`, in a data process. All methods are for the loop's thread."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._watches: dict[int, Callable[[Event], None]] = {}
        self._last_watch = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        """See `Registry`."""

        async def get() -> None:
            answer: Reading | Unavailable
            try:
                told = await self._call("registry_get", key=key)
                items = tuple((each, bytes.fromhex(value)) for each, value in told.get("items", ()))
                answer = Unavailable(told["reason"]) if "reason" in told else Reading(told["revision"], items)
            except (ChannelError, RemoteError) as error:
                answer = Unavailable(str(error))
            done(answer)

        self._run(get())

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        """See `Registry`; without leases."""

        async def swap() -> None:
            wanted = [[change.key, _hex(change.expected), _hex(change.new)] for change in changes]
            try:
                told = await self._call("registry_swap", changes=wanted)
                answer = Swap(Outcome(told["outcome"]), told["revision"], told["reason"])
            except (ChannelError, RemoteError) as error:
                answer = Swap(Outcome.UNKNOWN, reason=str(error))
            done(answer)

        self._run(swap())

    def watch(self, prefix: str, changed: Callable[[Event], None]) -> Watch:
        """See `Registry`; it begins with a reset. When the control process is gone its watches are, and soon this
        process."""
        self._last_watch += 1
        number = self._last_watch
        self._watches[number] = changed

        async def begin() -> None:
            with contextlib.suppress(ChannelError):
                await self._call("registry_watch", watch=number, prefix=prefix)

        def cancel() -> None:
            del self._watches[number]
            self._run(end())

        async def end() -> None:
            with contextlib.suppress(ChannelError):
                await self._call("registry_unwatch", watch=number)

        self._run(begin())
        return _ChannelWatch(cancel)

    def heard(self, fields: dict[str, Any]) -> None:
        """The control process tells of a change (the note EVENT)."""
        changed = self._watches.get(fields["watch"])
        if changed is not None:
            changes = tuple((key, _bytes(value)) for key, value in fields["changes"])
            changed(Event(fields["revision"], fields["is_reset"], changes))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class KeptSets(Protocol):
    """`Families`, as far as the desk needs it."""

    def has_replica(self, family_id: str) -> bool: ...

    async def keep_set(self, family_id: str, value: bytes) -> bool: ...

    async def note_asked(self, family_id: str, value: bytes) -> None: ...


class RegistryDesk:
    """The control process's end, for all data processes."""

    def __init__(self, registry: Registry, kept: KeptSets) -> None:
        self._registry = registry
        self._kept = kept
        self._keeping: set[asyncio.Task[bool]] = set()
        self._values: dict[str, bytes] = {}  # of the replica sets, as they were heard of
        self._revision = 0
        self._visits: set[RegistryVisit] = set()
        self._watch: Watch | None = None
        self._is_known = False
        self.times_told = 0
        """How often what is kept was told to who makes the registry whole."""

    def visit(self, notify: Notify) -> "RegistryVisit":
        """For one data process, to be closed when that ends; `notify` reaches it."""
        if self._watch is None:
            self._watch = self._registry.watch(REPLICA_SETS, self._heard)
        visit = RegistryVisit(self, self._registry, notify)
        self._visits.add(visit)
        return visit

    def close(self) -> None:
        """Nobody hears anything any more; the registry is the caller's."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def has_told(self) -> None:
        """What is kept is told at this moment: nobody acts on anything that is on its way here."""
        self.times_told += 1

    def leave(self, visit: "RegistryVisit") -> None:
        """It is over."""
        self._visits.discard(visit)

    def present(self, prefix: str) -> Event | None:
        """Everything below `prefix` as it was heard of last; None if nothing was heard yet."""
        if not self._is_known:
            return None
        changes = tuple((key, value) for key, value in self._values.items() if key.startswith(prefix))
        return Event(self._revision, True, changes)

    def _heard(self, event: Event) -> None:
        if event.is_reset:
            self._values.clear()
        for key, value in event.changes:
            if value is None:
                self._values.pop(key, None)
            else:
                self._values[key] = value
            if value is not None and self._kept.has_replica(_family(key)):
                self._keep_soon(key, value)
        self._revision = event.revision
        self._is_known = True
        for visit in list(self._visits):
            visit.heard(event)

    def _keep_soon(self, key: str, value: bytes) -> None:
        task = asyncio.get_running_loop().create_task(self.keep(key, value))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def keep(self, key: str, value: bytes) -> bool:
        """Have a replica set in this node's own registry; False if a newer one is there. What cannot be read is kept by
        nobody."""
        try:
            return await self._kept.keep_set(_family(key), value)
        except ReplicaSetError:
            return True

    async def note(self, change: Change) -> None:
        """Have it in this node's own registry if a replica set is asked for that adds a member."""
        if change.expected is None or change.new is None or not change.key.startswith(REPLICA_SETS):
            return
        with contextlib.suppress(ReplicaSetError):
            if ReplicaSet.decode(change.new).adds_to(ReplicaSet.decode(change.expected)):
                await self._kept.note_asked(_family(change.key), change.new)


def _family(key: str) -> str:
    return key.removeprefix(REPLICA_SETS)


class RegistryVisit:
    """What one data process asks of the registry."""

    def __init__(self, desk: RegistryDesk, registry: Registry, notify: Notify) -> None:
        self._desk = desk
        self._registry = registry
        self._notify = notify
        self._prefixes: dict[int, str] = {}

    async def answer(self, name: str, arguments: dict[str, Any]) -> Any:
        """Answer one call. ValueError for what no registry takes."""
        if name == "registry_get":
            return await self._get(**arguments)
        if name == "registry_swap":
            return await self._swap(**arguments)
        if name == "registry_watch":
            self._watch(**arguments)
        elif name == "registry_unwatch":
            self._prefixes.pop(arguments["watch"], None)
        return None

    def close(self) -> None:
        """The data process has ended."""
        self._prefixes.clear()
        self._desk.leave(self)

    async def _get(self, key: str) -> dict[str, Any]:
        times_told = self._desk.times_told
        answer: Reading | Unavailable = await answer_of(lambda done: self._registry.get_later(key, done))
        if isinstance(answer, Unavailable):
            return {"reason": answer.reason}
        for each, value in answer.items:
            if not await self._desk.keep(each, value):
                return {
                    "reason": "the registry shows an earlier state than this node has seen; nbdserver cluster recover"
                }
        if self._desk.times_told != times_told:
            return {"reason": _RECOVERED}
        return {"revision": answer.revision, "items": [(each, value.hex()) for each, value in answer.items]}

    async def _swap(self, changes: Sequence[tuple[str, str | None, str | None]]) -> dict[str, Any]:
        times_told = self._desk.times_told
        wanted = [Change(key, _bytes(expected), _bytes(new)) for key, expected, new in changes]
        for change in wanted:
            await self._desk.note(change)
        answer: Swap = await answer_of(lambda done: self._registry.swap_later(wanted, done))
        if answer.outcome is Outcome.SWAPPED:
            for change in wanted:
                if change.new is not None:
                    await self._desk.keep(change.key, change.new)
        if self._desk.times_told != times_told:
            answer = Swap(Outcome.UNKNOWN, reason=_RECOVERED)
        return {"outcome": answer.outcome.value, "revision": answer.revision, "reason": answer.reason}

    def _watch(self, watch: int, prefix: str) -> None:
        if not prefix.startswith(REPLICA_SETS):
            raise ValueError(f"a data process watches replica sets, not {prefix!r}")
        self._prefixes[watch] = prefix
        present = self._desk.present(prefix)
        if present is not None:
            self._tell(watch, present)

    def heard(self, event: Event) -> None:
        """The replica sets have changed."""
        for watch, prefix in self._prefixes.items():
            seen = tuple(change for change in event.changes if change[0].startswith(prefix))
            if seen or event.is_reset:
                self._tell(watch, Event(event.revision, event.is_reset, seen))

    def _tell(self, watch: int, event: Event) -> None:
        changes = [(key, _hex(value)) for key, value in event.changes]
        self._notify(
            EVENT, {"watch": watch, "revision": event.revision, "is_reset": event.is_reset, "changes": changes}
        )
