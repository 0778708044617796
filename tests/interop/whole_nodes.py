"""Whole nodes on machines of a lossy site, three etcd members that take only TLS and users with a password, and what is
done to them.

Theory: as in `directory_cluster`, a *round* does something to the cluster, waits for what has to be possible meanwhile
(mostly another master, which confirms a change of truth), mends it, and then everybody must know the same again. The
change of truth is that the node across the WAN is drained, or not any more: a key that the registry keeps.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdserver.node.authority import Authority
from tests.cluster_rig import ClusterNode, ClusterRig, wait
from tests.conftest import Processes
from tests.etcd_cluster import DAY, QUICK, EtcdCluster
from tests.interop.site import HUB, HUB_ADDRESS, Site
from tests.serving import descendants

PASSWORD = "a password of the test"
LEASE_S = 5.0
FOUNDER = "n1"
"""It has the CA's key: it is up when others join."""


class WholeNodes:
    """The nodes n1, n2, n3, and one across a WAN."""

    def __init__(
        self, site: Site, processes: Processes, path: Path, free_port: Callable[[], int], rng: random.Random
    ) -> None:
        authority = Authority(path / "tls")
        authority.make_ca("etcd", DAY)
        self.etcd = EtcdCluster(
            processes, path / "etcd", free_port, 3, QUICK, authority, HUB_ADDRESS, HUB_ADDRESS, site.within
        )  # fmt: skip
        self.etcd.enable_auth(PASSWORD, "nbdserver/")
        (path / "password").write_text(f"{PASSWORD}\n")
        login = ("--etcd-ca", str(authority.ca_certificate), "--etcd-user", "node")
        login += ("--etcd-password-file", str(path / "password"))
        self.site = site
        self.nodes: list[ClusterNode] = []
        self._rig = ClusterRig(processes, path, free_port, self.etcd.endpoints, login, site)
        self._rng = rng
        self._changes = 0
        for name in (FOUNDER, "n2", "n3"):
            self.join(name)
        self.far = self.join("far", "--across-wan")
        self.settle()

    def join(self, name: str, *more: str) -> ClusterNode:
        """One more node."""
        self.nodes.append(self._rig.start(name, *more))
        return self.nodes[-1]

    def lives(self) -> Iterator[tuple[str, int]]:
        """(name, pid) of every process of a node."""
        for node in self.nodes:
            assert node.server.process is not None
            for pid in (node.server.process.pid, *descendants(node.server.process.pid)):
                yield node.name, pid

    def master(self) -> ClusterNode:
        """Whom all nodes have for the master."""
        wait(lambda: len({node.cluster()["master"] for node in self.nodes} - {""}) == 1, "all have one master")
        return self._named(self.nodes[0].cluster()["master"])

    def _named(self, name: str) -> ClusterNode:
        return next(node for node in self.nodes if node.name == name)

    @property
    def can_let_in(self) -> bool:
        """Whether a node can join while the master is down."""
        return self.master().name != FOUNDER

    def others(self, node: ClusterNode) -> list[ClusterNode]:
        return [one for one in self.nodes if one is not node]

    def change_truth(self, asked: ClusterNode) -> None:
        """Each time another change: it has to come to all nodes and to stay."""
        self._changes += 1
        asked.server.command("node", "drain", self.far.name, *(("--end",) if self._changes % 2 == 0 else ()))

    def settle(self) -> None:
        """Wait until all is well: everybody is up for everybody, with one master, and has the last change."""
        names = sorted(node.name for node in self.nodes)
        is_drained = self._changes % 2 == 1
        for node in self.nodes:
            wait(lambda node=node: node.up() == names, f"{node.name} has {names} up")  # type: ignore[misc]
            wait(lambda node=node: node.node(self.far.name)["draining"] == is_drained, "the last change")  # type: ignore[misc]
        wait(
            lambda: len({(seen["master"], seen["epoch"]) for seen in map(ClusterNode.cluster, self.nodes)}) == 1, "one"
        )

    def _another_master(self, old: ClusterNode) -> ClusterNode:
        """Wait until the others have one, and it has made a change of truth."""
        others = self.others(old)
        names = {node.name for node in others}
        wait(lambda: {node.cluster()["master"] for node in others} & names != set(), "another master")
        master = self._named(next(seen for seen in (node.cluster()["master"] for node in others) if seen in names))
        self.change_truth(master)
        return master

    # --- rounds ---

    def stop_master(self) -> None:
        """The master, all of it, stands still until its lease is over: when it goes on it follows another one."""
        old = self.master()
        epoch = old.cluster()["epoch"]
        goes_on, stopped_s = old.stand_still(), time.monotonic()
        newer = self._another_master(old)
        time.sleep(max(0.0, stopped_s + 1.5 * LEASE_S - time.monotonic()))
        goes_on()
        self.settle()
        assert old.cluster()["master"] != old.name
        assert newer.cluster()["epoch"] > epoch

    def kill_master_and_registry_member(self, joiner: str = "") -> None:
        """kill -9 of both at once; a node joins meanwhile (`can_let_in`)."""
        old = self.master()
        member = self.etcd.members[self.etcd.leader()]
        old.server.kill9()
        member.kill()
        if joiner:
            self.join(joiner)
        self._another_master(old)
        member.start()
        old.server.start()
        self.settle()

    def cut_master_off(self) -> None:
        """It reaches nobody, etcd neither, and nobody reaches it: it says so, goes on serving, and comes back."""
        old = self.master()
        self.site.part([old.name], [*(node.name for node in self.others(old)), HUB])
        self._another_master(old)
        wait(lambda: "has heard no master" in old.findings(), "who is cut off says so")
        assert "registry (etcd" in old.findings()
        assert not old.cluster()["is_active"]
        self._make_and_delete_a_volume(old)
        self.site.mend()
        self.settle()

    def kill_registry(self) -> None:
        """Two etcd members of three are gone: what needs no change of truth goes on, and what nodes say is heard."""
        master = self.master()
        epoch = master.cluster()["epoch"]
        members = self._rng.sample(self.etcd.members, 2)
        for member in members:
            member.kill()
        wait(lambda: "registry (etcd" in master.findings(), "that etcd is gone is told")
        asked = self._rng.choice(self.others(self.far))
        volumes = self.far.node(asked.name)["volumes"]
        asked.server.command("volume", "create", "meanwhile", "--size", "64M")
        wait(lambda: self.far.node(asked.name)["volumes"] == volumes + 1, "what a node says of itself crosses the WAN")
        assert {(node.cluster()["is_active"], node.cluster()["epoch"]) for node in self.nodes} == {(True, epoch)}
        asked.server.command("volume", "delete", "meanwhile")
        for member in members:
            member.start()
        wait(lambda: "registry (etcd" not in master.findings(), "etcd is back")
        self.change_truth(self.far)
        self.settle()

    def kill_some_node(self) -> None:
        """kill -9 of any node, which is started again."""
        node = self._rng.choice(self.nodes)
        node.server.kill9()
        time.sleep(self._rng.uniform(0.0, 3.0))
        node.server.start()
        self.settle()

    @staticmethod
    def _make_and_delete_a_volume(node: ClusterNode) -> None:
        node.server.command("volume", "create", "alone", "--size", "64M")
        node.server.command("volume", "delete", "alone")
