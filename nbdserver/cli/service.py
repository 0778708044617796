"""`nbdserver install-service`: system user, systemd unit, /etc/nbdserver."""

import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from nbdserver.cli.completion_commands import script
from nbdserver.cli.options import JsonOption, print_json, wants_json
from nbdserver.node.errors import NodeError

COMPLETION = "usr/local/share/bash-completion/completions/nbdserver"

FILES = {
    "nbdserver.service": "etc/systemd/system/nbdserver.service",
    "nbdserver.sysusers": "etc/sysusers.d/nbdserver.conf",
    "node.yaml": "etc/nbdserver/node.yaml",
}

HIDDEN_FROM_THE_SERVICE = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""By ProtectHome and PrivateTmp in the unit."""

KEPT = ("node.yaml",)
"""What belongs to the administrator once it is there."""


def add_to(app: typer.Typer) -> None:
    app.command("install-service")(install_service)


def install_service(
    context: typer.Context,
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="Install below this directory.")] = Path("/"),
    json_output: JsonOption = False,
) -> None:
    """Install the systemd unit, the system user's description and an example /etc/nbdserver/node.yaml. Starts nothing.

    Completion for bash is installed too. An existing node.yaml is kept. Needs root, unless --root names a directory
    that you may write.

    Example:

      sudo nbdserver install-service
    """
    if root == Path("/") and os.geteuid() != 0:
        raise NodeError("installing the service needs root; try: sudo nbdserver install-service")
    program = Path(sys.executable).parent / "nbdserver"
    done: list[dict[str, str]] = []
    texts = {target: files("nbdserver.node").joinpath("systemd", name).read_text() for name, target in FILES.items()}
    texts[COMPLETION] = script("bash")
    for target, text in texts.items():
        path = root / target
        if path.name in KEPT and path.exists():
            done.append({"file": str(path), "action": "kept"})
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("@PROGRAM@", str(program)))
            path.chmod(0o644)
        except OSError as error:
            raise NodeError(f"{path} cannot be written: {error.strerror}") from None
        done.append({"file": str(path), "action": "written"})
    if wants_json(context, json_output):
        print_json(done)
        return
    hidden = next((place for place in HIDDEN_FROM_THE_SERVICE if program.is_relative_to(place)), None)
    if hidden is not None:
        print(f"WARNING: the service does not see {hidden}, where {program} is: install nbdserver into /opt/nbdserver")
    for item in done:
        print(f"{item['action']} {item['file']}")
    print("next: systemd-sysusers && systemctl daemon-reload && systemctl enable --now nbdserver")
