"""Snapshots from the command line, with real clients: made, listed, read, gone back to, deleted; and sizes."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.cli.main import run as run_command
from protocol.nbd import Command
from tests.conftest import Processes
from tests.nbd_client import Client, RefusedError
from tests.serving import Server

BLOCK = 4096


@pytest.fixture
def server(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> Server:
    return Server(processes, tmp_path / "data", free_port(), {"disk0": "64M"})


def attach(server: Server, name: str = "disk0") -> Client:
    return Client(("127.0.0.1", server.port), name)


def write(server: Server, fill: int) -> None:
    """Fill the first MiB of disk0."""
    client = attach(server)
    client.send(Command.WRITE, 0, data=bytes([fill]) * (1 << 20))
    assert client.receive().error == 0
    client.close()


def first_byte(server: Server, name: str) -> int:
    client = attach(server, name)
    data = client.read(0, 1 << 20)
    client.close()
    assert data == data[:1] * len(data)
    return data[0]


def refused(server: Server, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error for wrong input."""
    assert run_command(["--data", str(server.data), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_snapshots_are_made_read_gone_back_to_and_deleted(
    server: Server, needs: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    nbdinfo = needs("nbdinfo", "libnbd-bin")
    write(server, 1)
    server.command("snapshot", "create", "disk0@monday")
    write(server, 2)
    server.command("snapshot", "create", "disk0@tuesday")
    write(server, 3)
    assert [first_byte(server, name) for name in ("disk0", "disk0@monday", "disk0@tuesday")] == [3, 1, 2]
    listed = json.loads(server.command("snapshot", "list", "disk0", "--json"))
    assert [(found["export"], found["clients"]) for found in listed] == [("disk0@monday", 0), ("disk0@tuesday", 0)]
    exports = json.loads(
        subprocess.run(
            [nbdinfo, "--list", "--json", f"nbd://127.0.0.1:{server.port}"], capture_output=True, check=True
        ).stdout
    )["exports"]
    assert {(found["export-name"], found["is_read_only"]) for found in exports} == {
        ("disk0", False),
        ("disk0@monday", True),
        ("disk0@tuesday", True),
    }

    server.kill9()
    server.start()
    assert [first_byte(server, name) for name in ("", "disk0@monday", "disk0@tuesday")] == [3, 1, 2]

    client = attach(server)
    assert "client connection" in refused(server, capsys, "snapshot", "rollback", "disk0@monday")
    client.close()
    server.command("snapshot", "rollback", "disk0@monday")
    assert [first_byte(server, name) for name in ("disk0", "disk0@tuesday")] == [1, 2]
    assert "has snapshots: monday, tuesday" in refused(server, capsys, "volume", "delete", "disk0")

    reader = attach(server, "disk0@tuesday")
    assert "1 client connection" in refused(server, capsys, "snapshot", "delete", "disk0@tuesday")
    server.command("snapshot", "delete", "disk0@tuesday", "--force")
    with pytest.raises((ConnectionError, OSError)):
        reader.read(0, BLOCK)
    with pytest.raises(RefusedError):
        attach(server, "disk0@tuesday")
    server.command("snapshot", "delete", "disk0@monday")
    assert first_byte(server, "disk0") == 1
    server.command("volume", "delete", "disk0")
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["snapshot", "create", "disk0"], "is not VOLUME@NAME; write for example disk0@monday"),
        (["snapshot", "create", "disk0@a b"], "cannot be a snapshot's name"),
        (["snapshot", "create", "disk0@" + "x" * 129], "cannot be a snapshot's name"),
        (["snapshot", "create", "nosuch@a"], "there is no volume 'nosuch'"),
        (["snapshot", "delete", "disk0@nosuch"], "there is no snapshot 'nosuch' of volume disk0; it has: none yet"),
        (["snapshot", "rollback", "disk0@nosuch"], "there is no snapshot 'nosuch'"),
        (["snapshot", "list", "nosuch"], "there is no volume 'nosuch'"),
        (["volume", "resize", "disk0", "--size", "1MB"], "ambiguous"),
        (["volume", "resize", "disk0", "--size", "32M"], "shrink its file system first, then add --force"),
        (["volume", "resize", "disk0", "--size", "17T"], "the most is 16T"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(server, capsys, *arguments)


def test_a_name_is_taken_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.command("snapshot", "create", "disk0@a")
    assert "has a snapshot a already" in refused(server, capsys, "snapshot", "create", "disk0@a")


def test_a_volume_grows_and_shrinks_and_its_snapshot_keeps_its_size(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    write(server, 7)
    server.command("snapshot", "create", "disk0@before")
    attached = attach(server)
    server.command("volume", "resize", "disk0", "--size", "128M")
    assert "cannot be made smaller" in refused(server, capsys, "volume", "resize", "disk0", "--size", "4K", "--force")
    attached.close()
    grown = attach(server)
    assert grown.read((128 << 20) - BLOCK, BLOCK) == bytes(BLOCK)
    grown.close()
    server.command("volume", "resize", "disk0", "--size", "8K", "--force")
    server.kill9()
    server.start()
    server.command("volume", "resize", "disk0", "--size", "64M")
    client = attach(server)
    assert client.read(0, 16384) == b"\7" * 8192 + bytes(8192)
    client.close()
    assert first_byte(server, "disk0@before") == 7
    assert json.loads(server.command("volume", "show", "disk0", "--json"))["size_bytes"] == 64 << 20
