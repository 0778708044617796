"""Routes about a volume: what is asked of a volume that another node owns is sent on to that, as it is.

Theory: nbdserver/node/at_owner.py. A route of this class finds the volume that a request is about in its path (`name`,
`volume`), its query or its body (`volume`), before the handler sees it.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute

from nbdserver.node.at_owner import ApiAnswer, ApiRequest
from nbdserver.node.control import Node

SENT_ON = "x-nbdserver-sent-on"
"""A header of requests that another node has sent here."""


def route_class(node: Node) -> type[APIRoute]:
    """The class of routes about volumes of `node`."""

    class OwnersRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            here = super().get_route_handler()

            async def handle(request: Request) -> Response:
                answer = await _send_on(node, request)
                return await here(request) if answer is None else as_response(answer)

            return handle

    return OwnersRoute


async def _send_on(node: Node, request: Request) -> ApiAnswer | None:
    part = node.part
    volume = await _volume_of(request)
    if part is None or not volume:
        return None
    if SENT_ON in request.headers:
        if request.method != "GET":
            await part.at_owner.take(volume)
        return None
    body = (await request.body()).decode(errors="replace")
    asked = ApiRequest(request.method, request.url.path, request.url.query, body)
    return await part.at_owner.send_on(volume, asked)


async def _volume_of(request: Request) -> str:
    """The volume that a request is about, "" if it names none."""
    named = request.path_params.get("name") if "volume" not in request.path_params else request.path_params["volume"]
    if named is None:
        named = request.query_params.get("volume")
    if named is None and request.method in ("POST", "PATCH"):
        try:
            content = json.loads(await request.body())
        except ValueError:
            return ""  # the handler refuses it
        named = content.get("volume") if isinstance(content, dict) else None
    return named if isinstance(named, str) else ""


def as_response(answer: ApiAnswer) -> Response:
    """What another node has answered."""
    return Response(answer.body if answer.status != 204 else None, answer.status, media_type="application/json")


def answer_in(app: FastAPI) -> Callable[[ApiRequest], Coroutine[Any, Any, ApiAnswer]]:
    """What answers requests that other nodes have sent on to `app`."""

    async def answer(request: ApiRequest) -> ApiAnswer:
        import httpx

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
            url = request.path + (f"?{request.query}" if request.query else "")
            headers = {SENT_ON: "1", "content-type": "application/json"}
            response = await client.request(request.method, url, content=request.body, headers=headers)
            return ApiAnswer(response.status_code, response.text)

    return answer
