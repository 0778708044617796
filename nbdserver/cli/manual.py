"""The manual page, made from the program's help: `python -m nbdserver.cli.manual DIRECTORY` writes nbdserver.1 there.

Rules: nothing is said here that `--help` does not say. An option that takes a value has a metavar, a flag has none.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from nbdserver.cli.commands import app


def commands() -> Iterator[tuple[str, Any]]:
    """Every command as (words after `nbdserver`, click command), in the order of `--help`."""
    yield from _commands(typer.main.get_command(app), ())


def _commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        elif not command.hidden:
            yield " ".join((*path, name)), command


def page() -> str:
    """Return the manual page as roff (man macros)."""
    program: Any = typer.main.get_command(app)
    summary = str(program.help).splitlines()[0].rstrip(".")
    lines = [
        '.TH NBDSERVER 1 "" "nbdserver" "User Commands"',
        ".SH NAME",
        f"nbdserver \\- {_escape(summary[:1].lower() + summary[1:])}",
        ".SH SYNOPSIS",
        ".B nbdserver",
        "[\\fB\\-\\-data\\fR \\fIDIR\\fR] [\\fB\\-\\-json\\fR] \\fICOMMAND\\fR ...",
        ".SH DESCRIPTION",
        *_text(str(program.help)),
        ".SH OPTIONS",
        *_options(program),
        ".SH COMMANDS",
    ]
    for name, command in commands():
        arguments = " ".join(_argument(parameter) for parameter in command.params if not _is_option(parameter))
        lines += [f'.SS "{_escape(f"{name} {arguments}".strip())}"', *_text(str(command.help)), *_options(command)]
    lines += [".SH EXIT STATUS", *_text(str(program.epilog))]
    return "\n".join(lines) + "\n"


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _options(command: Any) -> list[str]:
    lines: list[str] = []
    for parameter in command.params:
        if not _is_option(parameter):
            continue
        names = ", ".join(f"\\fB{_escape(name)}\\fR" for name in parameter.opts)
        value = f" \\fI{_escape(parameter.metavar)}\\fR" if parameter.metavar else ""
        lines += [".TP", names + value, _escape(parameter.help or "")]
    return lines


def _text(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        is_example = paragraph.startswith((" ", "nbdserver ", "sudo nbdserver "))
        joined = _escape(" ".join(paragraph.split()))
        lines += [".PP", *([".RS 4", f"\\fB{joined}\\fR", ".RE"] if is_example else [joined])]
    return lines


def _escape(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


def main() -> None:
    """Write nbdserver.1 into the directory that the first argument names."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "man")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "nbdserver.1").write_text(page())
    print(directory / "nbdserver.1")


if __name__ == "__main__":
    main()
