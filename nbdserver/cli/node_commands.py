"""`nbdserver status`, `events` and `config check`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json
from nbdserver.cli.volume_commands import print_volumes
from nbdserver.node.sizes import round_size

WAIT_S = 25

config_app = typer.Typer(no_args_is_help=True, help="Look at settings files.")


def add_to(app: typer.Typer) -> None:
    app.command("status")(status)
    app.command("events")(events)
    app.add_typer(config_app, name="config")


def status(context: typer.Context, data: DataOption = None, json_output: JsonOption = False) -> None:
    """Show the running node and its volumes.

    Example:

      nbdserver status --json
    """
    node = NodeClient(data_path(context, data)).get("/v1/status")
    if wants_json(context, json_output):
        print_json(node)
        return
    print(f"nbdserver {node['version']}, pid {node['pid']}, up {node['uptime_s']:.0f} s")
    print(f"data {node['data']}, {round_size(node['free_bytes'])} free")
    print(f"listening on {', '.join(node['listen'])}")
    for warning in node["warnings"]:
        print(f"WARNING: {warning}")
    print()
    print_volumes(node["volumes"])
    for volume in node["volumes"]:
        if volume["reason"]:
            print(f"{volume['name']}: {volume['reason']}")


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, until Ctrl-C.")] = False,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, max=2000, help="How many of the last ones.")
    ] = 50,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what happened on the node, oldest first. With --json, one object a line.

    Examples:

      nbdserver events --follow

      nbdserver events --limit 500 --json
    """
    client = NodeClient(data_path(context, data))
    as_json = wants_json(context, json_output)
    found = client.get("/v1/events", limit=limit)
    last = 0
    while True:
        for event in found:
            last = event["sequence"]
            print(json.dumps(event) if as_json else _sentence(event), flush=True)
        if not follow:
            return
        asked_s = time.monotonic()
        found = client.get("/v1/events", after=last, wait_s=WAIT_S)
        if not found and time.monotonic() - asked_s < 1:
            time.sleep(1)  # a node that answers at once with nothing is not asked in a tight loop


def _sentence(event: dict[str, Any]) -> str:
    fields = [f"{key}={value}" for key, value in event.items() if key not in ("sequence", "time", "kind")]
    return " ".join([event["time"], event["kind"], *fields])


@config_app.command("check")
def config_check(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The settings file (YAML).", show_default=False)],
    json_output: JsonOption = False,
) -> int:
    """Check a settings file, whole, without a node.

    Example:

      nbdserver config check /etc/nbdserver/node.yaml
    """
    from nbdserver.node.config import ConfigError, load_settings

    try:
        settings = load_settings(file)
    except ConfigError as error:
        if not wants_json(context, json_output):
            raise
        print_json({"file": str(file), "problems": error.problems})
        return error.exit_code
    if wants_json(context, json_output):
        print_json({"file": str(file), "problems": [], "settings": settings.model_dump(mode="json")})
    else:
        print(f"{file}: good")
    return 0
