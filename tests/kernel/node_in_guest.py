"""Runs inside a guest: a node that serves one volume. What takes long to load in an emulated processor is left out: the
HTTP API, and the parser of settings files with its pydantic, for which a plain object stands.

usage: node_in_guest.py DATA HOST:PORT SEGMENT-BYTES VOLUME SIZE-BYTES
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

parser: Any = ModuleType("nbdserver.node.config")
parser.NodeSettings = SimpleNamespace
parser.load_settings = None
sys.modules[parser.__name__] = parser

from nbdserver.node.control import Node  # noqa: E402
from nbdserver.node.directory import DataDirectory  # noqa: E402

CACHE_BYTES = 64 << 20


class Voice:
    """Prints what the host waits for."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    def ready(self, node: Node) -> None:
        for family in node.families():
            print(f"generation {family.generation}", flush=True)


async def serve_no_api(node: Node) -> Callable[[], Awaitable[None]]:
    async def stop() -> None:
        pass

    return stop


async def serve(data: str, address: str, segment_bytes: str, volume: str, size_bytes: str) -> int:
    directory = DataDirectory(Path(data))
    directory.open()
    settings: Any = SimpleNamespace(
        listen=[address],
        socket=None,
        segment=int(segment_bytes),
        cache=CACHE_BYTES,
        max_connections=16,
        handshake_timeout_s=60,
    )
    node = Node(settings, directory, None, {}, Voice())
    return await node.run([(volume, int(size_bytes))], serve_no_api)


if __name__ == "__main__":
    sys.exit(asyncio.run(serve(*sys.argv[1:])))
