"""Data processes with replicas of one family: what a client was told is there, whichever of them dies."""

import asyncio
import random
import subprocess
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from protocol.nbd import Command
from tests.data_rig import SIZE_BYTES, VOLUME, DataNode, FreePort, data_nodes
from tests.nbd_client import Client

BLOCK_BYTES = 4096


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def tool(*command: str) -> str:
    """What a tool of other people prints."""
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Writer:
    """A client that notes what each block must have: what was acknowledged, or what was asked for after it."""

    def __init__(self, node: DataNode) -> None:
        self.may_have: dict[int, set[bytes]] = {}
        self._random = random.Random(5)
        self._client = Client(node.clients, VOLUME)

    async def write(self, count: int) -> None:
        """Some blocks, and wait until they are acknowledged."""
        await asyncio.to_thread(self._write, count)

    def _write(self, count: int) -> None:
        for _ in range(count):
            self.send()
            assert self._client.receive().error == 0
            self._acknowledged()

    def send(self) -> None:
        """A block more, not acknowledged."""
        block = self._random.randrange(SIZE_BYTES // BLOCK_BYTES)
        data = self._random.randbytes(BLOCK_BYTES)
        self._last = block, data
        self.may_have.setdefault(block, {bytes(BLOCK_BYTES)}).add(data)
        self._client.send(Command.WRITE, block * BLOCK_BYTES, data=data)

    def _acknowledged(self) -> None:
        block, data = self._last
        self.may_have[block] = {data}

    def is_gone(self) -> bool:
        """Whether it was disconnected; it must not be answered before."""
        try:
            self._client.receive()
        except ConnectionError:
            return True
        return False

    def close(self) -> None:
        self._client.close()

    def wrong_blocks(self, node: DataNode) -> list[int]:
        """Blocks that this node shows otherwise."""
        reader = Client(node.clients, VOLUME)
        wrong = []
        for block, contents in sorted(self.may_have.items()):
            reader.send(Command.READ, block * BLOCK_BYTES, BLOCK_BYTES)
            if reader.receive().data not in contents:
                wrong.append(block)
        reader.close()
        return wrong


def test_what_was_acknowledged_is_there_when_the_owner_is_killed(tmp_path: Path, free_port: FreePort) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            first, second, _ = rig.nodes
            writer = Writer(first)
            await writer.write(200)
            writer.send()
            await first.kill()
            writer.close()
            owned = await second.own()
            assert owned["epoch"] == 2
            assert await asyncio.to_thread(writer.wrong_blocks, second) == []
            again = Writer(second)
            again.may_have = writer.may_have
            await again.write(100)
            await first.start()
            await first.follow()
            await rig.until(rig.all_in_sync, "the killed one is back in sync")
            await again.write(50)
            again.close()
            await second.kill()
            await first.own()
            assert await asyncio.to_thread(again.wrong_blocks, first) == []

    run(story())


def test_an_image_is_copied_in_at_one_node_and_out_at_another(tmp_path: Path, free_port: FreePort) -> None:
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(random.Random(7).randbytes(SIZE_BYTES))

    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            await tool("nbdcopy", "--flush", str(image), rig.nodes[0].uri())
            await rig.nodes[2].own()
            await tool("nbdcopy", rig.nodes[2].uri(), str(copy))
            assert copy.read_bytes() == image.read_bytes()

    run(story())
