"""The status page: some files of this package, and the one JSON route that they draw.

Theory. The files say nothing of the node, so anybody may have them (access.py); what they show is /v1/overview, which
is guarded. There is no build step: what lies in `web/` is what the browser gets.

Rules
- Nothing is loaded from another host, and the browser is told to refuse it (CONTENT_POLICY): no script in the page, no
  style in an attribute, no frame around it.
- A browser asks for the files again at each visit (ETag): after an upgrade nobody sees the old ones.
"""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request, Response

from nbdserver.api import models
from nbdserver.api.access import PAGE_FILES
from nbdserver.node.control import Node

MOST_ROWS = 1000

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

Sort = Literal["trouble", "name", "node", "size", "data", "clients", "requests", "bytes", "latency"]
"""Those of overview.SORTS."""


def add_to(app: FastAPI, node: Node) -> None:
    """Serve the page and what it draws."""
    _add_files(app)

    @app.get("/v1/overview", summary="What the status page shows: the node, and the first of its volumes")
    async def overview(
        match: Annotated[
            str, Query(max_length=200, description="only volumes whose name, description or node has these words")
        ] = "",
        sort: Annotated[Sort, Query(description="names from a to z, numbers from the largest")] = "trouble",
        limit: Annotated[int, Query(ge=0, le=MOST_ROWS, description="at most so many volumes")] = 50,
    ) -> models.Overview:
        return models.Overview(version=app.version, **await node.overview.show(match, sort, limit))


def _add_files(app: FastAPI) -> None:
    folder = files("nbdserver.api").joinpath("web")
    for path, name in PAGE_FILES.items():
        kind = f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(
            _file(folder.joinpath(name).read_bytes(), kind)
        )


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return answer
