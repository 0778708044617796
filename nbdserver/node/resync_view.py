"""Replicas that are being made complete, as people see them: how much is left, how fast, for how long, or what for it
waits.

Theory: only the owner of a family knows what a replica lacks; every node can ask the owners. It is told in regions, and
what these hold is an estimate, by those that have been read so far: before the first one, as much as a region can. What
comes from the owner's log is told by how long that is.

Rules: `row` is pure; `ResyncView` asks.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from metadata.families import Families
from metadata.region_table import REGION_BYTES
from metadata.registry import Family
from metadata.replica_set import ReplicaSet
from nbdserver.node.errors import NodeError
from nbdserver.node.opening import Call
from nbdserver.node.owning import Owning
from nbdserver.node.replicas import Replicas

ASK_S = 3.0

Row = dict[str, Any]

COPYING, CONNECTING, WAITING, SILENT, UNKNOWN = "copying", "connecting", "waiting", "silent", "unknown"
"""What a replica does that is not in sync: it gets regions, or what was logged; its node is up and its replica is not
reached yet; it waits, `reason` says for what; its node is not heard; nobody who knows can be asked."""


def row(family: Family, value: ReplicaSet, node: str, is_up: bool, link: Mapping[str, Any] | None) -> Row:
    """Of a replica that is not in sync; `link` is what the owner says of it."""
    told = link or {"regions_left": 0, "regions_total": 0, "bytes_per_s": 0}
    region_bytes = int(told.get("region_bytes", REGION_BYTES))  # owners of before do not say, nor of the log
    left_bytes = int(told["regions_left"]) * region_bytes + int(told.get("log_left_bytes", 0))
    total_bytes = int(told["regions_total"]) * region_bytes + int(told.get("log_total_bytes", 0))
    bytes_per_s = float(told["bytes_per_s"]) + float(told.get("log_bytes_per_s", 0))
    state = _state(is_up, link, left_bytes, bytes_per_s)
    return {
        "volume": family.name,
        "node": node,
        "owner": value.owner,
        "state": state,
        "left_bytes": left_bytes if link else None,
        "total_bytes": total_bytes if link else None,
        "bytes_per_s": round(bytes_per_s),
        "left_s": round(left_bytes / bytes_per_s) if left_bytes and bytes_per_s else None,
        "reason": str(link["reason"]) if link and state in (CONNECTING, WAITING) else "",
        "disk": str(link.get("disk", "")) if link else "",
    }


def _state(is_up: bool, link: Mapping[str, Any] | None, left_bytes: int, bytes_per_s: float) -> str:
    if not is_up:
        return SILENT
    if link is None:
        return UNKNOWN
    if link["state"] in ("connecting", "opening"):
        return CONNECTING
    return COPYING if left_bytes and (bytes_per_s or not link["reason"]) else WAITING


class ResyncView:
    """Of all families of the cluster, from any node."""

    def __init__(
        self,
        families: Families,
        replicas: Replicas,
        owning: Owning,
        is_up: Callable[[str], bool],
        call: Call,
    ) -> None:
        self._families = families
        self._replicas = replicas
        self._owning = owning
        self._is_up = is_up
        self._call = call

    async def look(self) -> tuple[list[Row], dict[str, str]]:
        """Every replica that is not in sync, by volume and node; and of the volumes that this node owns what keeps one
        from being answered at this moment, by name."""
        own = await self._own()
        waits = {family_id: str(described["waiting_for"]) for family_id, described in own.items()}
        found = {family.name: waits.get(family.id, "") for family in self._families.replicas()}
        return await self._rows(_links(own)), {name: reason for name, reason in found.items() if reason}

    async def rows(self) -> list[Row]:
        """Every replica that is not in sync, by volume and node."""
        return await self._rows(_links(await self._own()))

    async def _rows(self, own: dict[str, Any]) -> list[Row]:
        behind = [(family, value) for family in self._families.of_cluster() if (value := self._behind(family))]
        me = self._replicas.me
        owners = {value.owner for _, value in behind if value.owner != me and self._is_up(value.owner)}
        told = await asyncio.gather(*(self._ask(owner) for owner in sorted(owners)))
        links = {key: link for one in [*told, own] for key, link in one.items()}
        return [
            row(family, value, node, self._is_up(node), links.get(f"{family.id}/{node}"))
            for family, value in behind
            for node in value.placement
            if value.member(node) is None
        ]

    def _behind(self, family: Family) -> ReplicaSet | None:
        value = self._families.replica_set(family.id)
        return None if value is None or len(value.in_sync) == len(value.placement) else value

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What this node, as an owner, knows of the replicas of others."""
        return {"links": _links(await self._own())}

    async def _own(self) -> dict[str, Any]:
        """What the data processes here say of each replica."""
        try:
            told: dict[str, Any] = await self._call("replicas")
        except NodeError:
            return {}
        return {family_id: described for family_id, described in told.items() if family_id != "silent"}

    async def _ask(self, owner: str) -> dict[str, Any]:
        try:
            answer = await self._owning.ask(owner, {"do": "resync"}, ASK_S)
        except NodeError:
            return {}
        links = answer.get("links")
        return links if isinstance(links, dict) else {}


def _links(described: Mapping[str, Any]) -> dict[str, Any]:
    """Those to replicas that are not in sync."""
    return {
        f"{family_id}/{link['node']}": link
        for family_id, replica in described.items()
        for link in replica["links"]
        if not link["is_member"]
    }
