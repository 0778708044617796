"""Replicated volumes whose machines cannot reach each other, of which one disk runs full or stands still, and whose
processes die and stop while fio writes: real nodes, each on a network and a file system of its own. `make soak
OF=replicas` has more of it."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import Processes
from tests.interop.disks import NoDiskError
from tests.interop.fio_rounds import FioRounds
from tests.interop.replica_site import ReplicaSite, node_disks
from tests.interop.site import NoNamespacesError, Site


def test_nothing_is_lost_nor_differs_whoever_is_cut_off_and_whatever_a_disk_does(
    tmp_path: Path, free_port: Callable[[], int], needs: Callable[[str, str], str]
) -> None:
    for program, package in (("etcd", "etcd-server"), ("nft", "nftables"), ("ip", "iproute2"), ("fio", "fio")):
        needs(program, package)
    with ExitStack() as undo, Processes() as processes:  # they end before their file systems are unmounted
        try:
            disks = node_disks(processes, tmp_path, needs, undo)
            site = Site(processes)
        except (NoDiskError, NoNamespacesError) as error:
            pytest.skip(f"no loop mounts or network namespaces here: {error}")
        nodes = ReplicaSite(site, processes, tmp_path, free_port, random.Random(1), disks)
        nodes.cut_one_way()
        nodes.cut_the_owner_off()
        nodes.a_disk_stands_still()
        fio = FioRounds(nodes, processes, tmp_path / "fio", needs("fio", "fio"))
        fio.a_replica_is_killed()
        fio.a_replica_is_stopped()
        fio.the_owner_is_killed()
        nodes.a_disk_is_full()
        nodes.stop_and_compare()
