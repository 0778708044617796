"""The tree of commands, in the order in which `--help` lists them."""

from typing import Annotated

import typer

from nbdserver.cli import (
    cert_commands,
    check_command,
    client_commands,
    clone_commands,
    cluster_commands,
    completion_commands,
    directory_commands,
    image_commands,
    member_commands,
    monitoring_commands,
    node_commands,
    resync_commands,
    scrub_commands,
    serve,
    service,
    snapshot_commands,
    upgrade,
    volume_commands,
)
from nbdserver.cli.options import DataOption, JsonOption

app = typer.Typer(
    name="nbdserver",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 something broke, 2 wrong input (nothing changed), 3 no node is running.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"nbdserver {version('nbdserver')}")
        except PackageNotFoundError:
            print("nbdserver (source tree)")
        raise typer.Exit


@app.callback()
def root(
    data: DataOption = None,
    json_output: JsonOption = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Turn this machine into disks: a Network Block Device server over a log-structured store.

    The data directory is --data, or NBDSERVER_DATA, or /var/lib/nbdserver as root, or ~/.local/share/nbdserver.

    Examples:

      nbdserver serve --create disk0=10G

      nbdserver volume create scratch --size 200G

      nbdserver status
    """


serve.add_to(app)
app.add_typer(volume_commands.app, name="volume")
app.add_typer(snapshot_commands.app, name="snapshot")
app.add_typer(clone_commands.app, name="clone")
app.add_typer(image_commands.app, name="image")
app.add_typer(scrub_commands.app, name="scrub")
app.add_typer(client_commands.app, name="client")
app.add_typer(cluster_commands.app, name="cluster")
app.add_typer(member_commands.app, name="node")
app.add_typer(directory_commands.app, name="directory")
app.add_typer(cert_commands.app, name="cert")
app.add_typer(monitoring_commands.app, name="monitoring")
node_commands.add_to(app)
resync_commands.add_to(app)
check_command.add_to(app)
upgrade.add_to(app)
service.add_to(app)
completion_commands.add_to(app)
