"""Whole nodes, and everything that may happen to them: a network that loses datagrams and is cut, masters killed and
stopped past their lease, etcd members killed, nodes that join meanwhile, and programs of other versions."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.node.authority import Authority
from tests.cluster_rig import ClusterNode, ClusterRig, wait
from tests.conftest import ROOT, Processes
from tests.etcd_cluster import DAY, EtcdCluster
from tests.etcd_rig import MakeCluster
from tests.interop.site import HUB, HUB_ADDRESS, NoNamespacesError, Site
from tests.serving import PROGRAM

PASSWORD = "a password of the test"
LOSS_PER_CENT = 10
LEASE_S = 5.0


@pytest.fixture
def site(processes: Processes, needs: Callable[[str, str], str]) -> Site:
    for program, package in (("nft", "nftables"), ("ip", "iproute2")):
        needs(program, package)
    try:
        return Site(processes)
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces here: {error}")


class Faults:
    """Nodes on machines of a site, and three etcd members at its hub who take only TLS, and users with a password."""

    def __init__(
        self, site: Site, processes: Processes, path: Path, free_port: Callable[[], int], make_etcd: MakeCluster
    ) -> None:
        authority = Authority(path / "tls")
        authority.make_ca("etcd", DAY)
        self.etcd: EtcdCluster = make_etcd(
            3, authority=authority, server_name=HUB_ADDRESS, host=HUB_ADDRESS, within=site.within
        )
        self.etcd.enable_auth(PASSWORD, "nbdserver/")
        (path / "password").write_text(f"{PASSWORD}\n")
        login = ("--etcd-ca", str(authority.ca_certificate), "--etcd-user", "node")
        login += ("--etcd-password-file", str(path / "password"))
        site.lose(LOSS_PER_CENT)
        self.site = site
        self.rig = ClusterRig(processes, path, free_port, self.etcd.endpoints, login, site)
        self.nodes: list[ClusterNode] = []
        self._drained = 0

    def join(self, name: str, *more: str) -> None:
        self.nodes.append(self.rig.start(name, *more))

    def master(self) -> ClusterNode:
        """Whom all nodes have for the master."""
        wait(lambda: len({node.cluster()["master"] for node in self.nodes} - {""}) == 1, "all have one master")
        name = self.nodes[0].cluster()["master"]
        return next(node for node in self.nodes if node.name == name)

    def others(self, node: ClusterNode) -> list[ClusterNode]:
        return [one for one in self.nodes if one is not node]

    def another_master(self, old: ClusterNode) -> ClusterNode:
        """Wait until the others have one, and it has confirmed a change that the registry keeps."""
        others = self.others(old)
        names = {node.name for node in others}
        wait(lambda: {node.cluster()["master"] for node in others} & names != set(), "another master")
        master = next(node for node in others if node.name == node.cluster()["master"])
        self.drain(master)
        return master

    def drain(self, asked: ClusterNode) -> None:
        """A change of truth, each time another one: it has to come to all nodes and to stay."""
        self._drained += 1
        asked.server.command("node", "drain", "n1", *(("--end",) if self._drained % 2 == 0 else ()))

    def settle(self) -> None:
        """Wait until all is well: everybody is up for everybody, and has the last change."""
        names = sorted(node.name for node in self.nodes)
        is_drained = self._drained % 2 == 1
        for node in self.nodes:
            wait(lambda node=node: node.up() == names, f"{node.name} has {names} up")  # type: ignore[misc]
            wait(lambda node=node: node.node("n1")["draining"] == is_drained, "the last change")  # type: ignore[misc]
        assert len({(node.cluster()["master"], node.cluster()["epoch"]) for node in self.nodes}) == 1


def test_five_whole_nodes_of_both_kinds_go_on_whatever_is_killed_stopped_and_cut_off(
    site: Site, processes: Processes, tmp_path: Path, free_port: Callable[[], int], make_etcd: MakeCluster
) -> None:
    faults = Faults(site, processes, tmp_path, free_port, make_etcd)
    for name in ("n1", "n2", "n3"):
        faults.join(name)
    faults.join("far", "--across-wan")
    faults.settle()

    # The master, all of it, stands still until its lease is over: when it goes on it follows another one.
    old = faults.master()
    epoch = old.cluster()["epoch"]
    goes_on = old.stand_still()
    stopped_s = time.monotonic()
    newer = faults.another_master(old)
    time.sleep(max(0.0, stopped_s + 1.5 * LEASE_S - time.monotonic()))
    goes_on()
    faults.settle()
    assert (newer.cluster()["master"], old.cluster()["master"]) == (newer.name, newer.name)
    assert newer.cluster()["epoch"] > epoch

    # kill -9 of the master and of an etcd member at once, and a fifth node joins meanwhile.
    member = faults.etcd.members[faults.etcd.leader()]
    newer.server.kill9()
    member.kill()
    faults.join("n5")
    faults.another_master(newer)
    member.start()
    newer.server.start()
    faults.settle()

    # The master reaches nobody, etcd neither, and nobody reaches it: it says so, and comes back as one that follows.
    old = faults.master()
    site.part([old.name], [*(node.name for node in faults.others(old)), HUB])
    newer = faults.another_master(old)
    wait(lambda: "has heard no master" in old.findings(), "who is cut off says so")
    assert "registry (etcd" in old.findings()
    assert not old.cluster()["is_active"]
    old.server.command("volume", "create", "disk0", "--size", "64M")
    site.mend()
    faults.settle()
    assert old.cluster()["master"] == newer.name

    # Two etcd members of three are gone: what needs no change of truth goes on, what nodes say of themselves too.
    epoch = newer.cluster()["epoch"]
    for member in faults.etcd.members[:2]:
        member.kill()
    wait(lambda: "registry (etcd" in newer.findings(), "that etcd is gone is told")
    far = next(node for node in faults.nodes if node.name == "far")
    n5 = faults.nodes[-1]
    n5.server.command("volume", "create", "disk5", "--size", "64M")
    wait(lambda: far.node("n5")["volumes"] == 1, "what a node says of itself comes to one across a WAN without etcd")
    assert all(node.cluster()["is_active"] for node in faults.nodes)
    for member in faults.etcd.members[:2]:
        member.start()
    wait(lambda: "registry (etcd" not in newer.findings(), "etcd is back")
    faults.drain(far)
    faults.settle()
    assert newer.cluster()["epoch"] == epoch


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
    processes: Processes, tmp_path: Path, free_port: Callable[[], int], make_etcd: MakeCluster
) -> None:
    rig = ClusterRig(processes, tmp_path, free_port, make_etcd().endpoints)
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
