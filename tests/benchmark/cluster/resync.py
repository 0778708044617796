"""`python -m tests.benchmark.cluster.resync`: what it costs to make one replica complete again, as work grows.

Three data processes without nodes around them (data_processes.py). One replica is killed, the volume is changed, the
replica is started again; nothing else is asked of them meanwhile. It gets what it lacks in one of three *ways*:

- `log`: what was written meanwhile, from the owner's log, which goes back that far;
- `regions`: the regions that changed, because the log does not (the owner is told to forget it: to have it recycled
  would take many times the writes);
- `new`: everything, because the replica's disk is an empty one.

Changes are `sequential`, from the volume's end backwards in whole regions, or `scattered`, single blocks of 4 KiB:
one a region when the volume grows with what changes, the same number in as many regions when only the volume grows.
Measured: the time from the start of the process until it is in sync; regions copied; what the replica received over
TCP; what owner and replica read from files, their CPU, and how much memory they had at most.

Known weakness: what LevelDB reads by mmap is not counted as read.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nbdserver.images.client import PIECE_BYTES, Client
from nbdserver.node.sizes import round_size

from .. import machine
from ..__main__ import refuse_a_slow_checksum, size_bytes_of
from ..outcome import RESULTS, DirectoryOption, JsonOption, ResultsOption, chosen, run_of, show
from ..processes import BenchmarkError, cpu_s, resident_bytes
from ..targets import EXPORT
from .absence import BLOCK_BYTES, COLOURS, REGION_BYTES, received_bytes
from .data_processes import DataProcesses
from .systems import wait_until

WAYS = {"log": "from the log", "regions": "by regions", "new": "a new replica"}
PATTERNS = {"sequential": "-", "scattered": "--"}
"""With the line of each in the plot."""
SCATTERED_REGIONS = 256
"""In which the same changes lie, however large the volume is: those of the smallest one, all of it."""
CHANGED = "10M,100M,1G"
LARGE_BYTES = 16 << 40
ROOM_FACTOR = 4  # three replicas, and what a log needs besides
LOOK_S = 0.01

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One resync. `regions`: in which scattered changes lie."""

    series: str
    way: str
    pattern: str
    volume_bytes: int
    changed_bytes: int
    regions: int = 0

    @property
    def title(self) -> str:
        return f"{WAYS[self.way]}, {self.pattern}"

    def changes(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of each write."""
        if self.pattern == "sequential":
            for offset in range(self.volume_bytes - self.changed_bytes, self.volume_bytes, PIECE_BYTES):
                yield offset, min(PIECE_BYTES, self.volume_bytes - offset)
            return
        regions = self.regions or self.changed_bytes // BLOCK_BYTES
        apart = self.volume_bytes // regions // REGION_BYTES * REGION_BYTES
        each = self.changed_bytes // regions // BLOCK_BYTES
        for region in range(regions):
            for block in range(each):
                yield region * apart + block * (REGION_BYTES // each), BLOCK_BYTES


def cases_of(
    changed: list[int], volumes: list[int], at_volume_bytes: int, ways: list[str], patterns: list[str]
) -> list[Case]:
    """Of both series."""
    found = [
        Case("changed", way, pattern, LARGE_BYTES, size_bytes)
        for pattern in patterns
        for way in ways
        for size_bytes in changed
    ]
    for pattern in patterns:
        regions = SCATTERED_REGIONS if pattern == "scattered" else 0
        found += [Case("volume", way, pattern, size, at_volume_bytes, regions) for way in ways for size in volumes]
    return found


def write(case: Case, socket: Path) -> None:
    """Change what the case says, with bytes that do not compress, and make that durable."""
    noise = memoryview(os.urandom(2 * PIECE_BYTES))
    with Client(str(socket), EXPORT) as client:
        changes = (
            (offset, noise[(number * BLOCK_BYTES + number // 256) % PIECE_BYTES :][:size_bytes])
            for number, (offset, size_bytes) in enumerate(case.changes())
        )
        for _ in client.write(changes):
            pass
        client.flush()


@dataclass(frozen=True)
class Used:
    """By one process so far."""

    cpu_s: float
    read_bytes: int
    resident_bytes: int

    @classmethod
    def by(cls, pid: int) -> "Used":
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return cls(cpu_s(pid), int(lines[0].split()[1]), resident_bytes(pid).get("RssAnon", 0))


def measure(case: Case, place: Path, limit_s: float) -> dict[str, Any]:
    """One case on processes of its own; BenchmarkError if it is not in sync within `limit_s`."""
    system = DataProcesses(place, case.volume_bytes)
    with ExitStack() as stack:
        stack.callback(system.remove)
        system.start()
        system.kill_replica()
        wait_until(lambda: not system.is_whole(), "the replica that was killed is still in sync")
        write(case, system.client_socket)
        if case.way != "log":
            system.forget_log()
        if case.way == "new":
            system.empty_replica()
        before = Used.by(system.owner_pid)
        began_s = time.monotonic()
        pid = system.start_replica()
        at_start = Used.by(pid)
        started_s = time.monotonic()
        most = {system.owner_pid: before.resident_bytes, pid: at_start.resident_bytes}
        while not system.is_whole():
            for each in most:
                most[each] = max(most[each], resident_bytes(each).get("RssAnon", 0))
            if time.monotonic() - began_s > limit_s:
                raise BenchmarkError(f"{case.title}: not in sync after {limit_s:.0f} s")
            time.sleep(LOOK_S)
        ended_s = time.monotonic()
        after, replica = Used.by(system.owner_pid), Used.by(pid)
        return {
            **asdict(case),
            "title": case.title,
            "in_sync_after_s": ended_s - began_s,
            "copying_s": ended_s - started_s,
            "received_bytes": received_bytes(pid),
            "copied": system.copied(),
            "owner": {
                "cpu_s": after.cpu_s - before.cpu_s,
                "read_bytes": after.read_bytes - before.read_bytes,
                "resident_bytes": before.resident_bytes,
                "most_resident_bytes": most[system.owner_pid],
            },
            "replica": {
                "cpu_s": replica.cpu_s - at_start.cpu_s,
                "read_bytes": replica.read_bytes - at_start.read_bytes,
                "resident_bytes": at_start.resident_bytes,
                "most_resident_bytes": most[pid],
            },
        }


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: the time over what has changed, and over the size of the volume."""
    from ..drawing import pyplot, save

    canvas, both = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    labels = {"changed": "bytes changed, of 16 TiB", "volume": "bytes of the volume"}
    colours = dict(zip(WAYS, COLOURS, strict=True))
    for axes, (series, label) in zip(both, labels.items(), strict=True):
        lines: dict[str, tuple[dict[str, Any], list[tuple[int, float]]]] = {}
        for taken in result["resyncs"]:
            if taken["series"] == series:
                _, points = lines.setdefault(taken["title"], (taken, []))
                points.append((taken[f"{series}_bytes"], taken["in_sync_after_s"]))
        for title, (first, points) in lines.items():
            style, colour = PATTERNS[first["pattern"]], colours[first["way"]]
            axes.plot(*zip(*sorted(points), strict=True), style, color=colour, marker="o", markersize=3, label=title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        if lines:
            axes.legend(frameon=False, fontsize=7)
    both[0].set_ylabel("seconds until in sync")
    save(canvas, path)


def table_of(result: dict[str, Any]) -> Table:
    table = Table(title="What a resync costs; CPU and read: owner, replica; memory: how much it grew")
    for head in ("way", "volume", "changed", "regions", "in sync, s", "MB/s", "sent", "read", "CPU s", "memory"):
        table.add_column(head, justify="left" if head == "way" else "right")
    for taken in result["resyncs"]:
        table.add_row(*cells_of(taken))
    return table


def cells_of(taken: dict[str, Any]) -> list[str]:
    ends = (taken["owner"], taken["replica"])
    return [
        taken["title"],
        round_size(taken["volume_bytes"]),
        round_size(taken["changed_bytes"]),
        f"{taken['copied']['regions']:,}",
        f"{taken['in_sync_after_s']:.2f}",
        f"{taken['changed_bytes'] / taken['copying_s'] / 1e6:,.1f}",
        round_size(taken["received_bytes"]),
        ", ".join(round_size(end["read_bytes"]) for end in ends),
        ", ".join(f"{end['cpu_s']:.2f}" for end in ends),
        ", ".join(round_size(end["most_resident_bytes"] - end["resident_bytes"]) for end in ends),
    ]


def sizes_of(text: str) -> list[int]:
    """Comma-separated sizes."""
    return [size_bytes_of(each) for each in text.split(",") if each]


@application.command()
def resync(
    changed: Annotated[str, typer.Option(help="Comma-separated: how much of a volume of 16T is changed.")] = CHANGED,
    volumes: Annotated[str, typer.Option(help="Comma-separated: sizes of volumes.")] = "1G,64G,1T,16T",
    at_volume: Annotated[str, typer.Option(help="How much of each of them is changed.")] = "256M",
    ways: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(WAYS)}.")] = ",".join(WAYS),
    patterns: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PATTERNS)}.")] = ",".join(PATTERNS),
    add_to: Annotated[
        Path | None, typer.Option(exists=True, help="An earlier result, whose resyncs are told and drawn too.")
    ] = None,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds until a replica must be in sync.")] = 600.0,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
) -> None:
    """Measure how long a replica that was away takes to be in sync, over what changed and over the volume's size."""
    with run_of("bench-resync", results, directory) as bench:
        refuse_a_slow_checksum()
        chosen(ways, "way", WAYS)
        chosen(patterns, "pattern", PATTERNS)
        at_volume_bytes = size_bytes_of(at_volume)
        cases = cases_of(sizes_of(changed), sizes_of(volumes), at_volume_bytes, ways.split(","), patterns.split(","))
        machine.check_room(bench.place, max(case.changed_bytes for case in cases) * ROOM_FACTOR)
        taken = json.loads(add_to.read_text())["resyncs"] if add_to else []
        say = Console(stderr=True)
        for case in cases:
            taken.append(measure(case, bench.place, limit))
            say.print(" | ".join(cells_of(taken[-1])), highlight=False, soft_wrap=True)
        result = bench.keep({"resyncs": taken}, told=not as_json)
        draw(result, bench.picture)
        show(result, as_json, table_of(result))


if __name__ == "__main__":
    application()
