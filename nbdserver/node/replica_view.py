"""A family of the cluster as people see it: who serves it, where its replicas are, how each is doing.

Rules: pure; from what the shared registry says and which nodes are heard.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from metadata.replica_set import ReplicaSet
from nbdserver.node.errors import listed
from nbdserver.node.findings import NOTE, NOW, SOON, Finding
from nbdserver.replication.slow_disks import SLOW

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


def replica_findings(volumes: Sequence[Mapping[str, Any]], problems: Mapping[str, str]) -> list[Finding]:
    """What is wrong with volumes of the cluster (as `Volumes.list` shows them), and `problems` by volume: one finding
    for all of which the same can be said."""
    same: dict[tuple[str, str, str], list[str]] = {}
    for volume in volumes:
        replicas = volume["replicas"]
        if replicas["wanted"]:
            for told in _of_volume(volume["state"], replicas):
                same.setdefault(told, []).append(volume["name"])
    for name, reason in problems.items():
        told = (SOON, f"replicas are not where they shall be: {reason}", "add a node, or end what keeps nodes out")
        same.setdefault(told, []).append(name)
    return [Finding(urgency, listed(names), problem, remedy) for (urgency, problem, remedy), names in same.items()]


def _of_volume(state: str, replicas: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    nodes = replicas["nodes"]
    if not nodes:
        return [
            (NOW, "cannot be told where it is: the registry has not answered yet", "see what is said of the registry")
        ]
    silent = [each["node"] for each in nodes if each["state"] == SILENT]
    returning = [each["node"] for each in nodes if each["state"] == RETURNING]
    there = sum(each["state"] == IN_SYNC for each in nodes)
    if not there:
        remedy = f"bring one of those back that are in sync: {replicas['owner']} was the last owner"
        return [(NOW, "served by no node: no replica that is in sync is up", remedy)]
    found = []
    if state == UNOWNED:
        problem = f"idle: its owner {replicas['owner']} is gone"
        found.append((NOTE, problem, "nothing: the next client, or command, lets another node take it over"))
    if silent:
        problem = f"short of replicas: {there} of {replicas['wanted']} in sync, silent: {listed(silent)}"
        remedy = f"look at {listed(silent)}; what is not back within cluster.repair_delay is made on another node"
        found.append((NOW if there == 1 else SOON, problem, remedy))
    elif returning:
        problem = f"short of replicas: {there} of {replicas['wanted']} in sync, {listed(returning)} being made complete"
        found.append((SOON, problem, "wait; nbdserver resync shows how far they are"))
    elif len(nodes) < replicas["wanted"]:
        found.append((SOON, f"short of replicas: it is on {len(nodes)} of {replicas['wanted']} nodes", "add a node"))
    return found


def waiting_findings(waits: Mapping[str, str]) -> list[Finding]:
    """Of volumes that this node owns and cannot answer for at this moment: what they wait for, by name."""
    same: dict[str, list[str]] = {}
    for name, reason in waits.items():
        same.setdefault(reason, []).append(name)
    remedy = "it takes some seconds; if it lasts: a member is removed only while the registry (etcd) answers"
    return [Finding(NOW, listed(names), f"answers nobody, it waits for {why}", remedy) for why, names in same.items()]


def disk_findings(resync: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Of replicas that are not in sync, and whose disk is known to be slow, or not to be what it was."""
    same: dict[tuple[str, str], list[str]] = {}
    for row in resync:
        if row["disk"]:
            same.setdefault((row["node"], row["disk"]), []).append(row["volume"])
    changed = "nothing, if that was meant: it gets what it lacks from the others; else look at that machine's disk"
    slow = "look at that machine's disk; when it has kept up with the others' for some seconds it is in sync again"
    return [
        Finding(SOON, f"{node}: {listed(names)}", why, slow if why == SLOW else changed)
        for (node, why), names in same.items()
    ]


def peers_finding(reason: str) -> Finding:
    """This node's replicas cannot be reached by the others."""
    remedy = "give the node another cluster.data_address, or mend its certificate, and restart it"
    return Finding(NOW, "this node", f"cannot take part in replicated volumes: {reason}", remedy)
