"""`nbdserver resync`: replicas that get what they lack."""

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, print_table, wants_json
from nbdserver.cli.progress import progress_bar
from nbdserver.node.sizes import round_size

LOOK_S = 1.0


def add_to(app: typer.Typer) -> None:
    app.command("resync")(resync)


def resync(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it until all are in sync.")] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the replicas of the cluster that are not in sync: how much of each is left to compare with its owner, how
    fast that goes and how long it takes, or what it waits for.

    A replica is out of sync from the moment its node is gone, and gets what has changed since then when it is back: the
    4 MiB around each change are compared. What they hold is an estimate, by those that have been.
    With --json and --watch, one object a line.

    Examples:

      nbdserver resync

      nbdserver resync --watch
    """
    client = NodeClient(data_path(context, data))
    as_json = wants_json(context, json_output)
    if not watch:
        rows = client.get("/v1/resync")
        if as_json:
            print_json(rows)
        elif rows:
            print_resync(rows)
        else:
            print("all replicas are in sync")
        return
    with progress_bar(not as_json, in_bytes=True) as show:
        while rows := show_resync(client, show):
            if as_json:
                print(json.dumps(rows), flush=True)
            time.sleep(LOOK_S)
    if not as_json:
        print("all replicas are in sync")


def show_resync(client: NodeClient, show: Callable[..., Any], volume: str = "") -> list[dict[str, Any]]:
    """Show a bar for each replica that is not in sync, of one volume or of all; returns them."""
    rows: list[dict[str, Any]] = [row for row in client.get("/v1/resync") if volume in ("", row["volume"])]
    for row in rows:
        total = max(row["total_bytes"] or 0, row["left_bytes"] or 0)
        show(f"{row['volume']} on {row['node']}", total - (row["left_bytes"] or 0), total or None)
    return rows


def resync_sentence(row: dict[str, Any]) -> str:
    """One replica that is not in sync, for `status`."""
    left = "" if row["left_bytes"] is None else f", {round_size(row['left_bytes'])} left"
    time_left = "" if row["left_s"] is None else f" for {row['left_s']} s"
    why = "".join(f": {row[key]}" for key in ("reason", "disk") if row[key])
    return f"{row['volume']} on {row['node']}: {row['state']}{left}{time_left}{why}"


def print_resync(rows: list[dict[str, Any]]) -> None:
    """A table of replicas that are not in sync."""
    headings = ["VOLUME", "NODE", "OWNER", "STATE", ">LEFT", ">RATE", ">TIME", "WAITS FOR"]
    print_table(headings, [_row(row) for row in rows])


def _row(row: dict[str, Any]) -> list[str]:
    return [
        row["volume"],
        row["node"],
        row["owner"],
        row["state"],
        "-" if row["left_bytes"] is None else round_size(row["left_bytes"]),
        f"{round_size(row['bytes_per_s'])}/s" if row["bytes_per_s"] else "-",
        "-" if row["left_s"] is None else f"{row['left_s']} s",
        "; ".join(row[key] for key in ("reason", "disk") if row[key]),
    ]
