"""`nbdserver upgrade-in-place`: the running node becomes the program on disk, and its clients see a pause."""

import time
from pathlib import Path
from typing import Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json
from nbdserver.host.data_directory import is_locked
from nbdserver.node.errors import NodeError, NotRunningError

TIMEOUT_S = 300.0
ASK_EVERY_S = 0.05
GONE_AFTER_S = 5.0
"""How long nobody may have the data directory before the node counts as gone."""


def add_to(app: typer.Typer) -> None:
    app.command("upgrade-in-place")(upgrade_in_place)


def upgrade_in_place(context: typer.Context, data: DataOption = None, json_output: JsonOption = False) -> None:
    """Let the running node become the program that is installed now; clients stay connected.

    Install the new version where the old one is, then run this. The node first asks the new program whether it
    would start with the same arguments; if not, nothing changes. Clients over TCP and unix sockets see a pause of
    about a second, no error. What they wrote is made durable before.

    Example:

      nbdserver upgrade-in-place
    """
    path = data_path(context, data)
    as_json = wants_json(context, json_output)
    begun = NodeClient(path).post("/v1/upgrade-in-place", {})
    if not as_json:
        print(f"nbdserver {begun['version']} becomes {begun['program']['version']} ...", flush=True)
    status = _wait_for(path, begun["id"])
    handover = status["handover"]
    if handover["failure"]:
        raise NodeError(f"{handover['failure']}; nbdserver {status['version']} goes on")
    if as_json:
        print_json({"from_version": begun["version"], "version": status["version"], **handover})
        return
    print(f"{handover['clients']} clients waited {handover['pause_s']} s; {handover['dropped']} have to connect again")


def _wait_for(path: Path, wanted: str) -> dict[str, Any]:
    """Return the node's status once the handover of this id is over."""
    deadline_s = time.monotonic() + TIMEOUT_S
    seen_s = time.monotonic()
    while time.monotonic() < deadline_s:
        try:
            status: dict[str, Any] = NodeClient(path).get("/v1/status")
            if status["handover"] is not None and status["handover"]["id"] == wanted:
                return status
            seen_s = time.monotonic()
        except NodeError as error:
            if is_locked(path):
                seen_s = time.monotonic()
            elif time.monotonic() - seen_s > GONE_AFTER_S:
                raise NotRunningError(f"the node ended during the upgrade, its output says why: {error}") from None
        time.sleep(ASK_EVERY_S)
    raise NodeError(f"the upgrade is not over after {TIMEOUT_S:.0f} s; `nbdserver status` says what the node does")
