"""Volumes on several nodes of a cluster: real processes, a real etcd, kill -9."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from protocol.agreement import ReplyStyle
from protocol.nbd import Command
from tests.cluster_rig import ClusterNode, ClusterRig, meet, wait
from tests.conftest import Processes
from tests.etcd_cluster import EtcdCluster
from tests.interop.talking import Talker, Verifying
from tests.nbd_client import Client

BLOCK = 4096


def start(rig: ClusterRig, *names: str, more: str = "") -> list[ClusterNode]:
    """Nodes that do not wait long for a replica that is lost, with `more` settings."""
    nodes = []
    for name in names:
        config = rig.make(name)
        settings = config.read_text().replace("cluster:\n", "cluster:\n  repair_delay: 5s\n", 1)
        config.write_text(settings + more)
        nodes.append(rig.serve(config))
    meet(nodes)
    return nodes


def gauges(node: ClusterNode) -> dict[str, float]:
    """What its metrics say of the replicas of the volume db."""
    with node.server.api() as api:
        told = api.get("/metrics").raise_for_status().text
    return {
        name: float(value) for name, value in re.findall(r'(?m)^nbdserver_replicas_(\w+){volume="db"} (\S+)$', told)
    }


def test_a_volume_on_three_nodes_goes_on_without_one_which_returns_and_is_changed_at_any_node(rig: ClusterRig) -> None:
    n1, n2, n3 = start(rig, "n1", "n2", "n3")
    made = n1.ask("volume", "create", "db", "--size", "64M", "--replicas", "3")
    assert (made["state"], made["replicas"]["owner"], made["replicas"]["in_sync"]) == ("serving", "n1", 3)
    client = Client(("127.0.0.1", n1.server.port), "db")
    assert client.request(Command.WRITE, 0, BLOCK, b"a" * BLOCK).error == 0

    # One is killed: writes go on. It comes back and gets what it lacks.
    n2.server.kill9()
    assert client.request(Command.WRITE, BLOCK, BLOCK, b"b" * BLOCK).error == 0
    assert client.request(Command.FLUSH).error == 0
    wait(lambda: n3.replicas("db")["in_sync"] == 2, "n2 is not in sync")
    wait(lambda: gauges(n1) == {"wanted": 3, "in_sync": 2}, "the owner's metrics say so")
    assert gauges(n3) == {}, "who does not serve it leaves it to the owner"
    n2.server.start()
    wait(lambda: n3.replicas("db")["in_sync"] == 3, "n2 is in sync again")
    wait(lambda: gauges(n1) == {"wanted": 3, "in_sync": 3}, "the owner's metrics say so")

    # What is asked of one node is done at the owner.
    assert [volume["state"] for volume in n2.ask("volume", "list")] == ["elsewhere"]
    assert n2.ask("volume", "show", "db")["clients"] == 1
    n2.server.command("snapshot", "create", "db@monday")
    assert [found["name"] for found in n3.ask("snapshot", "list", "db")] == ["monday"]
    assert "volume db exists already" in n2.refuses("volume", "create", "db", "--size", "1G")
    assert n3.ask("volume", "resize", "db", "--size", "128M")["size_bytes"] == 128 << 20
    assert "has snapshots: monday" in n3.refuses("volume", "delete", "db")
    wait(lambda: n3.get("/v1/snapshots") != [], "n3 knows of it too")

    # The owner is killed: a command makes another one of it; what was acknowledged is there.
    n1.server.kill9()
    wait(lambda: n2.up() == ["n2", "n3"], "n1 is silent")
    (told,) = n3.ask("snapshot", "list", "db")
    assert (told["export"], told["size_bytes"], told["clients"]) == ("db@monday", 64 << 20, None)
    assert [volume["snapshots"] for volume in n3.get("/v1/volumes")] == [1]
    n2.server.command("volume", "set", "db", "description=moved")
    assert n3.replicas("db")["owner"] == "n2"
    assert gauges(n2) == {"wanted": 3, "in_sync": 2}
    client = Client(("127.0.0.1", n2.server.port), "db")
    assert client.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
    n1.server.start()
    wait(lambda: n3.replicas("db")["in_sync"] == 3, "n1 is in sync again")
    assert n1.ask("volume", "show", "db")["settings"]["description"] == "moved"
    client.close()

    # A node gets an empty disk: it makes its replica anew.
    n3.server.kill9()
    wait(lambda: n2.replicas("db")["in_sync"] == 2, "n3 is not in sync")
    shutil.rmtree(n3.server.data)
    n3.server.start()
    wait(lambda: n2.replicas("db")["in_sync"] == 3, "n3 is in sync again")
    assert directories(n3)

    # It is deleted everywhere, also where it was not asked for, and where nobody was there.
    n3.server.kill9()
    n1.server.command("snapshot", "delete", "db@monday")
    n1.server.command("volume", "delete", "db")
    wait(lambda: not directories(n1) and not directories(n2), "the replicas are deleted")
    n3.server.start()
    wait(lambda: not directories(n3), "the replica of who was away is deleted")
    assert n3.ask("volume", "list") == []


def test_a_disk_that_is_put_back_from_an_older_copy_is_recognised_and_nothing_old_is_served(rig: ClusterRig) -> None:
    n1, n2 = start(rig, "n1", "n2")
    n1.ask("volume", "create", "db", "--size", "64M", "--replicas", "2")
    client = Client(("127.0.0.1", n1.server.port), "db")
    assert client.request(Command.WRITE, 0, BLOCK, b"a" * BLOCK).error == 0
    n2.server.stop()
    data, kept = n2.server.data, n2.server.data.parent / "kept"
    subprocess.run(["cp", "-a", data, kept], check=True)
    wait(lambda: n1.replicas("db")["in_sync"] == 1, "n2 is not in sync")
    n2.server.start()
    wait(lambda: n1.replicas("db")["in_sync"] == 2, "n2 is in sync again")
    assert client.request(Command.WRITE, 0, BLOCK, b"b" * BLOCK).error == 0
    n2.server.stop()
    n2.server.start()
    n2.server.stop()
    shutil.rmtree(data)
    kept.rename(data)
    n2.server.start()
    wait(lambda: bool(n1.events("replica-disk-changed")), "it is told")
    assert {event["reason"] for event in n1.events("replica-disk-changed")} == {
        "its disk was put back as it was at an earlier time"
    }
    wait(lambda: n1.replicas("db")["in_sync"] == 2, "it has everything again")
    client.close()
    wait(lambda: n1.get("/v1/volumes/db")["clients"] == 0, "the client is gone")
    n2.server.command("node", "drain", "n1", "--no-wait")
    wait(lambda: n2.replicas("db")["owner"] == "n2", "n2 serves it")
    client = Client(("127.0.0.1", n2.server.port), "db")
    assert client.read(0, BLOCK) == b"b" * BLOCK
    client.close()


def directories(node: ClusterNode) -> list[Path]:
    return list((node.server.data / "families").iterdir())


def listed(nbdinfo: str, node: ClusterNode) -> list[str]:
    """What clients of a node are told that there is."""
    told = subprocess.run([nbdinfo, "--list", "--json", node.server.uri()], capture_output=True, check=False)
    if told.returncode:
        return []  # it goes to each that it was told of, and one may be gone by then
    return [export["export-name"] for export in json.loads(told.stdout)["exports"]]


def test_replicas_are_more_or_fewer_leave_nodes_and_are_made_elsewhere_when_one_is_lost(
    rig: ClusterRig, processes: Processes, needs: Callable[[str, str], str], tmp_path: Path
) -> None:
    nbdinfo = needs("nbdinfo", "libnbd-bin")
    nodes = dict(zip(("n1", "n2", "n3", "n4"), start(rig, "n1", "n2", "n3", "n4"), strict=True))
    n1, n2, n3, n4 = nodes.values()

    # One node's own volume becomes the cluster's, with what it has.
    n1.server.command("volume", "create", "db", "--size", "64M")
    client = Client(("127.0.0.1", n1.server.port), "db")
    assert client.request(Command.WRITE, 0, BLOCK, b"a" * BLOCK).error == 0
    assert "detach first" in n1.refuses("volume", "set", "db", "replicas=2")
    client.close()
    wait(lambda: n1.get("/v1/volumes/db")["clients"] == 0, "the client is gone")
    n1.server.command("volume", "set", "db", "replicas=2")
    wait(lambda: n2.replicas("db")["in_sync"] == 2, "two replicas")
    n2.server.command("volume", "set", "db", "replicas=3")
    wait(lambda: n2.replicas("db")["in_sync"] == 3, "three replicas")
    assert n3.ask("resync") == []

    # A replica moves, and the owner is drained. Its clients see a pause, and so do those of another node.
    with n1.server.api() as api:  # those on loopback are of another host at each node
        api.patch("/v1/volumes/db", json={"shared": "true"}).raise_for_status()
    uri = f"nbd://127.0.0.1:{n1.server.port}/db"
    talkers = [
        Talker(n1.server.port, "db", 1024, ReplyStyle.EXTENDED),
        Talker(n4.server.port, "db", 2048),
        Verifying(processes, needs("fio", "fio"), uri, 4096, tmp_path / "fio.log"),
    ]
    wait(lambda: n1.get("/v1/volumes/db")["clients"] == 3, "all have come")
    (source, *_) = [each["node"] for each in n2.replicas("db")["nodes"] if each["node"] != "n1"]
    moved = n4.ask("volume", "move", "db", "--from", source)
    assert source not in [each["node"] for each in moved["replicas"]["nodes"]]
    assert moved["replicas"]["in_sync"] == 3
    drained = n2.ask("node", "drain", "n1")
    assert (drained["replicas"], drained["owned"]) == (0, 0)
    assert not directories(n1)
    assert len({event["client"] for event in n1.events("client-goes-on")}) == 2
    assert len({event["client"] for event in n4.events("client-goes-on")}) == 1
    for talker in talkers:
        talker.end()
    client = Client(("127.0.0.1", n1.server.port), "db")  # forwarded
    assert client.read(0, BLOCK) == b"a" * BLOCK
    client.close()

    # Snapshots are listed at every node: at the owner, at one that has a replica, at one that has none.
    n1.server.command("snapshot", "create", "db@monday")
    member = next(each["node"] for each in n1.replicas("db")["nodes"] if each["node"] != n1.replicas("db")["owner"])
    for node in (n1, nodes[member], nodes[n1.replicas("db")["owner"]]):
        wait(lambda node=node: listed(nbdinfo, node) == ["db", "db@monday"], f"{node.name} lists it")  # type: ignore[misc]
    n1.server.command("snapshot", "delete", "db@monday")
    wait(lambda: listed(nbdinfo, n1) == ["db"], "it is not listed any more")

    # A node is lost: its replica is made on the one that may have some again.
    n1.server.command("node", "drain", "n1", "--end")
    found = n1.replicas("db")
    lost = next(each["node"] for each in found["nodes"] if each["node"] != found["owner"])
    nodes[lost].server.kill9()
    wait(lambda: f"silent: {lost}" in n1.findings(), "who looks is told of it")
    wait(lambda: on(n1, "db") == sorted({"n1", "n2", "n3", "n4"} - {lost}), "it is made on n1")
    wait(lambda: n1.replicas("db")["in_sync"] == 3, "three are in sync again")
    assert directories(n1)


def on(node: ClusterNode, volume: str) -> list[str]:
    return sorted(each["node"] for each in node.replicas(volume)["nodes"])


def test_volumes_go_on_while_the_registry_is_away_also_over_a_restart(rig: ClusterRig, etcd: EtcdCluster) -> None:
    n1, n2, n3 = start(rig, "n1", "n2", "n3", more="workers: 2\n")
    for name in ("db", "web"):
        n1.ask("volume", "create", name, "--size", "64M", "--replicas", "3")
    assert all(worker["volumes"] or worker["pid"] for worker in n1.get("/v1/status")["workers"])
    client = Client(("127.0.0.1", n1.server.port), "db")
    etcd.members[0].kill()
    assert client.request(Command.WRITE, 0, BLOCK, b"a" * BLOCK).error == 0
    n2.server.command("snapshot", "create", "db@monday")
    wait(lambda: "registry (etcd" in n1.findings(), "the registry is missed")
    assert "registry cannot be changed now" in n2.refuses("volume", "set", "db", "description=x")

    # A replica's node is started again: it is the same replica.
    n3.server.kill9()
    n3.server.start()
    assert client.request(Command.WRITE, BLOCK, BLOCK, b"b" * BLOCK).error == 0
    assert client.request(Command.FLUSH).error == 0
    assert [volume["name"] for volume in n3.ask("volume", "list")] == ["db", "web"]
    wait(lambda: [found["export"] for found in n3.get("/v1/snapshots")] == ["db@monday"], "n3 knows the snapshot")
    etcd.members[0].start()
    wait(lambda: [n1.replicas(name)["in_sync"] for name in ("db", "web")] == [3, 3], "all are in sync")
    n2.server.command("volume", "set", "db", "description=x")
    assert client.read(0, 2 * BLOCK) == b"a" * BLOCK + b"b" * BLOCK
    client.close()
