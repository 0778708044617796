"""A family of the cluster as people see it: who serves it, where its replicas are, how each is doing.

Rules: pure; from what the shared registry says and which nodes are heard.
"""

from collections.abc import Callable
from typing import Any

from metadata.replica_set import ReplicaSet

IN_SYNC, RETURNING, SILENT = "in sync", "returning", "silent"
"""States of a replica: it has everything; its node is up and it is being made complete; its node is not heard."""

ELSEWHERE, UNOWNED = "elsewhere", "idle"
"""States of a volume that this node does not serve: another one does; none does, it is taken over when it is used."""

NO_REPLICAS: dict[str, Any] = {"wanted": 0, "owner": "", "in_sync": 0, "nodes": []}
"""Of a volume that is one node's own."""


def replicas(wanted: int, value: ReplicaSet | None, is_up: Callable[[str], bool]) -> dict[str, Any]:
    """How many there shall be, who owns them, and each of them."""
    if value is None:
        return {**NO_REPLICAS, "wanted": wanted}
    return {
        "wanted": wanted,
        "owner": value.owner,
        "in_sync": len(value.in_sync),
        "nodes": [{"node": node, "state": _state(value, node, is_up)} for node in value.placement],
    }


def _state(value: ReplicaSet, node: str, is_up: Callable[[str], bool]) -> str:
    if not is_up(node):
        return SILENT
    return IN_SYNC if value.member(node) is not None else RETURNING
