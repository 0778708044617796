"""`nbdserver cluster ...`: make a cluster, let nodes in, change its key.

Rules: init, token and join need no running node; each prints what to do next, to be copied and pasted.
"""

import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json
from nbdserver.node.errors import WrongInputError

if TYPE_CHECKING:
    from nbdserver.node.cluster_making import Wishes
    from nbdserver.node.cluster_settings import ClusterSettings

TOKEN_MINUTES = 60
MOST_TOKEN_LENGTH = 4096
MAX_MINUTES = 7 * 24 * 60

app = typer.Typer(no_args_is_help=True, help="Make a cluster of nodes, let nodes in, change its key.")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The node's settings; `cluster:` is added, its files go to cluster/ beside it.  [default:"
        " /etc/nbdserver/node.yaml as root, else ~/.config/nbdserver/node.yaml]",
        show_default=False,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="IP:PORT",
        help="Where other nodes reach this one, by UDP and TCP, as 10.0.0.5:10810.",
        show_default=False,
    ),
]
NodeOption = Annotated[
    str | None,
    typer.Option("--node", metavar="NAME", help="This node's name.  [default: the host's]", show_default=False),
]
SiteOption = Annotated[str | None, typer.Option("--site", metavar="NAME", help="Where it stands.", show_default=False)]
DomainOption = Annotated[
    str | None,
    typer.Option("--fault-domain", metavar="NAME", help="What fails together with it, as a rack.", show_default=False),
]
MinutesOption = Annotated[
    int, typer.Option("--minutes", metavar="N", min=1, max=MAX_MINUTES, help="How long the token is valid.")
]


@app.command()
def init(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="CLUSTER", help="The cluster's name.", show_default=False)],
    address: AddressOption = None,
    etcd: Annotated[
        list[str] | None,
        typer.Option("--etcd", metavar="HOST:PORT", help="A member of etcd; give all of them.", show_default=False),
    ] = None,
    node: NodeOption = None,
    site: SiteOption = None,
    fault_domain: DomainOption = None,
    etcd_ca: Annotated[
        Path | None, typer.Option("--etcd-ca", metavar="FILE", help="The CA of etcd's TLS, PEM.", show_default=False)
    ] = None,
    etcd_certificate: Annotated[
        Path | None,
        typer.Option("--etcd-certificate", metavar="FILE", help="A certificate for etcd, PEM.", show_default=False),
    ] = None,
    etcd_key: Annotated[
        Path | None, typer.Option("--etcd-key", metavar="FILE", help="The key to it, PEM.", show_default=False)
    ] = None,
    etcd_user: Annotated[
        str | None, typer.Option("--etcd-user", metavar="NAME", help="Who logs in to etcd.", show_default=False)
    ] = None,
    etcd_password_file: Annotated[
        Path | None,
        typer.Option("--etcd-password-file", metavar="FILE", help="File with the password.", show_default=False),
    ] = None,
    minutes: MinutesOption = TOKEN_MINUTES,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a cluster whose first node is this machine: its key, its CA, this node's certificate and settings.

    Prints a token that lets other nodes in. The CA's key stays here: this is the machine that can make tokens.

    Example:

      nbdserver cluster init prod --address 10.0.0.5:10810 --etcd 10.0.0.5:2379 --etcd 10.0.0.6:2379
    """
    from nbdserver.node import cluster_making

    _demand(address)
    if not etcd:
        raise WrongInputError("--etcd is missing: where etcd is, for example --etcd 10.0.0.5:2379")
    tls = {
        key: os.path.abspath(path)
        for key, path in (("ca", etcd_ca), ("certificate", etcd_certificate), ("key", etcd_key))
        if path is not None
    }
    registry: dict[str, Any] = {"endpoints": etcd}
    registry |= {"tls": tls} if tls else {}
    registry |= {"user": etcd_user} if etcd_user else {}
    registry |= {"password_file": os.path.abspath(etcd_password_file)} if etcd_password_file else {}
    wishes = _wishes(config, node, address, {"site": site, "fault_domain": fault_domain})
    settings = cluster_making.init(name, wishes, registry)
    token = cluster_making.make_token(settings, 60.0 * minutes, time.time())
    if wants_json(context, json_output):
        print_json({"config": str(wishes.config), "token": token, "cluster": settings.model_dump(mode="json")})
        return
    _tell(settings, wishes)
    _tell_token(token, minutes)


@app.command()
def token(
    context: typer.Context,
    minutes: MinutesOption = TOKEN_MINUTES,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a token that lets nodes into the cluster, on the machine where `cluster init` was run.

    Whoever has the token can join as long as it is valid.

    Example:

      nbdserver cluster token --minutes 10
    """
    from nbdserver.node import cluster_making
    from nbdserver.node.config import load_settings

    path = config or cluster_making.default_config()
    settings = load_settings(path).cluster
    if settings is None:
        raise WrongInputError(f"{path} names no cluster; make one with: nbdserver cluster init")
    text = cluster_making.make_token(settings, 60.0 * minutes, time.time())
    if wants_json(context, json_output):
        print_json({"token": text, "minutes": minutes})
    else:
        _tell_token(text, minutes)


@app.command()
def join(
    context: typer.Context,
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN",
            help="What `cluster init` or `cluster token` printed; -: read from standard input.",
            show_default=False,
        ),
    ],
    address: AddressOption = None,
    node: NodeOption = None,
    site: SiteOption = None,
    fault_domain: DomainOption = None,
    across_wan: Annotated[
        bool, typer.Option("--across-wan", help="It is far from the others' site: reached by TCP alone.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Get the key and another certificate for a node that has joined before.")
    ] = False,
    config: ConfigOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let this machine join a cluster: its certificate, the cluster's key and the settings.

    The node that made the token has to be running and to be reached by TCP.

    Examples:

      nbdserver cluster join nbdj1.eyJjbHVz... --address 10.0.0.6:10810

      nbdserver cluster join - --again     (the token is seen by nobody who looks at processes)
    """
    import asyncio

    from nbdserver.node import cluster_making
    from nbdserver.node.invitations import Token

    decoded = Token.decode(sys.stdin.readline(MOST_TOKEN_LENGTH) if token == "-" else token)
    given = {"site": site, "fault_domain": fault_domain, "across_wan": across_wan or None}
    if not again:
        _demand(address)
    wishes = _wishes(config, node, address, given)
    settings = asyncio.run(cluster_making.join(decoded, wishes, again))
    if wants_json(context, json_output):
        print_json({"config": str(wishes.config), "cluster": settings.model_dump(mode="json")})
    else:
        _tell(settings, wishes)


@app.command("rotate-key")
def rotate_key(context: typer.Context, data: DataOption = None, json_output: JsonOption = False) -> None:
    """Give the cluster another key, while it runs: after a node was removed whose disk others may have.

    Every node has to be up. If it is broken off both keys stay valid; the same command goes on with it, on any node.

    Example:

      nbdserver cluster rotate-key
    """
    NodeClient(data_path(context, data)).post("/v1/cluster/rotate-key", None)
    if wants_json(context, json_output):
        print_json({"rotated": True})
    else:
        print("every node has the new key, and only that")


@app.command()
def recover(
    context: typer.Context,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="NODE",
            help="Do not wait for the word of this node: what it alone has acknowledged is lost. May be repeated.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make the cluster's registry whole after etcd was restored from a backup, or has lost what it had.

    What is in etcd must not go back: an old value may name replicas that lack what was acknowledged since. So the nodes
    take nothing from an etcd that is not as far as they have seen it; volumes are served as while etcd is away. This
    asks every node what its disk says of its replicas, and writes that into etcd: who owns each volume, who is in sync,
    names and settings. All nodes should be up. A volume of which a node was in sync that does not answer is refused,
    unless that node is given up with --without.

    Examples:

      nbdserver cluster recover --dry-run

      nbdserver cluster recover

      nbdserver cluster recover --without n2     (n2 is lost for good, with its disk)
    """
    asked = {"without": without or [], "is_trial": dry_run}
    told = NodeClient(data_path(context, data)).post("/v1/cluster/recover", asked)
    if wants_json(context, json_output):
        print_json(told)
        return
    print(f"{', '.join(told['nodes'])} say what they have" + _of_silent(told["silent"]))
    for volume in told["volumes"]:
        loss = f"; {volume['loss']}" if volume["loss"] else ""
        print(f"  {volume['name']}: in sync on {', '.join(volume['in_sync'])}{loss}")
    for volume in told["left_out"]:
        print(f"  {volume['name']}: left out, {volume['problem']}")
    print("nothing was changed" if dry_run else "the registry is whole; the nodes take it within some seconds")


def _of_silent(silent: list[str]) -> str:
    return f"; {', '.join(silent)} {'says' if len(silent) == 1 else 'say'} nothing" if silent else ""


def _wishes(config: Path | None, node: str | None, address: str | None, more: dict[str, Any]) -> "Wishes":
    from nbdserver.node.cluster_making import Wishes, default_config

    path = Path(os.path.abspath(config or default_config()))
    given = {key: value for key, value in more.items() if value is not None}
    return Wishes(path, node or socket.gethostname().partition(".")[0], address or "", given)


def _demand(address: str | None) -> None:
    if not address:
        raise WrongInputError("--address is missing: where other nodes reach this one, for example 10.0.0.5:10810")


def _tell(settings: "ClusterSettings", wishes: "Wishes") -> None:
    print(f"{settings.node} belongs to cluster {settings.name}: {wishes.config}, with files in {wishes.directory}")
    print("next, here:")
    print(f"  nbdserver serve --config {shlex.quote(str(wishes.config))}")
    print("or, as a service: systemctl restart nbdserver")


def _tell_token(text: str, minutes: int) -> None:
    print(f"then, on each machine that shall join, within {minutes} minutes:")
    print(f"  nbdserver cluster join {text} --address IP:PORT")
