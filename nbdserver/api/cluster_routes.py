"""The cluster in the API: nodes, the registry's state, what is wrong, and what the directory says.

Rule: what is shown is what this node knows; reading asks nobody else.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import StreamingResponse

from nbdserver.api.models import (
    ClusterNode,
    ClusterStatus,
    DirectoryEntry,
    DrainRequest,
    Recovered,
    RecoverRequest,
    Resync,
)
from nbdserver.node.control import Node
from nbdserver.node.errors import NotFoundError, NotJoinedError

if TYPE_CHECKING:
    from nbdserver.node.cluster import Cluster
    from nbdserver.node.cluster_part import ClusterPart

WATCHED_LIMIT = 10_000
"""Changes that may wait for a watcher that does not read; then it is cut off."""
SIGN_OF_LIFE_S = 10.0


def add_to(app: FastAPI, node: Node) -> None:
    @app.get("/v1/cluster", summary="The cluster as this node sees it; null for a node that stands alone")
    async def cluster() -> ClusterStatus | None:
        return ClusterStatus(**node.cluster.describe()) if node.cluster else None

    @app.get("/v1/resync", summary="Replicas that are not in sync, and what each lacks")
    async def resync() -> list[Resync]:
        return [Resync(**row) for row in await _part(node).resync.rows()]

    @app.get("/v1/nodes", summary="The nodes of the cluster")
    async def nodes() -> list[ClusterNode]:
        return [ClusterNode(**row) for row in _cluster(node).describe()["nodes"]]

    @app.get("/v1/nodes/{name}", summary="One node of the cluster")
    async def show(name: str) -> ClusterNode:
        return ClusterNode(**_cluster(node).node(name))

    @app.post("/v1/nodes/{name}/drain", summary="Let a node get nothing new, or end that")
    async def drain(name: str, request: DrainRequest) -> ClusterNode:
        return ClusterNode(**await _cluster(node).drain(name, request.drain))

    @app.delete("/v1/nodes/{name}", status_code=204, summary="Strike a node that will not come back")
    async def remove(name: str) -> None:
        await _part(node).remove(name)

    @app.post("/v1/cluster/rotate-key", status_code=204, summary="Give the cluster another key")
    async def rotate_key() -> None:
        await _cluster(node).membership.rotate_key()

    @app.post("/v1/cluster/recover", summary="Make the registry whole from what the nodes know")
    async def recover(request: RecoverRequest) -> Recovered:
        return Recovered(**await _part(node).recovery.recover(request.without, request.is_trial))

    @app.get("/v1/directory", summary="What this node's copy of the directory has")
    async def directory(
        prefix: Annotated[str, Query(description="only keys that begin with it")] = "",
        key: Annotated[str, Query(description="only this key; 404 if it is not there")] = "",
    ) -> list[DirectoryEntry]:
        held = _cluster(node).directory
        if key:
            value = held.get(key)
            if value is None:
                raise NotFoundError(f"the directory has no {key}; `nbdserver directory list` shows what it has")
            return [DirectoryEntry(**entry(key, value))]
        return [DirectoryEntry(**entry(*pair)) for pair in held.range(prefix)]

    @app.get("/v1/directory/changes", summary="What changes in the directory from now on: a JSON object a line")
    async def changes(prefix: str = "") -> StreamingResponse:
        return StreamingResponse(_changes(_cluster(node), prefix), media_type="application/x-ndjson")


def _part(node: Node) -> "ClusterPart":
    if node.part is None:
        raise NotFoundError(
            "this node stands alone; make a cluster with: nbdserver cluster init, or join one: nbdserver cluster join"
        )
    return node.part


def _cluster(node: Node) -> "Cluster":
    cluster = _part(node).cluster
    if cluster is None:
        raise NotJoinedError
    return cluster


def entry(key: str, value: bytes) -> dict[str, Any]:
    """Key and value as JSON can hold them."""
    try:
        return {"key": key, "value": value.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"key": key, "value": base64.b64encode(value).decode(), "encoding": "base64"}


def change(key: str, value: bytes | None) -> dict[str, Any]:
    """What a watcher is told."""
    return {"action": "delete", "key": key} if value is None else {"action": "put", **entry(key, value)}


async def _changes(cluster: "Cluster", prefix: str) -> AsyncIterator[str]:
    """First what is there, then what changes; an empty line is a sign of life."""
    changed: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def watcher(key: str, value: bytes | None) -> None:
        waiting = changed.qsize()
        if waiting <= WATCHED_LIMIT:
            changed.put_nowait(change(key, value) if waiting < WATCHED_LIMIT else None)

    stop_watching = cluster.directory.watch(prefix, watcher)
    try:
        for key, value in cluster.directory.range(prefix):
            yield json.dumps(change(key, value)) + "\n"
        while True:
            try:
                one = await asyncio.wait_for(changed.get(), SIGN_OF_LIFE_S)
            except TimeoutError:
                yield "\n"
                continue
            if one is None:
                return
            yield json.dumps(one) + "\n"
    finally:
        stop_watching()
