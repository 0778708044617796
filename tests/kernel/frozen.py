"""A guest that has booted, loaded the node's modules and waits to be told what it is: its state, from which machines
with a node in them go on.

Theory: most of the time that an emulated machine needs until it serves goes into its kernel's boot and Python's
imports, which touch no disk of the test. So they are done once, for all machines of all tests. What a disk holds was
not looked at by then, but for the kernel's look for partitions, which is forgotten when the machine goes on. Which
clock and which random numbers a machine has is told to it (node_in_guest.py), the boot id among them.

Kept beside the images, under a key of the product's code.
"""

import fcntl
import hashlib
import py_compile
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT, product_sources
from tests.kernel.build import CACHE, Images
from tests.kernel.guest import Guest, Shape

SHAPE = Shape(memory_mib=512, processors=1, links=2)
DISK_BYTES = 2 << 30
FREEZE_TIMEOUT_S = 600.0
START = "/tmp/start"
LOG = "/tmp/node.log"
OF_THE_TEST = ("frozen.py", "node_in_guest.py", "guest.py")

UNCHECKED_HASH = py_compile.PycInvalidationMode.UNCHECKED_HASH
WITHOUT_SYNC = b"import os\nos.fdatasync = lambda descriptor: None\n"


@dataclass(frozen=True)
class FrozenNode:
    """What machines go on from, and what they boot from if they have to."""

    images: Images
    state: Path


def frozen_node(images: Images) -> FrozenNode:
    """The state, made now or before; several test processes may ask at once."""
    with (CACHE / "frozen-lock").open("w") as lock:  # its own: who needs but the images does not wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = product_sources()
        texts = [path.read_bytes() for path in (*sources, *(Path(__file__).with_name(name) for name in OF_THE_TEST))]
        names = "\n".join(str(path.relative_to(ROOT)) for path in sources)
        key = hashlib.sha256(b"\0".join([names.encode(), *texts])).hexdigest()[:16]
        frozen = FrozenNode(images, images.disk.with_name(f"node-{key}.state"))
        if not frozen.state.exists():
            for old in frozen.state.parent.glob("node-*.state"):
                old.unlink()
            with tempfile.TemporaryDirectory(prefix="frozen-", dir=frozen.state.parent) as scratch:
                freeze(images, Path(scratch), frozen.state)
        return frozen


def freeze(images: Images, scratch: Path, state: Path) -> None:
    disk = scratch / "data.img"
    with disk.open("wb") as image:
        image.truncate(DISK_BYTES)
    files = {
        **compiled(scratch),
        "code/node_in_guest.py": Path(__file__).with_name("node_in_guest.py").read_bytes(),
        "code/without_sync/sitecustomize.py": WITHOUT_SYNC,
    }
    with Guest(images, scratch, shape=SHAPE, files=files, disks=[images.disk, disk]) as guest:
        guest.wait_until_up(FREEZE_TIMEOUT_S)
        python = f"chroot /python {images.python}"
        guest.run(
            "mount -t ext4 -o ro /dev/vda /python\n"
            "for folder in dev proc code; do mount --bind /$folder /python/$folder; done\n"
            f"export PYTHONPATH=/code:{images.python_path}\n"
            f"mkfifo {START}\n"
            f"(set +e; {python} /code/node_in_guest.py <>{START} >{LOG} 2>&1; echo node-ended with $? >>{LOG}) &\n"
            f"{python} -c 'import nbdserver.node.data'",  # so that a data process finds all it needs in memory
            FREEZE_TIMEOUT_S,
        )
        deadline_s = time.monotonic() + FREEZE_TIMEOUT_S
        while "loaded" not in (log := guest.run(f"cat {LOG}", FREEZE_TIMEOUT_S)):
            assert time.monotonic() < deadline_s, f"the node's modules are not loaded: {log}"
            time.sleep(0.2)
        written = scratch / "state"
        guest.freeze(written)
        shutil.move(written, state)


def compiled(scratch: Path) -> dict[str, bytes]:
    """The product's modules as {path in the guest: compiled content}, because compiling them there takes seconds."""
    files = {}
    for source in product_sources():
        target = scratch / "module.pyc"
        py_compile.compile(str(source), str(target), doraise=True, invalidation_mode=UNCHECKED_HASH)
        files[f"code/{source.relative_to(ROOT).with_suffix('.pyc')}"] = target.read_bytes()
    return files
