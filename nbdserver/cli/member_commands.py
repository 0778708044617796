"""`nbdserver node ...`: the nodes of the cluster."""

import time
from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient, node_path
from nbdserver.cli.options import DataOption, JsonOption, coloured, data_path, print_json, print_table, wants_json
from nbdserver.cli.progress import progress_bar
from nbdserver.cli.resync_commands import LOOK_S, show_resync
from nbdserver.node.sizes import round_size

STILL_S = 10.0
"""So long nothing moves before a drain is taken to be over."""

app = typer.Typer(no_args_is_help=True, help="Look at the nodes of the cluster; drain and remove them.")

NameArgument = Annotated[str, typer.Argument(metavar="NODE", help="The node's name.", show_default=False)]


@app.command("list")
def list_nodes(context: typer.Context, data: DataOption = None, json_output: JsonOption = False) -> None:
    """Show the nodes of the cluster, as the node that is asked knows them.

    Example:

      nbdserver node list
    """
    client = NodeClient(data_path(context, data))
    nodes = client.get("/v1/nodes")
    if wants_json(context, json_output):
        print_json(nodes)
        return
    print_nodes(nodes)
    if not client.get("/v1/cluster")["is_active"]:
        print(coloured("WARNING: this node hears no master of the cluster: what it shows is old", "red"))


def print_nodes(nodes: list[dict[str, Any]]) -> None:
    """A table of nodes."""
    headings = [
        "NAME",
        "STATE",
        "ROLE",
        "SITE",
        "DOMAIN",
        "ADDRESS",
        "VERSION",
        ">VOLUMES",
        ">CLIENTS",
        ">REQUESTS/S",
        ">FULL",
    ]
    print_table(headings, [_row(node) for node in nodes])


def _row(node: dict[str, Any]) -> list[str]:
    percent = node["fill_percent"]
    return [
        node["name"],
        _state(node),
        _role(node),
        node["site"] or "-",
        node["fault_domain"] or "-",
        node["address"],
        node["version"] or "-",
        *(_figure(node[key]) for key in ("volumes", "clients", "requests_per_s")),
        "-" if percent is None else f"{percent:.0f} %",
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _state(node: dict[str, Any]) -> str:
    state = node["state"] if node["silent_s"] is None else f"silent {node['silent_s']:.0f} s"
    return f"{state}, draining" if node["draining"] else state


def _role(node: dict[str, Any]) -> str:
    if node["is_master"]:
        return "master"
    return "voter" if node["is_voter"] else "across wan" if node["across_wan"] else "member"


@app.command()
def show(context: typer.Context, name: NameArgument, data: DataOption = None, json_output: JsonOption = False) -> None:
    """Show one node of the cluster.

    Example:

      nbdserver node show n2
    """
    node = NodeClient(data_path(context, data)).get(node_path(name))
    if wants_json(context, json_output):
        print_json(node)
        return
    state = _state(node)
    print(f"{node['name']}: {coloured(state, 'green' if node['silent_s'] is None else 'red')}, {_role(node)}")
    print(f"  at {node['address']}, site {node['site'] or '-'}, fault domain {node['fault_domain'] or '-'}")
    print(f"  version {node['version'] or '-'}, started {node['started'] or '-'}, id {node['id']}")
    if node["volumes"] is not None:
        print(f"  volumes {node['volumes']}, clients {node['clients']}")
    if node["requests_per_s"] is not None:
        read, written = round_size(node["read_bytes_per_s"]), round_size(node["write_bytes_per_s"])
        print(f"  {node['requests_per_s']:.0f} requests/s, {read}/s read, {written}/s written")
    if node["size_bytes"]:
        used, size = round_size(node["used_bytes"]), round_size(node["size_bytes"])
        print(f"  {used} used of {size} ({node['fill_percent']:.1f} %)")


@app.command()
def remove(
    context: typer.Context, name: NameArgument, data: DataOption = None, json_output: JsonOption = False
) -> None:
    """Strike a node that will not come back from the cluster. It has to be silent: stop nbdserver on it first.

    What it still has of the cluster is its key: if others may have got it, nbdserver cluster rotate-key.

    Example:

      nbdserver node remove n2
    """
    NodeClient(data_path(context, data)).delete(node_path(name))
    if wants_json(context, json_output):
        print_json({"removed": name})
    else:
        print(f"{name} is removed; if others may have its disk: nbdserver cluster rotate-key")


@app.command()
def drain(
    context: typer.Context,
    name: NameArgument,
    end: Annotated[bool, typer.Option("--end", help="It may get new things again.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show it until it is over.")] = True,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let a node get nothing new, and move what is replicated away from it: before maintenance, or before it is
    removed.

    Other nodes take over the volumes that it serves, and get its replicas, as far as there are other nodes for them.
    This goes on by itself, also when the command is broken off. Volumes that are its own stay there and are served.

    Examples:

      nbdserver node drain n2

      nbdserver node drain n2 --end
    """
    client = NodeClient(data_path(context, data))
    node = client.post(f"{node_path(name)}/drain", {"drain": not end})
    if wait and not end:
        node = _wait_until_drained(client, node, not wants_json(context, json_output))
    if wants_json(context, json_output):
        print_json(node)
    elif end:
        print(f"{name} gets new volumes again")
    else:
        print(
            f"{name} gets nothing new; it has {node['replicas']} replicas, serves {node['owned']} of them, and has "
            f"{_figure(node['clients'])} clients"
        )
        if wait and node["replicas"]:
            print("there are no other nodes that could have these replicas: nbdserver status says why")


def _wait_until_drained(client: NodeClient, node: dict[str, Any], shown: bool) -> dict[str, Any]:
    """Show what leaves the node, until nothing is left or nothing has left for STILL_S."""
    path = node_path(node["name"])
    still_since_s = time.monotonic()
    with progress_bar(shown, in_bytes=True) as show:
        while node["replicas"] and time.monotonic() - still_since_s < STILL_S:
            if show_resync(client, show):
                still_since_s = time.monotonic()
            time.sleep(LOOK_S)
            before, node = node, client.get(path)
            if (node["replicas"], node["owned"]) != (before["replicas"], before["owned"]):
                still_since_s = time.monotonic()
    return node
