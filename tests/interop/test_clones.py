"""Clones and renaming from the command line, with real clients: what each volume holds, what is refused, what stays."""

import io
import json
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import pytest

from nbdserver.cli.main import run as run_command
from protocol.nbd import Command
from tests.conftest import Processes
from tests.interop.test_snapshots import BLOCK, attach, first_byte, refused
from tests.nbd_client import RefusedError
from tests.serving import Server

MIB = 1 << 20


@pytest.fixture
def server(processes: Processes, tmp_path: Path, free_port: Callable[[], int]) -> Server:
    return Server(processes, tmp_path / "data", free_port(), {"disk0": "64M"})


def fill(server: Server, name: str, byte: int) -> None:
    """Fill the first MiB of a volume."""
    client = attach(server, name)
    client.send(Command.WRITE, 0, data=bytes([byte]) * MIB)
    assert client.receive().error == 0
    client.close()


def command(server: Server, *arguments: str) -> str:
    """What a command prints, run in this process: another one would take a second to start."""
    with redirect_stdout(io.StringIO()) as printed:
        assert run_command(["--data", str(server.data), *arguments]) == 0
    return printed.getvalue()


def volumes(server: Server) -> dict[str, dict[str, Any]]:
    return {volume["name"]: volume for volume in json.loads(command(server, "volume", "list", "--json"))}


def test_clones_live_by_themselves_and_outlive_what_they_were_made_of(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    command(server, "volume", "set", "disk0", "allowed-clients=127.0.0.0/8", "iops=5000")
    fill(server, "disk0", 1)
    command(server, "snapshot", "create", "disk0@monday")
    fill(server, "disk0", 2)
    made = json.loads(command(server, "clone", "create", "disk0@monday", "web", "--json"))
    assert (made["name"], made["base"], made["size_bytes"]) == ("web", "disk0@monday", 64 << 20)
    assert (made["settings"]["allowed_clients"], made["settings"]["iops"]) == (["127.0.0.0/8"], 5000)
    fill(server, "web", 3)
    command(server, "snapshot", "create", "web@first")
    fill(server, "web", 4)
    command(server, "clone", "create", "web@first", "web2")
    command(server, "volume", "resize", "web2", "--size", "128M")
    command(server, "volume", "set", "web2", "read-only=true", "description=of web")
    there = ("disk0", "disk0@monday", "web", "web@first", "web2")
    assert [first_byte(server, name) for name in there] == [2, 1, 4, 3, 3]

    server.kill9()
    server.start()
    assert [first_byte(server, name) for name in there] == [2, 1, 4, 3, 3]
    shown = volumes(server)
    assert {name: (volume["base"], volume["snapshots"]) for name, volume in shown.items()} == {
        "disk0": ("", 1),
        "web": ("disk0@monday", 1),
        "web2": ("web@first", 0),
    }
    assert len({volume["family"] for volume in shown.values()}) == 1
    assert (shown["web2"]["size_bytes"], shown["web2"]["settings"]["description"]) == (128 << 20, "of web")
    listed = json.loads(command(server, "snapshot", "list", "--json"))
    assert {found["export"]: found["clones"] for found in listed} == {"disk0@monday": ["web"], "web@first": ["web2"]}

    error = refused(server, capsys, "volume", "delete", "disk0", "--force")
    assert "has snapshots of which there are clones: web; delete the clones first, or the snapshots" in error
    command(server, "snapshot", "rollback", "web@first")
    assert first_byte(server, "web") == 3
    command(server, "snapshot", "delete", "disk0@monday")
    command(server, "volume", "delete", "disk0")
    server.kill9()
    server.start()
    assert [first_byte(server, name) for name in there[2:]] == [3, 3, 3]
    assert volumes(server)["web"]["base"] == ""

    command(server, "volume", "delete", "web2")
    reader = attach(server, "web@first")
    assert "has snapshots: first" in refused(server, capsys, "volume", "delete", "web")
    command(server, "volume", "delete", "web", "--force")
    with pytest.raises((ConnectionError, OSError)):
        reader.read(0, BLOCK)
    assert set(volumes(server)) == {"disk0"}  # which each start makes
    assert len(list((server.data / "families").iterdir())) == 1
    assert server.stop() == 0


def test_a_renamed_volume_keeps_its_clients_and_takes_its_snapshots_along(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(server, "disk0", 5)
    command(server, "snapshot", "create", "disk0@monday")
    command(server, "clone", "create", "disk0@monday", "web")
    client, reader = attach(server, "disk0"), attach(server, "disk0@monday")
    renamed = json.loads(command(server, "volume", "rename", "disk0", "build", "--json"))
    assert renamed["name"] == "build"
    client.send(Command.WRITE, 0, data=bytes(BLOCK))
    assert client.receive().error == 0
    assert reader.read(0, 1) == b"\5"
    clients = json.loads(command(server, "client", "list", "--json"))
    assert {found["volume"] for found in clients} == {"build", "build@monday"}
    with pytest.raises(RefusedError):
        attach(server, "disk0")
    client.close()
    reader.close()
    assert volumes(server)["web"]["base"] == "build@monday"
    assert "there is no volume 'disk0'; this node has: build, web" in refused(server, capsys, "volume", "show", "disk0")
    assert "web exists already" in refused(server, capsys, "volume", "rename", "build", "web")
    server.kill9()
    server.start()
    assert first_byte(server, "build@monday") == 5
    client, reader = attach(server, "build"), attach(server, "build@monday")
    command(server, "volume", "rename", "build", "depot")
    assert first_byte(server, "depot@monday") == 5
    upgraded = json.loads(command(server, "upgrade-in-place", "--json"))
    assert (upgraded["clients"], upgraded["dropped"]) == (2, 0)
    assert (client.read(0, 1), reader.read(0, 1)) == (b"\0", b"\5")
    events = [json.loads(line) for line in command(server, "events", "--json").splitlines()]
    renamed_to = [event["new_name"] for event in events if event["kind"] == "volume-renamed"]
    assert renamed_to == ["build", "depot"]
    assert [event["base"] for event in events if event["kind"] == "clone-created"] == ["disk0@monday"]


def test_what_cannot_be_meant_is_refused_in_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for command, message in (
        ("clone create disk0 web", "is not VOLUME@NAME; write for example disk0@monday"),
        ("clone create nosuch@a web", "there is no volume 'nosuch'"),
        ("clone create disk0@nosuch web", "there is no snapshot 'nosuch' of volume disk0"),
        ("clone create disk0@a disk0", "volume disk0 exists already"),
        ("clone create disk0@a a@b", "cannot be a volume's name"),
        ("volume rename nosuch web", "there is no volume 'nosuch'"),
        ("volume rename disk0 a/b", "cannot be a volume's name"),
        ("volume rename disk0 disk0", "volume disk0 exists already"),
    ):
        assert message in refused(server, capsys, *command.split())


def test_a_thousand_clones_of_one_snapshot(server: Server) -> None:
    """By the API, one connection: through the command line it would be a thousand processes."""
    fill(server, "disk0", 1)
    command(server, "snapshot", "create", "disk0@base")
    with server.api() as api:

        def post(path: str, **content: Any) -> dict[str, Any]:
            answer = api.post(path, json=content)
            assert answer.status_code == 201, answer.text
            return dict(answer.json())

        for number in range(1000):
            post("/v1/clones", volume="disk0", snapshot="base", name=f"clone-{number:04}")
            if number % 10 == 0:
                post("/v1/snapshots", volume="disk0", name=f"snapshot-{number:04}")
        assert len(api.get("/v1/volumes").json()) == 1001
        assert len(api.get("/v1/snapshots").json()) == 101
        assert len(api.get("/v1/status").json()["volumes"]) == 1001
        assert api.get("/v1/snapshots?volume=disk0").json()[0]["clones"][-1] == "clone-0999"
    fill(server, "clone-0500", 9)
    server.kill9()
    server.start()
    assert [first_byte(server, name) for name in ("clone-0499", "clone-0500", "disk0@snapshot-0990")] == [1, 9, 1]
    command(server, "snapshot", "create", "clone-0500@own")
    assert server.stop() == 0


def test_kill_9_in_the_middle_of_changes_leaves_what_was_answered(server: Server) -> None:
    """Clones are made, renamed and deleted one after the other; what was under way is done or not."""
    command(server, "snapshot", "create", "disk0@base")
    there, doubtful = {"disk0"}, set[str]()
    for life in range(3):
        with server.api() as api:
            killer = threading.Timer(0.3 + life * 0.17, server.kill9)
            killer.start()
            try:
                for number in range(1000):
                    name, new_name = f"clone-{life}-{number}", f"renamed-{life}-{number}"
                    doubtful = {name}
                    content = {"volume": "disk0", "snapshot": "base", "name": name}
                    assert api.post("/v1/clones", json=content).status_code == 201
                    there.add(name)
                    doubtful = {name, new_name}
                    assert api.post(f"/v1/volumes/{name}/rename", json={"name": new_name}).status_code == 200
                    there = there - {name} | {new_name}
                    if number % 2:
                        doubtful = {new_name}
                        assert api.delete(f"/v1/volumes/{new_name}").status_code == 204
                        there.remove(new_name)
            except httpx.TransportError:
                pass
            killer.join()
        server.start()
        found = set(volumes(server))
        assert found - doubtful == there - doubtful
        assert len(found & doubtful) <= 1
        there = found
        assert not [volume["reason"] for volume in volumes(server).values() if volume["reason"]]
    assert first_byte(server, sorted(there)[-1]) == 0
    assert server.stop() == 0
    assert json.loads(command(server, "check", "--json"))["volumes"]["disk0"]["findings"] == []
