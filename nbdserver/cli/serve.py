"""`nbdserver serve`: settings together, data directory taken, node run in the foreground."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbdserver.cli.cert_commands import how_to_attach
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json
from nbdserver.node.addresses import check_address, check_socket_path, uri
from nbdserver.node.directory import FORMAT_VERSION, DataDirectory
from nbdserver.node.errors import WrongInputError, listed
from nbdserver.node.sizes import SizeError, parse_volume_size

if TYPE_CHECKING:
    from nbdserver.node.config import NodeSettings
    from nbdserver.node.control import Node
    from nbdserver.node.inherited import Inherited


def add_to(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Node settings (YAML).", show_default=False)
    ] = None,
    data: DataOption = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            "--listen",
            metavar="HOST:PORT",
            help="Where NBD clients connect; may be repeated.  [default: 127.0.0.1:10809]",
            show_default=False,
        ),
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option("--socket", metavar="PATH", help="A unix socket for NBD clients too.", show_default=False),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            "--http",
            metavar="HOST:PORT",
            help="Where the status page, metrics and the API are.  [default: nowhere]",
            show_default=False,
        ),
    ] = None,
    create: Annotated[
        list[str] | None,
        typer.Option(
            "--create",
            metavar="NAME=SIZE",
            help="Make this volume if it is not there yet (one that is there keeps its size); may be repeated.",
            show_default=False,
        ),
    ] = None,
    check_only: Annotated[
        bool,
        typer.Option(
            "--check-only", help="Say whether it would start: settings, data directory, code. Starts nothing."
        ),
    ] = False,
    json_output: JsonOption = False,
) -> int:
    """Serve this node's volumes to NBD clients, in the foreground, until Ctrl-C.

    Prints `ready: nbd://HOST:PORT/` when clients can attach. SIGTERM and Ctrl-C stop it cleanly; SIGHUP reloads
    the settings file. Listening sockets of a systemd socket unit are served too, and instead of the default
    address. With --json, one object a line.

    Examples:

      nbdserver serve --create disk0=10G --http 127.0.0.1:9809

      nbdserver serve --config /etc/nbdserver/node.yaml

      nbdserver serve --listen 0.0.0.0:10809 --listen '[::]:10809' --socket /run/nbdserver/nbd.sock
    """
    volumes = [parse_create(text) for text in create or []]
    overrides: dict[str, Any] = {}
    if listen:
        overrides["listen"] = [check_address(address) for address in listen]
    if socket:
        overrides["socket"] = check_socket_path(socket)
    if http:
        overrides["http.listen"] = check_address(http)
    import asyncio

    from nbdserver.node import certificates, cluster_files, inherited
    from nbdserver.node.config import NodeSettings, load_settings, put_over

    settings = load_settings(config) if config else NodeSettings()
    certificates.check(settings.tls)
    cluster_files.check(settings.cluster)
    as_json = wants_json(context, json_output)
    if check_only:
        return _check_only(data_path(context, data, settings.data), as_json)
    got = inherited.take(os.environ)
    if got.activated and "listen" not in settings.model_fields_set:
        overrides.setdefault("listen", [])
    settings = put_over(settings, overrides)
    directory = DataDirectory(data_path(context, data, settings.data), got.lock)
    return asyncio.run(_serve(settings, config, overrides, directory, volumes, got, as_json))


def _check_only(path: Path, as_json: bool) -> int:
    """Do what a start does before it changes anything, and load all of the program."""
    DataDirectory(path).check()
    import nbdserver.api.server
    import nbdserver.node.data  # noqa: F401
    from nbdserver.node import program
    from protocol.handover import READABLE

    says = {"version": program.version(), "data_format": FORMAT_VERSION, "handover_versions": list(READABLE)}
    if as_json:
        print_json(says)
    else:
        print(f"nbdserver {says['version']} would start on {path}")
    return 0


def parse_create(text: str) -> tuple[str, int]:
    """Return (name, bytes) of `NAME=SIZE`. Raises WrongInputError."""
    name, equals, size = text.partition("=")
    if not equals or not name:
        raise WrongInputError(f"--create {text!r:.60} is not NAME=SIZE; write for example --create disk0=10G")
    try:
        return name, parse_volume_size(size)
    except SizeError as error:
        raise WrongInputError(f"--create {name}: {error}") from None


async def _serve(
    settings: "NodeSettings",
    config: Path | None,
    overrides: dict[str, Any],
    directory: DataDirectory,
    create: list[tuple[str, int]],
    got: "Inherited",
    as_json: bool,
) -> int:
    from nbdserver.node.control import Node

    directory.open()
    try:
        voice = _JsonVoice() if as_json else _Voice()
        node = Node(settings, directory, config, overrides, voice, got)
        return await node.run(create, _start_api)
    finally:
        directory.release()


async def _start_api(node: "Node") -> Any:
    # FastAPI takes half a second to import: the data process opens its families meanwhile.
    from nbdserver.api.server import serve_api

    return await serve_api(node)


class _Voice:
    """Tells the person at the terminal. A server does not end because nobody reads what it says."""

    def say(self, line: str) -> None:
        try:
            print(line, flush=True)
        except OSError:
            pass

    def ready(self, node: "Node") -> None:
        for line in _how_to_attach(node):
            self.say(line)
        self.say(f"ready: {_first_uri(node)}")


class _JsonVoice(_Voice):
    """Tells a program: one JSON object a line."""

    def say(self, line: str) -> None:
        super().say(json.dumps({"message": line}))

    def ready(self, node: "Node") -> None:
        ready = {"ready": _first_uri(node), "listen": node.addresses(), "data": str(node.directory.path)}
        super().say(json.dumps(ready))


def _first_uri(node: "Node") -> str:
    return uri(node.addresses()[0], tls=node.settings.tls.mode == "required")


def _how_to_attach(node: "Node") -> list[str]:
    names = [volume.name for family in node.families() for volume in family.volumes]
    name = names[0] if names else "NAME"
    lines = [
        f"data: {node.directory.path}",
        f"volumes: {listed(names, 20) or 'none yet; nbdserver volume create NAME --size 10G'}",
    ]
    for address in node.addresses():
        if node.settings.tls.mode == "required" and not address.startswith("unix:"):
            host, _, port = address.rpartition(":")
            lines.append(f"to attach by {uri(address, tls=True)}, with $CERTS from `nbdserver cert client`")
            lines += [f"  {line}" for line in how_to_attach(host.strip("[]"), int(port), name, "$CERTS")]
            continue
        target = shlex.quote(uri(address, name))
        if address.startswith("unix:"):
            attach = f"nbd-client -unix {shlex.quote(address.removeprefix('unix:'))} -N {name} /dev/nbd0"
        else:
            host, _, port = address.rpartition(":")
            attach = f"nbd-client {host.strip('[]')} {port} -N {name} /dev/nbd0"
        lines += [
            f"to attach by {uri(address)}",
            f"  sudo modprobe nbd && sudo {attach}",
            f"  nbdinfo {target}",
            f"  qemu-img info {target}",
            f"  qemu-io -f raw -c 'read 0 4k' {target}",
        ]
    if node.settings.http.listen:
        lines.append(f"status page: http://{node.settings.http.listen}/")
    return lines
