"""Three whole nodes on machines of their own network, an etcd beside them, one volume on all three, and a client that
judges what it reads: what may happen to replicated volumes when machines cannot reach each other.

Theory: a *round* does something to the cluster while a client writes, waits for what has to be possible meanwhile,
mends it, and waits until all replicas are in sync again. The client comes by a unix socket of a node, which no cut
touches, as a host does that is its own node. In the end the nodes are stopped and their directories compared: all
replicas have to hold the same, and that has to be what the client reads.

Rules
- Nothing acknowledged may be missing, ever: no round takes a machine's memory away.
- Who was cut off while it owned the volume answers nothing from then on, reads included.
"""

import contextlib
import errno
import json
import random
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from protocol.nbd import Command
from tests.cluster_rig import ClusterNode, ClusterRig, meet, run, wait
from tests.conftest import Processes
from tests.durability import BLOCK_BYTES, Judge
from tests.etcd_cluster import QUICK, EtcdCluster
from tests.interop.disks import Disk
from tests.interop.site import HUB, HUB_ADDRESS, Site
from tests.nbd_client import Client

NODES = ("n1", "n2", "n3")
VOLUME = "db"
SIZE = "128M"
SETTINGS = "segment: 4M\ncache: 64M\n"
BLOCKS = 2000
ANSWER_S = 60.0
GRANT_OVER_S = 1.5
STILL_S = 4.0
SILENT = "it is silent"
SLOW = "its disk is slow"
DISK_BYTES = 500 << 20
LEFT_BYTES = 120 << 20
BULK_FROM = 16 << 20  # what lies behind it in the volume is not judged
PIECE_BYTES = 1 << 20
PIECE = b"0123456789abcdef" * (PIECE_BYTES // 16)
WRITTEN_S = 0.5  # before and after something happens
LONGEST_S = 15.0
"""No write takes longer than this when a replica goes; it is a second on a machine with nothing else to do."""


class Writing:
    """A client that writes in a thread of its own, until it is told to end."""

    def __init__(self, judge: Judge, client: Client) -> None:
        self._judge = judge
        self._client = client
        self._is_over = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> "Writing":
        self._thread.start()
        time.sleep(WRITTEN_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            time.sleep(WRITTEN_S)
        self._is_over = True
        self._thread.join()
        self._client.close()
        if self._error is not None and error is None:
            raise self._error

    def _write(self) -> None:
        try:
            while not self._is_over:
                self._judge.write_until(self._client, time.monotonic() + 0.2, finish=True)
        except Exception as error:
            self._error = error

    def goes_on(self) -> None:
        """Wait until writes have been answered that were sent from now on."""
        before = self._judge.writes
        wait(lambda: self._judge.writes >= before + 200 or self._error is not None, "writes go on")
        if self._error is not None:
            raise self._error


def node_disks(processes: Processes, path: Path, needs: Callable[[str, str], str], undo: ExitStack) -> dict[str, Disk]:
    """A file system of its own for each node, until `undo`. NoDiskError."""
    disks: dict[str, Disk] = {}
    for name in NODES:
        disks[name] = Disk(processes, path / "disks" / name, path / name, DISK_BYTES, needs)
        undo.callback(disks[name].close)
    return disks


class ReplicaSite:
    """The nodes n1, n2 and n3, of which n1 made the cluster."""

    def __init__(
        self,
        site: Site,
        processes: Processes,
        path: Path,
        free_port: Callable[[], int],
        rng: random.Random,
        disks: Mapping[str, Disk],
    ) -> None:
        """Below `path` each node has a directory of its name, where its disk is mounted (`node_disks`)."""
        self.site = site
        self.disks = disks
        self.rng = rng
        self.judge = Judge(BLOCKS, rng)
        self.etcd = EtcdCluster(
            processes, path / "etcd", free_port, 1, QUICK, None, HUB_ADDRESS, HUB_ADDRESS, site.within
        )  # fmt: skip
        rig = ClusterRig(processes, path, free_port, self.etcd.endpoints, (), site)
        self.nodes: dict[str, ClusterNode] = {}
        for name in NODES:
            config = rig.make(name)
            config.write_text(f"{config.read_text()}socket: {path / name / 'nbd.sock'}\n{SETTINGS}")
            self.nodes[name] = rig.serve(config)
        meet(list(self.nodes.values()))
        self.nodes["n1"].server.command("volume", "create", VOLUME, "--size", SIZE, "--replicas", "3")

    # --- asking ---

    def attach(self, name: str) -> Client:
        """A client at that node."""
        return Client(str(self.nodes[name].config.parent / "nbd.sock"), VOLUME, ANSWER_S)

    def look(self, name: str) -> Client:
        """A client at that node, which has found everything that was acknowledged."""
        client = self.attach(name)
        self.judge.check(client, acknowledged_too=True)
        return client

    def owner(self) -> str:
        """Who owns the volume, as all know."""
        found: set[str] = set()

        def is_told() -> bool:
            found.clear()
            found.update(node.replicas(VOLUME)["owner"] for node in self.nodes.values())
            return len(found) == 1

        wait(is_told, "all know one owner")
        return found.pop()

    def others(self, *names: str) -> list[str]:
        return [name for name in NODES if name not in names]

    def one_of(self, *names: str) -> str:
        return self.rng.choice(names)

    def in_sync(self, name: str) -> list[str]:
        """Who is, as that node knows."""
        found = self.nodes[name].replicas(VOLUME)["nodes"]
        return [each["node"] for each in found if each["state"] == "in sync"]

    def _removals(self, owner: str, gone: str) -> list[str]:
        """Why that node's replica was removed, each time, as the owner has told."""
        return [event["reason"] for event in self.nodes[owner].events("replica-removed") if event["node"] == gone]

    def settle(self) -> None:
        """Wait until all know each other, and all replicas are in sync."""
        meet(list(self.nodes.values()))
        for node in self.nodes.values():
            wait(lambda node=node: node.replicas(VOLUME)["in_sync"] == len(NODES), "all are in sync")  # type: ignore[misc]

    # --- what happens ---

    @contextmanager
    def _writing(self, owner: str) -> Iterator[Writing]:
        """A client writes at the owner meanwhile; no write takes long."""
        self.judge.longest_s = 0.0
        with Writing(self.judge, self.look(owner)) as writing:
            yield writing
        assert self.judge.longest_s < LONGEST_S, f"a write took {self.judge.longest_s:.1f} s"

    def isolate(self, name: str) -> None:
        """It reaches nobody, etcd neither, and nobody reaches it."""
        self.site.part([name], [*self.others(name), HUB])

    def _go_on_without(self, owner: str, gone: str, cut: Callable[[], None]) -> None:
        """After that cut the replica on `gone` is let go, until the cut is mended."""
        with self._writing(owner) as writing:
            cut()
            wait(lambda: gone not in self.in_sync(owner), f"{gone} is not in sync any more")
            writing.goes_on()
            self.site.mend()
            self.settle()

    def cut_a_replica_off(self) -> None:
        """It reaches nobody, etcd neither, and nobody reaches it."""
        owner = self.owner()
        gone = self.one_of(*self.others(owner))
        self._go_on_without(owner, gone, lambda: self.isolate(gone))

    def cut_one_way(self) -> None:
        """Between the owner and a replica frames get through in one direction alone."""
        owner = self.owner()
        gone = self.one_of(*self.others(owner))
        source, target = self.rng.sample([owner, gone], 2)
        self._go_on_without(owner, gone, lambda: self.site.cut([source], [target]))

    def cut_the_owner_off(self) -> None:
        """It reaches nobody and nobody reaches it: its clients get no answer, and another one takes over. When it is
        back they go on there, or are let go."""
        owner = self.owner()
        heir = self.one_of(*self.others(owner))
        old = self.look(owner)
        self.judge.may_come_late(self.judge.write_until(old, time.monotonic() + WRITTEN_S))
        self.isolate(owner)
        time.sleep(GRANT_OVER_S)
        drain(old)
        block = self.rng.randrange(BLOCKS)
        old.send(Command.READ, block * BLOCK_BYTES, BLOCK_BYTES)

        client = self.look(heir)
        self.judge.write_until(client, time.monotonic() + WRITTEN_S, finish=True)
        assert not is_answered(old), f"{owner} answers, although {heir} has taken over"
        self.site.mend()
        answers = read_or_gone(old)
        assert not answers or client.read(block * BLOCK_BYTES, BLOCK_BYTES) in answers, f"{heir} has answered otherwise"
        old.close()
        self.settle()
        self.judge.check(client, acknowledged_too=True)
        client.close()
        assert self.owner() == heir

    def cut_the_master_off(self) -> None:
        """The master of the directory, whichever part it has in the volume."""
        wait(lambda: len({node.cluster()["master"] for node in self.nodes.values()} - {""}) == 1, "all have one master")
        master = str(self.nodes["n1"].cluster()["master"])
        if master == self.owner():
            self.cut_the_owner_off()
            return
        owner = self.owner()
        with self._writing(owner) as writing:
            self.isolate(master)
            wait(lambda: self.nodes[owner].cluster()["master"] not in ("", master), "another one is the master")
            writing.goes_on()
            self.site.mend()
            self.settle()

    def cut_the_registry_off(self) -> None:
        """etcd is reached by nobody: what needs no change goes on. A replica that dies then stops the volume until etcd
        is back, visibly."""
        owner = self.owner()
        gone = self.one_of(*self.others(owner))
        node = self.nodes[gone]
        with Writing(self.judge, self.look(owner)) as writing:
            self.site.part(list(NODES), [HUB])
            wait(lambda: "registry (etcd" in self.nodes[owner].findings(), "that etcd is gone is told")
            writing.goes_on()
            node.server.kill9()
            wait(lambda: f"waits for {gone} to answer" in self.nodes[owner].findings(), "what is waited for is told")
            before = self.judge.writes
            time.sleep(GRANT_OVER_S)
            assert self.judge.writes == before, f"a write was acknowledged without {gone}, which is a member"
            self.site.mend()
            writing.goes_on()
            node.server.start()
            self.settle()

    # --- what happens to disks ---

    def a_disk_stands_still(self) -> None:
        """The device of a replica hangs for a while: flushes wait for it, not long, and it is in sync again after. Its
        process may hang with it, in an append that the kernel does not let in, and is silent then."""
        owner = self.owner()
        slow = self.one_of(*self.others(owner))
        removals = len(self._removals(owner, slow))
        with self._writing(owner) as writing:
            standing = threading.Thread(target=self.disks[slow].stand_still, args=(STILL_S,))
            standing.start()
            wait(lambda: len(self._removals(owner, slow)) > removals, f"{slow} is not in sync any more")
            if self._removals(owner, slow)[-1] != SILENT:
                wait(lambda: SLOW in self.nodes[owner].findings(), "that its disk is slow is told")
            writing.goes_on()
            standing.join()
            self.settle()

    def a_disk_is_slow(self) -> None:
        """The device of a replica hangs again and again, each time for less long than would cost it its place."""
        owner = self.owner()
        with self._writing(owner) as writing:
            self.disks[self.one_of(*self.others(owner))].stand_still(0.3, times=8, between_s=0.1)
            writing.goes_on()
            self.settle()

    def a_disk_is_full(self) -> None:
        """Somebody takes most room of a replica's file system, and clients write until theirs is used up: writes are
        refused (unless that node has been too slow to stay in sync), reads and trims go on. When the room is given back
        all goes on by itself."""
        owner = self.owner()
        full = self.one_of(*self.others(owner))
        self.judge.may_refuse = errno.ENOSPC
        with Writing(self.judge, self.look(owner)) as writing:
            client = self.attach(owner)
            self.disks[full].fill(LEFT_BYTES)
            more = range(BULK_FROM, client.size_bytes, PIECE_BYTES)
            is_refused = any(client.request(Command.WRITE, at, data=PIECE).error for at in more)
            assert is_refused or full not in self.in_sync(owner), "a replica without room has taken everything"
            assert client.read(BULK_FROM, PIECE_BYTES) == PIECE
            wait(lambda: f"{full} is " in self.nodes[owner].findings(), f"that {full} is full is told")
            assert client.request(Command.TRIM, BULK_FROM, client.size_bytes - BULK_FROM).error == 0
            self.disks[full].give_back()
            wait(lambda: client.request(Command.WRITE, BULK_FROM, data=PIECE).error == 0, "there is room again")
            assert client.request(Command.TRIM, BULK_FROM, PIECE_BYTES).error == 0
            client.close()
            writing.goes_on()
        self.judge.may_refuse = 0
        self.settle()

    def a_disk_is_taken_whole(self) -> None:
        """Somebody takes a replica's file system to the last block: the volume goes on without it, as without one that
        has died, and it comes back by itself when the room is given back."""
        owner = self.owner()
        full = self.one_of(*self.others(owner))
        self.judge.may_refuse = errno.ENOSPC  # while it reports that it has no room, and is not done without yet
        with Writing(self.judge, self.look(owner)) as writing:
            client = self.attach(owner)
            self.disks[full].fill()
            for at in range(BULK_FROM, client.size_bytes, PIECE_BYTES):
                client.request(Command.WRITE, at, data=PIECE)
            assert client.request(Command.TRIM, BULK_FROM, client.size_bytes - BULK_FROM).error == 0
            client.close()
            self.disks[full].give_back()
            writing.goes_on()
        self.judge.may_refuse = 0
        self.settle()

    # --- the end ---

    def stop_and_compare(self) -> None:
        """What is on the disks of all nodes is the same, and what a client has read."""
        self.settle()
        client = self.look(self.owner())
        size_bytes = client.size_bytes
        client.close()
        for node in self.nodes.values():
            node.server.stop()
        told = [self._check(node) for node in self.nodes.values()]
        assert told[0] == told[1] == told[2], f"the replicas differ: {told}"
        (export,) = told[0]["exports"]
        assert (export["name"], export["size_bytes"]) == (VOLUME, size_bytes)
        assert export["digest"]

    @staticmethod
    def _check(node: ClusterNode) -> dict[str, Any]:
        done = run("check", VOLUME, "--data", str(node.server.data), "--digest", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)["volumes"][VOLUME]["contents"]
        assert found["regions_to_fetch"] == 0
        return dict(found)


def is_answered(client: Client) -> bool:
    """Whether anything has come: an answer, or the end of the connection."""
    return bool(select.select([client.socket], [], [], 0)[0])


def drain(client: Client) -> None:
    """Take what has come until now."""
    while is_answered(client):
        assert client.socket.recv(1 << 20), "the connection is closed"


def read_or_gone(client: Client) -> bytes:
    """All that comes until a block was read, which has been asked for last, or the connection is closed."""
    came = b""
    with contextlib.suppress(ConnectionError):
        while len(came) < BLOCK_BYTES:
            assert select.select([client.socket], [], [], ANSWER_S)[0], "the connection stands still"
            if not (data := client.socket.recv(1 << 20)):
                return b""
            came += data
    return came
