"""What the figures were measured on."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from .processes import BenchmarkError

IN_MEMORY_OR_REMOTE = {"tmpfs", "ramfs", "nfs", "nfs4", "cifs", "fuse", "9p"}


def file_system(directory: Path) -> str:
    """Type of the file system that holds `directory` (the longest mount point that is a prefix of it)."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount_point, mount_type = line.split()[:3]
        inside = str(directory.resolve()).startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) > len(best):
            best, kind = mount_point, mount_type
    return kind


def describe(directory: Path) -> dict[str, str | int | float]:
    """CPU, cores, memory, kernel, file system, and how busy the machine was."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
        "kernel": platform.release(),
        "file_system": file_system(directory),
        "load_before": round(os.getloadavg()[0], 2),
    }


def check_room(directory: Path, need_bytes: int) -> None:
    """BenchmarkError if `directory` is not on a real disk with that much room."""
    kind = file_system(directory)
    if kind in IN_MEMORY_OR_REMOTE:
        raise BenchmarkError(f"{directory} is on {kind}: choose a --directory on a local disk")
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise BenchmarkError(
            f"{directory} has {free >> 20} MiB free and {need_bytes >> 20} MiB are needed: "
            "choose another --directory or a smaller --size"
        )


def commit() -> str:
    """The source's commit, with `-dirty` when it was changed since; `unknown` without git or a repository."""
    if not shutil.which("git"):
        return "unknown"
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"
