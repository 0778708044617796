"""The cluster as one node sees it, for people: its nodes, and what is wrong with what to do about it.

Theory: everything shown is from this node's copy of the directory, from what its registry says of itself and from what
it has refused. So the same question can be asked of any node, also of one that is cut off: it says so.

Rules
- Pure: a Picture in, rows and sentences out.
- A node's own values in the directory are read leniently: a newer version may say more, an older one less.
- What is wrong is told as in findings.py: what, and what to do about it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metadata.directory.registry_keys import Member
from metadata.registry_calls import Health
from nbdserver.node.cluster_settings import DRAIN_PREFIX, FACTS_PREFIX, LOAD_PREFIX, VOLUMES_PREFIX
from nbdserver.node.errors import listed
from nbdserver.node.findings import NOW, SOON, Finding
from nbdserver.node.volumes_told import has_replicas, said_in, volumes_of
from protocol.directory import NodeKind

FULL_PERCENT, FILLED_PERCENT = 95.0, 90.0
LATE_S = 3.0
"""So long the registry may not answer without a word about it."""
GRACE_S = 10.0
"""So long it may take to be heard after a start, or to find another master, without a word about it."""
UNKNOWN = Health(True, 0.0, "", "", 0)


@dataclass(frozen=True)
class Picture:
    """What a node knows at one moment."""

    cluster: str
    me: str
    members: tuple[Member, ...] = ()
    own_id: int = 0
    master: str = ""
    epoch: int = 0
    voters: frozenset[str] = frozenset()
    directory: Mapping[str, bytes] = field(default_factory=dict)
    """What the nodes say of themselves: keys under SAID_PREFIXES."""
    silent_s: Mapping[str, float] = field(default_factory=dict)
    """For how long the master has not heard them, by name."""
    is_active: bool = True
    in_this_state_s: float = 0.0
    """For how long `is_active` is what it is."""
    registry: Health = UNKNOWN
    registry_state_s: float = 0.0
    """For how long the registry is connected, or not."""
    registry_error: str = ""
    failure: str = ""
    refused: tuple[tuple[str, str], ...] = ()
    """(peer, reason) of the last minutes."""
    keys: int = 1
    replicas: Mapping[str, int] = field(default_factory=dict)
    """How many replicas of the cluster's families each node shall have."""
    owned: Mapping[str, int] = field(default_factory=dict)
    """How many families each node owns, or did last."""
    certificate_problem: str = ""


def nodes(picture: Picture) -> list[dict[str, Any]]:
    """A row for each member, by name."""
    return [_node(picture, member) for member in sorted(picture.members, key=lambda member: member.name)]


def _node(picture: Picture, member: Member) -> dict[str, Any]:
    name = member.name
    facts, load = said_in(_said(picture, FACTS_PREFIX, name)), said_in(_said(picture, LOAD_PREFIX, name))
    silent_s = picture.silent_s.get(name)
    return {
        "name": name,
        "state": "up" if silent_s is None else "silent",
        "silent_s": None if silent_s is None else round(silent_s, 1),
        "is_master": name == picture.master,
        "is_voter": name in picture.voters,
        "across_wan": member.kind is NodeKind.SECOND,
        "draining": DRAIN_PREFIX + name in picture.directory,
        "address": member.streams,
        "site": str(facts.get("site", "")),
        "fault_domain": str(facts.get("fault_domain", "")),
        "version": str(facts.get("version", "")),
        "started": str(facts.get("started", "")),
        "data_addresses": data_addresses(facts),
        "id": f"{member.node:016x}",
        "replicas": picture.replicas.get(name, 0),
        "owned": picture.owned.get(name, 0),
        "volumes": _number(load, "volumes"),
        "clients": _number(load, "clients"),
        "requests_per_s": _number(load, "requests_per_s"),
        "read_bytes_per_s": _number(load, "read_bytes_per_s"),
        "write_bytes_per_s": _number(load, "write_bytes_per_s"),
        "latency_us": _number(load, "latency_us"),
        "used_bytes": _number(load, "used_bytes"),
        "size_bytes": _number(load, "size_bytes"),
        "fill_percent": _number(load, "fill_percent"),
        "promisable_bytes": _number(load, "promisable_bytes"),
    }


def data_addresses(facts: Mapping[str, Any]) -> list[str]:
    """Where a node's data processes are, from what it says of itself; empty if it does not say."""
    addresses = facts.get("data_addresses")
    if isinstance(addresses, list) and all(isinstance(address, str) for address in addresses):
        return addresses
    return []


def _said(picture: Picture, prefix: str, name: str) -> bytes:
    return picture.directory.get(prefix + name, b"")


def _number(load: Mapping[str, Any], key: str) -> float | None:
    value = load.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def cluster_findings(picture: Picture, rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What is wrong with the cluster, and what to do about it; `rows` are its nodes."""
    return [*_own(picture), *_registry(picture), *_others(picture, rows), *_votes(picture), *_care(picture)]


def _own(picture: Picture) -> Iterable[Finding]:
    """This node's own place in the cluster."""
    if picture.failure:
        yield Finding(
            NOW,
            "this node",
            f"takes no part in the cluster any more: {picture.failure}",
            "mend its data directory (room, device), then restart nbdserver on it",
        )
        return
    twins = [one for one in picture.members if one.name == picture.me and one.node != picture.own_id]
    if twins and not picture.is_active:
        yield Finding(
            NOW,
            "another node",
            f"calls itself {picture.me}, at {twins[0].streams}",
            "give one of them another cluster.node in node.yaml and restart it",
        )
    elif not picture.is_active and picture.in_this_state_s > GRACE_S:
        voters = listed(sorted(picture.voters), 10) or "not known"
        yield Finding(
            NOW,
            "this node",
            f"has heard no master for {picture.in_this_state_s:.0f} s: what it shows of the cluster is old",
            f"a majority of the voters ({voters}) has to run, and to reach each other, this node and the registry",
        )


def _registry(picture: Picture) -> Iterable[Finding]:
    health = picture.registry
    if not health.is_connected and picture.registry_state_s > LATE_S:
        why = f": {health.last_error}" if health.last_error else ""
        yield Finding(
            NOW,
            "registry",
            f"(etcd, {health.endpoint}) has not answered for {picture.registry_state_s:.0f} s{why}",
            "volumes are served, changes of who owns what wait; look at etcd: etcdctl endpoint health --cluster",
        )
    elif picture.registry_error:
        yield Finding(NOW, "", f"no master can be elected: {picture.registry_error}", "see nbdserver events")


def _others(picture: Picture, rows: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    for name, silent_s in sorted(picture.silent_s.items()):
        told = volumes_of(_said(picture, VOLUMES_PREFIX, name))
        volumes = sorted(volume for volume, said in told.items() if not has_replicas(said))
        yield Finding(
            NOW,
            f"node {name}",
            f"has been silent for {silent_s:.0f} s"
            + (f", with what it alone has: {listed(volumes, 5)}" if volumes else ""),
            f"look at it; if it does not come back: nbdserver node remove {name}",
        )
    for row in rows:
        percent = row["fill_percent"]
        if row["name"] != picture.me and percent is not None and percent >= FILLED_PERCENT:
            urgency = NOW if percent >= FULL_PERCENT else SOON
            yield Finding(
                urgency, f"node {row['name']}", f"is {percent:.0f} % full", "delete volumes there, or add room"
            )
    versions = sorted({row["version"] for row in rows if row["version"]})
    if len(versions) > 1:
        yield Finding(SOON, "", f"the nodes run different versions: {listed(versions)}", "finish the upgrade")


def _votes(picture: Picture) -> Iterable[Finding]:
    voters = len(picture.voters)
    silent = sum(name in picture.silent_s for name in picture.voters)
    if voters == 2:
        yield Finding(
            SOON,
            "",
            "there are two voters: while either is down there is no master",
            "add a third node: nbdserver cluster token",
        )
    elif voters > 2 and (voters - 1) // 2 <= silent:
        yield Finding(
            NOW,
            "",
            f"{silent} of {voters} voters are silent: when one more goes there is no master",
            "bring them back, or remove those that will not come: nbdserver node remove NODE",
        )


def _care(picture: Picture) -> Iterable[Finding]:
    if picture.keys > 1:
        yield Finding(SOON, "", "two cluster keys are valid: a rotation has not ended", "nbdserver cluster rotate-key")
    if picture.certificate_problem:
        problem, _, remedy = picture.certificate_problem.partition("; ")
        yield Finding(SOON, "", problem, remedy)
    peers: dict[str, list[str]] = {}
    for peer, reason in dict.fromkeys(picture.refused):
        peers.setdefault(reason, []).append(peer)
    for reason, refused in peers.items():
        yield Finding(
            SOON,
            "",
            f"refused what {listed(refused, 3)} sent: {reason}",
            "if it belongs to this cluster, give it our cluster.name, key_file and CA, and our version",
        )
