"""Whole nodes, and everything that may happen to them: a network that loses datagrams and is cut, masters killed and
stopped past their lease, etcd members killed, nodes that join meanwhile, and programs of other versions."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster_rig import ClusterRig, wait
from tests.conftest import ROOT, Processes
from tests.interop.site import NoNamespacesError, Site
from tests.interop.whole_nodes import WholeNodes
from tests.serving import PROGRAM

LOSS_PER_CENT = 10


def test_five_whole_nodes_of_both_kinds_go_on_whatever_is_killed_stopped_and_cut_off(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], needs: Callable[[str, str], str]
) -> None:
    for program, package in (
        ("etcd", "etcd-server"),
        ("etcdctl", "etcd-client"),
        ("nft", "nftables"),
        ("ip", "iproute2"),
    ):
        needs(program, package)
    try:
        site = Site(processes)
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces here: {error}")
    site.lose(LOSS_PER_CENT)
    nodes = WholeNodes(site, processes, tmp_path, free_port, random.Random(1))
    nodes.stop_master()
    nodes.kill_master_and_registry_member(joiner="n5")
    assert nodes.nodes[-1].name == "n5"
    nodes.cut_master_off()
    nodes.kill_registry()


def copy_of_program(to: Path, version: str, protocol_version: int) -> tuple[str, ...]:
    """The program in another version, and what it says to other nodes in that one; how it is started, in `to`."""
    for package in ("protocol", "metadata", "nbdserver"):
        shutil.copytree(ROOT / package, to / package, ignore=shutil.ignore_patterns("__pycache__"))
    frames = to / "protocol" / "sealed_frames.py"
    text = frames.read_text()
    assert "\nVERSION = 1\n" in text
    frames.write_text(text.replace("\nVERSION = 1\n", f"\nVERSION = {protocol_version}\n"))
    metadata = to / f"nbdserver-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: nbdserver\nVersion: {version}\n")
    return tuple(PROGRAM)


def test_another_version_is_told_and_one_that_speaks_otherwise_is_refused_and_disturbs_nobody(
    rig: ClusterRig, tmp_path: Path
) -> None:
    n1, n2 = rig.start("n1"), rig.start("n2")
    config = rig.make("n3")
    newer, another = tmp_path / "newer", tmp_path / "another"
    n3 = rig.serve(config, copy_of_program(newer, "7.1", protocol_version=1), newer)
    for node in (n1, n2, n3):
        wait(lambda node=node: node.up() == ["n1", "n2", "n3"], "a newer program that speaks alike is a member")  # type: ignore[misc]
        wait(lambda node=node: "the nodes run different versions" in node.findings(), "both versions are told")  # type: ignore[misc]
    assert n1.node("n3")["version"] == "7.1"
    n3.server.stop()
    wait(lambda: n1.up() == n2.up() == ["n1", "n2"], "the third is stopped")

    epoch = n1.cluster()["epoch"]
    n3 = rig.serve(config, copy_of_program(another, "8.0", protocol_version=2), another)
    refused = "it has version 2, this program knows version 1"
    wait(lambda: refused in n1.findings(), "the other version is told")
    wait(lambda: "it has version 1, this program knows version 2" in n3.findings(), "and told on the other side")
    assert "our version" in n1.findings()
    assert refused in [event["reason"] for event in n1.events("cluster-refused")]
    assert n3.up() == []
    n2.server.command("node", "drain", "n3")
    wait(lambda: n1.node("n3")["draining"], "the others go on")
    assert (n1.up(), n2.up(), n1.cluster()["epoch"]) == (["n1", "n2"], ["n1", "n2"], epoch)
