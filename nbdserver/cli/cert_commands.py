"""`nbdserver cert ...`: a CA, and certificates for nodes and clients. Needs no node.

Rules: every command prints what to do next, to be copied and pasted; the library that makes certificates is imported
only when one is made.
"""

import os
import re
import shlex
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbdserver.cli.options import JsonOption, print_json, wants_json
from nbdserver.node.errors import WrongInputError

if TYPE_CHECKING:
    from nbdserver.node.authority import Authority, Made

CA_DAYS = 3650
CERTIFICATE_DAYS = 730
MAX_DAYS = 36500
ENVIRONMENT_VARIABLE = "NBDSERVER_TLS"
MAX_NAME_LENGTH = 64  # of a common name

_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_CLIENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")

app = typer.Typer(
    no_args_is_help=True,
    help="Make certificates for TLS: a CA, then one for each node and each client.",
)

DirectoryOption = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        envvar=ENVIRONMENT_VARIABLE,
        show_envvar=False,
        help=f"Where the CA is.  [default: {ENVIRONMENT_VARIABLE}, or /etc/nbdserver/tls as root, else"
        " ~/.config/nbdserver/tls]",
        show_default=False,
    ),
]
DaysOption = Annotated[int, typer.Option("--days", metavar="N", min=1, max=MAX_DAYS, help="How long it is valid.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@app.command("ca")
def make_ca(
    context: typer.Context,
    directory: DirectoryOption = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What the CA is called.")] = "nbdserver CA",
    days: DaysOption = CA_DAYS,
    force: ForceOption = False,
    json_output: JsonOption = False,
) -> None:
    """Make a certificate authority: ca-cert.pem and ca-key.pem in DIR.

    Whoever has ca-key.pem can make certificates that your nodes trust: no node and no client needs it. With --force
    all certificates of the CA that was there are worthless.

    Example:

      nbdserver cert ca
    """
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise WrongInputError(f"--name: a name has 1 to {MAX_NAME_LENGTH} printable characters")
    authority = _authority(directory, force)
    made = authority.make_ca(name, timedelta(days=days))
    where = _where(directory)
    then = [
        "next, a certificate for each node, with all names and addresses that clients use for it:",
        f"  nbdserver cert node{where} storage1.example.com 10.0.0.5",
        "and one for each client:",
        f"  nbdserver cert client{where} web1",
    ]
    _tell(context, json_output, made, then)


@app.command("node")
def make_node(
    context: typer.Context,
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="Host names and addresses that clients use.", show_default=False),
    ],
    directory: DirectoryOption = None,
    days: DaysOption = CERTIFICATE_DAYS,
    force: ForceOption = False,
    json_output: JsonOption = False,
) -> None:
    """Make a node's certificate: server-cert.pem and server-key.pem in DIR.

    Clients compare the name or address that they connect to with those in the certificate.

    Examples:

      nbdserver cert node storage1.example.com storage1 10.0.0.5

      nbdserver cert node storage1.example.com --force     (a new one, before the old one expires)
    """
    for name in names:
        _check_host(name)
    authority = _authority(directory, force)
    made = authority.make_node(names, timedelta(days=days))
    certificate, key = made.files
    then = [
        "in the node's settings (node.yaml):",
        "  tls:",
        "    mode: required",
        f"    certificate: {certificate}",
        f"    key: {key}",
        f"    client_ca: {authority.ca_certificate}",
        "then restart it, or let it reload them: systemctl reload nbdserver (or kill -HUP)",
    ]
    _tell(context, json_output, made, then)


@app.command("client")
def make_client(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Who it is, for allowed-clients=cert:NAME.", show_default=False)
    ],
    directory: DirectoryOption = None,
    days: DaysOption = CERTIFICATE_DAYS,
    force: ForceOption = False,
    json_output: JsonOption = False,
) -> None:
    """Make a client's certificate: the directory DIR/clients/NAME, to be copied to the client whole.

    It has the file names that libnbd and qemu look for. Give each machine its own: the name tells them apart.

    Example:

      nbdserver cert client web1
    """
    if not _CLIENT_NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise WrongInputError(
            f"{name!r:.80} cannot be a client's name; use 1 to {MAX_NAME_LENGTH} of A-Z a-z 0-9 _ . - @ "
            "and begin with a letter or digit"
        )
    authority = _authority(directory, force)
    made = authority.make_client(name, timedelta(days=days))
    folder = shlex.quote(str(authority.client_directory(name)))
    then = [
        f"copy the directory {folder} to the client; there, for a node NODE (as its certificate calls it):",
        *(f"  {line}" for line in how_to_attach("NODE", 10809, "VOLUME", folder)),
        "to let nobody else use a volume:",
        f"  nbdserver volume set VOLUME tls=required allowed-clients=cert:{name}",
    ]
    _tell(context, json_output, made, then)


def how_to_attach(host: str, port: int, volume: str, folder: str) -> list[str]:
    """What to type on a client that has its certificate in `folder`."""
    in_uri = f"[{host}]" if ":" in host else host
    files = f"-certfile {folder}/client-cert.pem -keyfile {folder}/client-key.pem -cacertfile {folder}/ca-cert.pem"
    return [
        f"nbd-client {host} {port} /dev/nbd0 -N {volume} {files} -tlshostname {host}",
        f'nbdinfo "nbds://{in_uri}:{port}/{volume}?tls-certificates={folder}"',
        f"qemu-img info --object tls-creds-x509,id=tls0,endpoint=client,dir={folder}"
        f" --image-opts driver=nbd,host={host},port={port},export={volume},tls-creds=tls0",
    ]


def _authority(directory: Path | None, force: bool) -> "Authority":
    from nbdserver.node.authority import Authority

    return Authority(Path(os.path.abspath(directory or default_directory())), force)


def default_directory() -> Path:
    """/etc/nbdserver/tls for root, ~/.config/nbdserver/tls for anybody else."""
    return Path("/etc/nbdserver/tls") if os.geteuid() == 0 else Path("~/.config/nbdserver/tls").expanduser()


def _where(directory: Path | None) -> str:
    return f" --dir {shlex.quote(str(directory))}" if directory else ""


def _check_host(name: str) -> None:
    try:
        ip_address(name)
    except ValueError:
        is_number = name.replace(".", "").isdigit()
        if is_number or not _HOST_NAME.fullmatch(name) or len(name) > 253 or ".." in name:
            raise WrongInputError(
                f"{name!r:.80} is neither a host name nor an address; write for example storage1.example.com 10.0.0.5"
            ) from None


def _tell(context: typer.Context, json_output: bool, made: "Made", then: list[str]) -> None:
    if wants_json(context, json_output):
        print_json({"files": [str(file) for file in made.files], "expires": made.expires.isoformat()})
        return
    print(f"made {', '.join(str(file) for file in made.files)}")
    print(f"valid until {made.expires:%Y-%m-%d}")
    for line in then:
        print(line)
