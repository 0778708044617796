"""The press of Tab in a real bash, with a real node and without one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserver.cli.completion_commands import script
from tests.conftest import ROOT, Processes
from tests.serving import Server

# What readline does at Tab: set the variables, call the function that `complete -F` named, show COMPREPLY.
PRESS_TAB = r"""
source "$1"
press() {
    COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=()
    _nbdserver "$PROGRAM"
    printf '%s|' "${COMPREPLY[@]}"
    echo
}
compopt() { :; }
while IFS= read -r line; do press "$line"; done
"""


@pytest.fixture
def press(tmp_path: Path) -> Callable[..., list[list[str]]]:
    """`press(data, line, ...)`: what each line is completed to."""
    program = tmp_path / "nbdserver"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m nbdserver "$@"\n')
    program.chmod(0o755)
    (tmp_path / "completion").write_text(script("bash"))

    def press(data: Path, *lines: str) -> list[list[str]]:
        result = subprocess.run(
            ["bash", "--norc", "-c", PRESS_TAB, "bash", str(tmp_path / "completion")],
            input="".join(f"{line}\n" for line in lines),
            env={"PATH": "/usr/bin:/bin", "PROGRAM": str(program), "NBDSERVER_DATA": str(data)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert result.stderr == ""
        return [sorted(filter(None, line.split("|"))) for line in result.stdout.splitlines()]

    return press


def test_bash_completes_commands_options_and_names(
    press: Callable[..., list[list[str]]], processes: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    server = Server(processes, tmp_path / "data", free_port(), {"disk0": "64M", "disk1": "64M"})
    server.command("snapshot", "create", "disk0@monday")
    assert press(
        server.data,
        "nbdserver snap",
        "nbdserver volume resize disk0 --s",
        "nbdserver volume show ",
        "nbdserver snapshot delete d",
        "nbdserver snapshot delete disk0@",  # bash has cut the word at the @
        "nbdserver snapshot delete disk0@mo",
        "nbdserver volume set disk0 read-o",
        "nbdserver --data /nowhere volume show ",
    ) == [
        ["snapshot"], ["--size"], ["disk0", "disk1"], ["disk0@monday"], ["monday"], ["monday"], ["read-only="], [],
    ]  # fmt: skip


def test_without_a_node_the_names_are_missing_and_nothing_else(
    press: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    assert press(tmp_path, "nbdserver volume show ", "nbdserver volume sh") == [[], ["show"]]
