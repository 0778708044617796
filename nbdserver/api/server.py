"""Serving the API: uvicorn on DATA/api.sock and, if the settings say so, on TCP behind the token.

Rules: uvicorn installs no signal handlers here (the control process has its own), and writes no access log. The
unix socket is made with mode 0600 before anything listens on it.
"""

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from nbdserver.api.access import allowed
from nbdserver.api.app import make_app
from nbdserver.node.addresses import is_loopback, port_holder, split_address
from nbdserver.node.config import HttpSettings
from nbdserver.node.control import Node
from nbdserver.node.errors import WrongInputError

BACKLOG = 128

MAX_CONCURRENT_REQUESTS = 256
"""Beyond this a request is answered with 503: a monitoring system gone wild must not fill the memory."""

MAX_TOKEN_BYTES = 4096


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _TokenGuard:
    """ASGI layer over the API on TCP: answers 401 to whom `access.allowed` refuses."""

    def __init__(self, app: Any, node: Node) -> None:
        self._app = app
        self._node = node

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        host = (scope.get("client") or ("", 0))[0]
        headers = dict(scope.get("headers", ()))
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        name = headers.get(b"host", b"").decode("latin-1")
        http = self._node.settings.http
        token = read_token(token_path(self._node))
        if scope["type"] == "http" and allowed(
            scope["method"], scope["path"], is_loopback(host), authorization, token, http.public_read, name
        ):
            await self._app(scope, receive, send)
            return
        body = b'{"error":"this needs the header `Authorization: Bearer TOKEN`, with the token of http.token_file"}'
        head = [
            (b"content-type", b"application/json"),
            (b"www-authenticate", b"Bearer"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": head})
        await send({"type": "http.response.body", "body": body})


def token_path(node: Node) -> Path:
    """Return where the token is."""
    return node.settings.http.token_file or node.directory.api_token


def read_token(path: Path) -> str:
    """Return the token, or "" (nobody is let in) when there is none."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_TOKEN_BYTES).decode("ascii", errors="replace").strip()
    except OSError:
        return ""


async def serve_api(node: Node) -> Callable[[], Awaitable[None]]:
    """Start serving and return what stops it. Raises WrongInputError when the TCP address cannot be had."""
    app = make_app(node)
    servers = [(_make_server(app), _unix_socket(node.directory.api_socket))]
    http = node.settings.http
    if http.listen:
        _prepare_token(node, http)
        servers.append((_make_server(_TokenGuard(app, node)), _tcp_socket(http.listen)))
    tasks = [asyncio.create_task(server.serve(sockets=[sock])) for server, sock in servers]
    while not all(server.started for server, _ in servers):
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.005)

    async def stop() -> None:
        for server, _ in servers:
            server.should_exit = True
        await asyncio.gather(*tasks)
        node.directory.api_socket.unlink(missing_ok=True)

    return stop


def _make_server(app: Any) -> _Server:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        loop="asyncio",
        http="h11",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONCURRENT_REQUESTS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )
    return _Server(config)


def _unix_socket(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # ours: the data directory's lock is held
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(mask)
    sock.listen(BACKLOG)
    return sock


def _tcp_socket(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(target)
        sock.listen(BACKLOG)
    except OSError as error:
        if error.errno == 98:
            raise WrongInputError(
                f"port {port} (http.listen) is taken by {port_holder(port)}; choose another"
            ) from None
        raise WrongInputError(f"http.listen: cannot listen on {address}: {error.strerror}") from None
    return sock


def _prepare_token(node: Node, http: HttpSettings) -> None:
    """Make a token for whoever named no file of their own."""
    path = node.directory.api_token
    if http.token_file is None and not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    elif http.token_file is not None and not read_token(http.token_file):
        raise WrongInputError(
            f"http.token_file: {http.token_file} is empty or cannot be read; write one line of secret into it"
        )
