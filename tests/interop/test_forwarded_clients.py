"""Real data processes of three nodes: clients of all sorts come to one that does not serve their volume."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadata.registry import ExportSettings
from nbdserver.node.errors import NodeError
from protocol.agreement import ReplyStyle
from protocol.nbd import Command
from tests.certificates import Certificates, make_certificates, make_member_files
from tests.data_rig import SIZE_BYTES, VOLUME, DataNode, DataRig, FreePort, data_nodes, tool
from tests.durability import Judge
from tests.nbd_client import Client, RefusedError
from tests.serving import resident_bytes

BLOCK_BYTES = 4096
JUDGED_BLOCKS = 256
PATIENCE_S = 30.0
SHARED = ExportSettings(shared=True)  # clients on loopback are of another host at each node

Needs = Callable[[str, str], str]


async def attach(node: DataNode, **more: Any) -> Client:
    """A client that has come to this node by TCP."""
    return await asyncio.to_thread(Client, ("127.0.0.1", node.port), VOLUME, PATIENCE_S, **more)


async def write(client: Client, block: int, data: bytes) -> None:
    answer = await asyncio.to_thread(client.request, Command.WRITE, block * BLOCK_BYTES, 0, data)
    assert answer.error == 0


async def read(client: Client, block: int) -> bytes:
    return await asyncio.to_thread(client.read, block * BLOCK_BYTES, BLOCK_BYTES)


async def allow_tls(rig: DataRig, certificates: Certificates) -> None:
    """Let clients come to every node over TLS."""
    files = {name: str(path) for name, path in certificates.settings.items()}
    for node in rig.nodes:
        await node.call("tls", mode="allowed", verify_clients=False, **files)


def is_gone(client: Client) -> bool:
    """Wait for the end of a connection that nothing is expected on any more."""
    try:
        client.receive()
    except ConnectionError:
        return True
    return False


async def vias(node: DataNode) -> list[str]:
    return sorted(client["via"] for client in await node.call("clients"))


class ElsewhereOnIt(Client):
    """A client whose blocks lie behind those of the others."""

    place = 1

    def pack(self, cookie: int, command: Command, offset: int, length: int, data: bytes, flags: int = 0) -> bytes:
        offset += 0 if command == Command.FLUSH else self.place * JUDGED_BLOCKS * BLOCK_BYTES
        return super().pack(cookie, command, offset, length, data, flags)


class FurtherOnIt(ElsewhereOnIt):
    place = 2


def block_of(seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(BLOCK_BYTES)


def test_other_peoples_clients_use_a_volume_by_way_of_any_node(
    tmp_path: Path, free_port: FreePort, needs: Needs
) -> None:
    tools = {name: needs(name, package) for name, package in (("nbdinfo", "libnbd-bin"), ("nbdcopy", "libnbd-bin"))}
    fio = needs("fio", "fio")
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(random.Random(3).randbytes(SIZE_BYTES))

    async def story() -> None:
        async with data_nodes(tmp_path, free_port, settings=SHARED) as rig:
            first, second, third = rig.nodes
            told = [await tool(tools["nbdinfo"], node.uri()) for node in rig.nodes]
            assert len({text.replace(node.clients, "") for text, node in zip(told, rig.nodes, strict=True)}) == 1
            assert VOLUME in await tool(tools["nbdinfo"], "--list", third.uri(""))
            await tool(
                tools["nbdcopy"], "--flush", "--connections=4", str(image), f"nbd://127.0.0.1:{second.port}/{VOLUME}"
            )
            await tool(tools["nbdcopy"], "--connections=4", third.uri(), str(copy))
            assert copy.read_bytes() == image.read_bytes()
            await tool(
                fio, "--name=verify", "--verify_state_save=0", "--ioengine=nbd", f"--uri=nbd://127.0.0.1:{second.port}/{VOLUME}",
                "--rw=randwrite", "--bs=4k", "--iodepth=16", f"--size={SIZE_BYTES}", "--io_size=16M", "--verify=crc32c",
                "--do_verify=1", "--verify_fatal=1", "--randseed=5",
            )  # fmt: skip
            clients = [await attach(node) for node in (second, third, second, second)]
            assert await vias(first) == ["node-2", "node-2", "node-2", "node-3"]
            for number, client in enumerate(clients):
                await write(client, number, block_of(number))
            for client in clients:
                assert [await read(client, number) for number in range(4)] == [block_of(number) for number in range(4)]
                client.close()
            await rig.until(lambda: _nobody(first), "the clients have gone")
            assert not second.heard("peer-refused")

    asyncio.run(story())


async def _nobody(node: DataNode) -> bool:
    return await node.call("clients") == []


def test_over_tls_between_client_and_node_and_between_the_nodes(tmp_path: Path, free_port: FreePort) -> None:
    certificates = make_certificates(tmp_path)
    tls = make_member_files(tmp_path / "cluster")

    async def story() -> None:
        async with data_nodes(tmp_path, free_port, ("node-1", "node-2"), tls) as rig:
            first, second = rig.nodes
            await allow_tls(rig, certificates)
            secure = await attach(second, tls=certificates.client_context("web1"))
            plain = await attach(second)
            (shown,) = [client for client in await first.call("clients") if client["tls"]]
            assert (shown["certificate"], shown["via"], shown["peer"][:10]) == ("web1", "node-2", "127.0.0.1:")
            data = [block_of(number) for number in range(256)]
            await write(secure, 0, b"".join(data))
            assert [await read(plain, number) for number in range(256)] == data
            secure.close()
            plain.close()

    asyncio.run(story())


def test_a_client_of_a_node_that_dies_hears_of_it_and_those_of_others_go_on_whoever_dies(
    tmp_path: Path, free_port: FreePort
) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port, settings=SHARED) as rig:
            first, second, third = rig.nodes
            clients = [await attach(node) for node in (second, third)]
            await write(clients[0], 1, block_of("by way of node-2"))
            await second.kill()
            assert await asyncio.to_thread(is_gone, clients[0])
            clients[0].close()
            await rig.until(lambda: _has(first, ["node-3"]), "the owner has dropped the client of the killed one")
            assert await read(clients[1], 1) == block_of("by way of node-2")
            await second.start()
            await second.follow()
            await rig.until(rig.all_in_sync, "the killed one is back in sync")

            # The owner dies: its client at another node goes on at the next owner, and then at its own node.
            client = clients[1]
            await first.kill()
            client.send(Command.WRITE, 2 * BLOCK_BYTES, data=block_of("while nobody serves it"))
            await asyncio.sleep(0.5)
            await second.own()
            answer = await asyncio.to_thread(client.receive)
            assert answer.error == 0
            assert await vias(second) == ["node-3"]
            assert [await read(client, block) for block in (1, 2)] == [
                block_of("by way of node-2"),
                block_of("while nobody serves it"),
            ]
            await first.start()
            await first.follow()
            await rig.until(rig.all_in_sync, "the killed one is back in sync")
            await second.kill()
            await third.own()
            await write(client, 3, block_of("at its own node"))
            assert [await read(client, block) for block in (2, 3)] == [
                block_of("while nobody serves it"),
                block_of("at its own node"),
            ]
            assert await vias(third) == ["", "node-3"], "it is seen where it has come, and where it is served"
            assert [fields["node"] for fields in third.heard("client-goes-on")] == ["node-2", "node-3"]
            client.close()

    asyncio.run(story())


async def _has(node: DataNode, clients: list[str]) -> bool:
    return await vias(node) == clients


def test_an_owner_that_stands_still_is_left_and_what_it_was_asked_for_is_not_done_by_it_later(
    tmp_path: Path, free_port: FreePort
) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port, settings=SHARED) as rig:
            first, second, third = rig.nodes
            client = await attach(third)
            await write(client, 1, block_of("before"))
            os.kill(first.process.pid, signal.SIGSTOP)
            try:
                client.send(Command.WRITE, 0, data=block_of("asked of the one that stands still"))
                await rig.until(lambda: bool(third.heard("client-waits")), "the silence is noticed")
                assert [fields["reason"] for fields in third.heard("client-waits")] == ["it does not answer"]
                await second.own()
                answer = await asyncio.to_thread(client.receive)
                assert answer.error == 0
                await write(client, 0, block_of("after"))
            finally:
                os.kill(first.process.pid, signal.SIGCONT)
            await rig.until(lambda: _nobody(first), "the one that stood still has no clients")
            assert [await read(client, block) for block in (0, 1)] == [block_of("after"), block_of("before")]
            client.close()

    asyncio.run(story())


def test_clients_write_on_while_the_volume_moves_and_its_owners_die_over_tls_too(
    tmp_path: Path, free_port: FreePort
) -> None:
    certificates = make_certificates(tmp_path)
    tls = make_member_files(tmp_path / "cluster")

    async def story() -> None:
        async with data_nodes(tmp_path, free_port, tls=tls, settings=SHARED) as rig:
            first, second, third = rig.nodes
            await allow_tls(rig, certificates)
            judges = [Judge(JUDGED_BLOCKS, random.Random(seed)) for seed in (1, 2, 3)]
            context, at_owner = certificates.client_context("web1"), ("127.0.0.1", first.port)
            clients = [
                await attach(third, tls=context),
                await asyncio.to_thread(ElsewhereOnIt, ("127.0.0.1", third.port), VOLUME, PATIENCE_S),
                await asyncio.to_thread(FurtherOnIt, at_owner, VOLUME, PATIENCE_S, ReplyStyle.EXTENDED, context),
            ]
            stop = asyncio.Event()

            async def write_on(judge: Judge, client: Client) -> None:
                while not stop.is_set():
                    await asyncio.to_thread(judge.write_until, client, time.monotonic() + 0.2, True)

            writing = [asyncio.create_task(write_on(*each)) for each in zip(judges, clients, strict=True)]
            await asyncio.sleep(0.5)
            await second.own()  # the volume moves
            await asyncio.sleep(0.5)
            await rig.until(lambda: _has(second, ["node-1", "node-3", "node-3"]), "all are carried on")
            await rig.until(rig.all_in_sync, "all are in sync")
            await second.kill()
            await first.own()
            await asyncio.sleep(0.5)
            await rig.until(lambda: _has(first, ["", "node-1", "node-3", "node-3"]), "all are carried on")
            await third.own()  # the node that they have come to
            await rig.until(lambda: _has(third, ["", "", "node-1", "node-3", "node-3"]), "all are carried on")
            await asyncio.sleep(0.5)
            stop.set()
            await asyncio.gather(*writing)
            for judge, client in zip(judges, clients, strict=True):
                await asyncio.to_thread(judge.check, client, True)
                assert judge.writes
                client.close()
            waits = [fields["waited_s"] for fields in third.heard("client-goes-on")]
            assert len(waits) >= 2 * 3
            assert {fields["node"] for fields in third.heard("client-goes-on")} == {"node-1", "node-2", "node-3"}
            assert {fields["node"] for fields in first.heard("client-goes-on")} == {"node-1", "node-2", "node-3"}

    asyncio.run(story())


def test_a_client_that_takes_nothing_costs_little_memory_and_hears_everything(
    tmp_path: Path, free_port: FreePort
) -> None:
    requests = 100
    length = 4 << 20

    async def story() -> None:
        async with data_nodes(tmp_path, free_port, ("node-1", "node-2")) as rig:
            second = rig.nodes[1]
            client = await attach(second)
            before = [resident_bytes(node.process.pid) for node in rig.nodes]
            for _ in range(requests):
                client.send(Command.READ, 0, length)
            await asyncio.sleep(1.0)
            after = [resident_bytes(node.process.pid) for node in rig.nodes]
            grown = [now - then for now, then in zip(after, before, strict=True)]
            assert max(grown) < 64 << 20, f"{requests} answers of {length} bytes lie in memory: {grown}"
            other = await attach(second)
            assert await read(other, 0) == bytes(BLOCK_BYTES)
            for _ in range(requests):
                assert len((await asyncio.to_thread(client.receive)).data) == length
            client.close()
            other.close()

    asyncio.run(story())


def test_a_client_is_told_when_nobody_serves_its_volume(tmp_path: Path, free_port: FreePort) -> None:
    async def story() -> None:
        async with data_nodes(tmp_path, free_port, ("node-1", "node-2")) as rig:
            first, second = rig.nodes

            async def nobody(*_arguments: object, **_more: object) -> dict[str, Any]:
                return {"error": "node-1, which owns it, does not answer; 1 of 2 replicas are away"}

            rig.attach = nobody  # type: ignore[method-assign]
            with pytest.raises(
                RefusedError, match="disk0 cannot be served now: node-1, which owns it, does not answer"
            ):
                await attach(second)
            with contextlib.suppress(NodeError):
                await first.call("disown", family=rig.family)
            with pytest.raises(RefusedError, match="disk0 cannot be served now"):
                await attach(first)

    asyncio.run(story())
