"""Nodes that form a cluster: real processes, a real etcd, TLS, signals."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster_rig import ClusterRig, wait
from tests.conftest import Processes
from tests.etcd_cluster import EtcdCluster
from tests.etcd_rig import MakeCluster


@pytest.fixture
def etcd(make_etcd: MakeCluster) -> EtcdCluster:
    return make_etcd()


@pytest.fixture
def rig(processes: Processes, tmp_path: Path, free_port: Callable[[], int], etcd: EtcdCluster) -> ClusterRig:
    return ClusterRig(processes, tmp_path, free_port, etcd.endpoints)


def test_three_nodes_form_a_cluster_that_outlives_its_master_and_takes_a_fourth(rig: ClusterRig) -> None:
    nodes = [rig.start(name) for name in ("n1", "n2", "n3")]
    for node in nodes:
        wait(lambda node=node: node.up() == ["n1", "n2", "n3"], "three nodes know each other")  # type: ignore[misc]
    wait(lambda: len(nodes[0].cluster()["voters"]) == 3, "three voters")

    # The master is killed: another takes over, and the status says which node is silent and what to do.
    cluster = nodes[0].cluster()
    master = next(node for node in nodes if node.name == cluster["master"])
    left = [node for node in nodes if node is not master]
    master.server.kill9()
    wait(lambda: left[0].cluster()["master"] in {node.name for node in left}, "another master")
    assert left[0].cluster()["epoch"] > cluster["epoch"]
    wait(lambda: left[1].up() == [node.name for node in left], "the dead one is silent")
    remedies = [finding["remedy"] for finding in left[1].ask("status")["findings"]]
    assert any(f"node remove {master.name}" in remedy for remedy in remedies)
    assert left[1].ask("node", "show", master.name)["state"] == "silent"
    assert left[0].events("cluster-master")

    # It comes back under its name, and a fourth joins.
    master.server.start()
    fourth = rig.start("n4", site="attic", fault_domain="shelf")
    wait(lambda: fourth.up() == ["n1", "n2", "n3", "n4"], "four nodes")
    wait(lambda: master.ask("node", "show", "n4")["fault_domain"] == "shelf", "what the fourth says of itself")
    wait(lambda: master.ask("node", "show", "n4")["fill_percent"] is not None, "the load that the fourth reports")
