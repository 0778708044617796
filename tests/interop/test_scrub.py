"""A scrub on a real node: rot on the device is found and named, progress is shown, a restart goes on with it."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdserver.cli.client import NodeClient
from protocol.nbd import Command
from tests.conftest import Processes
from tests.nbd_client import Client
from tests.serving import Server, eventually

MIB = 1 << 20
BLOCK_BYTES = 4096
WRITTEN_BLOCKS = 5120  # 20 MiB


@pytest.fixture
def server(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> Server:
    settings = tmp_path / "node.yaml"
    settings.write_text("segment: 1M\nscrub: {rate: 1G}\n")
    return Server(processes, tmp_path / "data", free_port(), {"disk0": "64M"}, ["--config", str(settings)])


def ask(server: Server, path: str) -> Any:
    return NodeClient(server.data).get(path)


def block(number: int) -> bytes:
    return b"%015d\n" % number * (BLOCK_BYTES // 16)


def write(server: Server, first: int = 0, count: int = WRITTEN_BLOCKS) -> None:
    client = Client(("127.0.0.1", server.port), "disk0")
    for at in range(first, first + count, 64):
        data = b"".join(block(number) for number in range(at, at + 64))
        assert client.request(Command.WRITE, (at - first) * BLOCK_BYTES, data=data).error == 0
    assert client.request(Command.FLUSH).error == 0
    client.close()


def rot(server: Server, number: int) -> None:
    """Change the block of this number wherever a segment file has it."""
    found = 0
    for file in server.data.glob("families/*/segments/*.seg"):
        at = file.read_bytes().find(block(number))
        if at >= 0:
            with file.open("r+b") as segment:
                segment.seek(at + 100)
                segment.write(b"rot")
            found += 1
    assert found == 1


def scrub(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = ask(server, "/v1/scrubs")[0]
    return found


def test_rot_is_found_and_named_by_what_shows_it(server: Server) -> None:
    write(server)
    server.command("snapshot", "create", "disk0@monday")
    write(server, first=100_000, count=64)  # over the first 64 blocks
    rot(server, 10)  # the snapshot's alone
    rot(server, 3000)  # both show it
    server.command("scrub", "start")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        server.command("scrub", "status", "--watch")
    assert caught.value.returncode == 1
    assert re.search(r"(?m)^disk0 +done +100 % +2 ", caught.value.stdout)
    damaged = ask(server, "/v1/volumes/disk0")["disk"]["damaged"]
    assert sorted((found["export"], found["lba"]) for found in damaged) == [
        ("disk0", 3000), ("disk0@monday", 10), ("disk0@monday", 3000),
    ]  # fmt: skip
    events = [event for event in ask(server, "/v1/events") if event["kind"] == "checksum-error" and "lba" in event]
    assert {(event["volume"], event["snapshot"], event["lba"]) for event in events} == {
        ("disk0", "", 3000), ("disk0", "monday", 10), ("disk0", "monday", 3000),
    }  # fmt: skip
    assert "3 blocks in disk0, disk0@monday cannot be read" in server.command("status")

    # The volume's own is mended by writing it again; the snapshot's stays.
    write(server, first=200_000)
    server.command("snapshot", "delete", "disk0@monday")

    def is_clean() -> bool:
        server.command("scrub", "start", "disk0")
        try:
            return bool(json.loads(server.command("scrub", "status", "--watch", "--json"))[0]["damaged_blocks"] == 0)
        except subprocess.CalledProcessError:
            return False  # the snapshot's layer is taken apart in the background

    eventually(is_clean, "what only the snapshot showed is gone")
    assert "damaged" not in server.command("status")


def test_a_scrub_goes_on_after_a_restart_and_its_end_is_remembered(server: Server, tmp_path: Path) -> None:
    write(server)
    settings = tmp_path / "node.yaml"
    settings.write_text(settings.read_text().replace("rate: 1G", "rate: 1M"))
    assert server.process is not None
    server.process.send_signal(signal.SIGHUP)
    server.command("scrub", "start")
    eventually(lambda: scrub(server)["done_bytes"] > MIB, "some was read")
    assert "scrubbing disk0: " in server.command("status")
    before = scrub(server)
    server.stop()
    server.start()
    eventually(lambda: scrub(server)["done_bytes"] > before["done_bytes"], "it goes on")
    assert scrub(server)["state"] == "running"
    settings.write_text(settings.read_text().replace("rate: 1M", "rate: 1G"))
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: scrub(server)["state"] == "done", "it ends")
    completed = scrub(server)["completed"]
    assert [event["kind"] for event in ask(server, "/v1/events")].count("scrub-started") == 1
    server.kill9()
    server.start()
    assert (scrub(server)["state"], scrub(server)["completed"]) == ("done", completed)
    assert scrub(server)["next"] > completed

    server.command("scrub", "start")
    assert server.command("scrub", "stop") in (
        "stopped scrubbing disk0\n",
        "stopped scrubbing nothing: no scrub was running\n",
    )
