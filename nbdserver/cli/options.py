"""Options that every command has: `--data`, before or after the subcommand, and `--json`; and how a command prints.

Rules: with `--json` a command prints one JSON document (events: one a line) on standard output and nothing else.
Errors are one line on standard error.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nbdserver.node.directory import ENVIRONMENT_VARIABLE, default_path

DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Data directory; may stand before the command too.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def data_path(context: typer.Context, data: Path | None, from_settings: Path | None = None) -> Path:
    """Return the data directory: the first that is given: here, before the command, NBDSERVER_DATA, settings."""
    before = context.find_root().params.get("data")
    given = data or before or os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(given) if given else from_settings or default_path()


def wants_json(context: typer.Context, here: bool) -> bool:
    """Return True if `--json` was given here or before the command."""
    return here or bool(context.find_root().params.get("json_output"))


def coloured(text: str, colour: str) -> str:
    """Return `text` in a colour if it goes to a terminal whose owner did not ask for none (NO_COLOR)."""
    return typer.style(text, fg=colour) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2), flush=True)


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """Print columns as wide as their widest cell; a heading that begins with `>` is aligned to the right."""
    names = [heading.lstrip(">") for heading in headings]
    widths = [max(len(row[column]) for row in [names, *rows]) for column in range(len(headings))]
    for row in [names, *rows]:
        cells = [
            cell.rjust(width) if heading.startswith(">") else cell.ljust(width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        ]
        print("  ".join(cells).rstrip())
