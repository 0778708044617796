"""The power fails for real: the server runs inside a guest, its data on a virtio disk, and QEMU is killed with -9.

What the guest's kernel had not written to its disk is gone then, page cache and all. The judge stands outside: it
writes over the network, notes what was flushed, and reads everything back after the next boot, which starts the
server on the same disk. So a round costs one boot. The node runs without its HTTP API, whose libraries take ten
seconds to load in an emulated processor.

Known weakness: the disk itself loses nothing. That a write reached the disk but not its medium is the simulation's to
show.
"""

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.durability import Judge, LostError
from tests.kernel.build import Images
from tests.kernel.guest import Guest
from tests.nbd_client import Client

ROUNDS = int(os.environ.get("POWER_LOSS_ROUNDS", "3"))
SEED = int(os.environ.get("POWER_LOSS_SEED", str(random.SystemRandom().randrange(1 << 32))))
PORT = 10809
VOLUME = "disk0"
VOLUME_SIZE = "256M"
JUDGED_BLOCKS = 4096  # 16 MiB, overwritten again and again: segments fill up with what is dead, and are recycled
SEGMENT = "4M"  # so that some seconds of an emulated machine fill, seal and recycle many
DISK_BYTES = 2 << 30
SHORTEST_S, LONGEST_S = 0.5, 4.0
START_TIMEOUT_S = 60.0

NODE = Path(__file__).with_name("node_in_guest.py").read_text()
WITHOUT_SYNC = b"import os\nos.fdatasync = lambda descriptor: None\n"


class NotServedError(LostError):
    """The server does not serve what it finds after the power cut."""


class Machine:
    """A guest with the node in it; every `start` is a power-on with the same disk."""

    def __init__(self, images: Images, folder: Path, port: int, without_sync: bool = False) -> None:
        self._images = images
        self._folder = folder
        self._port = port
        self._environment = f"PYTHONPATH={'/code/without_sync:' if without_sync else ''}/code:{images.python_path}"
        self._disk = folder / "data.img"
        with self._disk.open("wb") as image:
            image.truncate(DISK_BYTES)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", self._disk], check=True)

    @contextlib.contextmanager
    def start(self) -> Iterator[Client]:
        """Power on, start the node, connect; the power fails at the end. NotServedError if the node does not serve."""
        files = {
            f"code/{path.relative_to(ROOT)}": path.read_bytes()
            for package in ("protocol", "metadata", "nbdserver")
            for path in (ROOT / package).rglob("*.py")
        }
        files["code/node_in_guest.py"] = NODE.encode()
        files["code/without_sync/sitecustomize.py"] = WITHOUT_SYNC
        disks = [self._images.disk, self._disk]
        with Guest(self._images, self._folder, files=files, disks=disks, forward={self._port: PORT}) as guest:
            guest.run(
                # Nothing is written back because of its age: what reaches the disk was synced, or had to make room.
                "echo 0 >/proc/sys/vm/dirty_writeback_centisecs; echo 360000 >/proc/sys/vm/dirty_expire_centisecs\n"
                "mount -t ext4 -o ro /dev/vda /python; mount -t ext4 /dev/vdb /python/data\n"
                "for folder in dev proc code; do mount --bind /$folder /python/$folder; done\n"
                f"export {self._environment}\n"
                f"(set +e; chroot /python {self._images.python} /code/node_in_guest.py "
                f"/data/node 0.0.0.0:{PORT} {SEGMENT} {VOLUME} {VOLUME_SIZE} >/tmp/node.log 2>&1; "
                "echo node-ended with $? >>/tmp/node.log) &"
            )
            self._wait_until_ready(guest)
            client = Client(("127.0.0.1", self._port), VOLUME, timeout_s=START_TIMEOUT_S)
            try:
                yield client
            finally:
                guest.kill()  # before the connection is closed: the cut comes in the middle of writes
                client.close()

    def _wait_until_ready(self, guest: Guest) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            log = guest.run("cat /tmp/node.log 2>/dev/null || true")
            if "ready" in log:
                return
            if "node-ended" in log:
                raise NotServedError(f"the node ended; it printed: {log}")
            time.sleep(0.2)
        raise AssertionError(f"the node was not ready in {START_TIMEOUT_S:.0f} s; it printed: {log}")


@pytest.fixture
def machine(guest_images: Images, tmp_path: Path, free_port: Callable[[], int]) -> Callable[..., Machine]:
    return lambda **options: Machine(guest_images, tmp_path, free_port(), **options)


def write_until_the_power_fails(machine: Machine, judge: Judge, duration_s: float) -> None:
    with machine.start() as client:
        judge.check(client, acknowledged_too=False)
        judge.write_until(client, time.monotonic() + duration_s)


def test_a_power_cut_loses_nothing_that_was_flushed(machine: Callable[..., Machine]) -> None:
    print(f"POWER_LOSS_SEED={SEED}")
    generator = random.Random(SEED)
    guest = machine()
    judge = Judge(JUDGED_BLOCKS, generator)
    for number in range(ROUNDS):
        flushes = judge.flushes
        write_until_the_power_fails(guest, judge, generator.uniform(SHORTEST_S, LONGEST_S))
        print(f"round {number + 1} of {ROUNDS}: {judge.writes} writes, {judge.flushes} flushes so far")
        assert judge.flushes > flushes, "a round without a flush shows nothing"
    with guest.start() as client:
        judge.check(client, acknowledged_too=False)


def test_a_build_that_does_not_sync_is_found_out_by_a_power_cut(machine: Callable[..., Machine]) -> None:
    guest = machine(without_sync=True)
    judge = Judge(JUDGED_BLOCKS, random.Random(SEED))
    write_until_the_power_fails(guest, judge, LONGEST_S)
    assert judge.flushes
    with pytest.raises(LostError), guest.start() as client:
        judge.check(client, acknowledged_too=False)
