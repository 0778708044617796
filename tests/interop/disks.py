"""File systems of a test's own, which run full and whose device stands still: what a real disk does at its worst.

Theory: an ext4 lies in an image file, by a loop device, and that file lies on another ext4, by another loop device.
Freezing the one below makes the device above stand still as one does that hangs: what the page cache takes goes on, an
fdatasync waits. It is thawed by the same shell that freezes it, whatever becomes of the test.

Only root may do this.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Processes

BLOCK_BYTES = 4096
FILLER = "filler"
BELOW_BYTES = 96 << 20
"""Of the file system below, beyond the image: its journal and the like."""


class NoDiskError(Exception):
    """This machine does not let us mount one; the text says what it answered."""


def mount_image(image: Path, point: Path, size_bytes: int, needs: Callable[[str, str], str]) -> None:
    """Mount at `point` an empty ext4 of that size, which is made in the file `image`. NoDiskError."""
    if os.geteuid() != 0:
        raise NoDiskError("only root may mount a file system of its own")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    # No reserved blocks: full is full, for root too.
    subprocess.run([needs("mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-m", "0", image], check=True)
    answer = subprocess.run(["mount", "-o", "loop", image, point], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise NoDiskError(f"no loop mounts here: {answer.stderr.strip()}")


def unmount(point: Path) -> None:
    """Who uses it has ended."""
    subprocess.run(["umount", "--lazy", point], check=True)


class Disk:
    """One file system, mounted at `point` until `close`."""

    def __init__(
        self, processes: Processes, images: Path, point: Path, size_bytes: int, needs: Callable[[str, str], str]
    ) -> None:
        """NoDiskError. `images` is a directory of its own, which is made."""
        self.point = point
        self._processes = processes
        self._below = images / "below"
        self._mounted: list[Path] = []
        self._below.mkdir(parents=True)
        point.mkdir(exist_ok=True)
        try:
            mount_image(images / "image", self._below, size_bytes + BELOW_BYTES, needs)
            self._mounted.append(self._below)
            mount_image(self._below / "image", point, size_bytes, needs)
            self._mounted.append(point)
        except NoDiskError:
            self.close()
            raise

    def close(self) -> None:
        """Unmount it; who uses it has ended."""
        while self._mounted:
            unmount(self._mounted.pop())

    def stand_still(self, still_s: float, times: int = 1, between_s: float = 0.0) -> None:
        """The device stands still for so long, and again; returns when it goes on."""
        freezing = f"fsfreeze --freeze {self._below} && sleep {still_s}; fsfreeze --unfreeze {self._below}"
        script = f"; sleep {between_s}; ".join([freezing] * times)
        process = self._processes.start(["sh", "-c", script])
        assert process.wait() == 0, "the file system could not be frozen"

    def fill(self, left_bytes: int = 0) -> None:
        """Somebody else takes all the room, but for so much."""
        with (self.point / FILLER).open("wb") as file:
            size_bytes, more_bytes = 0, shutil.disk_usage(self.point).free - left_bytes
            while more_bytes >= BLOCK_BYTES:
                try:
                    os.posix_fallocate(file.fileno(), size_bytes, more_bytes)
                    size_bytes += more_bytes
                except OSError:
                    more_bytes //= 2

    def give_back(self) -> None:
        """What `fill` has taken."""
        (self.point / FILLER).unlink()
