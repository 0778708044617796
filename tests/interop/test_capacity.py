"""Limits of what data may take, on a real node: met by clients, told to people, changed live."""

import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli.client import NodeClient
from nbdserver.cli.main import run as run_command
from protocol.nbd import Command, ReplyError
from tests.conftest import Processes
from tests.nbd_client import Client
from tests.serving import Server, eventually
from tests.unit.test_monitoring import metrics

MIB = 1 << 20
SETTINGS = "segment: 1M\nmax_data: 64M\novercommit: 4\nhttp: {listen: '127.0.0.1:%d'}\n"


@pytest.fixture
def server(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> Server:
    settings = tmp_path / "node.yaml"
    settings.write_text(SETTINGS % (http_port := free_port()))
    (tmp_path / "http-port").write_text(str(http_port))
    return Server(processes, tmp_path / "data", free_port(), {"disk0": "200M"}, ["--config", str(settings)])


def ask(server: Server, path: str, **query: Any) -> Any:
    return NodeClient(server.data).get(path, **query)


def alarms(server: Server) -> dict[str, int]:
    return {fill["subject"]: fill["alarm"] for fill in ask(server, "/v1/status")["fills"]}


def told(server: Server, kind: str) -> list[int]:
    """The thresholds of max_data that were told."""
    events = ask(server, "/v1/events", limit=2000)
    return [event["threshold_percent"] for event in events if event["kind"] == kind and event["subject"] == "max_data"]


def test_the_nodes_limit_is_met_told_and_raised_live(server: Server, tmp_path: Path) -> None:
    client = Client(("127.0.0.1", server.port), "disk0", timeout_s=30.0)
    data = bytes(range(256)) * (MIB // 256)
    written = 0
    while (error := client.request(Command.WRITE, written * MIB, data=data).error) == 0:
        written += 1
        assert written < 64
    assert error == ReplyError.ENOSPC
    assert written > 50
    assert all(client.read(number * MIB, MIB) == data for number in range(0, written, 9))
    assert alarms(server)["max_data"] == 95
    assert told(server, "fill-alarm") == [80, 90, 95]

    with pytest.raises(subprocess.CalledProcessError) as caught:
        server.command("status", "--check")
    assert caught.value.returncode == 1
    assert re.search(r"WARNING: max_data is (9\d|100)\.\d % full: .* of 64\.0 MiB", caught.value.stdout)
    assert "disk0 is full: writes get ENOSPC (all volumes together take all that max_data" in caught.value.stdout

    port = (tmp_path / "http-port").read_text()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        metrics = dict(re.findall(r"(?m)^(nbdserver_\w+) (\S+)$", answer.read().decode()))
    assert float(metrics["nbdserver_max_data_alarm_percent"]) == 95
    assert float(metrics["nbdserver_max_data_bytes"]) == 64 * MIB

    settings = tmp_path / "node.yaml"
    settings.write_text(settings.read_text().replace("max_data: 64M", "max_data: 1G"))
    assert server.process is not None
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: alarms(server)["max_data"] == 0, "the new limit was taken over")
    assert told(server, "fill-alarm-over") == [95, 90, 80]
    assert client.request(Command.WRITE, written * MIB, data=data).error == 0


def test_more_than_overcommit_allows_is_refused_with_the_numbers(server: Server) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        server.command("volume", "create", "disk1", "--size", "100M")
    assert caught.value.returncode == 2
    assert "volume disk1 of 100M would make 300.0 MiB of volumes on 64.0 MiB of room" in caught.value.stderr
    assert "overcommit: 4 allows 256.0 MiB" in caught.value.stderr
    server.command("volume", "create", "disk1", "--size", "50M")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        server.command("volume", "resize", "disk1", "--size", "60M")
    assert "disk1 with 60M would make" in caught.value.stderr
    capacity = json.loads(server.command("status", "--json"))["capacity"]
    assert (capacity["overcommit"], capacity["provisioned_bytes"]) == (4.0, 250 * MIB)


def test_a_volumes_limit_is_set_live_and_counts_its_snapshots(server: Server) -> None:
    client = Client(("127.0.0.1", server.port), "disk0", timeout_s=30.0)
    data = bytes(range(256)) * (MIB // 256)
    for number in range(10):
        assert client.request(Command.WRITE, number * MIB, data=data).error == 0
    with pytest.raises(subprocess.CalledProcessError) as caught:
        server.command("volume", "set", "disk0", "max-data=8M")
    assert "less than 16M, which is 16 segments of 1M" in caught.value.stderr
    server.command("volume", "set", "disk0", "max-data=20M")
    server.command("snapshot", "create", "disk0@kept")
    written = 0
    while (error := client.request(Command.WRITE, written * MIB, data=data[::-1]).error) == 0:
        written += 1
        assert written < 12
    assert error == ReplyError.ENOSPC
    assert alarms(server)["volume disk0"] >= 90
    shown = ask(server, "/v1/volumes/disk0")
    assert (shown["state"], shown["disk"]["full"], shown["settings"]["max_data"]) == ("full", "max-data", 20 * MIB)
    assert "max-data=20M" in server.command("volume", "list")

    server.stop()
    client.close()
    server.start()
    client = Client(("127.0.0.1", server.port), "disk0", timeout_s=30.0)
    assert ask(server, "/v1/volumes/disk0")["settings"]["max_data"] == 20 * MIB
    assert alarms(server)["volume disk0"] >= 90
    server.command("snapshot", "delete", "disk0@kept")
    eventually(lambda: client.request(Command.WRITE, 9 * MIB, data=data).error == 0, "the snapshot's room came back")
    server.command("volume", "set", "disk0", "max-data=none")
    assert "volume disk0" not in alarms(server)


def test_every_metric_of_the_alert_rules_and_the_dashboard_is_there(
    processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    certificates = tmp_path / "certificates"
    for arguments in (["ca"], ["node", "localhost"]):
        assert run_command(["cert", *arguments, "--dir", str(certificates)]) == 0
    settings = tmp_path / "node.yaml"
    tls = f"certificate: {certificates}/server-cert.pem, key: {certificates}/server-key.pem, verify_clients: false"
    settings.write_text(SETTINGS % (port := free_port()) + f"tls: {{mode: allowed, {tls}}}\n")
    Server(processes, tmp_path / "data", free_port(), {"disk0": "64M"}, ["--config", str(settings)])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        there = set(re.findall(r"(?m)^(nbdserver_\w+)", answer.read().decode()))
    of_others = ("nbdserver_cluster_", "nbdserver_replicas_")  # this one stands alone
    of_a_node = {name for name in metrics() if not name.startswith(of_others)}
    assert len(of_a_node) > 30
    assert not of_a_node - there
