"""`nbdserver status`, `events` and `config check`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.member_commands import print_nodes
from nbdserver.cli.options import DataOption, JsonOption, coloured, data_path, print_json, wants_json
from nbdserver.cli.resync_commands import resync_sentence
from nbdserver.cli.scrub_commands import scrub_sentence
from nbdserver.cli.volume_commands import print_volumes
from nbdserver.node.errors import WrongInputError
from nbdserver.node.findings import NOTE, NOW, SOON, Finding, need_attention
from nbdserver.node.sizes import round_size

WAIT_S = 25

EXIT_ATTENTION = 1

_URGENCY = {NOW: ("WARNING", "red"), SOON: ("WARNING", "yellow"), NOTE: ("NOTE", "cyan")}

config_app = typer.Typer(no_args_is_help=True, help="Look at settings files.")


def add_to(app: typer.Typer) -> None:
    app.command("status")(status)
    app.command("events")(events)
    app.add_typer(config_app, name="config")


def status(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="End with 1 if something needs attention: for cron and monitoring.")
    ] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> int:
    """Show the running node, what is wrong and what to do about it, its cluster, and its volumes.

    With --check the exit code is 1 if there is a WARNING: a fill alarm stands (80, 90 or 95 %), a volume is full or
    failed, a block is damaged, the data process does not answer, a node of the cluster is silent, the registry is not
    reached. A NOTE tells what is over.

    Examples:

      nbdserver status --json

      nbdserver status --check >/dev/null || mail -s 'nbdserver needs attention' root
    """
    node = NodeClient(data_path(context, data)).get("/v1/status")
    found = [Finding(**finding) for finding in node["findings"]]
    if wants_json(context, json_output):
        print_json(node)
    else:
        _print_status(node, found)
    return EXIT_ATTENTION if check and need_attention(found) else 0


def _print_status(node: dict[str, Any], found: list[Finding]) -> None:
    capacity = node["capacity"]
    print(f"nbdserver {node['version']}, pid {node['pid']}, up {node['uptime_s']:.0f} s")
    print(f"data {node['data']}, {round_size(node['free_bytes'])} free of {round_size(capacity['size_bytes'])}")
    print(f"listening on {', '.join(node['listen'])}")
    if node["tls"]:
        print(f"tls {node['tls']['mode']}, certificate expires on {node['tls']['expires'][:10]}")
    if len(node["workers"]) > 1:
        volumes = [str(len(worker["volumes"])) if worker["pid"] else "starting" for worker in node["workers"]]
        print(f"{len(volumes)} data processes, volumes in each: {', '.join(volumes)}")
    limit = f", at most {capacity['overcommit']:g} times the room" if capacity["overcommit"] else ""
    promised, room = round_size(capacity["provisioned_bytes"]), round_size(capacity["room_bytes"])
    print(f"volumes of {promised} on {room} of room{limit}; they take {round_size(capacity['allocated_bytes'])}")
    for scrub in node["scrubs"]:
        if scrub["state"] == "running":
            print(f"scrubbing {scrub_sentence(scrub)}")
    for row in node["resync"]:
        print(f"completing the replica of {resync_sentence(row)}")
    for finding in found:
        word, colour = _URGENCY[finding.urgency]
        print(coloured(f"{word}: {finding.sentence}", colour))
        if finding.remedy:
            print(f"    to do: {finding.remedy}")
    print()
    if node["cluster"]:
        _print_cluster(node["cluster"])
        print()
    print_volumes(node["volumes"])


def _print_cluster(cluster: dict[str, Any]) -> None:
    registry = cluster["registry"]
    master = f"master {cluster['master']} (epoch {cluster['epoch']})" if cluster["master"] else "no master"
    state = "connected" if registry["is_connected"] else "not reached"
    print(f"cluster {cluster['name']}, this is {cluster['node']}; {master}")
    print(f"registry etcd {registry['endpoint']}, {state} for {registry['for_s']:.0f} s")
    print_nodes(cluster["nodes"])


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, until Ctrl-C.")] = False,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, max=2000, help="How many of the last ones.")
    ] = 50,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what happened on the node, oldest first. With --json, one object a line.

    Examples:

      nbdserver events --follow

      nbdserver events --limit 500 --json
    """
    client = NodeClient(data_path(context, data))
    as_json = wants_json(context, json_output)
    found = client.get("/v1/events", limit=limit)
    last = 0
    while True:
        for event in found:
            last = event["sequence"]
            print(json.dumps(event) if as_json else _sentence(event), flush=True)
        if not follow:
            return
        asked_s = time.monotonic()
        found = client.get("/v1/events", after=last, wait_s=WAIT_S)
        if not found and time.monotonic() - asked_s < 1:
            time.sleep(1)  # a node that answers at once with nothing is not asked in a tight loop


def _sentence(event: dict[str, Any]) -> str:
    fields = [f"{key}={value}" for key, value in event.items() if key not in ("sequence", "time", "kind")]
    return " ".join([event["time"], event["kind"], *fields])


@config_app.command("check")
def config_check(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The settings file (YAML).", show_default=False)],
    json_output: JsonOption = False,
) -> int:
    """Check a settings file, whole, without a node.

    Example:

      nbdserver config check /etc/nbdserver/node.yaml
    """
    from nbdserver.node import certificates, cluster_files
    from nbdserver.node.config import ConfigError, load_settings, too_many_workers

    try:
        settings = load_settings(file)
        warnings = [*too_many_workers(settings), *certificates.problems(certificates.check(settings.tls))]
        cluster_files.check(settings.cluster)
    except WrongInputError as error:
        if not wants_json(context, json_output):
            raise
        found = error.problems if isinstance(error, ConfigError) else [str(error)]
        print_json({"file": str(file), "problems": found})
        return error.exit_code
    if wants_json(context, json_output):
        content = settings.model_dump(mode="json")
        print_json({"file": str(file), "problems": [], "warnings": warnings, "settings": content})
        return 0
    for warning in warnings:
        print(f"WARNING: {warning}")
    print(f"{file}: good")
    return 0
