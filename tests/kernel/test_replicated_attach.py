"""A Linux kernel attaches a replicated volume by one node, mounts what is on it, and other nodes die."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster_rig import ClusterRig, meet, wait
from tests.conftest import Processes
from tests.etcd_cluster import QUICK, EtcdCluster
from tests.kernel.build import Images
from tests.kernel.guest import HOST, Guest
from tests.kernel.mounted import DEVICE, MountedVolume
from tests.nbd_client import Client

FILES_BETWEEN = 3


@pytest.fixture
def guest(guest_images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with Guest(guest_images, tmp_path_factory.mktemp("guest")) as machine:
        yield machine


@pytest.fixture
def rig(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], needs: Callable[[str, str], str]
) -> ClusterRig:
    needs("etcd", "etcd-server")
    needs("etcdctl", "etcd-client")
    etcd = EtcdCluster(processes, tmp_path / "etcd", free_port, 1, QUICK)
    return ClusterRig(processes, tmp_path, free_port, etcd.endpoints)


def test_a_mounted_ext4_notices_nothing_but_a_pause_when_the_owner_dies_and_when_a_replica_does(
    guest: Guest, rig: ClusterRig
) -> None:
    n1, n2, n3 = nodes = [rig.start(name) for name in ("n1", "n2", "n3")]
    meet(nodes)
    n2.ask("volume", "create", "db", "--size", "256M", "--replicas", "3")
    n2.server.command("snapshot", "create", "db@empty")
    keeper = Client(("127.0.0.1", n2.server.port), "db@empty")  # while it is attached n2 stays the owner
    guest.run("load_modules nbd")
    mounted = MountedVolume(guest, f"nbd-client -N db -b 4096 {HOST} {n1.server.port} {DEVICE}")
    assert n1.replicas("db")["owner"] == "n2"
    mounted.write(FILES_BETWEEN)
    n2.server.kill9()
    keeper.close()
    mounted.write(FILES_BETWEEN)
    assert n1.replicas("db")["owner"] != "n2"
    n2.server.start()
    wait(lambda: n1.replicas("db")["in_sync"] == 3, "n2 is in sync again")
    mounted.write(FILES_BETWEEN)
    n3.server.kill9()
    mounted.write(FILES_BETWEEN)
    wait(lambda: n1.replicas("db")["in_sync"] == 2, "n3 is in sync no more")
    n3.server.start()
    wait(lambda: n1.replicas("db")["in_sync"] == 3, "n3 is in sync again")
    mounted.must_have_noticed_nothing()
