"""A cluster to look at: an etcd and three nodes on loopback, until Ctrl-C.

`python -m tests.local_cluster DIR` makes everything below DIR, which stays: the next start goes on with it. Ports are
drawn at the first start. Ends exactly the processes that it has started.
"""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NODES = ("n1", "n2", "n3")
READY_S = 60.0
STOP_S = 15.0
PROGRAM = [sys.executable, "-m", "nbdserver"]


def main(directory: Path) -> int:
    if shutil.which("etcd") is None:
        print("etcd is missing; install it: sudo apt-get install etcd-server", file=sys.stderr)
        return 1
    directory.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # who starts it in the background may have told it to ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    started: list[subprocess.Popen[bytes]] = []
    try:
        run(directory, started)
    except KeyboardInterrupt:
        print()
    finally:
        stop(started)
    return 0


def run(directory: Path, started: list[subprocess.Popen[bytes]]) -> None:
    ports = kept_ports(directory / "ports.json")
    print(f"starting etcd on 127.0.0.1:{ports['etcd']} ...", flush=True)
    etcd = etcd_command(directory / "etcd", ports["etcd"], ports["etcd-peer"])
    started.append(start(directory / "etcd.log", etcd))
    token = ""
    for name in NODES:
        config = directory / name / "node.yaml"
        if not config.exists():
            token = make(config, name, ports, token)
        print(f"starting {name} ...", flush=True)
        started.append(start(directory / f"{name}.log", [*PROGRAM, "serve", "--config", str(config)]))
        wait(lambda name=name: "is_active" in status(directory / name), started)  # type: ignore[misc]
    first = directory / NODES[0]
    wait(lambda: len(up(status(first))) == len(NODES), started)
    command = f"{shlex.quote(program())} --data {shlex.quote(str(first / 'data'))}"
    print(flush=True)
    subprocess.run([*PROGRAM, "--data", first / "data", "node", "list"], check=True)
    print("\nin another terminal, make a volume that is on all three, and look around:")
    print(f"  {command} volume create disk0 --size 1G --replicas 3")
    for words in ("status", "node list", "node show n2", "directory list", "directory watch load/", "events --follow"):
        print(f"  {command} {words}")
    print(f"see another node take over: kill -9 {started[1].pid} (that is {NODES[0]}; then ask --data .../n2/data)")
    for name in NODES:
        print(f"  status page of {name}: http://127.0.0.1:{ports[f'{name}-http']}/")
    print(
        f"what they print is in {directory}/*.log. Ctrl-C stops all; what they hold stays for the next time", flush=True
    )
    while True:
        time.sleep(1)


def program() -> str:
    """nbdserver as somebody types it here."""
    beside = Path(sys.executable).with_name("nbdserver")
    return os.path.relpath(beside) if shutil.which("nbdserver") is None and beside.exists() else "nbdserver"


def kept_ports(path: Path) -> dict[str, int]:
    if path.exists():
        ports: dict[str, int] = json.loads(path.read_text())
        return ports
    wanted = ["etcd", "etcd-peer", *(f"{name}-{what}" for name in NODES for what in ("nbd", "cluster", "http"))]
    free = free_ports(len(wanted))
    ports = dict(zip(wanted, free, strict=True))
    path.write_text(json.dumps(ports))
    return ports


def free_ports(count: int) -> list[int]:
    """Ports below those that the kernel gives to clients, free by TCP and UDP a moment ago."""
    found: list[int] = []
    for port in random.sample(range(10_000, 32_000), 2000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                stack.enter_context(socket.socket(socket.AF_INET, kind)).bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise SystemExit("no ports are free")


def etcd_command(data: Path, client_port: int, peer_port: int) -> list[str]:
    """An etcd of one member on loopback."""
    client, peer = (f"http://127.0.0.1:{port}" for port in (client_port, peer_port))
    return [
        *("etcd", "--name=local", f"--data-dir={data}", f"--initial-cluster=local={peer}"),
        *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
        *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
    ]


def make(config: Path, name: str, ports: dict[str, int], token: str) -> str:
    """The settings of a node: of the first the cluster's too; return a token."""
    config.parent.mkdir()
    config.write_text(
        f"data: {config.parent / 'data'}\n"
        f"listen: 127.0.0.1:{ports[f'{name}-nbd']}\n"
        f"http: {{listen: 127.0.0.1:{ports[f'{name}-http']}, public_read: true}}\n"
    )
    who = ["--config", str(config), "--node", name, "--address", f"127.0.0.1:{ports[f'{name}-cluster']}", "--json"]
    if not token and name != NODES[0]:
        first = config.parent.parent / NODES[0] / "node.yaml"
        made = subprocess.run(
            [*PROGRAM, "cluster", "token", "--config", first, "--json"], capture_output=True, check=True
        )
        token = str(json.loads(made.stdout)["token"])
    words = ["init", "local", "--etcd", f"127.0.0.1:{ports['etcd']}"] if name == NODES[0] else ["join", token]
    made = subprocess.run([*PROGRAM, "cluster", *words, *who], stdout=subprocess.PIPE, check=True)
    return str(json.loads(made.stdout).get("token", token))


def start(log: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """In a process group of its own: Ctrl-C comes to this program, which stops them in order."""
    with log.open("ab") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0)


def status(node: Path) -> dict[str, Any]:
    """The cluster as a node sees it; {} while it does not answer."""
    words = ["--data", str(node / "data"), "status", "--json"]
    asked = subprocess.run([*PROGRAM, *words], capture_output=True)
    return (json.loads(asked.stdout)["cluster"] or {}) if not asked.returncode else {}


def up(cluster: dict[str, Any]) -> list[str]:
    return [node["name"] for node in cluster.get("nodes", ()) if node["state"] == "up"]


def wait(holds: Any, started: list[subprocess.Popen[bytes]]) -> None:
    deadline_s = time.monotonic() + READY_S
    while not holds():
        ended = next((process for process in started if process.poll() is not None), None)
        if ended is not None:
            raise SystemExit(f"it has ended with {ended.returncode}: {' '.join(map(str, ended.args))}; see its log")
        if time.monotonic() > deadline_s:
            raise SystemExit(f"it has taken more than {READY_S:.0f} s; the logs say more")
        time.sleep(0.3)


def stop(started: list[subprocess.Popen[bytes]]) -> None:
    """The nodes first, all at once, then etcd."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    etcd, nodes = started[:1], started[1:]
    for group in (nodes, etcd):
        for process in group:
            if process.poll() is None:
                process.terminate()
        for process in group:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    print("stopped")


if __name__ == "__main__":
    sys.exit(main(Path(os.path.abspath(sys.argv[1]))))
