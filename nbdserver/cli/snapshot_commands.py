"""`nbdserver snapshot ...`: talks to the running node."""

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, print_table, wants_json
from nbdserver.node.errors import WrongInputError
from nbdserver.node.sizes import format_size

app = typer.Typer(no_args_is_help=True, help="Keep what volumes hold at a moment, look at it, go back to it.")

Snapshot = Annotated[str, typer.Argument(metavar="VOLUME@NAME", help="The snapshot.", show_default=False)]


def _client(context: typer.Context, data: Path | None) -> NodeClient:
    return NodeClient(data_path(context, data))


def snapshot_parts(text: str) -> tuple[str, str]:
    """Return (volume, name) of `VOLUME@NAME`. Raises WrongInputError."""
    volume, _, name = text.partition("@")
    if not volume or not name:
        raise WrongInputError(f"{text!r:.60} is not VOLUME@NAME; write for example disk0@monday")
    return volume, name


def _path(text: str) -> str:
    volume, name = snapshot_parts(text)
    return f"/v1/snapshots/{quote(volume, safe='')}/{quote(name, safe='')}"


@app.command("create")
def create(
    context: typer.Context, snapshot: Snapshot, data: DataOption = None, json_output: JsonOption = False
) -> None:
    """Keep what a volume holds now, under a name. Takes no longer for a large volume, and no room until it changes.

    The snapshot has every write that was acknowledged before, and is durable when the command ends. What a file
    system still holds in its client's memory is not in it: sync there first, or freeze it (fsfreeze).
    Clients can attach to it, read-only, under the name VOLUME@NAME.

    Example:

      nbdserver snapshot create disk0@monday
    """
    volume, name = snapshot_parts(snapshot)
    made = _client(context, data).post("/v1/snapshots", {"volume": volume, "name": name})
    if wants_json(context, json_output):
        print_json(made)
    else:
        print(f"made snapshot {snapshot}")


@app.command("list")
def list_snapshots(
    context: typer.Context,
    volume: Annotated[str, typer.Argument(help="Of this volume only.", show_default=False)] = "",
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """List snapshots, of each volume the oldest first.

    Clients and clones of snapshots are not shown (-) of volumes that another node of the cluster serves: ask for one
    volume to see them.

    Example:

      nbdserver snapshot list disk0
    """
    snapshots = _client(context, data).get("/v1/snapshots", volume=volume)
    if wants_json(context, json_output):
        print_json(snapshots)
        return
    rows = [
        [
            found["export"],
            format_size(found["size_bytes"]),
            found["created"],
            "-" if found["clients"] is None else str(found["clients"]),
            "-" if found["clones"] is None else str(len(found["clones"])),
        ]
        for found in snapshots
    ]
    print_table(["NAME", ">SIZE", "CREATED", ">CLIENTS", ">CLONES"], rows)


@app.command("delete")
def delete(
    context: typer.Context,
    snapshot: Snapshot,
    force: Annotated[bool, typer.Option("--force", help="Disconnect its clients first.")] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Delete a snapshot; the room that only it needed is given back in the background.

    Clones of it stay as they are.

    Example:

      nbdserver snapshot delete disk0@monday
    """
    _client(context, data).delete(_path(snapshot), force=str(force).lower())
    if wants_json(context, json_output):
        print_json({"deleted": snapshot})
    else:
        print(f"deleted snapshot {snapshot}")


@app.command("rollback")
def rollback(
    context: typer.Context, snapshot: Snapshot, data: DataOption = None, json_output: JsonOption = False
) -> None:
    """Let the volume hold what the snapshot holds. What was written since is lost; other snapshots stay.

    Refused while clients are attached to the volume. To keep the present, make a snapshot of it first.

    Example:

      nbdserver snapshot rollback disk0@monday
    """
    volume = _client(context, data).post(_path(snapshot) + "/rollback", {})
    if wants_json(context, json_output):
        print_json(volume)
    else:
        print(f"{snapshot_parts(snapshot)[0]} holds what {snapshot} holds")
