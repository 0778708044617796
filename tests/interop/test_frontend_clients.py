"""Other people's clients against the NBD front end over memory: libnbd's tools, QEMU's tools, fio.

Every test runs twice: answered inline, and with everything deferred.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, Processes

SIZE_BYTES = 64 << 20
TIMEOUT_S = 60

Needs = Callable[[str, str], str]


@dataclass
class Served:
    """A running server's addresses."""

    tcp: str
    unix: str


@pytest.fixture(params=["inline", "deferring"])
def served(
    request: pytest.FixtureRequest, processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> Served:
    port = free_port()
    path = tmp_path / "nbd.sock"
    process = processes.start(
        [sys.executable, "-m", "tests.interop.serve_memory", str(SIZE_BYTES), request.param,
         f"127.0.0.1:{port}", f"unix:{path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready:\n"
    return Served(f"nbd://127.0.0.1:{port}/disk", f"nbd+unix:///disk?socket={path}")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Random data with holes."""
    path = tmp_path / "image"
    generator = random.Random(7)
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for start in range(0, SIZE_BYTES, 4 << 20):
            file.seek(start)
            file.write(generator.randbytes(1 << 20))
    return path


def run(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    # nbdsh is a script of the system's Python, not of the one that runs the tests.
    environment = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_nbdinfo_sees_size_description_flags_and_extents(served: Served, needs: Needs) -> None:
    nbdinfo = needs("nbdinfo", "libnbd-bin")
    told = json.loads(run(nbdinfo, "--json", served.tcp))
    (export,) = told["exports"]
    assert export["export-size"] == SIZE_BYTES
    assert export["description"] == "in memory"
    assert export["contexts"] == ["base:allocation"]
    assert export["block_size_preferred"] == 4096
    assert all(
        export[f"can_{what}"] for what in ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "df", "cache")
    )
    assert run(nbdinfo, "--size", served.unix).strip() == str(SIZE_BYTES)
    listed = json.loads(run(nbdinfo, "--json", "--list", served.unix.replace("/disk?", "/?")))
    assert [export["export-name"] for export in listed["exports"]] == ["disk"]
    (extent,) = json.loads(run(nbdinfo, "--map", "--json", served.tcp))
    assert (extent["length"], extent["type"]) == (SIZE_BYTES, 3)


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_brings_an_image_in_and_out(
    served: Served, needs: Needs, image: Path, tmp_path: Path, connections: int
) -> None:
    nbdcopy = needs("nbdcopy", "libnbd-bin")
    run(nbdcopy, f"--connections={connections}", "--flush", str(image), served.tcp)
    back = tmp_path / "back"
    run(nbdcopy, f"--connections={connections}", served.unix, str(back))
    assert back.read_bytes() == image.read_bytes()
    extents = json.loads(run(needs("nbdinfo", "libnbd-bin"), "--map", "--json", served.tcp))
    assert sum(extent["length"] for extent in extents) == SIZE_BYTES
    assert {extent["type"] for extent in extents} >= {0}


def test_qemu_img_converts_compares_and_maps(served: Served, needs: Needs, image: Path) -> None:
    qemu_img = needs("qemu-img", "qemu-utils")
    run(qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", "-t", "none", str(image), served.unix)
    assert "identical" in run(qemu_img, "compare", "-f", "raw", "-F", "raw", str(image), served.tcp)
    extents = json.loads(run(qemu_img, "map", "-f", "raw", "--output=json", served.tcp))
    assert sum(extent["length"] for extent in extents if extent["data"]) == SIZE_BYTES // 4


def test_qemu_io_reads_back_what_it_wrote_zeroed_and_discarded(served: Served, needs: Needs) -> None:
    qemu_io = needs("qemu-io", "qemu-utils")
    printed = run(
        qemu_io, "-f", "raw", "-c", "write -P 5 1000 100000", "-c", "read -P 5 1000 100000",
        "-c", "write -z 4096 65536",
        "-c", "read -P 0 4096 65536", "-c", "write -z -u 0 512", "-c", "write -f -P 9 5M 1M", "-c", "discard 6M 1M",
        "-c", "flush", "-c", "read -P 9 5M 1M", "-c", "aio_write -P 3 8M 16M", "-c", "aio_flush",
        "-c", "read -P 3 8M 16M", served.tcp,
    )  # fmt: skip
    assert "failed" not in printed
    assert "error" not in printed.lower()


LIBNBD_SCRIPT = """
import errno
h.set_request_structured_replies({structured})
if {structured}: h.add_meta_context("base:allocation")
h.set_strict_mode(0)
h.connect_uri("{uri}")
size = h.get_size()
assert h.get_structured_replies_negotiated() == {structured}
h.pwrite(b"x" * 5000, 3)
assert h.pread(5002, 2) == b"\\0" + b"x" * 5000 + b"\\0"
h.pwrite(b"y" * 512, size - 512, nbd.CMD_FLAG_FUA)
h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 4096)
h.cache(4096, 0)
h.flush()
assert h.pread(8192, 0) == bytes(8192)
for call, wanted in [
    (lambda: h.pwrite(b"z", size), errno.ENOSPC), (lambda: h.pread(1, size), errno.EINVAL),
    (lambda: h.zero(2, size - 1), errno.ENOSPC), (lambda: h.trim(2, size - 1), errno.EINVAL),
    (lambda: h.pread(1, 0, nbd.CMD_FLAG_NO_HOLE), errno.EINVAL),
]:
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == wanted, (error.errnum, wanted)
    else:
        raise AssertionError(wanted)
if {structured}:
    found = []
    h.block_status(16384, 0, lambda name, offset, entries, error: found.append((offset, entries)) or 0)
    h.block_status(size, 0, lambda *a: found.append(a[2]) or 0, nbd.CMD_FLAG_REQ_ONE)
    assert found[0][0] == 0 and sum(found[0][1][::2]) == 16384, found
    assert len(found[1]) == 2, found
    assert h.pread(65536, 0, nbd.CMD_FLAG_DF)[:1] == b"\\0"
assert len(h.pread(32 << 20, 0)) == 32 << 20
h.pwrite(b"w" * (32 << 20), 1)
assert h.pread(2, (32 << 20) - 1) == b"ww"
h.shutdown()
print("good")
"""


@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_gets_the_errors_of_the_protocol_and_the_largest_payload(
    served: Served, needs: Needs, structured: bool
) -> None:
    nbdsh = needs("nbdsh", "python3-libnbd")
    script = LIBNBD_SCRIPT.format(structured=structured, uri=served.tcp)
    assert run(nbdsh, "-c", script).strip() == "good"


@pytest.mark.parametrize("block", ["4k", "512", "128k"])
def test_fio_verifies_its_own_random_writes(served: Served, needs: Needs, tmp_path: Path, block: str) -> None:
    fio = needs("fio", "fio")
    run(
        fio, "--name=verify", "--verify_state_save=0", "--ioengine=nbd", f"--uri={served.tcp}",
        "--rw=randwrite", f"--bs={block}", "--iodepth=16", "--size=4M",
        "--verify=crc32c", "--verify_fatal=1", "--fsync=64", f"--directory={tmp_path}",
    )  # fmt: skip


def test_fio_with_four_connections_verifies(served: Served, needs: Needs, tmp_path: Path) -> None:
    fio = needs("fio", "fio")
    run(
        fio, "--name=verify", "--verify_state_save=0", "--ioengine=nbd", f"--uri={served.unix}",
        "--rw=randwrite", "--bs=4k", "--iodepth=8", "--numjobs=4", "--size=4M", "--offset_increment=16M",
        "--verify=crc32c", "--verify_fatal=1",
        f"--directory={tmp_path}",
    )  # fmt: skip
