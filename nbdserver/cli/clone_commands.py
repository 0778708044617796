"""`nbdserver clone ...`: talks to the running node."""

from typing import Annotated

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json
from nbdserver.cli.snapshot_commands import Snapshot, snapshot_parts

app = typer.Typer(no_args_is_help=True, help="Make volumes that begin with what a snapshot holds.")


@app.command("create")
def create(
    context: typer.Context,
    snapshot: Snapshot,
    name: Annotated[str, typer.Argument(metavar="NEW", help="The new volume's name.", show_default=False)],
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a volume that holds what a snapshot holds, and is written by itself.

    Takes no longer for a large volume, and no room until it is written. The clone is a volume like any other: it can be
    attached, resized, renamed, have snapshots, and clones of those. It begins with its base's allowed-clients and
    limits. The snapshot may be deleted later: the clone keeps what it holds.

    Example:

      nbdserver clone create disk0@monday disk1
    """
    volume, snapshot_name = snapshot_parts(snapshot)
    client = NodeClient(data_path(context, data))
    made = client.post("/v1/clones", {"volume": volume, "snapshot": snapshot_name, "name": name})
    if wants_json(context, json_output):
        print_json(made)
    else:
        print(f"made volume {name} of {snapshot}")
