"""The registry on a real etcd keeps every registry's promises, and goes on whatever happens to etcd."""

import uuid
from collections.abc import Callable, Iterator

import pytest

from metadata.etcd_settings import EtcdSettings
from tests.conftest import Processes
from tests.etcd_cluster import EtcdCluster
from tests.etcd_rig import EtcdRig
from tests.registry_conformance import RegistryConformance


@pytest.fixture(scope="module")
def etcd(
    module_processes: Processes,
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
    needs: Callable[[str, str], str],
) -> EtcdCluster:
    needs("etcd", "etcd-server")
    needs("etcdctl", "etcd-client")
    return EtcdCluster(module_processes, tmp_path_factory.mktemp("etcd"), free_port)


@pytest.fixture
def rig(etcd: EtcdCluster) -> Iterator[EtcdRig]:
    rig = EtcdRig(EtcdSettings(endpoints=etcd.endpoints, namespace=f"test/{uuid.uuid4().hex}/"))
    yield rig
    rig.end()


class TestEtcdRegistry(RegistryConformance):
    """The sentences of tests/registry_conformance.py."""
