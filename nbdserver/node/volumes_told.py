"""What nodes tell each other of their volumes, and what one makes of it: where a volume is, whatever node is asked.

    volumes/NAME   {"total": 2, "volumes": {"disk0": {"size_bytes": 1073741824, "state": "serving"}, ...}}
    load/NAME      ... "busiest": {"disk0": {"clients": 1, "requests_per_s": 80.5, ...}}

Theory: names, sizes and states change seldom, loads all the time. So the first are published when they have changed,
and of the second only what the few busiest volumes do goes along with the node's own load: what a cluster of a thousand
nodes has to be told every few seconds stays small, and who looks for a name or for trouble finds it.

Rules
- A value is at most TOLD_BYTES: those that are in trouble come first, and `total` counts all.
- What others say is read leniently: a newer version may say more, an older one less.
- The volumes of a node that is silent are *unknown*: nobody here knows whether they are served. But for those that have
  replicas: every node knows who else may serve them, and lists them itself.

Known weakness: beyond MOST_ELSEWHERE volumes of other nodes are counted and not shown.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nbdserver.node.cluster_settings import LOAD_PREFIX, VOLUMES_PREFIX

Row = dict[str, Any]

TOLD_BYTES = 128 << 10
BUSIEST = 8  # with these a load is mostly one datagram
MOST_ELSEWHERE = 10_000

TOLD = ("size_bytes", "state", "reason", "description", "base", "read_only", "snapshots", "replicas", "in_sync")
LOAD = ("clients", "requests_per_s", "read_bytes_per_s", "write_bytes_per_s", "latency_us")

NOT_TOLD: Row = {
    "description": "",
    "state": "unknown",
    "reason": "",
    "size_bytes": 0,
    "live_bytes": None,
    "shares_data": False,
    "damaged_blocks": 0,
    "base": "",
    "snapshots": 0,
    "read_only": False,
    "replicas": 0,
    "in_sync": 0,
    "bytes_per_s": None,
    **dict.fromkeys(LOAD),
}
"""Of a volume elsewhere; None: not known here."""


def told(rows: Sequence[Row]) -> bytes:
    """The value of `volumes/NAME` for a node with these volumes, the most important first."""
    pieces: list[str] = []
    size_bytes = 0
    for row in rows:
        said = {key: row[key] for key in TOLD if row[key]}
        piece = f"{json.dumps(row['name'])}:{json.dumps(said, separators=(',', ':'))}"
        size_bytes += len(piece) + 1
        if size_bytes > TOLD_BYTES:
            break
        pieces.append(piece)
    return f'{{"total":{len(rows)},"volumes":{{{",".join(pieces)}}}}}'.encode()


def busiest(rows: Sequence[Row]) -> dict[str, Row]:
    """What the volumes that do the most do, by name; those that do nothing and have no client are not among them."""
    busy = [row for row in rows if row["requests_per_s"] or row["clients"]]
    busy.sort(key=lambda row: (-row["requests_per_s"], -row["clients"], row["name"]))
    return {row["name"]: {key: row[key] for key in LOAD} for row in busy[:BUSIEST]}


def volumes_of(value: bytes) -> dict[str, Row]:
    """What the value of `volumes/NAME` says, by volume."""
    volumes = said_in(value).get("volumes")
    told = volumes if isinstance(volumes, dict) else {}
    return {name: said if isinstance(said, dict) else {} for name, said in told.items()}


def has_replicas(said: Row) -> bool:
    """Whether a volume is on other nodes too."""
    return bool(said.get("replicas"))


class Elsewhere:
    """The volumes of the other nodes, as they have told them."""

    def __init__(self) -> None:
        # By node: what the directory has of it and whether it is silent, then its rows and how many more it has.
        self._read: dict[str, tuple[tuple[bytes, bytes, bool], list[Row], int]] = {}
        self.total = 0
        """How many there are, those that are not shown too."""

    def rows(self, nodes: Sequence[Mapping[str, Any]], me: str, said: Callable[[str], bytes]) -> list[Row]:
        """Of these nodes of the cluster, without `me`; `said(key)` is what the directory has, b"" if nothing."""
        before, self._read = self._read, {}
        found: list[Row] = []
        self.total = 0
        for node in nodes:
            name = node["name"]
            if name == me:
                continue
            now = (said(VOLUMES_PREFIX + name), said(LOAD_PREFIX + name), node["state"] != "up")
            read = before.get(name)
            if read is None or read[0] != now:
                read = (now, _rows(name, *now), _not_told(now[0]))
            self._read[name] = read
            _, rows, more = read
            self.total += len(rows) + more
            if len(found) < MOST_ELSEWHERE:
                found += rows[: MOST_ELSEWHERE - len(found)]
        return found


def _rows(node: str, volumes: bytes, load: bytes, is_silent: bool) -> list[Row]:
    busy = said_in(load).get("busiest")
    rows = []
    for name, said in volumes_of(volumes).items():
        if is_silent and has_replicas(said):
            continue
        row = {**NOT_TOLD, "key": f"node {node}/{name}", "name": name, "node": node}
        row |= {key: said[key] for key in TOLD if type(said.get(key)) is type(NOT_TOLD[key])}
        if is_silent:
            row |= {"state": "unknown", "reason": f"{node} is silent"}
        elif isinstance(busy, dict):
            row |= _load(busy.get(name))
        rows.append(row)
    return rows


def _load(said: Any) -> Row:
    """What a volume does; of one that is not among the busiest that is not known here."""
    if not isinstance(said, dict) or not all(_is_number(said.get(key)) for key in LOAD):
        return {}
    load = {key: round(said[key], 1 if key == "requests_per_s" else None) for key in LOAD}
    return {**load, "bytes_per_s": load["read_bytes_per_s"] + load["write_bytes_per_s"]}


def said_in(value: bytes) -> dict[str, Any]:
    """What a node has said in a value of the directory; nothing if there is none, or that is not understood."""
    try:
        content = json.loads(value or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _not_told(volumes: bytes) -> int:
    """How many there were no room for."""
    total = said_in(volumes).get("total")
    return max(0, total - len(volumes_of(volumes))) if isinstance(total, int) else 0
