"""Completion: what may stand where the cursor is, from the tree of commands and the names of a node."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from nbdserver.cli import completing
from nbdserver.cli.commands import app
from nbdserver.cli.completing import FILES, NAMES, VOLUMES, ask_names, complete
from nbdserver.cli.completion_commands import SCRIPTS, script
from nbdserver.cli.manual import commands

THERE = {"volumes": ["disk0", "disk1", "other"], "snapshots": ["disk0@monday", "disk0@tuesday"]}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A node that has THERE; the data directories that were asked."""
    directories: list[Path] = []

    def ask(data: Path) -> dict[str, list[str]]:
        directories.append(data)
        return THERE

    monkeypatch.setattr(completing, "ask_names", ask)
    return directories


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vol", ["volume"]),
        ("volume s", ["show", "set"]),
        ("volume show ", ["disk0", "disk1", "other"]),
        ("volume show d", ["disk0", "disk1"]),
        ("volume show disk0 ", []),
        ("volume show --json d", ["disk0", "disk1"]),
        ("--json --data /x volume show o", ["other"]),
        ("volume create ", []),
        ("volume set disk0 read", ["read-only="]),
        ("volume set disk0 read-only=true bandwidth-", ["bandwidth-burst="]),
        ("volume resize disk0 --s", ["--size"]),
        ("volume resize disk0 --size ", []),
        ("volume nonsense ", []),
        ("snapshot delete disk0@", ["disk0@monday", "disk0@tuesday"]),
        ("snapshot rollback disk0@m", ["disk0@monday"]),
        ("snapshot create d", ["disk0@", "disk1@"]),
        ("snapshot create disk0@", []),
        ("clone create disk0@t", ["disk0@tuesday"]),
        ("clone create disk0@tuesday ", []),
        ("image save disk0", ["disk0", "disk0@monday", "disk0@tuesday"]),
        ("image save disk0 ", [FILES]),
        ("image save disk0 --format q", ["qcow2"]),
        ("image load some.raw d", ["disk0", "disk1"]),
        ("scrub start o", ["other"]),
        ("config check /etc/n", [FILES]),
        ("serve --config ", [FILES]),
        ("serve --config=x --li", ["--listen"]),
        ("comp", ["completion"]),  # and not the hidden one
    ],
)
def test_the_table_of_lines(line: str, expected: list[str]) -> None:
    *words, incomplete = line.split(" ")
    assert sorted(value for value, _ in complete(words, incomplete)) == sorted(expected)


def test_at_the_beginning_every_command_is_offered_with_what_it_does() -> None:
    offered = dict(complete([], ""))
    assert set(offered) == {name.split()[0] for name, _ in commands()}
    assert offered["status"].startswith("Show the running node")
    (delete,) = complete(["volume"], "del")
    assert delete[1].startswith("Delete a volume and its data")


def test_the_names_are_those_of_the_data_directory_that_was_given(
    asked: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBDSERVER_DATA", "/by/environment")
    for words in (["volume", "show"], ["--data", "/a", "volume", "show"], ["volume", "show", "--data=/b"]):
        complete(words, "")
    assert asked == [Path("/by/environment"), Path("/a"), Path("/b")]


def test_every_name_in_the_table_is_an_argument_of_a_command() -> None:
    known = dict(commands())
    for name, kinds in NAMES.items():
        arguments = [each for each in known[name].params if not each.opts[0].startswith("-")]
        assert len(kinds) <= len(arguments), name
    takes_a_volume = {
        name
        for name, command in known.items()
        if name.startswith("volume ") and any(each.name == "name" for each in command.params)
    }
    assert takes_a_volume - {"volume create"} == {
        name for name, kinds in NAMES.items() if name.startswith("volume ") and kinds[0] == (VOLUMES,)
    }


def test_without_a_node_there_is_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask_names(tmp_path) == {}
    assert ask_names(tmp_path / ("x" * 200)) == {}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("shell", SCRIPTS)
def test_each_script_calls_the_program_and_names_its_shell(shell: str) -> None:
    text = script(shell)
    assert " complete -- " in text
    assert f"nbdserver completion {shell}" in text


def test_the_command_that_scripts_call_is_hidden() -> None:
    group: Any = typer.main.get_command(app)
    find: Callable[[str], Any] = group.commands.get
    assert find("complete").hidden
    assert "complete" not in {name for name, _ in commands()}
