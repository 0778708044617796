"""A volume as people see it: what the registry says of it, what is live of it, and where it is.

Rules: pure. Of a volume that another node serves nothing is live here, and what is wrong with a replica here is not
wrong with the volume.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from metadata.registry import Family, Volume
from metadata.replica_set import ReplicaSet
from nbdserver.node.activity import NO_TRAFFIC
from nbdserver.node.replica_view import ELSEWHERE, NO_REPLICAS, UNOWNED, replicas

STARTING, UNKNOWN = "starting", "unknown"
"""States of a volume of which nothing is known: the data process is being started, or does not answer."""


def described(
    family: Family,
    volume: Volume,
    live: Mapping[str, Any],
    otherwise: str,
    reason: str,
    value: ReplicaSet | None = None,
    is_up: Callable[[str], bool] = lambda node: False,
    snapshots: int = 0,
) -> dict[str, Any]:
    """Of a volume that is served here, or shall be: `otherwise` is its state if nothing is `live` of it, `reason` why
    it cannot be served. `value` is that of a family of the cluster, `snapshots` how many another node has told of."""
    disk = live.get("disk", {})
    own = live.get("volumes", {}).get(str(volume.number), {})
    reason = reason or disk.get("failure", "")
    if reason:
        state = "failed"
    elif not own:
        state = otherwise
    else:
        state = "full" if disk["state"] == "full" else "serving"
    return {
        "name": volume.name,
        "number": volume.number,
        "size_bytes": volume.size_bytes,
        "state": state,
        "reason": reason,
        "base": own.get("base", ""),
        "snapshots": own.get("snapshots", snapshots),
        "generation": value.generation if value else family.generation,
        "epoch": value.epoch if value else family.epoch,
        "family": family.id,
        "settings": {**asdict(volume.settings), "max_data": family.max_data},
        "clients": None if otherwise == ELSEWHERE else own.get("clients", 0),
        "traffic": own.get("traffic", NO_TRAFFIC) if own else None,
        "disk": disk,
        "replicas": replicas(family.replicas, value, is_up) if family.replicas else NO_REPLICAS,
    }


def state_of_others(value: ReplicaSet | None, me: str, is_up: Callable[[str], bool]) -> str:
    """The state of a volume of the cluster that is not served here."""
    if value is None:
        return UNKNOWN
    return ELSEWHERE if value.owner != me and is_up(value.owner) else UNOWNED
