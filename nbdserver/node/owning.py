"""Which node serves a family of the cluster, or does what there is to do with it.

Theory: a client or a command may come to any node. Whoever owns the family goes on with it if it has clients, because
moving it makes them wait. Otherwise the node that was come to takes it over if it is in sync: what is used here is read
here. Only if neither can be, another member is asked to.

Rules
- Who is asked for a client names the nodes that it has tried in vain: they are not offered again.
- A command never moves a family away from an owner that is up and owns it, nor does a client that goes on.
- An owner that is not silent, and does not own at this moment, has some time to be found again (Wanted.SOON). So has
  this node itself: what it knows of the registry may be older than that it was deposed.

Known weakness: an owner that is up for the cluster and hangs is found out by its silence, as long as a call takes.
"""

from collections.abc import Callable, Collection
from typing import Any, Protocol

from metadata.families import Families
from metadata.registry import Family, RegistryError
from metadata.replica_set import ReplicaSet
from nbdserver.node.errors import ConflictError, NodeError, NotJoinedError, listed
from nbdserver.node.opening import Call
from nbdserver.node.placement import worker_of
from nbdserver.node.replicas import Replicas
from nbdserver.volume.export import volume_of
from nbdserver.volume.wanted import Wanted

LOOK_S = 3.0
TAKE_S = 12.0
"""A takeover waits for a grant to run out, and for members that do not answer."""


class Others(Protocol):
    """The other nodes of the cluster."""

    def is_up(self, node: str) -> bool:
        """Whether the cluster hears it."""

    def data_addresses_of(self, node: str) -> list[str]:
        """Where the data processes of a node are; empty if it has not said."""

    async def ask(self, node: str, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A question and its answer. NodeError."""


class Owning:
    """Finds, or makes, the node that owns a family."""

    def __init__(self, families: Families, replicas: Replicas, others: Callable[[], Others | None], call: Call) -> None:
        """`others` is None while this node does not take part in the cluster."""
        self._families = families
        self._replicas = replicas
        self._others = others
        self._call = call

    async def attach(self, export: str, failed: Collection[str], wanted: Wanted) -> dict[str, Any]:
        """Where a client shall go that wants an export: {own: true, address}: it is served here now; {node, address};
        or {error} with one line."""
        try:
            found = self._families.find(volume_of(export))
            if found is None or not found[0].replicas:
                raise NodeError(f"the cluster has no volume {export!r:.60}")
            family = found[0]
            node = await self._for_client(family, failed, wanted)
            others = self._others()
            addresses = others.data_addresses_of(node) if others else []
            address = addresses[worker_of(family.id, len(addresses))] if addresses else ""
            if node == self._replicas.me:
                return {"own": True, "address": address}
            if not address:
                raise NodeError(f"{node} has not said where its data processes are")
            return {"node": node, "address": address}
        except (NodeError, RegistryError, OSError) as error:
            return {"error": str(error)}

    async def _for_client(self, family: Family, failed: Collection[str], wanted: Wanted) -> str:
        me, replicas = self._replicas.me, self._replicas
        if replicas.owns(family.id):
            return me
        value = self._value(family)
        idle = ""
        if value.owner not in (me, *failed) and self._is_up(value.owner):
            told = await self._look_at(value.owner, family)
            if wanted is Wanted.SOON and not told.get("owns"):
                raise ConflictError(f"{value.owner} does not serve {family.name} at this moment")
            stays = wanted is not Wanted.ANEW or told.get("clients") or not replicas.may_own(value, family.id)
            if told.get("owns") and stays:
                return value.owner
            idle = value.owner if told.get("owns") else ""
        elif wanted is Wanted.SOON and value.owner == me and not replicas.is_taking(family.id):
            raise ConflictError(f"{me} does not serve {family.name} at this moment")
        reasons: list[str] = []
        if (value.owner == me or replicas.may_own(value, family.id)) and await self._own(family, reasons):
            return me
        return idle or await self._ask_members(family, failed, reasons)

    async def for_command(self, family: Family, failed: Collection[str] = ()) -> str:
        """The node at which a change of a family is to be made: its owner; if that is silent, whoever can be that."""
        if self._replicas.owns(family.id):
            return self._replicas.me
        value = self._value(family)
        if value.owner not in (self._replicas.me, *failed) and self._is_up(value.owner):
            told = await self._look_at(value.owner, family)
            if told.get("owns", True):  # it says so, or has not answered: whoever asks it finds out
                return value.owner
        reasons: list[str] = []
        if self._replicas.may_own(value, family.id) and await self._own(family, reasons):
            return self._replicas.me
        return await self._ask_members(family, failed, reasons)

    def for_look(self, family: Family) -> str:
        """The node that knows most of a family: its owner, if that is up; else this one."""
        value = self._families.replica_set(family.id)
        if value is None or self._replicas.owns(family.id) or not self._is_up(value.owner):
            return self._replicas.me
        return value.owner

    async def move(self, family: Family, node: str) -> None:
        """Let another node own a family: its clients come back there. NodeError: this one keeps it."""
        await self.ask(node, {"do": "own", "family": family.id}, TAKE_S)

    async def ask(self, node: str, question: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A question to another node and its answer. NodeError."""
        others = self._others()
        if others is None:
            raise NotJoinedError
        return await others.ask(node, question, timeout_s)

    # --- what other nodes ask ---

    async def answer_own(self, question: dict[str, Any]) -> dict[str, Any]:
        """Take a family over."""
        await self._replicas.own(str(question.get("family")))
        return {}

    async def answer_owns(self, question: dict[str, Any]) -> dict[str, Any]:
        """Say whether this node owns a family, and how many clients use it."""
        family = self._families.get(str(question.get("family")))
        if family is None or not self._replicas.owns(family.id):
            return {"owns": False, "clients": 0}
        return {"owns": True, "clients": await self.clients(family)}

    async def clients(self, family: Family) -> int:
        """How many connections there are to the volumes of a family that is served here."""
        names = {volume.name for volume in family.volumes}
        clients = await self._call("clients")
        return sum(volume_of(str(client["volume"])) in names for client in clients)

    # --- how ---

    def _value(self, family: Family) -> ReplicaSet:
        value = self._families.replica_set(family.id)
        if value is None:
            raise NodeError(f"who has {family.name} is not known: the cluster's registry has not answered yet")
        return value

    def _is_up(self, node: str) -> bool:
        others = self._others()
        return others is not None and others.is_up(node)

    async def _look_at(self, node: str, family: Family) -> dict[str, Any]:
        try:
            return await self.ask(node, {"do": "owns", "family": family.id}, LOOK_S)
        except NodeError:
            return {}

    async def _own(self, family: Family, reasons: list[str]) -> bool:
        """Take it over; if that fails, `reasons` get why."""
        try:
            await self._replicas.own(family.id)
        except NodeError as error:
            reasons.append(str(error))
            return False
        return True

    async def _ask_members(self, family: Family, failed: Collection[str], reasons: list[str]) -> str:
        """Let one of the other members take it over; `reasons` why none has until now."""
        value = self._value(family)
        for member in value.in_sync:
            if member.node in (self._replicas.me, *failed):
                continue
            if not self._is_up(member.node):
                reasons.append(f"{member.node} is silent")
                continue
            try:
                await self.ask(member.node, {"do": "own", "family": family.id}, TAKE_S)
                return member.node
            except NodeError as error:
                reasons.append(str(error))
        why = listed(reasons) or f"{value.owner} alone is in sync"
        raise ConflictError(f"no node can serve {family.name} now: {why}; nbdserver status says what to do")
