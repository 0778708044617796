"""`nbdserver image`: volumes as files and back, with real clients writing meanwhile, killed commands and bad images."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.cli import image_save
from nbdserver.cli.client import NodeClient, volume_path
from nbdserver.cli.main import run as run_command
from protocol.nbd import Command
from tests.conftest import ROOT, Processes
from tests.nbd_client import Client
from tests.serving import Server

MIB = 1 << 20
SIZE_BYTES = 32 * MIB
Needs = Callable[[str, str], str]


@pytest.fixture(scope="module")
def server(
    module_processes: Processes, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Server:
    """One node for all tests; each makes volumes of its own."""
    return Server(module_processes, tmp_path_factory.mktemp("data") / "node", free_port(), {})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Random data, holes, and zeros that are written."""
    path = tmp_path / "image.raw"
    generator = random.Random(3)
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for start in (0, 5 * MIB + 4096, 31 * MIB):
            file.seek(start)
            file.write(generator.randbytes(MIB - 4096))
        file.seek(12 * MIB)
        file.write(bytes(MIB))
    return path


def command(server: Server, *arguments: str) -> None:
    assert run_command(["--data", str(server.data), *arguments]) == 0


def started(
    server: Server, *arguments: str, stdin: int | None = None, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """A command as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "nbdserver", "--data", str(server.data), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
    )  # fmt: skip


def refused(server: Server, capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert run_command(["--data", str(server.data), "image", *arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def content(server: Server, export: str, length: int = SIZE_BYTES) -> bytes:
    client = Client(("127.0.0.1", server.port), export)
    data = b"".join(client.read(offset, MIB) for offset in range(0, length, MIB))
    client.close()
    return data


def names(server: Server) -> list[str]:
    return [snapshot["export"] for snapshot in NodeClient(server.data).get("/v1/snapshots")]


def live_bytes(server: Server, volume: str) -> int:
    return int(NodeClient(server.data).get(volume_path(volume))["disk"]["live_bytes"])


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_image_is_loaded_and_saved_with_its_holes_by_files_and_pipes(
    server: Server, image: Path, image_format: str, tmp_path: Path, needs: Needs
) -> None:
    whole = image.read_bytes()
    if image_format == "qcow2":
        qemu_img = needs("qemu-img", "qemu-utils")
        there = tmp_path / "image.qcow2"
        subprocess.run([qemu_img, "convert", "-f", "raw", "-O", "qcow2", image, there], check=True)
        image = there
    one, two, back = f"{image_format}1", f"{image_format}2", tmp_path / f"back.{image_format}"
    command(server, "image", "load", str(image), one, "--create")
    assert content(server, one) == whole
    assert live_bytes(server, one) <= 4 * MIB, "holes and zeros take no room"
    command(server, "image", "save", one, str(back))
    assert back.stat().st_blocks * 512 <= 5 * MIB
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]

    saving = started(server, "image", "save", f"--format={image_format}", one, "-", stdout=subprocess.PIPE)
    loading = started(
        server, "image", "load", "-", two, "--create", f"--size={SIZE_BYTES}", f"--format={image_format}",
        stdin=saving.stdout.fileno() if saving.stdout else None, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert saving.stdout is not None
    saving.stdout.close()
    assert loading.communicate()[1] == b""
    assert saving.communicate()[1] == b""
    assert (saving.returncode, loading.returncode) == (0, 0)
    assert content(server, two) == whole
    command(server, "image", "load", str(back), two)
    assert content(server, two) == whole
    assert not [name for name in names(server) if name.startswith((one, two))]


def test_a_load_replaces_all_that_the_volume_held_and_keeps_its_snapshots(
    server: Server, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(server, "volume", "create", "old", "--size", "64M")
    client = Client(("127.0.0.1", server.port), "old")
    client.request(Command.WRITE, 40 * MIB, data=b"o" * MIB)
    client.request(Command.WRITE, 3 * MIB, data=b"o" * MIB)
    client.close()
    command(server, "snapshot", "create", "old@before")
    capsys.readouterr()
    command(server, "image", "load", str(image), "old", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["image_bytes"], told["size_bytes"], told["format"]) == (SIZE_BYTES, 64 * MIB, "raw")
    assert content(server, "old", 64 * MIB) == image.read_bytes() + bytes(32 * MIB)
    assert content(server, "old@before", 64 * MIB)[3 * MIB : 4 * MIB] == b"o" * MIB
    command(server, "image", "save", "old@before", str(image.with_name("before")), "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["size_bytes"] == 64 * MIB
    assert image.with_name("before").read_bytes()[40 * MIB : 41 * MIB] == b"o" * MIB


def test_what_is_saved_while_clients_write_is_of_one_moment(server: Server, tmp_path: Path) -> None:
    """A writer counts up in the first block, then in the last: in one moment the last is never ahead."""
    command(server, "volume", "create", "busy", "--size", f"{SIZE_BYTES // MIB}M")
    client = Client(("127.0.0.1", server.port), "busy")
    client.request(Command.WRITE, MIB, data=b"f" * (24 * MIB))
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        while not stop.is_set():
            written += 1
            for offset in (SIZE_BYTES - 4096, 0):
                client.request(Command.WRITE, offset, data=written.to_bytes(8, "big") * 512)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            path = tmp_path / f"{number}.raw"
            before = written
            command(server, "image", "save", "busy", str(path))
            saved = path.read_bytes()
            last, first = (int.from_bytes(saved[at : at + 8], "big") for at in (SIZE_BYTES - 4096, 0))
            assert before <= last + 1
            assert last - first in (0, 1), "the image is of two moments"
    finally:
        stop.set()
        writer.join()
        client.close()
    assert written > 3
    assert not [name for name in names(server) if name.startswith("busy@")]


def test_a_killed_save_leaves_one_snapshot_which_the_next_one_deletes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(server, "volume", "create", "killed", "--size", "64M")
    client = Client(("127.0.0.1", server.port), "killed")
    for offset in range(0, 64 * MIB, 16 * MIB):
        client.request(Command.WRITE, offset, data=b"k" * (16 * MIB))
    client.close()

    def left(ending: signal.Signals) -> tuple[int, list[str]]:
        """Exit code of a save that is ended while nobody reads what it writes, and the snapshots that are left."""
        saving = started(server, "image", "save", "killed", "-", stdout=subprocess.PIPE)
        assert saving.stdout is not None
        saving.stdout.read(1)
        saving.send_signal(ending)
        saving.communicate()
        return saving.returncode, [name for name in names(server) if name.startswith("killed@")]

    assert left(signal.SIGTERM) == (130, [])
    code, (leftover,) = left(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert leftover.startswith("killed@image-save-")
    command(server, "image", "save", "killed", str(tmp_path / "young"))
    assert leftover in names(server), "it may be that of another command that has just begun"
    monkeypatch.setattr(image_save, "LEFT_AFTER_S", 0.0)
    time.sleep(1.1)  # the time of a snapshot has whole seconds
    command(server, "image", "save", "killed", str(tmp_path / "image"))
    assert not [name for name in names(server) if name.startswith("killed@")]


def test_an_interrupted_save_keeps_the_image_that_was_there(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "kept.raw"
    path.write_bytes(b"yesterday's")
    assert run_command(["--data", str(server.data), "image", "save", "nosuch", str(path)]) == 2
    assert path.read_bytes() == b"yesterday's"
    assert [found.name for found in tmp_path.iterdir()] == ["kept.raw"]


def test_a_load_is_refused_before_anything_changes(
    server: Server, image: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command(server, "volume", "create", "guarded", "--size", "16M")
    client = Client(("127.0.0.1", server.port), "guarded")
    client.request(Command.WRITE, 0, data=b"g" * 4096)
    small, odd, empty, qcow2 = (tmp_path / name for name in ("small", "odd", "empty", "looks"))
    small.write_bytes(b"s" * MIB)
    odd.write_bytes(b"s" * 1000)
    empty.write_bytes(b"")
    qcow2.write_bytes(b"QFI\xfb" + bytes(508))
    assert "1 client connection; detach first" in refused(server, capsys, 2, "load", str(small), "guarded")
    client.close()
    for message, arguments in [
        ("has 16M, the image 32M; nbdserver volume resize guarded --size 32M", [str(image), "guarded"]),
        ("no whole number of 512", [str(odd), "guarded"]),
        ("is empty", [str(empty), "guarded"]),
        ("looks like qcow2", [str(qcow2), "guarded"]),
        ("is not known; use raw or qcow2", [str(small), "guarded", "--format", "vmdk"]),
        ("add --create to make it", [str(small), "nosuch"]),
        ("exists already", [str(small), "guarded", "--create"]),
        ("is a snapshot", [str(small), "guarded@x"]),
        ("cannot be read: No such file", [str(tmp_path / "nosuch"), "guarded"]),
        ("not 4096", [str(small), "guarded", "--size", "4K"]),
    ]:
        assert message in refused(server, capsys, 2, "load", *arguments)
    command(server, "volume", "set", "guarded", "read-only=true")
    assert "read-only=false" in refused(server, capsys, 2, "load", str(small), "guarded")
    assert content(server, "guarded", MIB)[:4096] == b"g" * 4096


def test_a_load_that_breaks_in_the_middle_says_that_the_volume_holds_a_part(server: Server) -> None:
    command(server, "volume", "create", "part", "--size", "16M")
    cases: list[tuple[bytes, list[str], str]] = [
        (b"p" * (MIB + 100), ["part"], "cut off; part holds a part of it now"),
        (b"p" * MIB, ["part", "--size=2M"], "had 1048576 bytes instead of 2097152; part holds a part of it now"),
        (b"p" * (17 * MIB), ["part"], "is larger than part, 16M; part holds a part of it now"),
        (b"p" * MIB, ["made", "--create", "--size=2M"], "volume made, made for it, was deleted again"),
        (b"", ["part"], "is empty"),
    ]
    for sent, arguments, message in cases:
        loading = started(server, "image", "load", "-", *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        printed, complaint = loading.communicate(sent)
        assert (printed, complaint.count(b"\n")) == (b"", 1)
        assert message in complaint.decode()
        assert loading.returncode == (2 if not sent else 1)
    volumes = {volume["name"]: volume for volume in NodeClient(server.data).get("/v1/volumes")}
    assert volumes["part"]["clients"] == 0
    assert "made" not in volumes


def test_a_qcow2_image_that_is_cut_off_or_read_over_another_file_is_refused(
    server: Server, image: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, needs: Needs
) -> None:
    qemu_img = needs("qemu-img", "qemu-utils")
    base, cut, over, none = (tmp_path / f"{name}.qcow2" for name in ("base", "cut", "over", "none"))
    subprocess.run([qemu_img, "convert", "-f", "raw", "-O", "qcow2", image, base], check=True)
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over], check=True)
    cut.write_bytes(base.read_bytes()[: 2 * MIB])
    none.write_bytes(b"nothing" * 1000)
    command(server, "volume", "create", "strict", "--size", "32M")
    assert "cut off" in refused(server, capsys, 2, "load", str(cut), "strict")
    assert "no qcow2 image" in refused(server, capsys, 2, "load", str(none), "strict")
    assert f"is read over another file, {base}" in refused(server, capsys, 2, "load", str(over), "strict")
    command(server, "image", "load", str(over), "strict", "--backing-files")
    assert content(server, "strict") == image.read_bytes()


def test_without_qemu_raw_works_and_qcow2_says_what_to_install(
    server: Server, image: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command(server, "image", "load", str(image), "alone", "--create")
    command(server, "image", "save", "alone", str(tmp_path / "raw"))
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()
    (tmp_path / "some.qcow2").write_bytes(b"QFI\xfb")
    for arguments in (["save", "alone", str(tmp_path / "x.qcow2")], ["load", str(tmp_path / "some.qcow2"), "alone"]):
        assert "apt-get install qemu-utils" in refused(server, capsys, 1, *arguments)
    assert not [name for name in names(server) if name.startswith("alone@")]


def test_a_volume_may_be_out_of_reach_of_the_network_and_is_saved_all_the_same(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(server, "volume", "create", "far", "--size", "4M")
    command(server, "volume", "set", "far", "allowed-clients=192.0.2.0/24")
    command(server, "image", "save", "--live", "far", str(tmp_path / "far"))
    assert (tmp_path / "far").stat().st_size == 4 * MIB
    assert (server.data / "own.sock").stat().st_mode & 0o777 == 0o600
    assert "a directory" in refused(server, capsys, 2, "save", "far", str(tmp_path))
    assert "both need standard output" in refused(server, capsys, 2, "save", "far", "-", "--json")
    assert "cannot be written" in refused(server, capsys, 2, "save", "far", str(tmp_path / "no" / "such"))
