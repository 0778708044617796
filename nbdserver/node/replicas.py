"""The replicas of this node: what the cluster's registry says of them, made true here, and which of them it owns.

Theory: the shared registry says of each family which nodes shall have a replica (ReplicaSet.placement). This node looks
at it whenever it has changed, and again now and then, and does what is missing: makes a replica that it shall have,
opens those that it has (`follow`), lets go of those that it shall not have any more. So a node that was away, or was
killed in between, does the same as one that was there.

     named, not here ─► made (format) ─► followed ─► owned (its volumes are served) ─► followed
     here, not named any more, or the family is deleted ─► closed ─► its directory is deleted

Rules
- What is here is in the node's own registry (`replica/ID`, families.py), written when the directory is complete. A node
  that cannot reach the shared registry follows all that it has.
- A replica is made only if the in-sync set does not name this node: else it is one that was lost, and nobody may take
  an empty log for it. The owner removes it from the set first.
- Nothing is deleted because the shared registry does not know it; only because it names the nodes without this one, or
  says that the family was deleted.
- One whose disk has failed is closed and opened anew, as often as it fails: what it may have lost, the others have. If
  it cannot be opened, on a full disk above all, that is tried again, less and less often.
- A node owns nothing by itself, but for what the registry says that it owns already. What is held of the registry may
  be old, of a node that was cut off above all: the data process asks again before it goes on as the owner.
- One change at a time (`lock`), which is that of the volumes.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

from metadata.families import OF_REPLICA, Families
from metadata.registry import Family, RegistryError
from metadata.replica_set import ReplicaSet
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import ConflictError, NodeError
from nbdserver.node.opening import Call, Opening

LOOK_S = 5.0
REOPEN_S = 30.0
"""After which a replica whose disk has failed, or that could not be opened, is opened anew."""
REOPEN_LONGEST_S = 600.0
OWN_AGAIN_S = 5.0
"""Between two tries to go on as the owner that the registry names."""


class Replicas:
    """What this node has of the cluster's families."""

    def __init__(
        self,
        me: str,
        directory: DataDirectory,
        families: Families,
        opening: Opening,
        lock: asyncio.Lock,
        call: Call,
        place: Callable[[str], object],
        event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """`me` is this node's name in the cluster; `place(family_id)` gives a replica its data process."""
        self.me = me
        self.problems: dict[str, str] = {}
        """By family: why there is no replica here although there shall be one."""
        self.now_owns: Callable[[], None] = lambda: None
        """Called when it serves the volumes of another family."""
        self._directory = directory
        self._families = families
        self._opening = opening
        self._lock = lock
        self._call = call
        self._place = place
        self._event = event
        self._following: set[str] = set()
        self._epochs: dict[str, int] = {}  # of the families that this node owns, as the data process says
        self._served: dict[str, int] = {}  # and of those whose volumes are served
        self._taking: dict[str, asyncio.Task[None]] = {}
        self._own_next_s: dict[str, float] = {}
        self._trying: set[asyncio.Task[None]] = set()
        self._reopen_at_s: dict[str, float] = {}  # those whose disk has failed, or that could not be opened
        self._reopen_after_s: dict[str, float] = {}  # those that could not be opened, for how long they waited last
        self._changed = asyncio.Event()
        self._scraps_are_settled = False

    # --- looking ---

    def owns(self, family_id: str) -> bool:
        """Whether this node serves the volumes of a family of the cluster."""
        return family_id in self._served

    def is_taking(self, family_id: str) -> bool:
        """Whether it is about to."""
        return family_id in self._taking

    def is_followed(self, family_id: str) -> bool:
        """Whether a replica here is open."""
        return family_id in self._following

    # --- what is here, made what it shall be ---

    def stir(self) -> None:
        """Something may have changed in the shared registry."""
        self._changed.set()

    async def watch(self) -> None:
        """Do what is missing, whenever something has changed, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_S)
            self._changed.clear()
            try:
                await self.reconcile()
            except (NodeError, RegistryError, OSError) as error:
                self._note("", str(error))

    async def follow_all(self, families: list[Family]) -> None:
        """Open these replicas anew: their data process has been started."""
        async with self._lock:
            for family in families:
                self._following.discard(family.id)
                self._epochs.pop(family.id, None)
                self._served.pop(family.id, None)
                self._own_next_s.pop(family.id, None)
                self._reopen_at_s.pop(family.id, None)
                await self._follow(family)
        self.stir()

    async def reconcile(self) -> None:
        """Do what is missing here. RegistryError, OSError."""
        if self._families.shared is None:
            return
        async with self._lock:
            await self._settle_scraps()
            for family in self._families.being_shared():
                await self._settle_sharing(family)
            for family_id, nodes in self._families.removed().items():
                if self.me in nodes:
                    await self.forget(family_id)
            for family in self._families.of_cluster():
                try:
                    await self._make_true(family)
                except (NodeError, RegistryError, OSError) as error:
                    self._note(family.id, str(error))
        self._own_again()

    async def _settle_sharing(self, family: Family) -> None:
        """The node stopped while a family was on its way to the shared registry."""
        if self._families.replica_set(family.id) is not None:
            await self._families.end_sharing(family)
        else:
            await self.give_back(family)

    async def _make_true(self, family: Family) -> None:
        value = self._families.replica_set(family.id)
        if value is None:
            return
        kept = self._families.kept_set(family.id)
        if kept is not None and kept.number > value.number:
            return  # what is held of the registry is behind, or the registry has gone back
        is_here, is_member = self._families.has_replica(family.id), value.member(self.me) is not None
        if self.me not in value.placement:
            self.problems.pop(family.id, None)
            if is_here and not is_member:
                await self._let_go(family.id)
                self._event("replica-deleted", {"volume": family.name, "reason": "it is on other nodes now"})
            return
        if not is_here:
            if is_member:
                self._note(family.id, "it was in sync and is gone from this node; its owner has to notice that first")
                return
            await self._make(family)
            self._event("replica-made", {"volume": family.name})
        else:
            await self._families.keep_replica(family)
        if time.monotonic() >= self._reopen_at_s.get(family.id, math.inf):
            del self._reopen_at_s[family.id]
            self._opening.failed.pop(family.id, None)
            if family.id in self._following:
                await self._close(family.id)
                self._event("replica-opened-anew", {"volume": family.name, "reason": "its disk had failed"})
        if family.id not in self._following and family.id not in self._opening.failed:
            await self._follow(family)

    async def _make(self, family: Family) -> None:
        """Make an empty replica."""
        await self.format(family)
        await self._families.keep_replica(family)

    async def format(self, family: Family) -> None:
        """Make the directory of a replica. It is a scrap until `Families.keep_replica`. NodeError: it is gone."""
        self._place(family.id)
        await self._opening.format(family, OF_REPLICA)

    async def follow(self, family: Family) -> dict[str, Any]:
        """Open a replica; what the data process says of it. NodeError."""
        self._place(family.id)
        answer: dict[str, Any] = await self._call(
            "follow",
            directory=str(self._directory.family(family.id)),
            family=family.id,
            volume=family.name,
            max_data_bytes=family.max_data,
        )
        self._following.add(family.id)
        self._opening.failed.pop(family.id, None)
        self.problems.pop(family.id, None)
        return answer

    async def _follow(self, family: Family) -> None:
        """One that cannot be opened is reported, and tried again later."""
        try:
            await self.follow(family)
            self._reopen_after_s.pop(family.id, None)
        except NodeError as error:
            after_s = self._reopen_after_s.get(family.id, REOPEN_S / 2)
            after_s = self._reopen_after_s[family.id] = min(2 * after_s, REOPEN_LONGEST_S)
            self._reopen_at_s[family.id] = time.monotonic() + after_s
            self._opening.failed[family.id] = str(error)
            self._note(family.id, str(error))

    async def forget(self, family_id: str) -> None:
        """The family was deleted: delete its replica here, and say so."""
        await self._let_go(family_id, was_deleted=True)
        await self._families.has_removed(family_id, self.me)

    async def _let_go(self, family_id: str, was_deleted: bool = False) -> None:
        await self._close(family_id)
        reopening = (self._reopen_at_s, self._reopen_after_s)
        for known in (self._epochs, self._served, *reopening, self.problems, self._opening.failed):
            known.pop(family_id, None)
        if self._families.has_replica(family_id):
            await self._families.drop_replica(family_id, was_deleted)
            await self._opening.scrap(family_id)

    async def give_back(self, family: Family) -> None:
        """A family that could not be shared is this node's own again."""
        await self._close(family.id)
        await self._opening.open(await self._families.begin_sharing(family, 0))

    async def drop_unknown(self, family_id: str) -> None:
        """Close and delete what was made here and is known to nobody."""
        await self._close(family_id)
        await self._opening.scrap(family_id)

    async def _close(self, family_id: str) -> None:
        """Obey and order no more, if the replica is open."""
        if family_id in self._following:
            await self._call("close", family=family_id)
            self._following.discard(family_id)

    async def _settle_scraps(self) -> None:
        """What was being made when the node stopped: it counts if the shared registry says so."""
        if self._scraps_are_settled:
            return
        for family_id in self._families.replica_scraps():
            value, family = self._families.replica_set(family_id), self._families.get(family_id)
            if family is not None and value is not None and value.member(self.me) is not None:
                await self._families.keep_replica(family)
            else:
                await self._opening.scrap(family_id)
        self._scraps_are_settled = True

    def _note(self, family_id: str, reason: str) -> None:
        """Say once what is in the way."""
        if self.problems.get(family_id) != reason:
            self.problems[family_id] = reason
            family = self._families.get(family_id)
            self._event("replica-not-opened", {"volume": family.name if family else "", "reason": reason})

    # --- owning ---

    async def own(self, family_id: str, only_again: bool = False) -> None:
        """Take a family over and serve its volumes, if that is not so already; `only_again`: unless another node owns
        it by now. NodeError with why not."""
        if self.owns(family_id):
            return
        taking = self._taking.get(family_id)
        if taking is None:
            taking = self._taking[family_id] = asyncio.get_running_loop().create_task(self._own(family_id, only_again))
            taking.add_done_callback(lambda task: self._taking.pop(family_id, None) and task.exception())
        await asyncio.shield(taking)

    async def _own(self, family_id: str, only_again: bool) -> None:
        family = self._families.get(family_id)
        if family is None or family_id not in self._following:
            raise ConflictError(self._opening.failed.get(family_id) or f"{self.me} has no open replica of it")
        answer = await self._call("own", family=family_id, only_again=only_again)
        sizes_bytes = {int(number): size_bytes for number, size_bytes in answer["sizes_bytes"].items()}
        await self._opening.settle_and_serve(family, sizes_bytes)
        if self._epochs.get(family_id) != answer["epoch"]:
            raise ConflictError("another node has taken it over meanwhile")
        self._served[family_id] = answer["epoch"]
        self.now_owns()
        self._event("volume-owned", {"volume": family.name, "node": self.me, "epoch": answer["epoch"]})

    def _own_again(self) -> None:
        """Go on as the owner that the registry names, after a start."""
        now_s = time.monotonic()
        for family_id in self._following - self._served.keys() - self._taking.keys():
            value = self._families.replica_set(family_id)
            if value is None or value.owner != self.me or value.member(self.me) is None:
                continue
            if now_s >= self._own_next_s.get(family_id, 0.0):
                self._own_next_s[family_id] = now_s + OWN_AGAIN_S
                task = asyncio.get_running_loop().create_task(self._try_to_own(family_id))
                self._trying.add(task)
                task.add_done_callback(self._trying.discard)

    async def _try_to_own(self, family_id: str) -> None:
        with contextlib.suppress(NodeError, RegistryError, OSError):  # the data process tells why: not-taken-over
            await self.own(family_id, only_again=True)

    def heard(self, kind: str, fields: dict[str, Any]) -> None:
        """What the data process reports of a family."""
        if kind == "family-failed" and fields["family"] in self._following:
            self._reopen_at_s[fields["family"]] = time.monotonic() + REOPEN_S
        elif kind == "owner":
            self._epochs[fields["family"]] = fields["epoch"]
        elif kind == "owner-deposed":
            self._epochs.pop(fields["family"], None)
            self._served.pop(fields["family"], None)
            self.stir()

    def may_own(self, value: ReplicaSet, family_id: str) -> bool:
        """Whether this node could take a family over now."""
        return value.member(self.me) is not None and family_id in self._following
