"""Makes what a guest boots: Debian's cloud kernel, an initramfs with the tests' programs, and a disk with Python.

Nothing is installed and no root is needed: the kernel's package is downloaded and unpacked, the initramfs is written
here (newc is a simple format), the disk is made by `mke2fs -d`. Everything is kept in tests/kernel/.cache under a key
of the versions it was made from. Known weakness: programs and libraries are those of this machine, found by `ldd`.
"""

import fcntl
import gzip
import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "tests/kernel/.cache"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = {  # list of modules: what it is for. The first is loaded at boot, the others by `load_modules NAME`.
    "boot": ("virtio_pci", "virtio_net", "virtio_blk"),
    "nbd": ("nbd",),
    "xfs": ("xfs",),  # takes seconds, most of it a self-test of its checksum
}
PROGRAMS = {  # program: Debian package
    "busybox": "busybox-static",
    "nbd-client": "nbd-client",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
}
MISSING_PROGRAM = "{program} is missing: apt-get install {package}"

# What the server never imports; config-* holds the static library.
STDLIB_WITHOUT = {"test", "idlelib", "tkinter", "ensurepip", "lib2to3", "turtledemo", "pydoc_data", "site-packages"}
DISK_MARGIN = 1.4
DISK_MARGIN_BYTES = 16 << 20

LOAD_MODULES = """#!/bin/busybox sh
while read -r module; do [ -d /sys/module/$module ] || insmod /modules/$module.ko; done </modules/$1
"""
INIT = """#!/bin/busybox sh
# Runs the host's commands: a line of base64 comes in on the second serial port, its output and exit code go back.
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
load_modules boot
ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2
exec </dev/ttyS1 >/dev/ttyS1 2>/dev/console
stty raw -echo
echo guest-ready
while read -r number encoded; do
  echo "$encoded" | base64 -d >/tmp/command
  sh /tmp/command >/tmp/output 2>&1
  echo "$number $? $(base64 -w 0 </tmp/output)"
done
"""


class MissingError(Exception):
    """This machine lacks something; the message says what and how to get it."""


@dataclass(frozen=True)
class Images:
    """What a guest boots from. `python` and its libraries' `python_path` are seen from the root of the disk."""

    kernel: Path
    initramfs: Path
    disk: Path
    python: str
    python_path: str


def images() -> Images:
    """Return the images, made now or before; several test processes may ask at once. Raises MissingError."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cached_images()


def cached_images() -> Images:
    programs = {name: find_program(name, package) for name, package in PROGRAMS.items()}
    package = kernel_package()
    site_packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    key = hashlib.sha256(
        "\n".join(
            [
                Path(__file__).read_text(),
                package,
                *(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in programs.values()),
                sys.version,
                *(f"{path} {sorted(os.listdir(path))}" for path in site_packages),
            ]
        ).encode()
    ).hexdigest()[:16]
    folder = CACHE / key
    python = Path(sys.executable).resolve()
    made = Images(
        folder / "vmlinuz", folder / "initramfs.gz", folder / "disk.img", str(python), ":".join(site_packages)
    )
    if (folder / "complete").exists():
        return made
    for old in CACHE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    folder.mkdir()
    tree = unpack_kernel(package, folder)
    shutil.copyfile(next((tree / "boot").glob("vmlinuz-*")), made.kernel)
    make_initramfs(tree, programs, made.initramfs)
    shutil.rmtree(tree)
    make_python_disk(python, folder / "python", made.disk)
    made.disk.chmod(0o444)  # shared by every guest
    (folder / "complete").touch()
    return made


def find_program(name: str, package: str) -> Path:
    path = shutil.which(name)
    if path is None:
        raise MissingError(MISSING_PROGRAM.format(program=name, package=package))
    return Path(path).resolve() if name != "busybox" else Path(path)


# --- kernel ---------------------------------------------------------------------------------------------------------


def kernel_package() -> str:
    """The package that Debian's cloud kernel is in at present, by name."""
    package = kernel_in_lists() or (kernel_in_lists() if refresh_package_lists() else "")
    if not package:
        raise MissingError(f"no package lists with {KERNEL_PACKAGE} (Debian 12): apt-get update")
    return package


def kernel_in_lists() -> str:
    answer = subprocess.run(["apt-cache", "depends", KERNEL_PACKAGE], capture_output=True, text=True, check=False)
    found = re.search(r"Depends: (linux-image-\d\S+)", answer.stdout)
    return found[1] if found else ""


def unpack_kernel(package: str, folder: Path) -> Path:
    """Download and unpack (not install) the kernel's package; return the tree."""
    download = ["apt-get", "-qq", "download", package]
    answer = subprocess.run(download, cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode and refresh_package_lists():
        answer = subprocess.run(download, cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.deb"))
    if answer.returncode or len(archives) != 1:
        raise MissingError(f"apt-get download {package} failed: {answer.stderr.strip()}")
    tree = folder / "kernel"
    subprocess.run(["dpkg", "-x", archives[0], tree], check=True)
    archives[0].unlink()
    return tree


def refresh_package_lists() -> bool:
    """They may be missing or name a version that is gone. Only root can; True if it was done."""
    return os.geteuid() == 0 and subprocess.run(["apt-get", "-qq", "update"], check=False).returncode == 0


def module_order(tree: Path, wanted: Iterable[str]) -> list[Path]:
    """The wanted modules and what they depend on, in the order of loading. Built-in ones have no file: left out."""
    files = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for dependency in depends[1].decode().split(",") if depends and depends[1] else []:
            add(dependency)
        order.append(path)

    for name in wanted:
        add(name)
    return order


# --- initramfs ------------------------------------------------------------------------------------------------------


def newc(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the kernel's "newc" format of (path, mode, data). Archives may follow one another in a file."""
    parts = []
    for number, (path, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")]):
        name = path.encode() + b"\0"
        fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
    return b"".join(parts)


def with_folders(files: Iterable[tuple[str, int, bytes]]) -> Iterator[tuple[str, int, bytes]]:
    """Put the entries of the folders that files lie in before them."""
    seen: set[str] = set()
    for path, mode, data in files:
        for parent in reversed(Path(path).parents):
            if str(parent) not in seen and str(parent) != ".":
                seen.add(str(parent))
                yield str(parent), stat.S_IFDIR | 0o755, b""
        yield path, mode, data


def overlay(files: dict[str, bytes]) -> bytes:
    """What is appended to the initramfs for one guest: {path: content}."""
    archive = newc(with_folders((path.lstrip("/"), stat.S_IFREG | 0o755, data) for path, data in files.items()))
    return gzip.compress(archive, 1)


def make_initramfs(tree: Path, programs: dict[str, Path], target: Path) -> None:
    executable, folder = stat.S_IFREG | 0o755, stat.S_IFDIR | 0o755
    files: list[tuple[str, int, bytes]] = [("init", executable, INIT.encode())]
    files.append(("bin/load_modules", executable, LOAD_MODULES.encode()))
    modules: set[Path] = set()
    for name, wanted in MODULES.items():
        order = module_order(tree, wanted)
        modules.update(order)
        files.append((f"modules/{name}", executable, "".join(f"{path.stem}\n" for path in order).encode()))
    files += [(f"modules/{path.name}", executable, path.read_bytes()) for path in sorted(modules)]
    for name, path in programs.items():
        files.append((f"bin/{name}", executable, path.read_bytes()))
    for library in shared_libraries(programs.values()):
        files.append((str(library).lstrip("/"), executable, library.read_bytes()))
    files += [(name, folder, b"") for name in ("dev", "proc", "sys", "tmp", "mnt", "disk", "python", "sbin", "etc")]
    files.append(("etc/mtab", executable, b""))
    target.write_bytes(gzip.compress(newc(with_folders(files)), 1))


def shared_libraries(paths: Iterable[Path]) -> list[Path]:
    """What the dynamic loader would load for these programs or libraries, the loader itself too."""
    found: set[str] = set()
    for path in paths:
        answer = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
        found |= set(re.findall(r"(?:=> )?(/\S+) \(0x", answer.stdout))
    return sorted(Path(path) for path in found)


# --- the disk with Python -------------------------------------------------------------------------------------------


def make_python_disk(python: Path, tree: Path, target: Path) -> None:
    """An ext4 image with this interpreter, its library and this environment's packages, at the paths they have here."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    copy(python, tree)
    shutil.copytree(
        standard_library,
        tree / str(standard_library).lstrip("/"),
        ignore=lambda _, names: [name for name in names if name in STDLIB_WITHOUT or name.startswith("config-")],
    )
    for path in product_files():
        copy(path, tree)
    extensions = [path for path in tree.rglob("*.so*") if path.is_file()]
    for library in shared_libraries([python, *extensions]):
        if not (tree / str(library).lstrip("/")).exists() and not library.is_relative_to(tree):
            copy(library, tree)
    for name in ("code", "data", "dev", "proc", "sys", "tmp", "etc"):
        (tree / name).mkdir(exist_ok=True)
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    with target.open("wb") as image:
        image.truncate(int(size * DISK_MARGIN) + DISK_MARGIN_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, target], check=True)
    shutil.rmtree(tree)


def product_files() -> list[Path]:
    """Every file of the libraries that pyproject.toml names, and of those that they need in turn."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    files: list[Path] = []
    seen: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        name = re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")  # type: ignore[index]
        if name in seen or "extra ==" in requirement:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # only for another platform or Python
        wanted += distribution.requires or []
        files += installed_files(distribution)
    return [path for path in files if path.is_file() and ".." not in path.parts]


def installed_files(distribution: importlib.metadata.Distribution) -> list[Path]:
    """A pip before 23.1 that has no `wheel` installs source packages the old way, with a list of their own, of paths
    from the .egg-info on; `files` shows the sources' names then."""
    old_list = distribution.read_text("installed-files.txt")
    if old_list is not None:
        names = [line.removeprefix("../") for line in old_list.splitlines()]
    else:
        names = [str(file) for file in distribution.files or []]
    return [Path(str(distribution.locate_file(name))) for name in names]


def copy(path: Path, tree: Path) -> None:
    target = tree / str(path).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target)


if __name__ == "__main__":
    print(images())
