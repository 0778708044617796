"""Real nodes that form a cluster on loopback, as tests start, ask, stop and kill them."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from nbdserver.node.authority import Authority
from tests.conftest import Processes
from tests.serving import Server

DAY = timedelta(days=1)
KEY = "5a" * 32
TIMEOUT_S = 40.0


def wait(holds: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"it takes too long: {what}"
        time.sleep(0.1)


class ClusterNode:
    """A node with a settings file."""

    def __init__(self, processes: Processes, config: Path, port: int) -> None:
        self.config = config
        settings = yaml.safe_load(config.read_text())
        self.name = str(settings["cluster"]["node"])
        self.server = Server(processes, Path(settings["data"]), port, {}, ("--config", str(config)))

    def ask(self, *arguments: str) -> Any:
        """What a command prints with --json."""
        return json.loads(self.server.command(*arguments, "--json"))

    def cluster(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("status")["cluster"]
        return found

    def up(self) -> list[str]:
        """The names of the nodes that it takes for alive, if it is active itself."""
        cluster = self.cluster()
        return [node["name"] for node in cluster["nodes"] if node["state"] == "up"] if cluster["is_active"] else []

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = self.server.command("events", "--limit", "2000", "--json").splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


class ClusterRig:
    """What the nodes of a cluster share."""

    def __init__(
        self, processes: Processes, directory: Path, free_port: Callable[[], int], endpoints: tuple[str, ...]
    ) -> None:
        self._processes = processes
        self._directory = directory
        self._free_port = free_port
        self._endpoints = endpoints
        self.authority = Authority(directory / "ca")
        self.authority.make_ca("test cluster", DAY)

    def write_settings(self, name: str, key: str = KEY, authority: Authority | None = None, **changes: Any) -> Path:
        """A settings file for one more node."""
        directory = self._directory / name
        member = Authority(directory)
        ca = (authority or self.authority).directory
        directory.mkdir()
        for file in ("ca-cert.pem", "ca-key.pem"):
            (directory / file).write_bytes((ca / file).read_bytes())
        member.make_member(name, DAY)
        (directory / "cluster.key").write_text(key + "\n")
        settings = {
            "data": str(directory / "data"),
            "cluster": {
                "name": "test",
                "node": name,
                "address": f"127.0.0.1:{self._free_port()}",
                "key_file": str(directory / "cluster.key"),
                "tls": {
                    "ca": str(directory / "ca-cert.pem"),
                    "certificate": str(directory / "node-cert.pem"),
                    "key": str(directory / "node-key.pem"),
                },
                "registry": {"endpoints": list(self._endpoints)},
                **changes,
            },
        }
        config = directory / "node.yaml"
        config.write_text(yaml.safe_dump(settings))
        return config

    def start(self, name: str, **changes: Any) -> ClusterNode:
        return ClusterNode(self._processes, self.write_settings(name, **changes), self._free_port())
