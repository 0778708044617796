"""`python -m tests.benchmark.cluster.absence`: a replica is killed, is away for a while and comes back, under writes.

4 KiB random writes at the same rate on both systems; what is killed is not what the client is attached to. Measured:
the longest time that any write took, from the log of each of them, death and return included; how long it takes until
all replicas are in sync again, the start of the daemon included; and what the returned one was sent for that over TCP
(as `ss` says), less what clients wrote meanwhile, beside the regions of 4 MiB and the blocks that had changed while it
was away. One system after the other.

Known weakness: what streams carried that are closed again by then is not seen.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import machine
from ..__main__ import refuse_a_slow_checksum, size_bytes_of
from ..load import fio_job, fio_version, prefill
from ..outcome import RESULTS, DirectoryOption, JsonOption, ResultsOption, run_of, show
from ..processes import BenchmarkError, descendants
from .__main__ import ROOM_FACTOR, SYSTEMS, USUAL, chosen_systems
from .systems import System, run

BLOCK_BYTES = 4096
REGION_BYTES = 4 << 20
DEPTH = 16
COLUMN_S = 0.1  # of the plot: the longest write that ended in it
COLOURS = ("#c8442d", "#2f6f9f", "#4f9d8f")

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Write = tuple[float, float, int]
"""(seconds since the start when it ended, milliseconds that it took, offset)."""


def received_bytes(pid: int) -> int:
    """By the TCP streams that the process and its descendants have."""
    ours = {f"pid={each}," for each in descendants(pid)}
    lines = run(["ss", "--tcp", "--info", "--processes", "--oneline", "--numeric", "--no-header"]).splitlines()
    found = [re.search(r"bytes_received:(\d+)", line) for line in lines if any(each in line for each in ours)]
    return sum(int(each[1]) for each in found if each)


def writes_of(log: Path) -> list[Write]:
    """fio's log of latencies: milliseconds, nanoseconds, direction, size, offset."""
    found = []
    for line in log.read_text().splitlines():
        fields = [int(field, 0) for field in line.split(",")]
        found.append((fields[0] / 1000, fields[1] / 1e6, fields[4]))
    return found


def changed(writes: list[Write], begin_s: float, end_s: float) -> tuple[int, int]:
    """(bytes of the regions, bytes of the blocks) that were written in that time."""
    offsets = {offset for at_s, _, offset in writes if begin_s <= at_s <= end_s}
    return len({offset // REGION_BYTES for offset in offsets}) * REGION_BYTES, len(offsets) * BLOCK_BYTES


def count(writes: list[Write], begin_s: float, end_s: float) -> int:
    """How many ended in that time."""
    return sum(begin_s <= at_s < end_s for at_s, _, _ in writes)


def rate(writes: list[Write], begin_s: float, end_s: float) -> float:
    """Writes a second."""
    return count(writes, begin_s, end_s) / max(end_s - begin_s, 1e-9)


def measure(
    system: System, rate_iops: int, before_s: float, away_s: float, limit_s: float, by_regions: bool
) -> dict[str, Any]:
    """One absence; BenchmarkError if the replica is not back in sync within `limit_s`."""
    log = system.directory / "writes"
    arguments = [f"--size={system.size_bytes}", "--rw=randwrite", "--bs=4k"]
    arguments += [f"--iodepth={DEPTH}", "--randrepeat=0", "--randseed=1", "--time_based", f"--write_lat_log={log}"]
    arguments += [f"--runtime={round(before_s + away_s + limit_s + 60)}", "--log_offset=1"]
    if rate_iops:
        arguments.append(f"--rate_iops={rate_iops}")
    command = fio_job(system, "absence", *arguments)
    load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    began_s = time.monotonic()

    def at_s() -> float:
        return time.monotonic() - began_s

    try:
        time.sleep(before_s)
        killed_s = at_s()
        system.kill_replica()
        time.sleep(away_s)
        if by_regions:
            system.forget_log()
        started_s = at_s()
        pid = system.start_replica()
        system.wait_until_whole(limit_s - (at_s() - started_s))
        whole_s = at_s()
        returned_bytes = received_bytes(pid)
        time.sleep(before_s / 2)
        if load.poll() is not None:
            raise BenchmarkError(f"fio has ended: {(load.stdout.read() if load.stdout else '').strip()[-200:]}")
    finally:
        load.send_signal(signal.SIGINT)  # it ends in order
        load.communicate(timeout=60)
    writes = writes_of(log.with_name("writes_lat.1.log"))
    regions_bytes, blocks_bytes = changed(writes, killed_s, started_s)
    longest = max(writes, key=lambda each: each[1])
    live_bytes = count(writes, started_s, whole_s) * BLOCK_BYTES
    return {
        "killed_s": killed_s,
        "started_s": started_s,
        "whole_s": whole_s,
        "in_sync_after_s": whole_s - started_s,
        "longest_write_ms": longest[1],
        "longest_write_at_s": longest[0],
        "regions_changed_bytes": regions_bytes,
        "blocks_changed_bytes": blocks_bytes,
        "received_bytes": returned_bytes,
        "clients_wrote_meanwhile_bytes": live_bytes,
        "copied_bytes": max(0, returned_bytes - live_bytes),
        "rate_before": rate(writes, 1.0, killed_s),
        "rate_away": rate(writes, killed_s, started_s),
        "rate_until_in_sync": rate(writes, started_s, whole_s),
        "columns": columns_of(writes),
    }


def columns_of(writes: list[Write]) -> list[tuple[float, float]]:
    """(when, the longest write that ended there in ms), for the plot."""
    longest: dict[int, float] = {}
    for at_s, took_ms, _ in writes:
        column = int(at_s / COLUMN_S + 1e-6)  # 1.9 / 0.1 is a little less than 19
        longest[column] = max(took_ms, longest.get(column, 0.0))
    return [(round(column * COLUMN_S, 3), round(took_ms, 3)) for column, took_ms in sorted(longest.items())]


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: the longest write of each tenth of a second."""
    from ..drawing import pyplot, save

    canvas, axes = pyplot.subplots(figsize=(11, 4), layout="constrained")
    for (name, taken), colour in zip(result["absences"].items(), COLOURS, strict=False):
        times, longest = zip(*taken["columns"], strict=True)
        axes.plot(times, longest, color=colour, linewidth=0.8, label=result["systems"][name]["title"])
        axes.axvline(taken["whole_s"], color=colour, linestyle=":", linewidth=1)
    for what in ("killed_s", "started_s"):
        at_s = next(iter(result["absences"].values()))[what]
        axes.axvline(at_s, color="#444444", linewidth=0.8)
        axes.text(at_s, 1.0, f" {what.removesuffix('_s')}", transform=axes.get_xaxis_transform(), va="top")
    axes.set_yscale("log")
    axes.set_xlabel("seconds; dotted: all replicas are in sync again")
    axes.set_ylabel("longest write of 0.1 s, ms")
    axes.legend(loc="upper right", frameon=False)
    save(canvas, path)


def table_of(result: dict[str, Any]) -> Table:
    table = Table(title="A replica away under writes")
    table.add_column("")
    for name in result["absences"]:
        table.add_column(result["systems"][name]["title"], justify="right")
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "longest write, ms": lambda taken: f"{taken['longest_write_ms']:,.0f} (at {taken['longest_write_at_s']:.1f} s)",
        "in sync after its return, s": lambda taken: f"{taken['in_sync_after_s']:.1f}",
        "copied, MB": lambda taken: f"{taken['copied_bytes'] / 1e6:,.0f}",
        "changed meanwhile: regions / blocks, MB": lambda taken: (
            f"{taken['regions_changed_bytes'] / 1e6:,.0f} / {taken['blocks_changed_bytes'] / 1e6:,.0f}"
        ),
        "writes/s before, away, until in sync": lambda taken: (
            f"{taken['rate_before']:,.0f}, {taken['rate_away']:,.0f}, {taken['rate_until_in_sync']:,.0f}"
        ),
    }
    for title, cell in lines.items():
        table.add_row(title, *(cell(taken) for taken in result["absences"].values()))
    return table


@application.command()
def absence(
    systems: Annotated[str, typer.Option(help=f"Comma-separated systems: {', '.join(SYSTEMS)}.")] = USUAL,
    size: Annotated[str, typer.Option(help="Working set.")] = "1G",
    rate_iops: Annotated[int, typer.Option(min=0, help="Writes a second; 0: as many as it takes.")] = 1000,
    before: Annotated[float, typer.Option(min=2.0, help="Seconds of load before the death.")] = 10.0,
    away: Annotated[float, typer.Option(min=1.0, help="Seconds that the replica is away.")] = 20.0,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds until it must be in sync.")] = 180.0,
    by_regions: Annotated[
        bool, typer.Option("--by-regions", help="The log does not go back to the death (data-processes alone).")
    ] = False,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
) -> None:
    """Kill a replica under writes, start it again, and measure what clients notice and what is copied."""
    with run_of("bench-absence", results, directory) as bench:
        refuse_a_slow_checksum()
        size_bytes = size_bytes_of(size)
        there = chosen_systems(systems, bench.place, size_bytes)
        machine.check_room(bench.place, size_bytes * ROOM_FACTOR * len(there))
        taken: dict[str, Any] = {}
        for system in there:
            with ExitStack() as stack:
                stack.callback(system.stop)
                system.start()
                prefill(system)
                taken[system.name] = measure(system, rate_iops, before, away, limit, by_regions)
        result = bench.keep(
            {
                "fio_version": fio_version(),
                "options": {"size_bytes": size_bytes, "rate_iops": rate_iops, "away_s": away, "by_regions": by_regions},
                "systems": {system.name: {"title": system.title, "version": system.version()} for system in there},
                "absences": taken,
            },
            told=not as_json,
        )
        draw(result, bench.picture)
        show(result, as_json, table_of(result))


if __name__ == "__main__":
    application()
