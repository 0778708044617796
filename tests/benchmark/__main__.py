"""`python -m tests.benchmark`: the command line of the benchmark."""

import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nbdserver.node.sizes import SizeError, parse_volume_size
from protocol.checksum import CHECKSUM_IS_FAST, CHECKSUM_LIBRARY

from . import machine, measuring, profiler
from .conditions import Conditions
from .load import fio_command, fio_version
from .outcome import RESULTS, DirectoryOption, JsonOption, ResultsOption, Run, chosen, console, run_of, show
from .processes import BenchmarkError
from .report import noise_cores, rich_table
from .rows import ROWS, ROWS_BY_NAME, Row
from .targets import SUBJECT, TARGETS, USUAL_TARGETS, Setting, Target, nbd_engine, stopped_at_the_end

RESULT_FORMAT = 1
QUICK_SIZE_BYTES = 32 << 20
ROOM_FACTOR = 2.5  # of the working set, for a log-structured disk: garbage and what is written ahead
LEAST_ROOM_BYTES = 1 << 30
GOAL_WITH_LIMITED_MEMORY = 1.0  # then the device decides, and a copy of its queue is the best there is
BUSY_LOAD = 0.7

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def size_bytes_of(text: str) -> int:
    """`1G`, `512M`: read as the server reads sizes, and a multiple of 1 MiB, which is what the disks are filled by."""
    try:
        size_bytes = parse_volume_size(text)
    except SizeError as error:
        raise BenchmarkError(str(error)) from None
    if size_bytes % (1 << 20):
        raise BenchmarkError(f"{text!r} is not a multiple of 1M")
    return size_bytes


def chosen_rows(names: str | None, memory_is_limited: bool = False) -> list[Row]:
    rows = list(ROWS) if names is None else chosen(names, "row", ROWS_BY_NAME)
    return [replace(row, goal=GOAL_WITH_LIMITED_MEMORY) for row in rows] if memory_is_limited else rows


def chosen_targets(names: str | None, directory: Path, size_bytes: int) -> list[Target]:
    wanted = chosen(",".join(USUAL_TARGETS) if names is None else names, "target", TARGETS)
    packages = {target.missing() for target in wanted} | {None if shutil.which("fio") else "fio"}
    absent = sorted(package for package in packages if package)
    if absent:
        raise BenchmarkError(
            f"not installed: {', '.join(absent)}. apt-get install --no-install-recommends {' '.join(absent)}"
            + ("" if absent == ["fio"] else ", or leave the target out by --targets")
        )
    return [target(directory, size_bytes) for target in wanted]


def room_bytes(servers: list[Target]) -> int:
    """A disk for each."""
    return LEAST_ROOM_BYTES + sum(
        int(server.size_bytes * (ROOM_FACTOR if server.name == SUBJECT else 1)) for server in servers
    )


def refuse_a_slow_checksum() -> None:
    if not CHECKSUM_IS_FAST:
        raise BenchmarkError(
            f"CRC-32C is computed by {CHECKSUM_LIBRARY}, some 500 µs a block: the figures would say nothing. "
            f"{sys.executable} -m pip install --force-reinstall google-crc32c"
        )


@application.command()
def benchmark(
    rows: Annotated[str | None, typer.Option(help="Comma-separated rows.  [default: all]")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Comma-separated targets.  [default: all but nbdkit-simple]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each target in each row.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of one measurement.")] = 2.0,
    size: Annotated[str, typer.Option(help="Working set.")] = "1G",
    memory: Annotated[
        str | None, typer.Option(help="Limit of each server's memory, page cache included: 2G.  [default: none]")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A smoke run: 32M, 2 rounds of 0.3 s, no search for settings.")] = False,
    search: Annotated[bool, typer.Option(help="Search the peers' settings again.")] = False,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
    profile: Annotated[str | None, typer.Option(metavar="ROW", help="Profile this server in one row instead.")] = None,
) -> None:
    """Measure this server beside nbdkit, qemu-nbd and nbd-server by fio, in turn, on one disk."""
    with run_of("bench", results, directory) as bench:
        refuse_a_slow_checksum()
        size_bytes = QUICK_SIZE_BYTES if quick else size_bytes_of(size)
        if profile:
            (row,) = chosen_rows(profile)
            (subject,) = chosen_targets(SUBJECT, bench.place, size_bytes)
            run_profile(subject, row, max(seconds, 5.0), results)
            return
        servers = chosen_targets(targets, bench.place, size_bytes)
        machine.check_room(bench.place, room_bytes(servers))
        conditions = Conditions(size_bytes, size_bytes_of(memory) if memory else 0)
        wanted = chosen_rows(rows, memory_is_limited=memory is not None)
        counts = (2, 0.3) if quick else (rounds, seconds)
        with conditions.put_on(servers):
            figures = run(servers, conditions, wanted, counts[0], counts[1], None if quick else results, search)
        keep(bench, figures, as_json)


def run(
    servers: list[Target],
    conditions: Conditions,
    rows: list[Row],
    rounds: int,
    seconds: float,
    settings_in: Path | None,
    search: bool,
) -> dict[str, Any]:
    """Measure and return the result; the servers are stopped whatever happens."""
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        warning = f"the machine is busy (load {load:.2f}): expect noise, and wrong settings from a search"
        Console(stderr=True).print(warning, style="yellow", highlight=False, soft_wrap=True)
    path = settings_in / conditions.settings_file if settings_in else Path("/nonexistent")
    kept = measuring.PeerSettings(path, servers, conditions)
    if search:
        kept.found = {}
    to_search = kept.missing_rows(rows, servers) if settings_in else []
    total_s = len(servers) * measuring.PREFILL_S + measuring.planned_s(rows, servers, rounds, seconds)
    total_s += measuring.planned_search_s(to_search, servers)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
    with progress:
        task = progress.add_task("", total=total_s)

        def advance(worked_off_s: float, what: str) -> None:
            progress.update(task, advance=worked_off_s, description=what or None)

        with stopped_at_the_end(*servers):
            measuring.prepare(servers, advance)
            if to_search:
                measuring.search_settings(to_search, servers, kept, advance, progress.console.print)
            samples = measuring.measure_rows(rows, servers, rounds, seconds, kept.best, advance)
    options = {**asdict(conditions), "rounds": rounds, "seconds": seconds}
    return assemble(servers, rows, samples, kept, options)


def assemble(
    servers: list[Target],
    rows: list[Row],
    samples: dict[str, measuring.Samples],
    kept: measuring.PeerSettings,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The figures as they are written: with the run's conditions, all that table, plot and documents are made from."""
    rows_json = []
    used: dict[str, dict[str, Setting]] = {server.name: {} for server in servers}
    for row in rows:
        chosen = {server.name: kept.best(server, row) for server in servers}
        for name, setting in chosen.items():
            used[name][setting.name] = setting
        command = fio_command(row, nbd_engine("URI"), options["size_bytes"], options["seconds"], seed=1)
        rows_json.append(
            {
                "name": row.name,
                "title": row.title,
                "block_bytes": row.block_bytes,
                "goal": row.goal,
                "fio_command": " ".join(command),
                "settings": {name: setting.name for name, setting in chosen.items()},
                **measuring.row_as_json(samples[row.name], measuring.ratio_of(samples[row.name], SUBJECT)),
            }
        )
    return {
        "format": RESULT_FORMAT,
        "fio_version": fio_version(),
        "options": options,
        "subject": SUBJECT,
        "targets_in_order": [server.name for server in servers],
        "targets": {
            server.name: {
                "title": server.title,
                "version": server.version(),
                "commands": {name: server.shown_command(setting) for name, setting in used[server.name].items()},
            }
            for server in servers
        },
        "peer_settings": kept.found,
        "rows": rows_json,
    }


def keep(bench: Run, figures: dict[str, Any], as_json: bool) -> None:
    """The JSON file, the plot, and the table on the terminal."""
    from .plot import draw

    result = bench.keep(figures, told=not as_json)
    draw(result, bench.picture)
    show(result, as_json, rich_table(result), f"{noise_cores(result):.2f} of the cores were busy with other things")


def run_profile(subject: Target, row: Row, duration_s: float, results: Path) -> None:
    """Print the top functions and lines of our data process in one row, and keep the folded stacks."""
    folded = results / time.strftime(f"profile-{row.name}-%Y%m%d-%H%M%S.folded")
    with stopped_at_the_end(subject):
        measuring.prepare([subject])
        sample = profiler.profile(subject, row, duration_s, folded)
        calls = profiler.system_calls(subject, row, 2.0, folded.with_suffix(".strace"))
    text = folded.read_text()
    console.print(
        f"{row.title}: {sample.operations_per_s:,.0f}/s under the profiler, "
        f"{sample.server_cpu_s_per_1000:.4f} CPU s per 1,000 operations\n\n  self  with callees",
        highlight=False,
    )
    for function, alone, anywhere in profiler.top_functions(text):
        console.print(f"{alone:5.1f} %  {anywhere:5.1f} %  {function}", highlight=False, soft_wrap=True)
    console.print("\n  self  line", highlight=False)
    for line, alone in profiler.top_lines(text):
        console.print(f"{alone:5.1f} %  {line}", highlight=False, soft_wrap=True)
    console.print("\n  system calls an operation", highlight=False)
    for call, count in calls[:10]:
        console.print(f"{count:7.3f}  {call}", highlight=False)
    console.print(f"\n{folded}", highlight=False)


if __name__ == "__main__":
    application()
