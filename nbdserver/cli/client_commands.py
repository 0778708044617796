"""`nbdserver client ...`: who is attached."""

from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, print_table, wants_json
from nbdserver.node.sizes import round_size

app = typer.Typer(no_args_is_help=True, help="List and disconnect NBD clients.")


@app.command("list")
def list_clients(context: typer.Context, data: DataOption = None, json_output: JsonOption = False) -> None:
    """List the client connections; a client with several connections has several lines.

    In a cluster a client may have come to another node than the one that serves its volume: both show it.

    Example:

      nbdserver client list
    """
    clients = NodeClient(data_path(context, data)).get("/v1/clients")
    if wants_json(context, json_output):
        print_json(clients)
        return
    rows = [
        [
            str(client["id"]),
            client["volume"],
            client["peer"] + _way(client),
            client["tls"] or "-",
            client["certificate"] or "-",
            str(client["requests"]),
            round_size(client["read_bytes"]),
            round_size(client["write_bytes"]),
        ]
        for client in clients
    ]
    print_table([">ID", "VOLUME", "PEER", "TLS", "CERTIFICATE", ">REQUESTS", ">READ", ">WRITTEN"], rows)


def _way(client: dict[str, Any]) -> str:
    """Of a client that has come to one node and is served by another."""
    if client["via"]:
        return f" via {client['via']}"
    return f" -> {client['forwarded_to']}" if client["forwarded_to"] else ""


@app.command("disconnect")
def disconnect(
    context: typer.Context,
    client_id: Annotated[int, typer.Argument(metavar="ID", help="As `client list` shows it.", show_default=False)],
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Close a client's connection. It may come back: `volume set NAME allowed-clients=` keeps it out.

    Example:

      nbdserver client disconnect 3
    """
    NodeClient(data_path(context, data)).delete(f"/v1/clients/{client_id}")
    if wants_json(context, json_output):
        print_json({"disconnected": client_id})
    else:
        print(f"disconnected client {client_id}")
