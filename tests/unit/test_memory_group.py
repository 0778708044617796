"""Where the benchmark finds the memory controller."""

from pathlib import Path

import pytest

from tests.benchmark.memory_group import controller_root

ROOT = "/dev/vda / ext4 rw,relatime 0 0\n"
FIRST = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
SECOND = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0\n"
OFFERED = {"memory": "cpu io memory pids", "none": ""}


@pytest.mark.parametrize(
    ("mounts", "offered", "found"),
    [
        (ROOT + FIRST, "none", (Path("/sys/fs/cgroup/memory"), 1)),
        (ROOT + SECOND, "memory", (Path("/sys/fs/cgroup/unified"), 2)),
        (ROOT + SECOND + FIRST, "none", (Path("/sys/fs/cgroup/memory"), 1)),
        (ROOT + SECOND, "none", None),
        (ROOT, "none", None),
    ],
    ids=["version 1", "version 2", "both mounted, memory in version 1", "version 2 without memory", "none"],
)
def test_the_memory_controller_is_found_in_either_version(
    mounts: str, offered: str, found: tuple[Path, int] | None
) -> None:
    assert controller_root(mounts, lambda mount_point: OFFERED[offered]) == found
