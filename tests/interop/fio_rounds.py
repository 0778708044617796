"""What fio wrote, and verifies, while something happens to one of three replicas: other people's judge beside ours.

Theory: fio writes random 4 KiB blocks with a checksum in each, every one once, and flushes now and then, by the socket
of one node. Its range is trimmed before, so that a write which is lost shows zeros. When the round is over it is ended
in the middle of its writes and says how far it has come (its verify state). What it had an answer for is then read and
verified through each of the other nodes: they take the volume over for that, and read their own disk.

How long a request took is in fio's log of latencies. It never had an error, unless a disk was full.

Known weakness: it writes so few blocks a second that one range is enough for a round.
"""

import errno
import json
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.nbd import Command
from tests.cluster_rig import wait
from tests.conftest import Processes
from tests.interop.replica_site import BULK_FROM, LONGEST_S, STILL_S, VOLUME, ReplicaSite

JOB = "fio"
RATE_IOPS = 400
FAST_IOPS = 2000
FAILED = 1
"""fio's exit code."""
RANGE_BYTES = 112 << 20
"""What is written in more than a minute at that rate."""
NO_ROOM_BYTES = 60 << 20
"""Less than what stays free for LevelDB: a disk with no more than that is full."""
READ_BACK = ("--verify_only", "--verify_state_load=1", "--verify_state_save=0", "--continue_on_error=verify")
WRITE = ("--do_verify=0", "--write_lat_log=log", "--fsync=32")
MORE_ANSWERS = 100
ANSWER_S = 120.0


class FioRounds:
    """Rounds of fio on the nodes of a site; `longest_s` has how long a request took, by what had happened."""

    def __init__(self, nodes: ReplicaSite, processes: Processes, path: Path, fio: str) -> None:
        """`path` is where fio keeps its state and its logs."""
        self.longest_s: dict[str, float] = {}
        self._nodes = nodes
        self._processes = processes
        self._path = path
        self._fio = fio
        self._seed = 1
        self._writer: subprocess.Popen[bytes] | None = None
        path.mkdir()

    # --- what happens ---

    def a_replica_is_killed(self) -> None:
        """kill -9; it is started again."""
        owner, gone = self._roles()
        server = self._nodes.nodes[gone].server
        with self._verified(owner, "a replica killed"):
            server.kill9()
            self._go_on_without(owner, gone)
            server.start()

    def a_replica_is_stopped(self) -> None:
        """SIGSTOP, until it is not in sync any more."""
        owner, gone = self._roles()
        with self._verified(owner, "a replica stopped"):
            goes_on = self._nodes.nodes[gone].stand_still()
            self._go_on_without(owner, gone)
            goes_on()

    def a_replica_is_cut_off(self) -> None:
        """It reaches nobody and nobody reaches it."""
        owner, gone = self._roles()
        with self._verified(owner, "a replica cut off"):
            self._nodes.isolate(gone)
            self._go_on_without(owner, gone)
            self._nodes.site.mend()

    def a_disk_stands_still(self) -> None:
        """The device of a replica hangs."""
        owner, slow = self._roles()
        disk = self._nodes.disks[slow]
        with self._verified(owner, "a disk standing still"):
            standing = threading.Thread(target=disk.stand_still, args=(STILL_S,))
            standing.start()
            self._go_on_without(owner, slow)
            standing.join()

    def a_disk_is_slow(self) -> None:
        """The device of a replica hangs again and again, each time for less long than would cost it its place."""
        owner, slow = self._roles()
        with self._verified(owner, "a slow disk"):
            self._nodes.disks[slow].stand_still(0.3, times=8, between_s=0.1)

    def a_disk_is_full(self) -> None:
        """fio is told so, or the volume goes on without that replica."""
        owner, full = self._roles()
        disk = self._nodes.disks[full]
        with self._verified(owner, "a full disk", FAST_IOPS, may_be_full=True) as fio:
            disk.fill(NO_ROOM_BYTES)

            wait(
                lambda: fio.poll() == FAILED or full not in self._nodes.in_sync(owner),
                f"that {full} has no room is noticed",
            )
            disk.give_back()

    def the_owner_is_killed(self) -> None:
        """fio has come to another node, which carries it on."""
        owner, host = self._roles()
        server = self._nodes.nodes[owner].server
        with self._verified(host, "the owner killed"):
            server.kill9()
            self._go_on_elsewhere(owner, host)
            server.start()

    def the_owner_is_stopped(self) -> None:
        """Until fio has gone on without it."""
        owner, host = self._roles()
        with self._verified(host, "the owner stopped"):
            goes_on = self._nodes.nodes[owner].stand_still()
            self._go_on_elsewhere(owner, host)
            goes_on()

    def the_owner_s_disk_stands_still(self) -> None:
        """Flushes wait for it; if its process stands still with it, another node goes on."""
        owner, host = self._roles()
        with self._verified(host, "the owner's disk standing still"):
            self._nodes.disks[owner].stand_still(STILL_S)

    # --- who has which part ---

    def _roles(self) -> tuple[str, str]:
        """(owner, another one)."""
        owner = self._nodes.owner()
        return owner, self._nodes.one_of(*self._nodes.others(owner))

    def _go_on_without(self, owner: str, gone: str) -> None:
        wait(lambda: gone not in self._nodes.in_sync(owner), f"{gone} is not in sync any more")
        self._write_more(owner)

    def _go_on_elsewhere(self, owner: str, host: str) -> None:
        wait(lambda: self._nodes.nodes[host].replicas(VOLUME)["owner"] != owner, f"{owner} owns it no more")
        self._write_more(self._nodes.nodes[host].replicas(VOLUME)["owner"])

    def _write_more(self, owner: str) -> None:
        """Wait until requests have been answered that were sent from now on, or fio has ended, whyever."""
        before, writer = self._answers(owner), self._writer
        assert writer is not None
        wait(lambda: self._answers(owner) >= before + MORE_ANSWERS or writer.poll() is not None, "fio goes on")

    def _answers(self, owner: str) -> int:
        """How many requests that owner has answered."""
        traffic = self._told(owner)["traffic"]
        return int(traffic["answers"]) if traffic else 0

    def _told(self, owner: str) -> dict[str, Any]:
        """What that node says of the volume."""
        told: dict[str, Any] = self._nodes.nodes[owner].get(f"/v1/volumes/{VOLUME}")
        return told

    # --- fio ---

    @contextmanager
    def _verified(
        self, host: str, what: str, rate_iops: int = RATE_IOPS, may_be_full: bool = False
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """fio writes meanwhile, by that node; in the end all replicas are in sync again, and show what it wrote."""
        folder = self._path / str(self._seed)
        folder.mkdir()
        self._trim()
        owner = self._nodes.owner()
        with self._held(owner) if host != owner else nullcontext():
            self._writer = fio = self._start(host, folder, *WRITE, f"--rate_iops={rate_iops}")
            self._write_more(owner)
        yield fio
        self._nodes.settle()
        self._write_more(self._nodes.owner())
        if fio.poll() is None:
            fio.send_signal(signal.SIGINT)
        done = self._end(fio, folder)
        assert done.error in ((0, errno.ENOSPC) if may_be_full else (0,)), f"{what}: {done.words}"
        assert done.operations["write"], f"{what}: {done.words}"
        longest_s = longest_request_s(folder, done)
        assert host != owner or longest_s < LONGEST_S, f"{what}: a request took {longest_s:.1f} s"
        self.longest_s[what] = max(self.longest_s.get(what, 0.0), longest_s)
        for name in self._nodes.others(self._nodes.owner()):
            self._verify(name, folder, done)
        shutil.rmtree(folder)
        self._seed += 1

    def _trim(self) -> None:
        with closing(self._nodes.look(self._nodes.owner())) as client:
            assert client.request(Command.TRIM, BULK_FROM, RANGE_BYTES).error == 0

    @contextmanager
    def _held(self, owner: str) -> Iterator[None]:
        """A client of that node has the volume, which so stays there when another one's client comes."""
        with self._nodes.nodes[owner].server.api() as api:
            api.patch(f"/v1/volumes/{VOLUME}", json={"shared": "true"}).raise_for_status()
            with closing(self._nodes.attach(owner)):
                yield
            api.patch(f"/v1/volumes/{VOLUME}", json={"shared": "false"}).raise_for_status()

    def _verify(self, name: str, folder: Path, written: "Done") -> None:
        """Read what was written through that node; what was refused may be there or not."""
        fio = self._start(name, folder, *READ_BACK)
        done = self._end(fio, folder)
        assert set(done.wrong) <= set(written.refused), f"through {name}: {done.words}"
        assert done.error == 0 or done.wrong, f"through {name}: {done.words}"
        assert done.operations["read"] >= written.operations["write"] - len(written.refused), f"through {name}: {done}"

    def _start(self, name: str, folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
        socket = self._nodes.nodes[name].config.parent / "nbd.sock"
        command = [
            self._fio, f"--name={JOB}", "--thread", "--ioengine=nbd", f"--uri=nbd+unix:///{VOLUME}?socket={socket}",
            "--rw=randwrite", "--bs=4k", f"--offset={BULK_FROM}", f"--size={RANGE_BYTES}", "--iodepth=4",
            "--randrepeat=0", f"--randseed={self._seed}", "--verify=crc32c", "--output-format=json", "--output=report",
            *arguments,
        ]  # fmt: skip
        with (folder / "words").open("wb") as words:
            return self._processes.start(command, cwd=folder, stdout=words, stderr=words)

    def _end(self, fio: "subprocess.Popen[bytes]", folder: Path) -> "Done":
        """What it says when it has ended, which it does now, and its node has noticed that."""
        fio.wait(ANSWER_S)
        wait(lambda: not self._told(self._nodes.owner())["clients"], "fio has left the volume")
        words, report = (folder / "words").read_text(), (folder / "report").read_text()
        assert "{" in report, words
        (job,) = json.loads(report[report.index("{") :])["jobs"]
        return Done(
            job["error"],
            {kind: job[kind]["total_ios"] for kind in ("read", "write", "sync")},
            job["sync"]["lat_ns"]["max"] / 1e9 if job["sync"]["total_ios"] else 0.0,
            [int(at) for at in re.findall(r"No space left on device: write offset=(\d+)", words)],
            [int(at) for at in re.findall(r"requested block: offset=(\d+)", words)],
            words[-2000:],
        )


@dataclass(frozen=True)
class Done:
    """What fio says when it has ended."""

    error: int
    operations: dict[str, int]
    """By kind."""
    longest_flush_s: float
    refused: list[int]
    """Offsets of writes that had no room."""
    wrong: list[int]
    """Offsets that do not show what was written."""
    words: str


def longest_request_s(folder: Path, done: Done) -> float:
    """From its submission to its answer: by the log of the writes, a line each, and what is told of flushes."""
    lines = (folder / "log_lat.1.log").read_text().splitlines()
    return max(done.longest_flush_s, *(int(line.split(",")[1]) / 1e9 for line in lines))
