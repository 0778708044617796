"""`nbdserver node ...` and `directory ...` as people read them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nbdserver.cli import directory_commands, member_commands
from nbdserver.cli.main import run

UP: dict[str, Any] = {
    "name": "n1",
    "state": "up",
    "silent_s": None,
    "is_master": True,
    "is_voter": True,
    "across_wan": False,
    "draining": False,
    "address": "10.0.0.5:10810",
    "site": "main",
    "fault_domain": "rack1",
    "version": "1.2",
    "started": "2026-01-01T00:00:00+00:00",
    "id": "00000000000000aa",
    "replicas": 3,
    "owned": 1,
    "volumes": 3,
    "clients": 2,
    "requests_per_s": 1234.4,
    "read_bytes_per_s": 1 << 20,
    "write_bytes_per_s": 0,
    "latency_us": 90,
    "used_bytes": 1 << 30,
    "size_bytes": 4 << 30,
    "fill_percent": 25.0,
    "promisable_bytes": None,
}
NOT_SAID = ("volumes", "clients", "requests_per_s", "read_bytes_per_s", "used_bytes", "size_bytes", "fill_percent")
SILENT = UP | dict.fromkeys(NOT_SAID) | {
    "name": "n2", "state": "silent", "silent_s": 61.2, "is_master": False, "is_voter": False, "draining": True,
    "site": "", "fault_domain": "", "version": "",
}  # fmt: skip


class Client:
    """Answers like a node, whatever its data directory; `asked` is what it was asked."""

    is_active = True
    asked: list[Any]

    def __init__(self, data: object) -> None:
        type(self).asked = []

    def get(self, path: str, **query: Any) -> Any:
        self.asked.append((path, query))
        return {
            "/v1/nodes": [UP, SILENT],
            "/v1/nodes/n1": UP,
            "/v1/nodes/n2": SILENT,
            "/v1/resync": [],
            "/v1/cluster": {"is_active": self.is_active},
            "/v1/directory": [{"key": "load/n1", "value": "{}", "encoding": "utf-8"}],
        }[path]

    def post(self, path: str, content: Any) -> Any:
        self.asked.append((path, content))
        return SILENT

    def delete(self, path: str) -> None:
        self.asked.append((path, None))

    def lines(self, path: str, **query: Any) -> Iterator[str]:
        yield json.dumps({"action": "put", "key": "load/n1", "value": "x y", "encoding": "utf-8"})
        yield json.dumps({"action": "delete", "key": "load/n1"})


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    for module in (member_commands, directory_commands):
        monkeypatch.setattr(module, "NodeClient", Client)
    monkeypatch.setattr(Client, "is_active", True)
    return Client


def test_the_list_has_a_line_a_node_and_a_dash_for_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "list"]) == 0
    heading, up, silent = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    assert heading == "NAME STATE ROLE SITE DOMAIN ADDRESS VERSION VOLUMES CLIENTS REQUESTS/S FULL"
    assert up == "n1 up master main rack1 10.0.0.5:10810 1.2 3 2 1234 25 %"
    assert silent == "n2 silent 61 s, draining member - - 10.0.0.5:10810 - - - - -"


def test_a_list_that_is_old_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "is_active", False)
    assert run(["node", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("WARNING: this node hears no master")


def test_a_node_is_shown_with_what_it_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    run(["node", "show", "n1"])
    shown = capsys.readouterr().out
    for words in ("n1: up, master", "fault domain rack1", "volumes 3, clients 2", "1234 requests/s, 1.0 MiB/s read"):
        assert words in shown
    assert "1.0 GiB used of 4.0 GiB (25.0 %)" in shown
    run(["node", "show", "n2"])
    assert "n2: silent 61 s, draining, member" in capsys.readouterr().out


def test_draining_and_removing_say_what_comes_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    run(["node", "drain", "n2", "--no-wait"])
    assert Client.asked == [("/v1/nodes/n2/drain", {"drain": True})]
    run(["node", "drain", "n2", "--end"])
    assert Client.asked == [("/v1/nodes/n2/drain", {"drain": False})]
    run(["node", "remove", "n2"])
    assert Client.asked == [("/v1/nodes/n2", None)]
    drained, ended, removed = capsys.readouterr().out.splitlines()
    assert drained == "n2 gets nothing new; it has 3 replicas, serves 1 of them, and has - clients"
    assert ended == "n2 gets new volumes again"
    assert "rotate-key" in removed


def test_a_drain_waits_until_no_replica_is_left_or_none_leaves_any_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [SILENT | {"replicas": count} for count in (3, 2, 0)]
    monkeypatch.setattr(Client, "get", lambda self, path: [] if path == "/v1/resync" else left.pop(0))
    monkeypatch.setattr(member_commands, "LOOK_S", 0.0)
    run(["node", "drain", "n2"])
    assert left == []
    assert capsys.readouterr().out == "n2 gets nothing new; it has 0 replicas, serves 1 of them, and has - clients\n"
    monkeypatch.setattr(Client, "get", lambda self, path: [] if path == "/v1/resync" else SILENT)
    monkeypatch.setattr(member_commands, "STILL_S", 0.01)
    run(["node", "drain", "n2"])
    assert "no other nodes that could have these replicas" in capsys.readouterr().out


def test_the_directory_is_printed_as_it_is_and_as_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    run(["directory", "list", "load/"])
    run(["directory", "get", "load/n1"])
    run(["directory", "watch", "load/"])
    assert capsys.readouterr().out.splitlines() == ["load/n1 {}", "{}", "put load/n1 x y", "delete load/n1"]
    run(["directory", "watch", "--json"])
    assert [json.loads(line)["action"] for line in capsys.readouterr().out.splitlines()] == ["put", "delete"]
