"""Clients of a cluster's volume, wherever they attach: real nodes, a real etcd, kill -9, clients that come again."""

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.nbd import Command
from tests.cluster_rig import ClusterNode, ClusterRig, meet, wait
from tests.conftest import Processes
from tests.durability import Judge
from tests.nbd_client import Client

SIZE_BYTES = 64 << 20
BLOCK_BYTES = 4096
JUDGED_BLOCKS = 512
COPY_BYTES_PER_S = 16 << 20  # so that the owner dies in the middle of it

Needs = Callable[[str, str], str]


@pytest.fixture
def nodes(rig: ClusterRig) -> list[ClusterNode]:
    """Three, with a volume `db` on all of them, which the first one owns."""
    started = [rig.start(name) for name in ("n1", "n2", "n3")]
    meet(started)
    started[0].ask("volume", "create", "db", "--size", f"{SIZE_BYTES}", "--replicas", "3")
    return started


def attach(node: ClusterNode) -> Client:
    return Client(("127.0.0.1", node.server.port), "db", 30.0)


def owner(node: ClusterNode) -> str:
    found: str = node.replicas("db")["owner"]
    return found


def test_any_node_takes_the_client_and_clients_go_on_when_the_owner_dies(
    nodes: list[ClusterNode], processes: Processes, tmp_path: Path, needs: Needs
) -> None:
    qemu = needs("qemu-img", "qemu-utils")
    n1, n2, n3 = nodes
    held = attach(n1)
    held.close()

    # It stays where it is used, and comes to where it is used alone.
    first = attach(n2)
    assert owner(n3) == "n2"
    second = attach(n2)
    assert [client["via"] for client in n2.ask("client", "list")] == ["", ""]
    first.close()
    assert second.request(Command.WRITE, 0, data=b"a" * BLOCK_BYTES).error == 0
    n2.server.command("volume", "set", "db", "shared=true")
    other = attach(n3)
    assert owner(n3) == "n2"
    assert other.read(0, BLOCK_BYTES) == b"a" * BLOCK_BYTES
    assert sorted(client["via"] for client in n2.ask("client", "list")) == ["", "n3"]
    assert [client["forwarded_to"] for client in n3.ask("client", "list")] == ["n2"]
    second.close()

    # The owner dies under a client of another node, which goes on.
    judge = Judge(JUDGED_BLOCKS, random.Random(4))
    judge.write_until(other, time.monotonic() + 1.0, finish=True)
    n2.server.kill9()
    judge.write_until(other, time.monotonic() + 1.0, finish=True)
    judge.check(other, acknowledged_too=True)
    assert owner(n3) == "n3"
    assert [client["forwarded_to"] for client in n3.ask("client", "list") if client["forwarded_to"]] == ["n3"]
    n2.server.start()
    wait(lambda: n3.replicas("db")["in_sync"] == 3, "n2 is in sync again")
    other.close()

    # Somebody else's client goes on too, in the middle of a copy.
    held = attach(n1)
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(random.Random(5).randbytes(SIZE_BYTES))
    there = (
        f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={n3.server.port},export=db,reconnect-delay=30"
    )
    copying = processes.start(
        [qemu, "convert", "-n", "-f", "raw", "-r", str(COPY_BYTES_PER_S), "--target-image-opts", str(image), there]
    )
    wait(lambda: any(client["forwarded_to"] for client in n3.get("/v1/clients")), "the copying client is forwarded")
    time.sleep(1.0)
    n1.server.kill9()
    assert copying.wait(60) == 0
    assert owner(n3) == "n3"
    subprocess.run([needs("nbdcopy", "libnbd-bin"), f"nbd://127.0.0.1:{n2.server.port}/db", str(copy)], check=True)
    assert copy.read_bytes() == image.read_bytes()
    held.close()
