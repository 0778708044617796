"""Data processes with replicas of one family: what a client was told is there, whichever of them dies."""

import asyncio
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from nbdserver.node.data_process import DataProcessError
from protocol.nbd import Command
from tests.certificates import make_member_files
from tests.data_rig import SIZE_BYTES, TIMEOUT_S, VOLUME, DataNode, FreePort, data_nodes, tool
from tests.interop.replication_soak import soak
from tests.nbd_client import Client, RefusedError

BLOCK_BYTES = 4096


class Writer:
    """A client that notes what each block must have: what was acknowledged, or what was asked for after it."""

    def __init__(self, node: DataNode) -> None:
        self.may_have: dict[int, set[bytes]] = {}
        self._random = random.Random(5)
        self._client = Client(node.clients, VOLUME, timeout_s=TIMEOUT_S)

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

    async def is_answered(self) -> None:
        """Wait until what was sent is acknowledged."""
        answer = await asyncio.to_thread(self._client.receive)
        assert answer.error == 0
        self._acknowledged()

    def close(self) -> None:
        self._client.close()

    def wrong_blocks(self, node: DataNode, export: str = VOLUME) -> list[int]:
        """Blocks that this node shows otherwise. Who has closed at another node is in the way for a moment."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while True:
            try:
                reader = Client(node.clients, export, timeout_s=TIMEOUT_S)
                break
            except RefusedError as error:
                if "is in use by" not in str(error) or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)
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
            with pytest.raises(DataProcessError, match="node-1 owns it by now"):
                await second.call("own", family=rig.family, only_again=True)
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

    asyncio.run(story())


def test_an_image_is_copied_in_at_one_node_and_out_at_another(tmp_path: Path, free_port: FreePort) -> None:
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(random.Random(7).randbytes(SIZE_BYTES))

    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            await tool("nbdcopy", "--flush", str(image), rig.nodes[0].uri())
            await rig.nodes[2].own()
            await tool("nbdcopy", rig.nodes[2].uri(), str(copy))
            assert copy.read_bytes() == image.read_bytes()

    asyncio.run(story())


def test_clients_of_an_owner_that_is_no_more_are_answered_by_the_next_one(tmp_path: Path, free_port: FreePort) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            first, second, _ = rig.nodes
            writer = Writer(first)
            await writer.write(20)
            assert await first.call("snapshot_create", family=rig.family, number=1, snapshot="monday") == 0
            reader = Client(first.clients, f"{VOLUME}@monday", timeout_s=TIMEOUT_S)
            monday = await asyncio.to_thread(reader.read, 0, SIZE_BYTES // 4)
            os.kill(first.process.pid, signal.SIGSTOP)
            writer.send()
            await second.own()
            os.kill(first.process.pid, signal.SIGCONT)
            await writer.is_answered()
            await writer.write(20)
            assert await asyncio.to_thread(reader.read, 0, SIZE_BYTES // 4) == monday
            assert [client["via"] for client in await second.call("clients")] == ["node-1", "node-1"]
            reader.close()
            assert (await first.replicas())["role"] == "following"
            with pytest.raises(DataProcessError) as refused:
                await first.call("snapshot_create", family=rig.family, number=1, snapshot="late")
            assert refused.value.kind == "NotOwnedError"
            await rig.until(rig.all_in_sync, "who was the owner follows")
            writer.close()
            assert await asyncio.to_thread(writer.wrong_blocks, second) == []

    asyncio.run(story())


def test_a_volume_that_is_given_up_is_flushed_and_its_clients_wait_for_the_next_owner(
    tmp_path: Path, free_port: FreePort
) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            first = rig.nodes[0]
            writer = Writer(first)
            await writer.write(20)
            last_txid = (await first.replicas())["log"]["last"][1]
            await first.call("disown", family=rig.family)
            await first.call("disown", family=rig.family)
            assert (await first.replicas())["role"] == "following"
            writer.send()
            await first.own()
            await writer.is_answered()
            assert [fields["node"] for fields in first.heard("client-goes-on")] == ["node-1"]
            writer.close()
            assert await asyncio.to_thread(writer.wrong_blocks, first) == []
            assert last_txid >= 20

    asyncio.run(story())


def test_changes_of_the_tree_are_on_every_replica_and_snapshots_are_read_at_the_next_owner(
    tmp_path: Path, free_port: FreePort
) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            first, second, _ = rig.nodes
            family = {"family": rig.family, "number": 1}
            writer = Writer(first)
            await writer.write(50)
            assert await first.call("snapshot_create", **family, snapshot="monday") == 0
            at_snapshot = dict(writer.may_have)
            await writer.write(50)
            layer = (await first.call("snapshot", **family, snapshot="monday"))["layer"]
            assert await first.call("clone", family=rig.family, layer=layer, number=2) == 0
            assert await first.call("resize", **family, size_bytes=2 * SIZE_BYTES) == 0
            await first.kill()
            writer.close()
            assert (await second.own())["sizes_bytes"] == {"1": 2 * SIZE_BYTES, "2": SIZE_BYTES}
            assert await asyncio.to_thread(writer.wrong_blocks, second) == []
            writer.may_have = at_snapshot
            assert await asyncio.to_thread(writer.wrong_blocks, second, f"{VOLUME}@monday") == []
            assert await second.call("snapshot_rollback", **family, snapshot="monday") == 0
            assert await asyncio.to_thread(writer.wrong_blocks, second) == []
            assert await second.call("snapshot_delete", **family, snapshot="monday") == 0
            await first.start()
            await first.follow()
            await rig.until(rig.all_in_sync, "who was the owner follows")
            await second.kill()
            await first.own()
            assert await first.call("snapshots", **family) == []
            assert await asyncio.to_thread(writer.wrong_blocks, first) == []

    asyncio.run(story())


def test_replicas_go_where_they_are_asked_to_be(tmp_path: Path, free_port: FreePort) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port, ("node-1", "node-2", "node-3")) as rig:
            first, second, third = rig.nodes
            writer = Writer(first)
            await writer.write(50)
            await first.call("place", family=rig.family, placement=["node-1", "node-2"])
            await rig.until(lambda: rig.are_in_sync("node-1", "node-2"), "node-3 is let go")
            await third.call("close", family=rig.family)
            shutil.rmtree(third.directory)
            await third.follow()
            await first.call("place", family=rig.family, placement=["node-1", "node-3"])
            await rig.until(lambda: rig.are_in_sync("node-1", "node-3"), "node-3 is in the place of node-2")
            await writer.write(50)
            writer.close()
            with pytest.raises(DataProcessError, match="node-1 owns the volume"):
                await first.call("place", family=rig.family, placement=["node-2", "node-3"])
            with pytest.raises(DataProcessError, match="not in sync"):
                await second.call("own", family=rig.family)
            await first.kill()
            await third.own()
            assert await asyncio.to_thread(writer.wrong_blocks, third) == []

    asyncio.run(story())


def test_streams_between_data_processes_are_tls_with_certificates_of_one_ca(
    tmp_path: Path, free_port: FreePort
) -> None:
    files = {ca: make_member_files(tmp_path / ca) for ca in ("ours", "theirs")}

    async def story() -> None:
        async with data_nodes(tmp_path, free_port, tls=files["ours"]) as rig:
            writer = Writer(rig.nodes[0])
            await writer.write(100)
            stranger = DataNode(rig, "stranger", free_port(), files["theirs"])
            rig.nodes.append(stranger)
            await stranger.start()
            await stranger.follow()
            rig.tell_addresses()
            names = ["node-1", "node-2", "node-3", "stranger"]
            await rig.nodes[0].call("place", family=rig.family, placement=names)
            await rig.until(lambda: rig.nodes[0].heard("peer-refused"), "the stranger is refused")
            assert not await rig.all_in_sync()
            (link,) = [each for each in (await rig.nodes[0].replicas())["links"] if each["node"] == "stranger"]
            assert "TLS" in link["reason"]
            await rig.nodes[0].kill()
            writer.close()
            await rig.nodes[1].own()
            assert await asyncio.to_thread(writer.wrong_blocks, rig.nodes[1]) == []

    asyncio.run(story())


@pytest.mark.parametrize("is_late", [False, True], ids=["owned before the clients come", "owned after that"])
def test_clients_stay_when_the_owners_program_is_replaced(tmp_path: Path, free_port: FreePort, is_late: bool) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            first, second, _ = rig.nodes
            writer = Writer(first)
            await writer.write(50)
            assert (await first.hand_over(is_late))["clients"] == 1
            await writer.write(50)
            assert (await first.replicas())["value"]["epoch"] == 2
            assert len(first.heard("clients-returned")) == is_late
            await second.own()
            await writer.write(10)
            writer.close()
            assert await asyncio.to_thread(writer.wrong_blocks, second) == []

    asyncio.run(story())


def test_an_owner_whose_disk_fails_gives_the_volume_up_and_its_clients_to_the_next_one(
    tmp_path: Path, free_port: FreePort
) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            first, second, _ = rig.nodes
            writer = Writer(first)
            await writer.write(50)
            resource.prlimit(first.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            writer.send()
            await rig.until(lambda: first.heard("owner-deposed"), "the owner is deposed")
            with pytest.raises(DataProcessError):
                await first.call("own", family=rig.family)
            await second.own()
            await writer.is_answered()
            await writer.write(10)
            writer.close()
            assert await asyncio.to_thread(writer.wrong_blocks, second) == []
            resource.prlimit(first.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            await first.call("close", family=rig.family)
            await first.follow()
            await rig.until(rig.all_in_sync, "who had failed is in sync again")
            await first.own()
            assert await asyncio.to_thread(writer.wrong_blocks, first) == []

    asyncio.run(story())


def rot(node: DataNode, contents: Iterable[bytes]) -> int:
    """Flip a bit of each of these blocks, wherever the node's segments have them; how many were found."""
    found = 0
    for path in sorted(Path(node.directory, "segments").glob("*.seg")):
        data = path.read_bytes()
        for content in contents:
            at = data.find(content)
            if at >= 0:
                found += 1
                with path.open("r+b") as segment:
                    segment.seek(at + 9)
                    segment.write(bytes([content[9] ^ 4]))
    return found


def test_a_client_does_not_see_rot_and_a_scrub_finds_the_replicas_alike(tmp_path: Path, free_port: FreePort) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port) as rig:
            first, second, _ = rig.nodes
            writer = Writer(first)
            await writer.write(60)
            contents = [content for (content,) in writer.may_have.values()]
            assert rot(first, contents) >= len(contents)
            assert rot(second, contents) >= len(contents)
            assert await asyncio.to_thread(writer.wrong_blocks, first) == []
            writer.close()
            repaired = [fields for kind, fields in first.events if kind == "block-repaired"]
            assert len(repaired) == len(contents)
            begin = {"sequence": 0, "stop": 0, "done_bytes": 0, "total_bytes": 0, "damaged_blocks": 0}
            for node in (second, first):
                await node.call("scrub_start", family=rig.family, begin=begin, bytes_per_s=1 << 30)
                scrub = None
                while scrub is None or not scrub["is_over"]:
                    await asyncio.sleep(0.05)
                    scrub = await node.call("scrub_progress", family=rig.family, bytes_per_s=1 << 30)
                assert (scrub["failure"], scrub["progress"]["damaged_blocks"]) == ("", 0)
            repaired = [fields for kind, fields in second.events if kind == "block-repaired"]
            assert len(repaired) >= len(contents)
            assert (await first.call("replicas"))[rig.family]["differences"] == []
            assert not [fields for kind, fields in first.events if kind == "replicas-differ"]
            counters = (await first.call("counters"))["volumes"][VOLUME]["counters"]
            assert counters["disk_repaired_blocks"] == len(contents)
            assert {"resync_bytes_sent", "resync_bytes_saved"} <= counters.keys()

    asyncio.run(story())


def test_a_client_finds_what_it_was_told_whatever_has_happened_to_the_nodes(
    tmp_path: Path, free_port: FreePort
) -> None:
    asyncio.run(soak(tmp_path, free_port, 0.0, seed=1, writes_s=0.5))
