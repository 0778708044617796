"""Guests with a node in each, whose power is cut while a judge outside writes to them.

The node runs without its HTTP API, whose libraries take ten seconds to load in an emulated processor. A machine that is
powered on does not boot: it goes on from a state in which no disk was mounted yet (frozen.py).

Known weakness: the disk itself loses nothing. That a write reached the disk but not its medium is the simulation's to
show.
"""

import base64
import contextlib
import json
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.durability import Judge, LostError
from tests.kernel.frozen import DISK_BYTES, LOG, SHAPE, START, FrozenNode
from tests.kernel.guest import Guest, Link
from tests.nbd_client import Client

PORT = 10809
DESK_PORT = 10812
VOLUME = "disk0"
VOLUME_BYTES = 256 << 20
JUDGED_BLOCKS = 4096  # 16 MiB, overwritten again and again: segments fill up with what is dead, and are recycled
START_TIMEOUT_S = 600.0
NEVER = 0
ENTROPY_BYTES = 64

# Segments so small that some seconds of an emulated machine fill, seal and recycle many.
SETTINGS = f"data: /data/node\nlisten: 0.0.0.0:{PORT}\nsegment: 4M\ncache: 64M\nmax_connections: 16\n"


class NotServedError(LostError):
    """The server does not serve what it finds after the power cut."""


class Machine:
    """A machine with a disk and a node on it, which is powered on and off."""

    def __init__(
        self,
        frozen: FrozenNode,
        folder: Path,
        settings: str,
        forward: Mapping[int, int],
        *,
        volume: Sequence[str | int] = (),
        files: Mapping[str, bytes] | None = None,
        links: Sequence[Link] = (),
        network: str = "",
        without_sync: bool = False,
    ) -> None:
        """`settings` are those of the node, which is told to make `volume` (name, bytes); `files` are what it
        needs besides, by name below /code; `forward` and `links` are those of a guest; `network` is the commands that
        make use of the links."""
        self.generation = 0
        """Of the volume, as of the last time it was powered on."""
        self.disk = folder / "data.img"
        self._frozen = frozen
        self._folder = folder
        self._forward = dict(forward)
        self._files = {"node.yaml": settings.encode(), **(files or {})}
        self._links = links
        self._network = network
        self._told = {
            "settings": "/code/node.yaml",
            "volume": list(volume),
            "desk_port": DESK_PORT,
            "path": ["/code/without_sync"] if without_sync else [],
        }
        with self.disk.open("wb") as image:
            image.truncate(DISK_BYTES)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", self.disk], check=True)

    def power_on(self) -> Guest:
        """A guest that goes on with this disk; `begin` must follow."""
        return Guest(
            self._frozen.images,
            self._folder,
            shape=SHAPE,
            disks=[self._frozen.images.disk, self.disk],
            forward=self._forward,
            links=self._links,
            state=self._frozen.state,
        )

    def begin(self, guest: Guest, writeback_centisecs: int = NEVER) -> None:
        """Let it start its node, which `wait_until_ready` waits for.

        What is not synced is written back when it has been dirty for `writeback_centisecs`: never, so that a cut takes
        all of it, or soon, so that a cut finds any part of it on the disk.
        """
        told = {**self._told, "entropy": secrets.token_hex(ENTROPY_BYTES)}
        guest.wait_until_up(START_TIMEOUT_S)
        guest.run(
            f"date -s @{int(time.time())}\n"
            f"echo {writeback_centisecs} | tee /proc/sys/vm/dirty_writeback_centisecs "
            "/proc/sys/vm/dirty_expire_centisecs\n"
            f"{self._network}\n"
            "blockdev --flushbufs /dev/vdb; mount -t ext4 /dev/vdb /python/data\n"
            + "".join(
                f"echo {base64.b64encode(content).decode()} | base64 -d >/code/{name}\n"
                for name, content in self._files.items()
            )
            + f"echo '{json.dumps(told)}' >{START}",
            START_TIMEOUT_S,
        )

    def wait_until_ready(self, guest: Guest) -> None:
        """NotServedError if the node ends."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            log = guest.run(f"cat {LOG}", START_TIMEOUT_S)
            if "node-ended" in log:
                raise NotServedError(f"the node ended; it printed: {log}")
            if re.search(r"^ready$", log, re.MULTILINE):
                generation = re.search(r"^generation (\d+)$", log, re.MULTILINE)
                self.generation = int(generation[1]) if generation else 0
                return
            time.sleep(0.2)
        raise AssertionError(f"the node was not ready in {START_TIMEOUT_S:.0f} s; it printed: {log}")


class SingleNode(Machine):
    """A machine whose node stands alone, with one volume."""

    def __init__(self, frozen: FrozenNode, folder: Path, port: int, without_sync: bool = False) -> None:
        volume = (VOLUME, VOLUME_BYTES)
        super().__init__(frozen, folder, SETTINGS, {port: PORT}, volume=volume, without_sync=without_sync)
        self._port = port

    @contextlib.contextmanager
    def start(self, writeback_centisecs: int = NEVER) -> Iterator[Client]:
        """Power on and connect; the power fails at the end."""
        with self.power_on() as guest:
            self.begin(guest, writeback_centisecs)
            self.wait_until_ready(guest)
            client = Client(("127.0.0.1", self._port), VOLUME, timeout_s=START_TIMEOUT_S)
            try:
                yield client
            finally:
                guest.kill()  # before the connection is closed: the cut comes in the middle of writes
                client.close()


def write_until_the_power_fails(
    node: SingleNode, judge: Judge, duration_s: float, writeback_centisecs: int = NEVER
) -> None:
    """Power on, check what is there, write; the power fails in the middle of it."""
    with node.start(writeback_centisecs) as client:
        judge.check(client, acknowledged_too=False)
        judge.write_until(client, time.monotonic() + duration_s)
