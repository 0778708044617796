"""Nodes that form a cluster: real processes, a real etcd, TLS, signals."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.cluster_rig import ClusterRig, run, wait
from tests.conftest import ROOT, Processes
from tests.etcd_cluster import EtcdCluster
from tests.serving import PROGRAM, descendants, is_alive


def test_nodes_form_a_cluster_outlive_their_master_take_another_in_and_let_one_go(
    rig: ClusterRig, processes: Processes
) -> None:
    nodes = [rig.start(name) for name in ("n1", "n2", "n3")]
    for node in nodes:
        wait(lambda node=node: node.up() == ["n1", "n2", "n3"], "three nodes know each other")  # type: ignore[misc]
    wait(lambda: len(nodes[0].cluster()["voters"]) == 3, "three voters")

    # n1 alone has the CA's key, and is master: it is killed. Another takes over; who is silent is told, and what to do.
    n1, n2, n3 = nodes
    assert n1.cluster()["master"] == "n1"
    epoch = n1.cluster()["epoch"]
    n1.server.command("volume", "create", "disk0", "--size", "64M")
    wait(lambda: n3.volume("disk0").get("state") == "serving", "what another node has is shown")
    n1.server.kill9()
    wait(lambda: n2.cluster()["master"] in ("n2", "n3"), "another master")
    assert n2.cluster()["epoch"] > epoch
    wait(lambda: n3.up() == ["n2", "n3"], "n1 is silent")
    assert (
        "with what it alone has: disk0; look at it; if it does not come back: nbdserver node remove n1" in n3.findings()
    )
    assert n3.volume("disk0").items() >= {"node": "n1", "state": "unknown", "reason": "n1 is silent"}.items()
    assert n3.ask("node", "show", "n1")["state"] == "silent"
    assert n3.ask("status")["cluster"]["master"] == n3.cluster()["master"]
    assert n2.events("cluster-master")
    assert "n1 cannot be told of the key" in n2.refuses("cluster", "rotate-key")

    # It comes back, and lets a fourth in. All of them get another key.
    n1.server.start()
    wait(lambda: n1.up() == ["n1", "n2", "n3"], "n1 is back")
    n4 = rig.start("n4", "--site", "attic", "--fault-domain", "shelf")
    wait(lambda: n4.up() == ["n1", "n2", "n3", "n4"], "four nodes")
    wait(lambda: n1.node("n4")["fault_domain"] == "shelf", "what the fourth says of itself")
    far = rig.start("far", "--across-wan")
    everybody = ["far", "n1", "n2", "n3", "n4"]
    wait(lambda: far.up() == everybody, "one across a WAN")
    wait(lambda: n1.node("n4")["fill_percent"] is not None, "the load that the fourth reports")
    before = n1.config.with_name("cluster").joinpath("cluster.key").read_text()
    n2.server.command("cluster", "rotate-key")
    keys = {node.config.with_name("cluster").joinpath("cluster.key").read_text() for node in (*nodes, n4, far)}
    assert len(keys) == 1
    assert before not in keys

    # What one is told all are told, under the new key; a drained node takes no new volume.
    assert "n4 is up" in n1.refuses("node", "remove", "n4")
    n1.server.command("node", "drain", "n4")
    wait(lambda: n4.node("n4")["draining"], "n4 hears that it is drained")
    assert "n4 is being drained" in n4.refuses("volume", "create", "disk0", "--size", "1G")
    watching = processes.start(
        [*PROGRAM, "--data", str(n3.server.data), "directory", "watch", "drain/", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["key"] == "drain/n4"
    n2.server.command("node", "drain", "n4", "--end")
    assert json.loads(watching.stdout.readline()) == {"action": "delete", "key": "drain/n4"}
    assert [entry["key"] for entry in far.ask("directory", "list", "member/")] == [
        f"member/{name}" for name in everybody
    ]
    assert json.loads(n3.ask("directory", "get", "node/n4")["value"])["site"] == "attic"
    assert "the directory has no node/n9" in n3.refuses("directory", "get", "node/n9")

    # It is stopped and removed, by a node that is not the master.
    n4.server.stop()
    asked = next(node for node in nodes if node.name != n1.cluster()["master"])
    wait(lambda: all(node.node("n4")["state"] == "silent" for node in nodes), "n4 is silent")
    asked.server.command("node", "remove", "n4")
    for node in (*nodes, far):
        wait(lambda node=node: node.up() == ["far", "n1", "n2", "n3"], "n4 is removed")  # type: ignore[misc]
    assert not asked.ask("directory", "list", "node/n4")


def test_who_does_not_belong_is_refused_with_an_event_and_an_etcd_that_is_gone_is_told(
    rig: ClusterRig, etcd: EtcdCluster
) -> None:
    config = rig.make("n1")
    n1 = rig.serve(config)
    wait(lambda: n1.up() == ["n1"], "a cluster of one")

    # Tokens: not whole, of another secret, for a name that is there; a machine that belongs to a cluster already.
    stranger = config.parent.parent / "x" / "node.yaml"
    arguments = ("--config", str(stranger), "--node", "x", "--address", "127.0.0.1:9")
    done = run("cluster", "join", rig.token[:-20], *arguments)
    assert done.returncode == 2
    assert "no whole token" in done.stderr
    (config.parent / "cluster" / "tokens.json").write_text("{}")
    done = run("cluster", "join", rig.token, *arguments)
    assert "the token is not valid" in done.stderr
    assert not stranger.parent.exists()
    assert n1.events("cluster-join-refused")[-1]["node"] == "x"
    rig.token = json.loads(run("cluster", "token", "--config", str(config), "--json").stdout)["token"]
    done = run("cluster", "join", rig.token, "--config", str(stranger), "--node", "n1", "--address", "127.0.0.1:9")
    assert "there is a node n1 already" in done.stderr
    done = run("cluster", "join", rig.token, "--config", str(config), "--address", "127.0.0.1:9")
    assert "belongs to cluster test already" in done.stderr
    assert not run("cluster", "join", rig.token, "--config", str(config), "--again").returncode
    assert run("config", "check", str(config)).returncode == 0
    assert n1.server.process is not None
    n1.server.process.send_signal(signal.SIGHUP)
    wait(lambda: n1.events("settings-reloaded"), "another certificate is taken")

    # The program is replaced while it is a member.
    n1.server.command("upgrade-in-place")
    wait(lambda: n1.up() == ["n1"] and len(n1.events("node-started")) == 2, "the program after it joins again")

    # A node that has another key, and one of another cluster that was given our registry's place, are kept out.
    other_key = rig.make("n2")
    key = other_key.parent / "cluster" / "cluster.key"
    key.write_text(re.sub("[0-9a-f]", "7", key.read_text()))
    n2 = rig.serve(other_key)
    wait(lambda: "a key that this cluster does not use" in n1.findings(), "the other key is told")
    assert n2.up() == []
    n2.server.stop()
    other_cluster = rig.another().make("n3", cluster="other")
    other_cluster.write_text(other_cluster.read_text() + "    namespace: nbdserver/test/\n")
    n3 = rig.serve(other_cluster)
    wait(lambda: "it is from another cluster" in n1.findings(), "the other cluster is told")
    n3.server.stop()
    assert n1.up() == ["n1"]
    reasons = " ".join(event["reason"] for event in n1.events("cluster-refused"))
    assert "a key that this cluster does not use" in reasons

    # etcd is gone: volumes are made and served, the status says what is wrong. It comes back.
    etcd.members[0].kill()
    wait(lambda: "etcdctl endpoint health" in n1.findings(), "that etcd is gone is told")
    n1.server.command("volume", "create", "disk0", "--size", "64M")
    etcd.members[0].start()
    wait(lambda: "etcdctl endpoint health" not in n1.findings(), "etcd is back")
    wait(lambda: n1.up() == ["n1"], "the cluster goes on")


def test_make_cluster_starts_one_says_how_to_look_around_and_ends_all_that_it_started(
    processes: Processes, tmp_path: Path, needs: Callable[[str, str], str]
) -> None:
    needs("etcd", "etcd-server")
    terminal = processes.start(
        [sys.executable, "-m", "tests.local_cluster", str(tmp_path / "c")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert terminal.stdout is not None
    printed = ""
    while "Ctrl-C" not in printed:
        line = terminal.stdout.readline().decode()
        assert line, printed
        printed += line
    assert len(re.findall(r"^n[123] +up ", printed, re.MULTILINE)) == 3
    found = re.search(r"nbdserver --data (\S+) status\n", printed)
    assert found
    assert "cluster local, this is n1; master n1" in run("--data", found[1], "status").stdout
    children = descendants(terminal.pid)
    assert len(children) >= 7  # etcd, and two processes a node
    terminal.send_signal(signal.SIGINT)
    assert terminal.wait(60) == 0
    assert not any(is_alive(pid) for pid in children)
