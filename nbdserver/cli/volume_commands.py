"""`nbdserver volume ...`: talks to the running node."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient, volume_path
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, print_table, wants_json
from nbdserver.cli.progress import progress_bar
from nbdserver.cli.resync_commands import LOOK_S, show_resync
from nbdserver.node.errors import WrongInputError
from nbdserver.node.sizes import SizeError, format_size, parse_volume_size

app = typer.Typer(no_args_is_help=True, help="Make, list, change and delete volumes.")

Name = Annotated[str, typer.Argument(help="The volume's name.", show_default=False)]


def _client(context: typer.Context, data: Path | None) -> NodeClient:
    return NodeClient(data_path(context, data))


@app.command("create")
def create(
    context: typer.Context,
    name: Name,
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="10G, 512M, 1.5T: powers of 1024.", show_default=False)
    ],
    replicas: Annotated[
        int,
        typer.Option("--replicas", metavar="N", help="On so many nodes of the cluster.  [default: on this one alone]"),
    ] = 0,
    on: Annotated[
        str, typer.Option("--on", metavar="NODE,...", help="Nodes that are to have one.", show_default=False)
    ] = "",
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make an empty, thin volume: it takes room as it is written.

    With --replicas it is on several nodes of the cluster, spread over fault domains: it goes on when one of them dies,
    and is attached, shown and changed at any node.

    Examples:

      nbdserver volume create disk1 --size 200G

      nbdserver volume create db --size 1T --replicas 3
    """
    try:
        size_bytes = parse_volume_size(size)
    except SizeError as error:
        raise WrongInputError(f"--size: {error}") from None
    wanted = {
        "name": name,
        "size_bytes": size_bytes,
        "replicas": replicas,
        "on": [node for node in on.split(",") if node],
    }
    volume = _client(context, data).post("/v1/volumes", wanted)
    if wants_json(context, json_output):
        print_json(volume)
    else:
        print(f"made volume {name} of {format_size(size_bytes)}{_where(volume['replicas'])}")


def _where(replicas: dict[str, Any]) -> str:
    """Where a volume is, and what its replicas still lack."""
    if not replicas["wanted"]:
        return ""
    late = [f"{each['node']} is {each['state']}" for each in replicas["nodes"] if each["state"] != "in sync"]
    nodes = ", ".join(each["node"] for each in replicas["nodes"])
    return f" on {nodes}" + (f"; not in sync yet: {', '.join(late)} (nbdserver resync)" if late else ", all in sync")


@app.command("list")
def list_volumes(context: typer.Context, data: DataOption = None, json_output: JsonOption = False) -> None:
    """List the volumes of the node.

    Example:

      nbdserver volume list --json
    """
    volumes = _client(context, data).get("/v1/volumes")
    if wants_json(context, json_output):
        print_json(volumes)
    else:
        print_volumes(volumes)


def print_volumes(volumes: list[dict[str, Any]]) -> None:
    """Print a table of volumes."""
    headings = ["NAME", ">SIZE", "STATE", ">CLIENTS", ">GENERATION", ">SNAPSHOTS", "BASE", "NODES", "SETTINGS"]
    if not any(volume["replicas"]["wanted"] for volume in volumes):
        headings.remove("NODES")
    rows = [
        [
            volume["name"],
            format_size(volume["size_bytes"]),
            volume["state"],
            "-" if volume["clients"] is None else str(volume["clients"]),
            str(volume["generation"]),
            str(volume["snapshots"]),
            volume["base"],
            *([_nodes(volume["replicas"])] if "NODES" in headings else ()),
            _short(volume["settings"]),
        ]
        for volume in volumes
    ]
    print_table(headings, rows)


def _nodes(replicas: dict[str, Any]) -> str:
    """Where the replicas are, the owner's first; in brackets those that are not in sync."""
    nodes = sorted(replicas["nodes"], key=lambda each: each["node"] != replicas["owner"])
    return " ".join(each["node"] if each["state"] == "in sync" else f"({each['node']})" for each in nodes)


def _short(settings: dict[str, Any]) -> str:
    words = [key.replace("_", "-") for key in ("read_only", "shared") if settings[key]]
    if settings["allowed_clients"]:
        words.append("allowed-clients=" + ",".join(settings["allowed_clients"]))
    if settings["tls"] != "inherit":
        words.append(f"tls={settings['tls']}")
    if settings["iops"]:
        words.append(f"iops={settings['iops']}")
    if settings["bandwidth"]:
        words.append(f"bandwidth={format_size(settings['bandwidth'])}")
    if settings["max_data"]:
        words.append(f"max-data={format_size(settings['max_data'])}")
    return " ".join(words)


@app.command("show")
def show(context: typer.Context, name: Name, data: DataOption = None, json_output: JsonOption = False) -> None:
    """Show one volume: size, settings, state, and what its disk says of itself.

    Example:

      nbdserver volume show disk0
    """
    print_one(context, _client(context, data).get(volume_path(name)), json_output)


def print_one(context: typer.Context, volume: dict[str, Any], json_output: bool) -> None:
    if wants_json(context, json_output):
        print_json(volume)
        return
    flat = {**volume, **{f"disk.{key}": value for key, value in volume["disk"].items()}, **volume["settings"]}
    flat["disk.damaged"] = [f"{block['export']} block {block['lba']}" for block in volume["disk"].get("damaged", [])]
    flat["size"] = format_size(volume["size_bytes"])
    flat["replicas"] = [f"{each['node']} {each['state']}" for each in volume["replicas"]["nodes"]]
    flat["owner"] = volume["replicas"]["owner"]
    for key in ("disk", "settings", *(() if volume["replicas"]["wanted"] else ("replicas", "owner"))):
        del flat[key]
    if not flat["reason"]:
        del flat["reason"]
    width = max(len(key) for key in flat)
    for key, value in flat.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key.replace('_', '-').ljust(width)}  {shown}".rstrip())


@app.command("set")
def set_settings(
    context: typer.Context,
    name: Name,
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="What to change.", show_default=False)],
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Change settings of a volume, live: all that are given, or none.

    Keys: read-only=true|false; shared=true|false (more than one host may write, which needs a cluster file system);
    description=TEXT; allowed-clients=CIDR,CIDR,cert:NAME (empty: everybody; where there are networks and names in
    certificates, a client needs both); tls=off|allowed|required|inherit (as the node's settings say).

    Limits for all its clients together: iops=N operations and bandwidth=SIZE bytes a second, read and written;
    iops-burst=N and bandwidth-burst=SIZE: what may be done at once after a pause (else one second's worth). none
    takes a limit away. max-data=SIZE: what the volume, its snapshots and its clones may take on the disk together; at
    it writes get ENOSPC, as on a full disk.

    Examples:

      nbdserver volume set disk0 read-only=true

      nbdserver volume set disk0 tls=required allowed-clients=cert:web1,cert:web2

      nbdserver volume set disk0 iops=1000 iops-burst=5000 bandwidth=100M

      nbdserver volume set disk0 allowed-clients=10.0.0.0/8,fd00::/8 description='build farm'
    """
    wanted: dict[str, str] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise WrongInputError(f"{change!r:.60} is not KEY=VALUE; write for example read-only=true")
        if key in wanted:
            raise WrongInputError(f"{key} is given twice; keep one")
        wanted[key] = value
    volume = _client(context, data).patch(volume_path(name), wanted)
    if wants_json(context, json_output):
        print_json(volume)
    else:
        print(f"changed {name}: {', '.join(wanted)}")


@app.command("resize")
def resize(
    context: typer.Context,
    name: Name,
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="10G, 512M, 1.5T: powers of 1024.", show_default=False)
    ],
    force: Annotated[bool, typer.Option("--force", help="Make it smaller too: what is cut off is gone.")] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give a volume another size, at once. Clients that are attached see it when they attach again.

    What it grows by reads as zeros. Making it smaller needs --force, and no client may be attached; its snapshots
    keep all that they hold.

    Example:

      nbdserver volume resize disk0 --size 20G
    """
    try:
        size_bytes = parse_volume_size(size)
    except SizeError as error:
        raise WrongInputError(f"--size: {error}") from None
    volume = _client(context, data).post(volume_path(name) + "/resize", {"size_bytes": size_bytes, "force": force})
    if wants_json(context, json_output):
        print_json(volume)
    else:
        print(f"volume {name} has {format_size(size_bytes)}")


@app.command("rename")
def rename(
    context: typer.Context,
    name: Name,
    new_name: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.", show_default=False)],
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give a volume another name, and its snapshots with it (NEW@SNAPSHOT).

    Clients that are attached go on. Who attaches again has to use the new name.

    Example:

      nbdserver volume rename disk1 build
    """
    volume = _client(context, data).post(volume_path(name) + "/rename", {"name": new_name})
    if wants_json(context, json_output):
        print_json(volume)
    else:
        print(f"volume {name} is called {new_name} now")


@app.command("move")
def move(
    context: typer.Context,
    name: Name,
    source: Annotated[str, typer.Option("--from", metavar="NODE", help="Where it is now.", show_default=False)],
    target: Annotated[
        str,
        typer.Option("--to", metavar="NODE", help="Where it shall be.  [default: the best node]", show_default=False),
    ] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show it until it is over.")] = True,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let a replica of a volume be on another node, while it is used.

    It is made there, and when it has everything the one that it replaces is deleted. This goes on by itself, also when
    the command is broken off.

    Example:

      nbdserver volume move db --from n2 --to n4
    """
    client = _client(context, data)
    volume = client.post(volume_path(name) + "/move", {"source": source, "target": target})
    if wait:
        with progress_bar(not wants_json(context, json_output), in_bytes=True) as show:
            while source in [each["node"] for each in volume["replicas"]["nodes"]]:
                show_resync(client, show, name)
                time.sleep(LOOK_S)
                volume = client.get(volume_path(name))
    if wants_json(context, json_output):
        print_json(volume)
    else:
        nodes = ", ".join(each["node"] for each in volume["replicas"]["nodes"])
        print(
            f"volume {name} is on {nodes}" if wait else f"volume {name} is leaving {source}: nbdserver resync shows it"
        )


@app.command("delete")
def delete(
    context: typer.Context,
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Disconnect its clients first, delete its snapshots too.")
    ] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Delete a volume and its data, for good. Refused while it has clients or snapshots, unless --force.

    Refused in any case while there are clones of its snapshots. Delete the clones first, or the snapshots: clones go on
    without them.

    Example:

      nbdserver volume delete disk1
    """
    _client(context, data).delete(volume_path(name), force=str(force).lower())
    if wants_json(context, json_output):
        print_json({"deleted": name})
    else:
        print(f"deleted volume {name}")
