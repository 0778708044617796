"""A control group that bounds the memory of a server, its page cache included.

Theory. The kernel charges a page of the page cache to the group of the process that first touched it. So a server
that was started in such a group, and that has written its whole disk from there, has at most the limit of it in
memory, whatever the machine has. Each server gets a group of its own with the same limit; a server's own memory counts
too, for all of them.

Both versions of the memory controller do; which one is mounted is looked up. Groups lie below the controller's root,
which takes root's rights.

Rules
- Nobody else reads the disk's files: what another process brought in is charged to that one, and is free.
- The group stays while its server is stopped and started again; `remove` when nothing of it runs any more.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from .processes import BenchmarkError

LEAST_BYTES = 256 << 20  # below it, servers spend their time on being short of memory
_REMOVE_TIMEOUT_S = 10.0


def controller_root(mounts: str, controllers: Callable[[Path], str]) -> tuple[Path, int] | None:
    """Where the memory controller is mounted, and its version, by the text of /proc/self/mounts; None if nowhere.

    `controllers` reads what a mount of version 2 offers.
    """
    for line in mounts.splitlines():
        _, mount_point, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(mount_point), 1
        if kind == "cgroup2" and "memory" in controllers(Path(mount_point)).split():
            return Path(mount_point), 2
    return None


def _controllers(mount_point: Path) -> str:
    return (mount_point / "cgroup.controllers").read_text()


class MemoryGroup:
    """One group with a limit, made now. BenchmarkError where the kernel or our rights do not give that."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        found = controller_root(Path("/proc/self/mounts").read_text(), _controllers)
        if found is None:
            raise BenchmarkError("no memory cgroup is mounted, version 1 or 2: page caches cannot be limited here")
        root, version = found
        self.path = root / f"nbdserver-benchmark-{os.getpid()}-{name}"
        try:
            if version == 2 and "memory" not in (root / "cgroup.subtree_control").read_text().split():
                (root / "cgroup.subtree_control").write_text("+memory")
            self.path.mkdir()
        except OSError as error:
            raise BenchmarkError(f"cannot make the cgroup {self.path} ({error.strerror}): run it as root") from None
        try:
            limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
            (self.path / limit).write_text(str(limit_bytes))
        except OSError as error:
            self.path.rmdir()
            raise BenchmarkError(f"cannot limit the cgroup {self.path}: {error.strerror}") from None

    def entering(self, command: list[str]) -> list[str]:
        """The command, begun by a shell that goes into the group and becomes the command."""
        return ["sh", "-c", f'echo $$ > "{self.path}/cgroup.procs" && exec "$@"', "sh", *command]

    def remove(self) -> None:
        """Remove it; a process that is just ending is waited for."""
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        while True:
            try:
                self.path.rmdir()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"cannot remove the cgroup {self.path}: {error.strerror}") from None
                time.sleep(0.05)
