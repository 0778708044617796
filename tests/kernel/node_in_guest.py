"""Runs inside a guest: a node that serves one volume, without the HTTP API, whose libraries take long to load there.

usage: node_in_guest.py DATA HOST:PORT SEGMENT VOLUME SIZE
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from nbdserver.node.config import NodeSettings
from nbdserver.node.control import Node
from nbdserver.node.directory import DataDirectory
from nbdserver.node.sizes import parse_volume_size

CACHE = "64M"


async def serve_no_api(node: Node) -> Callable[[], Awaitable[None]]:
    async def stop() -> None:
        pass

    return stop


async def serve(data: str, address: str, segment: str, volume: str, size: str) -> int:
    directory = DataDirectory(Path(data))
    directory.open()
    settings = NodeSettings.model_validate({"listen": address, "segment": segment, "cache": CACHE})
    node = Node(settings, directory, None, {}, lambda line: print(line, flush=True))
    return await node.run([(volume, parse_volume_size(size))], serve_no_api)


if __name__ == "__main__":
    sys.exit(asyncio.run(serve(*sys.argv[1:])))
