"""Runs inside a guest: a node that serves one volume. The HTTP API is left out: FastAPI takes long to load in an
emulated processor.

usage: node_in_guest.py DATA HOST:PORT SEGMENT-BYTES VOLUME SIZE-BYTES
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from nbdserver.node.config import NodeSettings
from nbdserver.node.control import Node
from nbdserver.node.directory import DataDirectory

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
    settings = NodeSettings(listen=[address], segment=int(segment_bytes), cache=CACHE_BYTES, max_connections=16)
    node = Node(settings, directory, None, {}, Voice())
    return await node.run([(volume, int(size_bytes))], serve_no_api)


if __name__ == "__main__":
    sys.exit(asyncio.run(serve(*sys.argv[1:])))
