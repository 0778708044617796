"""The directory on real processes: sockets, LevelDB, etcd, signals, and a network that loses datagrams and is cut."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Processes
from tests.etcd_rig import MakeCluster
from tests.interop.directory_cluster import KEY, DirectoryCluster, NodeProcess, wait, wait_active
from tests.interop.site import NoNamespacesError

LOSS_PER_CENT = 10


@pytest.fixture
def cluster(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], needs: Callable[[str, str], str]
) -> DirectoryCluster:
    for program, package in (("etcd", "etcd-server"), ("nft", "nftables"), ("ip", "iproute2")):
        needs(program, package)
    try:
        return DirectoryCluster(processes, tmp_path, free_port, LOSS_PER_CENT, random.Random(1))
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces here: {error}")


def test_five_nodes_of_both_kinds_keep_what_was_confirmed_when_masters_are_killed_stopped_and_cut_off(
    cluster: DirectoryCluster,
) -> None:
    far = cluster.far[0]
    assert far.publish("load/far-1", "x" * 200_000) == "confirmed"  # larger than any datagram
    assert cluster.near[1].publish("load/kept", "kept", "REGISTRY") == "confirmed"

    cluster.kill_master_and_registry_member(joiner="d")
    cluster.stop_master()
    cluster.cut_master_off()

    loads = {"load/far-1": "x" * 200_000, "load/kept": "kept"}
    assert all(node.range("load/") == loads for node in (*cluster.near, far))
    assert cluster.far[1].range("load/") == {}


def test_a_node_with_another_key_is_refused_with_a_line_that_says_so_and_disturbs_nobody(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], make_etcd: MakeCluster
) -> None:
    etcd = make_etcd()

    def make_node(name: str, key: str) -> NodeProcess:
        datagrams, streams = (f"127.0.0.1:{free_port()}" for _ in range(2))
        return NodeProcess(processes, tmp_path, name, datagrams, streams, etcd.endpoints, key=key)

    node = make_node("a", KEY)
    wait_active(node)
    stranger = make_node("stranger", "77" * 32)
    wait(lambda: node.status()["refused"] > 0)
    assert "a key that this cluster does not use" in node.log.read_text()
    assert not stranger.status()["active"]
    assert node.status()["members"] == ["a"]
    assert node.publish("once/a", "a") == "confirmed"
