"""The registry on a real etcd keeps every registry's promises, and goes on whatever happens to etcd."""

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from metadata.etcd_connection import EtcdSettings
from metadata.etcd_registry import EtcdRegistry
from nbdserver.host.clock import HostClock
from tests.conftest import Processes
from tests.etcd_cluster import EtcdCluster
from tests.registry_conformance import RegistryConformance

RUN_TIMEOUT_S = 20.0


class EtcdRig:
    """Two users of an etcd, on one loop."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = HostClock(self.loop)
        self.registry = self.open(settings)
        self.other = self.open(settings)

    def open(self, settings: EtcdSettings) -> EtcdRegistry:
        """Open one more."""
        return EtcdRegistry(settings, self.clock, random.Random(0), self.loop)

    def run_until(self, holds: Callable[[], bool], timeout_s: float = RUN_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s

        async def poll() -> None:
            while not holds():
                assert time.monotonic() < deadline, f"{self.registry.health()}"
                await asyncio.sleep(0.002)

        self.loop.run_until_complete(poll())

    def run_for(self, duration_s: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(duration_s))

    def stand_still(self, duration_s: float) -> None:
        time.sleep(duration_s)

    def end(self) -> None:
        for registry in (self.registry, self.other):
            registry.close()
            self.loop.run_until_complete(registry.wait_closed())
        self.loop.close()


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
