"""etcd goes back to an earlier state, or is lost with all it had: real processes, real backups."""

import json
from contextlib import suppress
from pathlib import Path

from protocol.nbd import Command
from tests.cluster_rig import ClusterNode, ClusterRig, meet, run, wait
from tests.etcd_cluster import EtcdCluster
from tests.nbd_client import Client, RefusedError
from tests.serving import eventually

BLOCK = 4096
PATIENCE_S = 180.0
"""Nodes look for the registry every some seconds, then elect a master, on a machine that may be busy."""


def write(client: Client, content: bytes) -> None:
    assert client.request(Command.WRITE, 0, BLOCK, content * BLOCK).error == 0


def attach(node: ClusterNode, volume: str) -> Client:
    """As a client that comes again when the node does not know the volume yet, or nobody serves it at that moment."""
    found: list[Client] = []

    def is_taken() -> bool:
        with suppress(RefusedError, ConnectionResetError):
            found.append(Client(("127.0.0.1", node.server.port), volume))
        return bool(found)

    wait(is_taken, f"{node.name} takes clients of {volume}")
    return found[0]


def refuses(node: ClusterNode) -> bool:
    return "put back to an earlier state" in node.findings()


def digest(node: ClusterNode) -> str:
    """Of the one volume on the disk of a node that was stopped, which may have kept an older name of it."""
    done = run("check", "--data", str(node.server.data), "--digest", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)["volumes"].values()
    contents = found["contents"]
    assert contents["regions_to_fetch"] == 0
    (export,) = contents["exports"]
    return str(export["digest"])


def test_an_etcd_that_was_put_back_is_refused_until_it_is_recovered_and_makes_no_old_replica_the_owner(
    rig: ClusterRig, etcd: EtcdCluster, tmp_path: Path
) -> None:
    n1, n2, n3 = nodes = [rig.start(name) for name in ("n1", "n2", "n3")]
    meet(nodes)
    n1.ask("volume", "create", "db", "--size", "64M", "--replicas", "3")
    client = Client(("127.0.0.1", n1.server.port), "db")
    write(client, b"a")
    etcd.control("snapshot", "save", str(tmp_path / "backup"))

    # n3 is in sync there, and lacks what is acknowledged since.
    n3.server.kill9()
    wait(lambda: n1.replicas("db")["in_sync"] == 2, "n3 is not in sync")
    write(client, b"b")
    n1.server.command("volume", "rename", "db", "web")
    etcd.lose()
    etcd.restore(tmp_path / "backup")
    wait(lambda: refuses(n1) and refuses(n2), "nobody takes it")
    write(client, b"c")
    client.close()
    for node in (n1, n2):
        node.server.kill9()
    n3.server.start()
    wait(lambda: refuses(n3), "who was away does not take it either")
    done = run("--data", str(n3.server.data), "volume", "set", "db", "description=x")
    assert done.returncode == 1
    assert n3.get("/v1/volumes/db")["state"] != "serving"

    for node in (n1, n2):
        node.server.start()
    tried = json.loads(n2.server.command("cluster", "recover", "--dry-run", "--json"))
    assert tried["volumes"] == [{"name": "web", "in_sync": ["n1", "n2"], "loss": ""}]
    recovered = json.loads(n2.server.command("cluster", "recover", "--json"))
    assert (recovered["nodes"], recovered["silent"], recovered["left_out"]) == (["n1", "n2", "n3"], [], [])

    eventually(lambda: all(node.up() == ["n1", "n2", "n3"] for node in nodes), "the cluster is whole", PATIENCE_S)
    client = attach(n2, "web")
    assert client.read(0, BLOCK) == b"c" * BLOCK
    write(client, b"d")
    wait(lambda: n1.replicas("web")["in_sync"] == 3, "n3 has everything again")
    assert client.request(Command.FLUSH, 0, 0).error == 0
    client.close()
    assert "nothing is to be recovered" in n1.refuses("cluster", "recover")
    for node in nodes:
        node.server.stop()
    assert len({digest(node) for node in nodes}) == 1


def test_an_etcd_that_is_lost_for_good_is_made_anew_from_what_the_nodes_know(
    rig: ClusterRig, etcd: EtcdCluster
) -> None:
    n1, n2 = nodes = [rig.start(name) for name in ("n1", "n2")]
    meet(nodes)
    n1.ask("volume", "create", "db", "--size", "64M", "--replicas", "2")
    n1.ask("volume", "create", "gone", "--size", "64M", "--replicas", "2")
    n1.server.command("volume", "delete", "gone")
    n1.server.command("snapshot", "create", "db@monday")
    client = Client(("127.0.0.1", n1.server.port), "db")
    write(client, b"a")
    etcd.lose()
    etcd.members[0].start()
    wait(lambda: refuses(n1) and refuses(n2), "nobody takes it")
    write(client, b"b")

    # A node whose word is needed is missing: refused, unless it is given up.
    n2.server.kill9()
    assert "needs the word of n2" in n1.refuses("cluster", "recover")
    assert "there is no node n7" in n1.refuses("cluster", "recover", "--without", "n7")
    given_up = json.loads(n1.server.command("cluster", "recover", "--without", "n2", "--dry-run", "--json"))
    assert [volume["in_sync"] for volume in given_up["volumes"]] == [["n1"]]
    assert "n2" in given_up["volumes"][0]["loss"]
    n2.server.start()
    assert "its word counts" in n1.refuses("cluster", "recover", "--without", "n2")
    recovered = json.loads(n1.server.command("cluster", "recover", "--json"))
    assert [volume["name"] for volume in recovered["volumes"]] == ["db"]
    eventually(lambda: all(node.up() == ["n1", "n2"] for node in nodes), "the cluster is whole", PATIENCE_S)
    wait(lambda: n2.replicas("db")["in_sync"] == 2, "both are in sync")
    client.close()
    client = Client(("127.0.0.1", n2.server.port), "db")
    assert client.read(0, BLOCK) == b"b" * BLOCK
    client.close()
    assert [found["name"] for found in n2.ask("snapshot", "list", "db")] == ["monday"]
