"""Runs inside a guest: a node. It loads its modules, which takes most of its start in an emulated processor, says
`loaded`, and waits for a line of JSON that says what it is:

    settings        file with its settings
    volume          [name, bytes] of the one that it makes if it is not there, or []
    desk_port       of a node of a cluster: who asks it something from outside comes there with a line of JSON
    entropy         random numbers in hexadecimal: of what was loaded there may be copies
    path            directories that its data process finds modules in before others

The HTTP API is left out: FastAPI takes long to load.
"""

import asyncio
import fcntl
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nbdserver.node.cluster_part  # noqa: F401  # what a node of a cluster loads later
from nbdserver.node.config import load_settings
from nbdserver.node.control import Node
from nbdserver.node.directory import DataDirectory
from nbdserver.node.errors import NodeError

RESEED_KERNEL = 0x5207
"""RNDRESEEDCRNG: use what was written to /dev/urandom from now on."""

Stop = Callable[[], Awaitable[None]]


class Voice:
    """Prints what the host waits for."""

    def say(self, line: str) -> None:
        print(line, flush=True)

    def ready(self, node: Node) -> None:
        for family in node.families():
            print(f"generation {family.generation}", flush=True)
        print("ready", flush=True)


async def answer(node: Node, ask: str, arguments: dict[str, Any]) -> Any:
    """What the API would answer. NodeError."""
    assert node.part is not None
    if ask == "create":
        nodes = node.part.changes.choose(arguments.pop("replicas"), (), arguments["size_bytes"])
        return await node.part.changes.create(nodes=nodes, **arguments)
    if ask == "volume":
        return await node.volumes.show(arguments["name"])
    assert ask == "cluster"
    return node.cluster.describe() if node.cluster else None


def desk(port: int) -> Callable[[Node], Awaitable[Stop]]:
    """What serves it in place of the API."""

    async def serve(node: Node) -> Stop:
        async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked = json.loads(await reader.readline())
            try:
                answered = {"answer": await answer(node, asked.pop("ask"), asked)}
            except NodeError as error:
                answered = {"error": str(error)}
            writer.write(json.dumps(answered).encode() + b"\n")
            writer.close()

        server = None if node.settings.cluster is None else await asyncio.start_server(visit, "0.0.0.0", port)

        async def stop() -> None:
            if server is not None:
                server.close()

        return stop

    return serve


def take_entropy(entropy: bytes) -> None:
    """Let no random number be one that a copy of this machine has."""
    with open("/dev/urandom", "wb", buffering=0) as device:
        device.write(entropy)
        fcntl.ioctl(device, RESEED_KERNEL)
    random.seed()


async def main(told: dict[str, Any]) -> int:
    take_entropy(bytes.fromhex(told["entropy"]))
    os.environ["PYTHONPATH"] = os.pathsep.join([*told["path"], os.environ["PYTHONPATH"]])
    settings = load_settings(Path(told["settings"]))
    assert settings.data is not None
    directory = DataDirectory(settings.data)
    directory.open()
    node = Node(settings, directory, None, {}, Voice())
    create = [tuple(told["volume"])] if told["volume"] else []
    return await node.run(create, desk(told["desk_port"]))


if __name__ == "__main__":
    print("loaded", flush=True)
    sys.exit(asyncio.run(main(json.loads(sys.stdin.readline()))))
