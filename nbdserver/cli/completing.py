"""What may stand where the cursor is: commands, options, files, and names that the running node knows.

    shell ──► nbdserver complete -- WORD... INCOMPLETE ──► one candidate a line: VALUE, tab, what it is

Theory. The tree of commands says what there is, so nothing is said twice but which arguments are names (NAMES). The
scripts in completion/ know their shell and nothing of the commands. We do not use typer's own completion: bash splits
words at `@`, which stands in every snapshot's name, and its protocol is private and changes.

Rules
- It is asked at every press of a key: a node that does not answer within TIMEOUT_S, or none, is silence. Only what is
  needed is imported.
- A line `:files` lets the shell complete names of files.
"""

import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdserver.node.directory import ENVIRONMENT_VARIABLE, default_path

TIMEOUT_S = 1.0
FILES = ":files"

Candidate = tuple[str, str]
"""(value, what it is)."""

VOLUMES, SNAPSHOTS, NODES = "volumes", "snapshots", "nodes"

NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "check": ((VOLUMES,),),
    "volume show": ((VOLUMES,),),
    "volume set": ((VOLUMES,),),
    "volume resize": ((VOLUMES,),),
    "volume rename": ((VOLUMES,),),
    "volume delete": ((VOLUMES,),),
    "volume move": ((VOLUMES,),),
    "snapshot create": ((VOLUMES,),),  # a new name behind the @
    "snapshot list": ((VOLUMES,),),
    "snapshot delete": ((SNAPSHOTS,),),
    "snapshot rollback": ((SNAPSHOTS,),),
    "clone create": ((SNAPSHOTS,),),
    "image save": ((VOLUMES, SNAPSHOTS), (FILES,)),
    "image load": ((FILES,), (VOLUMES,)),
    "scrub start": ((VOLUMES,),),
    "config check": ((FILES,),),
    "node show": ((NODES,),),
    "node drain": ((NODES,),),
    "node remove": ((NODES,),),
}
"""What each argument of a command is, in order; a command that is not here has none that could be known."""

ETCD_FILES = ("--etcd-ca", "--etcd-certificate", "--etcd-key", "--etcd-password-file")
FILE_OPTIONS = ("--config", "--data", "--dir", "--root", "--socket", *ETCD_FILES)


def complete(words: list[str], incomplete: str) -> list[Candidate]:
    """Return what may follow `words` (without the program's name) and begins with `incomplete`."""
    import typer

    from nbdserver.cli.commands import app

    command: Any = typer.main.get_command(app)
    path: list[str] = []
    arguments = 0
    option: Any = None  # that waits for its value
    data = ""
    for word in words:
        if option is not None:
            data = word if "--data" in option.opts else data
            option = None
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            data = value if equals and name == "--data" else data
            found = _option(command, name)
            option = found if found is not None and not equals and not found.is_flag else None
        elif hasattr(command, "commands"):
            command = command.commands.get(word)
            path.append(word)
            if command is None:
                return []
        else:
            arguments += 1
    if option is not None:
        found_candidates = _values(option)
    elif incomplete.startswith("-"):
        found_candidates = _options(command)
    elif hasattr(command, "commands"):
        found_candidates = [
            (name, _short(each)) for name, each in command.commands.items() if not getattr(each, "hidden", False)
        ]
    else:
        found_candidates = _argument(" ".join(path), arguments, data, incomplete)
    return [found for found in found_candidates if found[0] == FILES or found[0].startswith(incomplete)]


def _option(command: Any, name: str) -> Any:
    return next((parameter for parameter in command.params if name in parameter.opts), None)


def _options(command: Any) -> list[Candidate]:
    return [
        (max(parameter.opts, key=len), _sentence(parameter.help or ""))
        for parameter in command.params
        if parameter.opts[0].startswith("-")
    ]


def _values(option: Any) -> list[Candidate]:
    if set(FILE_OPTIONS) & set(option.opts):
        return [(FILES, "")]
    metavar = str(option.metavar or "")
    return [(choice, "") for choice in metavar.split("|")] if "|" in metavar else []


def _argument(path: str, position: int, data: str, incomplete: str) -> list[Candidate]:
    if path == "volume set" and position > 0:
        from nbdserver.node.volume_settings import SETTING_KEYS

        return [(f"{key}=", "") for key in SETTING_KEYS]
    kinds = NAMES.get(path, ())
    if position >= len(kinds):
        return []
    if kinds[position] == (FILES,):
        return [(FILES, "")]
    names = ask_names(Path(data or os.environ.get(ENVIRONMENT_VARIABLE) or default_path()))
    candidates = [(name, kind.removesuffix("s")) for kind in kinds[position] for name in names.get(kind, [])]
    if path == "snapshot create" and "@" not in incomplete:
        return [(f"{name}@", what) for name, what in candidates]
    return candidates


def _short(command: Any) -> str:
    return _sentence(str(command.help or "").strip().partition("\n")[0])


def _sentence(text: str) -> str:
    """The first one."""
    return text.partition(". ")[0].rstrip(".")


def ask_names(data: Path) -> dict[str, list[str]]:
    """Return the volumes, snapshots and cluster's nodes that the node on a data directory knows; nothing if it does not
    answer."""
    try:
        connection = _UnixConnection(data.absolute() / "api.sock")
        connection.request("GET", "/v1/names")
        answer = connection.getresponse()
        names: dict[str, list[str]] = json.load(answer) if answer.status == 200 else {}
        return names
    except (OSError, http.client.HTTPException, ValueError):
        return {}


class _UnixConnection(http.client.HTTPConnection):
    """httpx takes longer to be imported than a person waits for a key."""

    def __init__(self, path: Path) -> None:
        super().__init__("node", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


def lines(words: list[str]) -> Iterator[str]:
    """What the shell gets for `words`, of which the last one is incomplete."""
    for value, what in complete(words[:-1], words[-1] if words else ""):
        yield f"{value}\t{what}" if what else value
