"""`nbdserver node ...`: the nodes of the cluster."""

from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient, node_path
from nbdserver.cli.options import DataOption, JsonOption, coloured, data_path, print_json, print_table, wants_json
from nbdserver.node.sizes import round_size

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
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let a node get nothing new: before maintenance, or before it is removed.

    Volumes that it has stay there and are served.

    Examples:

      nbdserver node drain n2

      nbdserver node drain n2 --end
    """
    node = NodeClient(data_path(context, data)).post(f"{node_path(name)}/drain", {"drain": not end})
    if wants_json(context, json_output):
        print_json(node)
    elif end:
        print(f"{name} gets new volumes again")
    else:
        print(
            f"{name} gets nothing new; it has {_figure(node['volumes'])} volumes and {_figure(node['clients'])} clients"
        )
