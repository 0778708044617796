"""The HTTP API: one FastAPI application over the control process. `/openapi.json` documents it.

Rules: handlers are coroutines and call the node; nothing is decided here. A refusal is `{"error": "one line"}` with
400 (cannot be meant), 404, 409 (does not go with what is there), 401 (token) or 500.
"""

import asyncio
import errno
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from metadata.registry import RegistryError
from nbdserver.api import cluster_routes, page, sent_on
from nbdserver.api.metrics import Figures, exposition, of_worker
from nbdserver.api.models import (
    CloneRequest,
    MoveRequest,
    Names,
    RenameRequest,
    ResizeRequest,
    Scrub,
    ScrubRequest,
    Snapshot,
    SnapshotRequest,
    Status,
    Volume,
    VolumeRequest,
)
from nbdserver.node import program
from nbdserver.node.at_owner import ApiRequest
from nbdserver.node.control import Node
from nbdserver.node.errors import NodeError, WrongInputError

if TYPE_CHECKING:
    from nbdserver.node.cluster_part import ClusterPart

MAX_WAIT_S = 30.0
"""Longest that a request for events is held open."""


def make_app(node: Node) -> FastAPI:
    """Return the API of `node`, without any access control."""
    app = FastAPI(
        title="nbdserver",
        version=program.version(),
        summary="A Network Block Device server",
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app)
    _add_node(app, node)
    of_volumes = APIRouter(route_class=sent_on.route_class(node))
    _add_volumes(of_volumes, node)
    _add_snapshots(of_volumes, node)
    _add_scrubs(of_volumes, node)
    app.include_router(of_volumes)
    _add_names(app, node)
    _add_clients(app, node)
    cluster_routes.add_to(app, node)
    page.add_to(app, node)
    if node.part is not None:
        node.part.at_owner.answer_here = sent_on.answer_in(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(NodeError)
    async def node_error(_: Request, error: NodeError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.http_status)

    @app.exception_handler(HTTPException)
    async def no_such_path(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{error.detail}; /openapi.json says what there is"}, error.status_code)

    @app.exception_handler(RegistryError)
    async def registry_error(_: Request, error: RegistryError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 409)

    @app.exception_handler(OSError)
    async def broken(_: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 507 if error.errno == errno.ENOSPC else 500)

    @app.exception_handler(RequestValidationError)
    async def wrong_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{where}: {first['msg']}; /openapi.json says what is right"}, 400)


def _add_node(app: FastAPI, node: Node) -> None:
    started_s = time.time()

    @app.get("/healthz", response_class=PlainTextResponse, summary="200 while the data process answers")
    async def healthz() -> Response:
        try:
            await node.call("ping")
        except NodeError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("ok\n")

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    async def metrics() -> Response:
        gauges: dict[str, Any] = {"start_time_seconds": started_s, "free_bytes": node.free_bytes(), "up": 0}
        gauges |= node.capacity.gauges()
        gauges |= node.cluster.gauges() if node.cluster else {}
        if (expires_s := node.tls.expires_s()) is not None:
            gauges["tls_certificate_expires_seconds"] = expires_s
        counters: dict[str, Any] = {}
        live: dict[str, Any] = {}
        workers: dict[str, Figures] = {}
        try:
            answer = await node.call("counters")
            live = answer["volumes"]
            while answer["last"]:
                answer = await node.call("counters", after=answer["last"])
                live |= answer["volumes"]
            gauges |= answer["node"]["gauges"] | {"up": int(node.is_whole and "silent" not in answer)}
            counters = answer["node"]["counters"]
            workers = {number: of_worker(own["counters"], own["gauges"]) for number, own in answer["workers"].items()}
        except NodeError:
            pass  # `up` says so
        volumes: dict[str, Figures] = {}
        for family in node.families():
            for at, volume in enumerate(family.volumes):
                own: dict[str, float] = {"volume_size_bytes": volume.size_bytes, "volume_generation": family.generation}
                if at == 0:
                    own |= node.capacity.volume_gauges(family) | node.scrubs.gauges(family)
                    own |= node.part.replica_gauges(family) if node.part is not None else {}
                figures = live.get(volume.name, {"counters": {}, "gauges": {"volume_failed": 1}})
                volumes[volume.name] = Figures(figures["counters"], figures["gauges"] | own)
        # With a thousand volumes this takes a tenth of a second, in which the API has other things to do.
        text = await asyncio.to_thread(exposition, Figures(counters, gauges), volumes, workers)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/status", summary="The node and its volumes")
    async def status() -> Status:
        return Status(version=program.version(), **await node.status())

    @app.post("/v1/upgrade-in-place", status_code=202, summary="Become the program on disk, with the clients")
    async def upgrade_in_place() -> dict[str, Any]:
        return {**await node.upgrade_in_place(), "version": program.version()}

    @app.get("/v1/events", summary="What happened, oldest first")
    async def events(
        after: Annotated[int, Query(ge=0, description="only events with a higher sequence number")] = 0,
        limit: Annotated[int, Query(ge=1, le=2000)] = 200,
        wait_s: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="wait so long for the first")] = 0,
    ) -> list[dict[str, Any]]:
        if wait_s and node.events.last_sequence <= after:
            await _next_event(node, wait_s)
        return node.events.since(after, limit)


async def _next_event(node: Node, wait_s: float) -> None:
    happened = asyncio.Event()
    unfollow = node.events.follow(happened.set)
    try:
        async with asyncio.timeout(wait_s):
            await happened.wait()
    except TimeoutError:
        pass
    finally:
        unfollow()


def _add_volumes(app: APIRouter, node: Node) -> None:
    @app.get("/v1/volumes", summary="Every volume")
    async def list_volumes() -> list[Volume]:
        return [Volume(**volume) for volume in await node.volumes.list()]

    @app.post("/v1/volumes", status_code=201, summary="Make an empty volume", response_model=Volume)
    async def create_volume(request: VolumeRequest) -> Volume | Response:
        if not request.replicas and not request.on:
            return Volume(**await node.volumes.create(request.name, request.size_bytes))
        return await _create_replicated(node, request)

    @app.get("/v1/volumes/{name:path}", summary="One volume")
    async def show_volume(name: str) -> Volume:
        return Volume(**await node.volumes.show(name))

    @app.patch("/v1/volumes/{name:path}", summary="Change settings: all of them or none")
    async def set_volume(name: str, changes: dict[str, str]) -> Volume:
        return Volume(**await node.volumes.set(name, changes))

    @app.delete("/v1/volumes/{name:path}", status_code=204, summary="Delete a volume and its data")
    async def delete_volume(name: str, force: bool = False) -> None:
        await node.volumes.delete(name, force)


async def _create_replicated(node: Node, request: VolumeRequest) -> Volume | Response:
    """At the first of the nodes that it shall be on."""
    part = _part(node)
    nodes = part.changes.choose(request.replicas or len(request.on), request.on, request.size_bytes)
    if nodes[0] == part.settings.node:
        return Volume(**await part.changes.create(request.name, request.size_bytes, nodes))
    body = request.model_copy(update={"on": list(nodes)}).model_dump_json()
    return sent_on.as_response(await part.at_owner.ask(nodes[0], ApiRequest("POST", "/v1/volumes", "", body)))


def _part(node: Node) -> "ClusterPart":
    if node.part is None:
        raise WrongInputError("this node stands alone, replicas need a cluster; nbdserver cluster init makes one")
    return node.part


def _add_snapshots(app: APIRouter, node: Node) -> None:
    @app.post("/v1/volumes/{name}/resize", summary="Give a volume another size")
    async def resize_volume(name: str, request: ResizeRequest) -> Volume:
        return Volume(**await node.snapshots.resize(name, request.size_bytes, request.force))

    @app.post("/v1/volumes/{name}/move", summary="Let a replica be on another node; returns when that is begun")
    async def move_replica(name: str, request: MoveRequest) -> Volume:
        await _part(node).changes.move(name, request.source, request.target)
        return Volume(**await node.volumes.show(name))

    @app.post("/v1/volumes/{name}/rename", summary="Give a volume another name; attached clients go on")
    async def rename_volume(name: str, request: RenameRequest) -> Volume:
        return Volume(**await node.volumes.rename(name, request.name))

    @app.post("/v1/clones", status_code=201, summary="Make a volume that holds what a snapshot holds")
    async def create_clone(request: CloneRequest) -> Volume:
        return Volume(**await node.volumes.clone(request.volume, request.snapshot, request.name))

    @app.get("/v1/snapshots", summary="Snapshots of one volume, or of all")
    async def list_snapshots(volume: str = "") -> list[Snapshot]:
        return [Snapshot(**found) for found in await node.snapshots.listed(volume)]

    @app.post("/v1/snapshots", status_code=201, summary="Keep what a volume holds now")
    async def create_snapshot(request: SnapshotRequest) -> Snapshot:
        return Snapshot(**await node.snapshots.create(request.volume, request.name))

    @app.delete("/v1/snapshots/{volume}/{name}", status_code=204, summary="Delete a snapshot")
    async def delete_snapshot(volume: str, name: str, force: bool = False) -> None:
        await node.snapshots.delete(volume, name, force)

    @app.post("/v1/snapshots/{volume}/{name}/rollback", summary="Let the volume hold what the snapshot holds")
    async def rollback(volume: str, name: str) -> Volume:
        return Volume(**await node.snapshots.rollback(volume, name))


def _add_names(app: FastAPI, node: Node) -> None:
    @app.get("/v1/names", summary="What there is, by name: for completion in shells")
    async def names() -> Names:
        snapshots = [found["export"] for found in await node.snapshots.listed()]
        nodes = node.cluster.names() if node.cluster else []
        return Names(volumes=list(node.volumes.names()), snapshots=snapshots, nodes=nodes)


def _add_scrubs(app: APIRouter, node: Node) -> None:
    @app.get("/v1/scrubs", summary="How far the reading of all data is")
    async def list_scrubs() -> list[Scrub]:
        return [Scrub(**found) for found in node.scrubs.status()]

    @app.post("/v1/scrubs", status_code=202, summary="Read a volume's data, or all, to find what has rotted")
    async def start_scrub(request: ScrubRequest) -> list[Scrub]:
        return [Scrub(**found) for found in node.scrubs.start(request.volume)]

    @app.delete("/v1/scrubs", summary="Stop reading; returns the volumes whose scrub was under way or waited")
    async def stop_scrubs() -> list[str]:
        return await node.scrubs.stop()


def _add_clients(app: FastAPI, node: Node) -> None:
    @app.get("/v1/clients", summary="Every client connection")
    async def list_clients() -> list[dict[str, Any]]:
        clients: list[dict[str, Any]] = await node.call("clients")
        return clients

    @app.delete("/v1/clients/{client_id}", status_code=204, summary="Disconnect a client")
    async def disconnect(client_id: int) -> None:
        if not await node.call("disconnect", client=client_id):
            raise WrongInputError(f"there is no client {client_id}; `nbdserver client list` shows them")
