"""Three guests with a node of one cluster in each, and a replica of one volume on each, whose power is cut.

Theory: a guest is wired to each other one by a link of its own, and has one address for both of its links. The host is
where etcd runs, which keeps its power, and where the judge and fio write from, through a port of the host's loopback
for each guest. The volume is followed through all cuts; what it may show after each of them is for these two to say.

- *Of all at once*: as on one machine, everything that was flushed is there.
- *While one of those that were in sync keeps its power*: everything that was acknowledged is there.

Either way all replicas hold the same when they are in sync again: it is served by each of them in turn, from its own
disk, and read whole; and when all are off, `nbdserver check --digest` tells the same of what lies in their images.
"""

import contextlib
import json
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metadata.replica_set import ReplicaSet
from nbdserver.node.authority import Authority
from nbdserver.node.cluster_files import KEY_BYTES, Keys, write_keys
from protocol.nbd import Command
from tests.conftest import ROOT, Processes
from tests.durability import Judge
from tests.etcd_cluster import DAY, QUICK, EtcdCluster
from tests.kernel.frozen import FrozenNode
from tests.kernel.guest import HOST, Guest, Link
from tests.kernel.powered import DESK_PORT, JUDGED_BLOCKS, NEVER, PORT, SETTINGS, VOLUME, Machine
from tests.kernel.sliced_fio import FROM, SIZE_BYTES, SlicedFio
from tests.nbd_client import Client, RefusedError
from tests.serving import PROGRAM

NODES = ("n1", "n2", "n3")
PATIENCE_S = 600.0
"""Three emulated machines may share a busy processor: whoever waits is told what for, but not hurried."""
VALUES = "nbdserver/power/replicas/"
"""In etcd, which has no other family."""
ASK_TIMEOUT_S = 300.0
LOOK_S = 0.2
LOOK_AT_WRITES_S = 0.05


class PoweredReplicas:
    """The cluster, its volume and its judge; off at first."""

    def __init__(
        self,
        frozen: FrozenNode,
        folder: Path,
        processes: Processes,
        free_port: Callable[[], int],
        generator: random.Random,
        fio: str,
        say: Callable[[str], None] = print,
    ) -> None:
        self.judge = Judge(JUDGED_BLOCKS, generator)
        self._random = generator
        self._folder = folder
        self._processes = processes
        self._fio = fio
        self.say = say
        self._etcd = EtcdCluster(processes, folder / "etcd", free_port, 1, QUICK)
        self._clients = {name: free_port() for name in NODES}
        self._desks = {name: free_port() for name in NODES}
        self._guests: dict[str, Guest] = {}
        wires = {frozenset(pair): (free_port(), free_port()) for pair in _pairs()}
        authority = Authority(folder, overwrite=True)
        authority.make_ca("nbdserver cluster power", DAY)
        write_keys(folder / "key", Keys(generator.randbytes(KEY_BYTES)))
        self._machines = {}
        for name in NODES:
            (folder / name).mkdir()
            certificate, key = authority.make_member(name, DAY).files
            files = {"key": folder / "key", "ca.pem": authority.ca_certificate, "node.pem": certificate, "key.pem": key}
            others = [other for other in NODES if other != name]
            ports = [wires[frozenset((name, other))][:: 1 if name < other else -1] for other in others]
            self._machines[name] = Machine(
                frozen,
                folder / name,
                SETTINGS + cluster_settings(name, self._etcd.members[0].endpoint),
                {self._clients[name]: PORT, self._desks[name]: DESK_PORT},
                files={file: path.read_bytes() for file, path in files.items()},
                links=[Link(*pair) for pair in ports],
                network=wired(name, others),
            )

    def close(self) -> None:
        """All are off."""
        self.cut(self.powered)

    # --- power ---

    @property
    def powered(self) -> list[str]:
        return sorted(self._guests)

    def power_on(self, names: Sequence[str]) -> None:
        """Power these on, all at once, and wait until their nodes are ready."""
        began_s = time.monotonic()
        for name in names:
            self._guests[name] = self._machines[name].power_on()
        for name in names:
            self._machines[name].begin(self._guests[name], self._random.choice((NEVER, 10, 50)))
        for name in names:
            self._machines[name].wait_until_ready(self._guests[name])
        self.say(f"  {', '.join(names)} ready after {time.monotonic() - began_s:.0f} s")

    def cut(self, names: Sequence[str]) -> None:
        """Cut the power of these at once."""
        guests = [self._guests.pop(name) for name in names]
        for guest in guests:
            guest.process.kill()
        for guest in guests:
            guest.kill()

    # --- what the nodes say ---

    def ask(self, name: str, ask: str, /, **arguments: Any) -> Any:
        """What a node answers; AssertionError with its reason."""
        with (
            socket.create_connection(("127.0.0.1", self._desks[name]), ASK_TIMEOUT_S) as desk,
            desk.makefile() as lines,
        ):
            desk.sendall(json.dumps({"ask": ask, **arguments}).encode() + b"\n")
            answered = json.loads(lines.readline() or '{"error": "the node does not answer"}')
        assert "answer" in answered, answered["error"]
        return answered["answer"]

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        problem: Exception | None = None
        while time.monotonic() < deadline_s:
            try:
                if holds():
                    return
            except (AssertionError, OSError) as error:
                problem = error
            time.sleep(LOOK_S)
        raise AssertionError(f"not in {PATIENCE_S:.0f} s: {what}; {problem}")

    def owner(self, name: str) -> str:
        """Who owns the volume, as a node knows it."""
        return str(self.ask(name, "volume", name=VOLUME)["replicas"]["owner"])

    def value(self) -> ReplicaSet:
        """What the registry says of the volume, which is what counts when power is cut."""
        (value,) = self._etcd.control("get", "--prefix", VALUES, "--print-value-only").split()
        return ReplicaSet.decode(value.encode())

    def in_sync(self) -> set[str]:
        """The nodes whose replicas are."""
        return {member.node for member in self.value().in_sync}

    def make_volume(self) -> None:
        """Make the volume when all nodes are up."""
        for name in NODES:
            self.wait(lambda name=name: self._sees_all(name), f"{name} knows all")  # type: ignore[misc]
        self.ask(NODES[0], "create", name=VOLUME, size_bytes=FROM + SIZE_BYTES, replicas=len(NODES))
        self.wait_in_sync()

    def _sees_all(self, name: str) -> bool:
        rows = self.ask(name, "cluster")["nodes"]
        return sorted(row["name"] for row in rows if row["state"] == "up" and row["data_addresses"]) == list(NODES)

    def wait_in_sync(self) -> float:
        """Wait until all three replicas are in sync; returns how long that took, in seconds."""
        began_s = time.monotonic()
        self.wait(lambda: self.in_sync() == set(NODES), "all replicas are in sync")
        return time.monotonic() - began_s

    # --- clients ---

    def attach(self, name: str) -> Client:
        """Attach through a node, as soon as it finds who serves the volume."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return Client(("127.0.0.1", self._clients[name]), VOLUME, PATIENCE_S)
            except (RefusedError, OSError):
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(LOOK_S)

    def start_fio(self, client: Client, name: str) -> SlicedFio:
        """fio writes through that node from now on, where `client` has trimmed."""
        assert client.request(Command.TRIM, FROM, SIZE_BYTES).error == 0
        seed = self._random.randrange(1 << 32)
        return SlicedFio(self._processes, self._fio, self._folder / f"fio-{seed}", self._clients[name], seed)

    def verify(self, fio: SlicedFio) -> None:
        """Let fio find what it wrote, by any node, which serves it from its own disk."""
        fio.verify(self._clients[self._random.choice(self.powered)])

    def look(self, client: Client, acknowledged_too: bool) -> None:
        """Find what must be there; what is seen must be there from now on, so it is flushed."""
        self.judge.check(client, acknowledged_too)
        assert client.request(Command.FLUSH).error == 0

    def read_from(self, name: str) -> None:
        """Let a node own the volume, and read it: from its own disk."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.closing(self.attach(name)) as client:
                if self.owner(name) == name:
                    self.look(client, acknowledged_too=True)
                    return
            assert time.monotonic() < deadline_s, f"{name} does not own the volume in {PATIENCE_S:.0f} s"
            time.sleep(LOOK_S)

    def check(self, acknowledged_too: bool) -> None:
        """Look for what must be there; then what was seen must be what every replica shows by itself."""
        first, *others = self._random.sample(self.powered, len(self.powered))
        with contextlib.closing(self.attach(first)) as client:
            self.look(client, acknowledged_too)
        for name in (*others, first):
            self.read_from(name)

    def digests(self, folder: Path) -> dict[str, Any]:
        """Cut the power of all after `check`, and tell what each image holds by the offline check; {node: contents}."""
        with contextlib.closing(self.attach(NODES[0])) as client:
            self.wait_in_sync()
            assert client.request(Command.FLUSH).error == 0
        self.cut(self.powered)
        found = {}
        for name, machine in self._machines.items():
            place = folder / f"{name}-copy"
            place.mkdir()
            done = subprocess.run(["e2fsck", "-fp", machine.disk], capture_output=True, text=True, check=False)
            assert done.returncode in (0, 1), done.stdout
            subprocess.run(["debugfs", "-R", f"rdump /node {place}", machine.disk], check=True, capture_output=True)
            command = [*PROGRAM, "--data", str(place / "node"), "check", VOLUME, "--digest", "--json"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name}: {done.stdout} {done.stderr}"
            found[name] = json.loads(done.stdout)["volumes"][VOLUME]["contents"]
            shutil.rmtree(place)
        return found

    @contextlib.contextmanager
    def writing(self, client: Client) -> Iterator["Writing"]:
        """The judge writes meanwhile, in another thread."""
        writing = Writing(self.judge, client)
        writing.thread.start()
        try:
            yield writing
        finally:
            writing.stop()


class Writing:
    """The judge while it writes, until it is stopped or the connection is cut."""

    def __init__(self, judge: Judge, client: Client) -> None:
        self.is_cut = False
        self.failure: Exception | None = None
        self._judge = judge
        self._client = client
        self._until_s = float("inf")
        self.thread = threading.Thread(target=self._write, daemon=True)

    def _write(self) -> None:
        try:
            while time.monotonic() < self._until_s:
                self._judge.write_until(self._client, time.monotonic() + LOOK_AT_WRITES_S, finish=True)
        except ConnectionError:
            self.is_cut = True
        except Exception as error:  # told by whoever waits
            self.failure = error

    @property
    def done(self) -> int:
        return self._judge.writes + self._judge.flushes

    def go_on(self, for_s: float, more: int) -> None:
        """Wait until time has passed and that many more requests are answered, a flush among them."""
        began_s, flushes = time.monotonic(), self._judge.flushes
        wanted, until_s, give_up_s = self.done + more, began_s + for_s, began_s + PATIENCE_S
        while self.thread.is_alive() and (
            self.done < wanted or self._judge.flushes == flushes or time.monotonic() < until_s
        ):
            assert time.monotonic() < give_up_s, f"{self.done - wanted + more} of {more} requests are answered"
            time.sleep(0.01)
        assert self.failure is None, self.failure

    def wait_until_cut(self) -> None:
        """Wait until it has noticed that the node it is attached to is gone."""
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "the connection of a node without power goes on"

    def stop(self) -> None:
        """Let it finish what is under way; AssertionError for what was answered wrongly."""
        self._until_s = 0.0
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "requests are not answered"
        assert self.failure is None, self.failure


def _pairs() -> list[tuple[str, str]]:
    return [(one, other) for one in NODES for other in NODES if one < other]


def address(name: str) -> str:
    return f"10.9.0.{NODES.index(name) + 1}"


def cluster_settings(name: str, etcd: str) -> str:
    """The part of a node's settings that is about the cluster."""
    _, _, port = etcd.rpartition(":")
    return (
        f"cluster:\n  name: power\n  node: {name}\n  address: {address(name)}:10810\n  data_tls: false\n"
        "  key_file: /code/key\n"
        "  tls: {ca: /code/ca.pem, certificate: /code/node.pem, key: /code/key.pem}\n"
        f"  registry: {{endpoints: ['{HOST}:{port}']}}\n"
    )


def wired(name: str, others: Sequence[str]) -> str:
    """The commands that give a guest its address, and the links to others."""
    number = NODES.index(name)
    links = "".join(
        f"ip link set eth{link} address 52:54:00:00:{number:02x}:{link:02x}; ip link set eth{link} up; "
        f"ip route add {address(other)}/32 dev eth{link} src {address(name)}\n"
        for link, other in enumerate(others, 1)
    )
    return f"ip addr add {address(name)}/32 dev lo\n{links}"
