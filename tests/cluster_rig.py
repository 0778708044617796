"""Real nodes that form a cluster, on loopback or on machines of a `Site`, as tests make, start, ask and end them."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT, Processes
from tests.interop.site import Site
from tests.serving import PROGRAM, Server, descendants, eventually

TIMEOUT_S = 60.0
SITE_PORT = 10810


def wait(holds: Callable[[], bool], what: str) -> None:
    """`eventually`, with the patience that a cluster needs."""
    eventually(holds, what, TIMEOUT_S)


def run(*arguments: str, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A command that needs no node; `within` comes before it."""
    command = [*within, *PROGRAM, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


class ClusterNode:
    """A node with a settings file."""

    def __init__(
        self,
        processes: Processes,
        config: Path,
        port: int,
        program: Sequence[str] = PROGRAM,
        cwd: Path | None = None,
    ) -> None:
        self.config = config
        settings = yaml.safe_load(config.read_text())
        self.name = str(settings["cluster"]["node"])
        self.server = Server(processes, Path(settings["data"]), port, {}, ("--config", str(config)), program, cwd)

    def ask(self, *arguments: str) -> Any:
        """What a command prints with --json."""
        printed = self.server.command(*arguments, "--json")
        return json.loads(printed) if printed else None

    def get(self, path: str) -> Any:
        """What the API answers; a command would take a second to start, and is asked again and again."""
        with self.server.api(timeout_s=20) as api:
            return api.get(path).raise_for_status().json()

    def refuses(self, *arguments: str) -> str:
        """The line that a command ends with, as wrong input."""
        done = run("--data", str(self.server.data), *arguments)
        assert done.returncode == 2, done.stderr
        return done.stderr

    def cluster(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/cluster")
        return found

    def up(self) -> list[str]:
        """The names of the nodes that it takes for alive, if it is active itself."""
        cluster = self.cluster()
        return [node["name"] for node in cluster["nodes"] if node["state"] == "up"] if cluster["is_active"] else []

    def findings(self) -> str:
        return "\n".join(
            f"{found['subject']} {found['problem']}; {found['remedy']}" for found in self.get("/v1/status")["findings"]
        )

    def node(self, name: str) -> dict[str, Any]:
        """What it knows of a node."""
        found: dict[str, Any] = self.get(f"/v1/nodes/{name}")
        return found

    def volume(self, name: str) -> dict[str, Any]:
        """What its status page shows of a volume, wherever that is; {} if it knows of none."""
        rows: list[dict[str, Any]] = self.get(f"/v1/overview?match={name}")["volumes"]["rows"]
        return next((row for row in rows if row["name"] == name), {})

    def replicas(self, volume: str) -> dict[str, Any]:
        """What it says of the replicas of a volume, whoever owns that."""
        found: dict[str, Any] = self.get(f"/v1/volumes/{volume}")["replicas"]
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.get("/v1/events?limit=2000") if event["kind"] == kind]

    def stand_still(self) -> Callable[[], None]:
        """All its processes are stopped; returns what lets them go on."""
        assert self.server.process is not None
        pids = [self.server.process.pid, *descendants(self.server.process.pid)]

        def tell(number: signal.Signals) -> None:
            for pid in pids:
                os.kill(pid, number)

        tell(signal.SIGSTOP)
        return lambda: tell(signal.SIGCONT)


def meet(nodes: Sequence[ClusterNode]) -> None:
    """Wait until each of them has all of them up, and knows where their data processes are."""
    names = sorted(node.name for node in nodes)
    wait(lambda: all(node.up() == names for node in nodes), f"{', '.join(names)} know each other")
    wait(
        lambda: all(row["data_addresses"] for node in nodes for row in node.get("/v1/nodes")),
        "where their data processes are",
    )


class ClusterRig:
    """Makes nodes: the first one the cluster too, the others join by its token."""

    def __init__(
        self,
        processes: Processes,
        directory: Path,
        free_port: Callable[[], int],
        endpoints: tuple[str, ...],
        etcd_options: Sequence[str] = (),
        site: Site | None = None,
    ) -> None:
        """`etcd_options` of `cluster init` say who a node is to etcd. On a site each node has a machine of its name."""
        self._processes = processes
        self._directory = directory
        self._free_port = free_port
        self._endpoints = endpoints
        self._etcd_options = etcd_options
        self._site = site
        self.token = ""

    def make(self, name: str, *more: str, cluster: str = "test") -> Path:
        """The settings of one more node; those that were there before the cluster are kept."""
        config = self._directory / name / "node.yaml"
        config.parent.mkdir(exist_ok=True)  # a file system of its own may be mounted there
        config.write_text(f"# of {name}\ndata: {config.parent / 'data'}\n")
        words = ["join", self.token] if self.token else ["init", cluster]
        if not self.token:
            words += [word for endpoint in self._endpoints for word in ("--etcd", endpoint)] + [*self._etcd_options]
        address = f"{self._site.add(name)}:{SITE_PORT}" if self._site else f"127.0.0.1:{self._free_port()}"
        who = ("--config", str(config), "--node", name, "--address", address)
        done = run("cluster", *words, *who, *more, "--json", within=self._on(name))
        assert not done.returncode, done.stderr
        assert config.read_text().startswith(f"# of {name}\n")
        self.token = self.token or json.loads(done.stdout)["token"]
        if not self._site:  # all on one machine: the port above a node's may be another one's
            own = f"cluster:\n  data_address: 127.0.0.1:{self._free_port()}\n"
            config.write_text(config.read_text().replace("cluster:\n", own, 1))
        return config

    def start(self, name: str, *more: str) -> ClusterNode:
        return self.serve(self.make(name, *more))

    def serve(self, config: Path, program: Sequence[str] = PROGRAM, cwd: Path | None = None) -> ClusterNode:
        """Start the node with these settings; another `program` runs in `cwd`."""
        program = (*self._on(config.parent.name), *program) if self._site else program
        return ClusterNode(self._processes, config, self._free_port(), program, cwd)

    def _on(self, name: str) -> list[str]:
        return self._site.on(name) if self._site else []

    def another(self) -> "ClusterRig":
        """Of another cluster that has the same etcd."""
        directory = self._directory / "another"
        directory.mkdir()
        return ClusterRig(self._processes, directory, self._free_port, self._endpoints)
