"""`nbdserver directory ...`: what the nodes of a cluster tell each other, as this node has it."""

import json
from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json

app = typer.Typer(no_args_is_help=True, help="Look at the directory: what the nodes of the cluster tell each other.")

PrefixArgument = Annotated[
    str, typer.Argument(metavar="PREFIX", help="Only keys that begin with it.", show_default=False)
]


@app.command()
def get(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key.", show_default=False)],
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Print the value of a key.

    Example:

      nbdserver directory get load/n1
    """
    (entry,) = NodeClient(data_path(context, data)).get("/v1/directory", key=key)
    if wants_json(context, json_output):
        print_json(entry)
    else:
        print(entry["value"])


@app.command("list")
def list_entries(
    context: typer.Context, prefix: PrefixArgument = "", data: DataOption = None, json_output: JsonOption = False
) -> None:
    """Print all keys, or those that begin with PREFIX, with their values.

    Example:

      nbdserver directory list member/
    """
    entries = NodeClient(data_path(context, data)).get("/v1/directory", prefix=prefix)
    if wants_json(context, json_output):
        print_json(entries)
        return
    for entry in entries:
        print(f"{entry['key']} {entry['value']}")


@app.command()
def watch(
    context: typer.Context, prefix: PrefixArgument = "", data: DataOption = None, json_output: JsonOption = False
) -> None:
    """Print what is there and then every change, until Ctrl-C. With --json, one object a line.

    Examples:

      nbdserver directory watch load/

      nbdserver directory watch state/ --json
    """
    as_json = wants_json(context, json_output)
    for line in NodeClient(data_path(context, data)).lines("/v1/directory/changes", prefix=prefix):
        print(line if as_json else _sentence(json.loads(line)), flush=True)


def _sentence(change: dict[str, Any]) -> str:
    return f"{change['action']} {change['key']} {change.get('value', '')}".rstrip()
