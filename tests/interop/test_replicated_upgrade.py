"""A node's program is replaced while it owns a replicated volume: its clients see a pause."""

from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.nbd import Command
from tests.cluster_rig import ClusterRig, wait
from tests.conftest import Processes
from tests.etcd_rig import MakeCluster
from tests.nbd_client import Client

BLOCK = 4096


@pytest.fixture
def rig(processes: Processes, tmp_path: Path, free_port: Callable[[], int], make_etcd: MakeCluster) -> ClusterRig:
    return ClusterRig(processes, tmp_path, free_port, make_etcd().endpoints)


def test_a_client_stays_attached_to_the_owner_that_is_upgraded(rig: ClusterRig) -> None:
    n1, n2 = rig.start("n1"), rig.start("n2")
    for node in (n1, n2):
        wait(lambda node=node: node.up() == ["n1", "n2"], "the nodes know each other")  # type: ignore[misc]
        wait(
            lambda node=node: all(row["data_addresses"] for row in node.get("/v1/nodes")),  # type: ignore[misc]
            "where their data processes are",
        )
    n1.ask("volume", "create", "db", "--size", "64M", "--replicas", "2")
    client = Client(("127.0.0.1", n1.server.port), "db", timeout_s=40)
    assert client.request(Command.WRITE, 0, BLOCK, b"a" * BLOCK).error == 0
    n1.server.command("upgrade-in-place")
    assert client.request(Command.WRITE, BLOCK, BLOCK, b"b" * BLOCK).error == 0
    assert client.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
    wait(lambda: n2.get("/v1/volumes/db")["replicas"]["in_sync"] == 2, "both are in sync")
    assert n2.get("/v1/volumes/db")["replicas"]["owner"] == "n1"
    client.close()
