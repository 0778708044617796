"""`nbdserver scrub ...`: talks to the running node."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nbdserver.cli.client import NodeClient
from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, print_table, wants_json
from nbdserver.node.sizes import round_size

WATCH_S = 1.0
EXIT_DAMAGED = 1

app = typer.Typer(no_args_is_help=True, help="Read all data again, to find what has rotted while there is a backup.")


def _client(context: typer.Context, data: Path | None) -> NodeClient:
    return NodeClient(data_path(context, data))


@app.command("start")
def start(
    context: typer.Context,
    volume: Annotated[
        str, typer.Argument(metavar="[VOLUME]", help="With its snapshots and clones; else all.", show_default=False)
    ] = "",
    data: DataOption = None,
    json_output: JsonOption = False,
) -> None:
    """Read a volume's data, or that of all, from the device, and compare it with its checksums. In the background.

    Each damaged block becomes an event and stands in `status`, with the volumes and snapshots that show it. Volumes are
    read one after the other, at the rate that scrub.rate in node.yaml says, at an eighth of it while clients are busy.
    It goes on after a restart. scrub.interval (30 days unless set) does the same by itself.

    Examples:

      nbdserver scrub start

      nbdserver scrub start disk0
    """
    waiting = _client(context, data).post("/v1/scrubs", {"volume": volume})
    if wants_json(context, json_output):
        print_json(waiting)
    else:
        print(f"scrubbing {', '.join(found['volume'] for found in waiting) or 'nothing: there are no volumes'}")


@app.command("status")
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show progress until all are over.")] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> int:
    """Show how far scrubs are, what they found, and when the next ones are due.

    With --watch the exit code is 1 if damage was found or a scrub failed.

    Examples:

      nbdserver scrub status

      nbdserver scrub status --watch
    """
    client = _client(context, data)
    as_json = wants_json(context, json_output)
    found = _watch(client, shown=not as_json) if watch else client.get("/v1/scrubs")
    if as_json:
        print_json(found)
    else:
        _print(found)
    return EXIT_DAMAGED if watch and any(_is_bad(scrub) for scrub in found) else 0


@app.command("stop")
def stop(context: typer.Context, data: DataOption = None, json_output: JsonOption = False) -> None:
    """Stop the scrub that runs, and those that wait. What was found stays reported.

    Example:

      nbdserver scrub stop
    """
    stopped = _client(context, data).delete("/v1/scrubs")
    if wants_json(context, json_output):
        print_json({"stopped": stopped})
    else:
        print(f"stopped scrubbing {', '.join(stopped) or 'nothing: no scrub was running'}")


def scrub_sentence(scrub: dict[str, Any]) -> str:
    """Say how far one is."""
    done, total = scrub["done_bytes"], scrub["total_bytes"]
    share = f"{done * 100 // total if total else 0} % of {round_size(total)}"
    rate = f", {round_size(scrub['rate_bytes_per_s'])}/s" if scrub["rate_bytes_per_s"] else ""
    left = f", {_duration(scrub['left_s'])} left" if scrub["left_s"] is not None else ""
    damaged = f", {scrub['damaged_blocks']} damaged blocks" if scrub["damaged_blocks"] else ""
    return f"{scrub['volume']}: {share}{rate}{left}{damaged}"


def _print(scrubs: list[dict[str, Any]]) -> None:
    rows = [
        [
            scrub["volume"],
            scrub["state"],
            f"{scrub['done_bytes'] * 100 // scrub['total_bytes']} %" if scrub["total_bytes"] else "",
            str(scrub["damaged_blocks"]),
            scrub["completed"] or "never",
            scrub["next"],
        ]
        for scrub in scrubs
    ]
    print_table(["VOLUME", "STATE", ">DONE", ">DAMAGED", "COMPLETED", "NEXT"], rows)
    for scrub in scrubs:
        if scrub["state"] == "running":
            print(scrub_sentence(scrub))
        if scrub["reason"]:
            print(f"{scrub['volume']}: {scrub['reason']}")


def _watch(client: NodeClient, shown: bool) -> list[dict[str, Any]]:
    """Wait until no scrub is active, with a bar for each on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}"))
    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not shown or not console.is_terminal) as bars:
        while True:
            found: list[dict[str, Any]] = client.get("/v1/scrubs")
            for scrub in found:
                volume = scrub["volume"]
                if scrub["state"] in ("running", "waiting") or volume in tasks:
                    if volume not in tasks:
                        tasks[volume] = bars.add_task(volume, total=None, left="")
                    left = f"{_duration(scrub['left_s'])} left" if scrub["left_s"] else scrub["state"]
                    total = scrub["total_bytes"] or None
                    bars.update(tasks[volume], completed=scrub["done_bytes"], total=total, left=left)
            if not any(scrub["state"] in ("running", "waiting") for scrub in found):
                return found
            time.sleep(WATCH_S)


def _is_bad(scrub: dict[str, Any]) -> bool:
    return bool(scrub["damaged_blocks"]) or scrub["state"] == "failed"


def _duration(seconds: float) -> str:
    for name, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {name}"
    return f"{seconds:.0f} s"
