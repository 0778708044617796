"""Fixtures of the tests with a real etcd, and with the nodes of a cluster."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata.etcd_settings import EtcdSettings
from tests.cluster_rig import ClusterRig
from tests.conftest import Processes
from tests.etcd_cluster import QUICK, EtcdCluster
from tests.etcd_rig import EtcdRig, MakeCluster, MakeRig


@pytest.fixture
def make_etcd(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], needs: Callable[[str, str], str]
) -> MakeCluster:
    """`make_etcd(members, *arguments, **settings of EtcdCluster)`: one that is quick to elect."""
    needs("etcd", "etcd-server")
    needs("etcdctl", "etcd-client")

    def make(members: int = 1, *arguments: str, **more: object) -> EtcdCluster:
        return EtcdCluster(
            processes,
            tmp_path / "etcd",
            free_port,
            members,
            (*QUICK, *arguments),
            **more,  # type: ignore[arg-type]
        )

    return make


@pytest.fixture
def etcd(make_etcd: MakeCluster) -> EtcdCluster:
    """One of one member."""
    return make_etcd()


@pytest.fixture
def rig(processes: Processes, tmp_path: Path, free_port: Callable[[], int], etcd: EtcdCluster) -> ClusterRig:
    """Makes the nodes of a cluster that has `etcd`."""
    return ClusterRig(processes, tmp_path, free_port, etcd.endpoints)


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    """`make_rig(settings)`: two users of one etcd, closed when the test is over."""
    rigs: list[EtcdRig] = []

    def make(settings: EtcdSettings) -> EtcdRig:
        rigs.append(EtcdRig(settings))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.end()
