"""A guest with the node in it, whose power is cut while a judge outside writes to it.

The node runs without its HTTP API, whose libraries take ten seconds to load in an emulated processor.

Known weakness: the disk itself loses nothing. That a write reached the disk but not its medium is the simulation's to
show.
"""

import contextlib
import py_compile
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.conftest import ROOT
from tests.durability import Judge, LostError
from tests.kernel.build import Images
from tests.kernel.guest import Guest
from tests.nbd_client import Client

PORT = 10809
VOLUME = "disk0"
VOLUME_BYTES = 256 << 20
JUDGED_BLOCKS = 4096  # 16 MiB, overwritten again and again: segments fill up with what is dead, and are recycled
SEGMENT_BYTES = 4 << 20  # so that some seconds of an emulated machine fill, seal and recycle many
DISK_BYTES = 2 << 30
START_TIMEOUT_S = 120.0
NEVER = 0

UNCHECKED_HASH = py_compile.PycInvalidationMode.UNCHECKED_HASH
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
        self._code = compiled(("protocol", "metadata", "nbdserver"), folder)
        self._environment = f"PYTHONPATH={'/code/without_sync:' if without_sync else ''}/code:{images.python_path}"
        self.generation = 0  # of the volume, as of the last start
        self._disk = folder / "data.img"
        with self._disk.open("wb") as image:
            image.truncate(DISK_BYTES)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", self._disk], check=True)

    @contextlib.contextmanager
    def start(self, writeback_centisecs: int = NEVER) -> Iterator[Client]:
        """Power on, start the node, connect; the power fails at the end. NotServedError if the node does not serve.

        What is not synced is written back when it has been dirty for `writeback_centisecs`: never, so that a cut takes
        all of it, or soon, so that a cut finds any part of it on the disk.
        """
        files = {**self._code, "code/node_in_guest.py": NODE.encode()}
        files["code/without_sync/sitecustomize.py"] = WITHOUT_SYNC
        disks = [self._images.disk, self._disk]
        with Guest(self._images, self._folder, files=files, disks=disks, forward={self._port: PORT}) as guest:
            guest.run(
                f"echo {writeback_centisecs} | tee /proc/sys/vm/dirty_writeback_centisecs "
                "/proc/sys/vm/dirty_expire_centisecs\n"
                "mount -t ext4 -o ro /dev/vda /python; mount -t ext4 /dev/vdb /python/data\n"
                "for folder in dev proc code; do mount --bind /$folder /python/$folder; done\n"
                f"export {self._environment}\n"
                f"(set +e; chroot /python {self._images.python} /code/node_in_guest.py "
                f"/data/node 0.0.0.0:{PORT} {SEGMENT_BYTES} {VOLUME} {VOLUME_BYTES} >/tmp/node.log 2>&1; "
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
            ready = re.search(r"^generation (\d+)$", log, re.MULTILINE)
            if ready:
                self.generation = int(ready[1])
                return
            if "node-ended" in log:
                raise NotServedError(f"the node ended; it printed: {log}")
            time.sleep(0.2)
        raise AssertionError(f"the node was not ready in {START_TIMEOUT_S:.0f} s; it printed: {log}")


def compiled(packages: Sequence[str], scratch: Path) -> dict[str, bytes]:
    """The product's modules as {path in the guest: compiled content}, because compiling them there takes seconds."""
    files = {}
    for source in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        target = scratch / "module.pyc"
        py_compile.compile(str(source), str(target), doraise=True, invalidation_mode=UNCHECKED_HASH)
        files[f"code/{source.relative_to(ROOT).with_suffix('.pyc')}"] = target.read_bytes()
    return files


def write_until_the_power_fails(
    machine: Machine, judge: Judge, duration_s: float, writeback_centisecs: int = NEVER
) -> None:
    """Power on, check what is there, write; the power fails in the middle of it."""
    with machine.start(writeback_centisecs) as client:
        judge.check(client, acknowledged_too=False)
        judge.write_until(client, time.monotonic() + duration_s)
