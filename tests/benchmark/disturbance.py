"""`python -m tests.benchmark.disturbance`: what a client at depth 1 notices of what goes on beside it.

Percentiles of 4 KiB random reads and writes at depth 1, alone and while

* a checkpoint is made every second (the product's own interval is 30 s; a `sitecustomize` in the server's path changes
  that number and nothing else),
* the cleaner works (half of the disk was just overwritten at random, and it may take hardly more room),
* a scrub reads the disk,
* `/metrics` is read every second,
* the list of all volumes is read every second, with many volumes on the node.

In each round every case is measured once; a case's figure is the median of its rounds, its ratio is to the case alone
in the same round. Checkpoints are made at a second server, which does nothing while the first one is measured, and only
of what is written: reads are not measured there. Beside it stands how often the loop was held longer than 5 ms, which
the server counts itself, and what the case did meanwhile (checkpoints, blocks moved, requests), so that a case that did
not happen shows.

What held the loop is told by a second pass, of one round, with servers that look for it (NBDSERVER_WATCH_LOOP): that
costs a thousand timer signals a second, so nothing of that pass is measured.

Known weakness: checkpoints go on in the other cases too, at their own interval. On a machine that others use most long
turns are those in which the process did not run.
"""

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from nbdserver.cli.client import NodeClient
from nbdserver.host.watching import WATCH_VARIABLE

from . import machine
from .__main__ import size_bytes_of
from .load import fio_job, prefill, run_fio
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError
from .targets import EXPORT, Nbdserver, Setting, stopped_at_the_end

CHECKPOINT_EVERY_S = 1.0
QUICK_CHECKPOINTS = f"""
from nbdserver.logdisk.disk import DiskSettings
defaults = list(DiskSettings.__init__.__defaults__)
names = DiskSettings.__init__.__code__.co_varnames[1 : 1 + len(defaults)]
defaults[names.index("checkpoint_interval_s")] = {CHECKPOINT_EVERY_S}
DiskSettings.__init__.__defaults__ = tuple(defaults)
"""
TIMEOUT_S = 30.0
PATTERNS = ("randread", "randwrite")
ROOM_BESIDE_CLEANER_BYTES = 64 << 20  # one segment
PLACES_SHOWN = 4  # of those that held the loop in one case

SERVERS = {False: "usual", True: "quick"}

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Node:
    """The server under test, its figures, and what disturbs it."""

    def __init__(self, target: Nbdserver) -> None:
        self.target = target
        self._api = NodeClient(target.directory)
        # It comes a moment after the clients' sockets.
        wait_until((target.directory / "api.sock").exists, "the server's API does not answer")

    def figure(self, name: str) -> float:
        """One of its metrics, of all volumes together; a counter's name ends in `_total`."""
        found = re.findall(rf"^nbdserver_{name}(?:{{[^}}]*}})? (\S+)$", self._metrics(), re.MULTILINE)
        return sum(map(float, found))

    def _metrics(self) -> str:
        import httpx

        transport = httpx.HTTPTransport(uds=str(self.target.directory / "api.sock"))
        with httpx.Client(transport=transport, base_url="http://node", timeout=60) as client:
            return client.get("/metrics").text

    def read_metrics(self) -> None:
        self._metrics()

    def list_volumes(self) -> None:
        self._api.get("/v1/volumes")

    @contextmanager
    def scrubbing(self) -> Iterator[None]:
        """Its disk is read from the beginning meanwhile."""
        self._api.post("/v1/scrubs", {"volume": EXPORT})
        try:
            yield
        finally:
            self._api.delete("/v1/scrubs")

    @contextmanager
    def cleaning(self) -> Iterator[None]:
        """It may take hardly more room than it has taken: then the cleaner works although clients write."""
        taken_bytes = int(self.figure("disk_allocated_bytes"))
        self.limit_data(EXPORT, max(1 << 30, taken_bytes + ROOM_BESIDE_CLEANER_BYTES))
        try:
            yield
        finally:
            self.limit_data(EXPORT, 0)

    def limit_data(self, volume: str, size_bytes: int) -> None:
        """What the volume's segment files may take."""
        self._api.patch(f"/v1/volumes/{volume}", {"max_data": str(size_bytes)})

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """What happened after the event of that number."""
        found: list[dict[str, Any]] = self._api.get("/v1/events", after=after, limit=2000)
        return found

    def make_volumes(self, count: int) -> None:
        for number in range(count):
            self._api.post("/v1/volumes", {"name": f"other{number}", "size_bytes": 1 << 30})


Nodes = dict[bool, Node]
"""By whether it makes checkpoints every second."""


def wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline_s:
            raise BenchmarkError(otherwise)
        time.sleep(0.05)


@contextmanager
def every_second(work: Callable[[], None]) -> Iterator[None]:
    over = threading.Event()

    def run() -> None:
        while not over.wait(1.0):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def nothing() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Case:
    """A disturbance: `begin` happens before the measurement, `beside` during it; `shows` counts that it happened, since
    the measurement began or (`anew`) since the disturbance did."""

    title: str
    shows: str
    anew: bool = False
    quick: bool = False  # at the server that makes a checkpoint every second
    patterns: tuple[str, ...] = PATTERNS
    begin: Callable[[Node], None] = lambda node: None
    beside: Callable[[Node], Any] = lambda node: nothing()


ALONE = Case("alone", "disk_checkpoints_total")
CASES = (
    ALONE,
    Case("a checkpoint every second", "disk_checkpoints_total", quick=True, patterns=("randwrite",)),
    Case(
        "the cleaner",
        "disk_cleaner_blocks_moved_total",
        begin=lambda node: overwrite_half(node.target),
        beside=lambda node: node.cleaning(),
    ),
    Case("a scrub", "scrub_done_bytes", anew=True, beside=lambda node: node.scrubbing()),
    Case("/metrics every second", "", beside=lambda node: every_second(node.read_metrics)),
    Case("list of all volumes every second", "", beside=lambda node: every_second(node.list_volumes)),
)


def overwrite_half(target: Nbdserver) -> None:
    """Write random blocks, as many as half of the disk has: some of each segment is garbage then."""
    half_bytes = target.size_bytes // 2
    arguments = [f"--size={target.size_bytes}", f"--io_size={half_bytes}", "--rw=randwrite", "--norandommap"]
    run_fio(fio_job(target, "overwrite", *arguments, "--bs=4k", "--iodepth=32", "--refill_buffers"), timeout_s=600)


def measure(node: Node, case: Case, pattern: str, seconds: float, seed: int) -> dict[str, float]:
    case.begin(node)
    held = node.figure("loop_held_total")
    arguments = [f"--rw={pattern}", f"--size={node.target.size_bytes}", "--bs=4k", "--iodepth=1", "--time_based"]
    arguments += [f"--runtime={round(seconds * 1000)}ms", f"--randseed={seed}", "--percentile_list=50:99:99.9:100"]
    with case.beside(node):
        if case.anew:
            wait_until(lambda: node.figure(case.shows) > 0, f"{case.title} does not begin")
        before = node.figure(case.shows) if case.shows and not case.anew else 0
        job = run_fio(fio_job(node.target, "depth1", *arguments), timeout_s=seconds + 60)
        shown = node.figure(case.shows) - before if case.shows else 0
    side = job["write" if pattern == "randwrite" else "read"]
    percentiles = side["clat_ns"]["percentile"]
    return {
        "operations_per_s": side["iops"],
        "p50_us": percentiles["50.000000"] / 1000,
        "p99_us": percentiles["99.000000"] / 1000,
        "p99_9_us": percentiles["99.900000"] / 1000,
        "longest_us": side["clat_ns"]["max"] / 1000,
        "loop_held": node.figure("loop_held_total") - held,
        "shown": shown,
    }


def measure_cases(nodes: Nodes, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each case and pattern."""
    taken: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}")
        for pattern in PATTERNS:
            alone: dict[str, float] = {}
            for case in (case for case in CASES if pattern in case.patterns):
                sample = measure(nodes[case.quick], case, pattern, seconds, number + 1)
                alone = alone or sample
                ratios = {f"{key}_ratio": sample[key] / alone[key] for key in ("p99_us", "p99_9_us")}
                taken[pattern, case.title].append({**sample, **ratios})
    rows = []
    for (pattern, title), samples in taken.items():
        middle = {key: median(sample[key] for sample in samples) for key in samples[0]}
        rows.append({"pattern": pattern, "title": title, **middle, "samples": samples})
    return rows


def places_of(nodes: Nodes, seconds: float) -> list[dict[str, Any]]:
    """What held the loop in each case, beside random writes: how often, the longest time and how much of it the process
    had a processor, the most that it had in any, where."""
    rows = []
    for case in CASES:
        node = nodes[case.quick]
        case.begin(node)
        last = node.events()[-1]["sequence"]
        measure(node, replace(case, begin=ALONE.begin), "randwrite", seconds, 1)
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for event in node.events(after=last):
            if event["kind"] == "loop-held":
                found[" > ".join(event["where"][-3:])].append((event["ms"], event["cpu_ms"]))
        for place, turns in sorted(found.items(), key=lambda place: -sum(ms for ms, _ in place[1])):
            longest_ms, cpu_ms = max(turns)
            rows.append(
                {
                    "title": case.title,
                    "turns": len(turns),
                    "longest_ms": longest_ms,
                    "cpu_ms": cpu_ms,
                    "most_cpu_ms": max(cpu_ms for _, cpu_ms in turns),
                    "where": place,
                }
            )
    return rows


def show_places(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="What held the loop longer than 5 ms")
    for head in ("while", "turns", "longest", "of it at work", "most work", "where"):
        table.add_column(head, overflow="fold")
    for case in CASES:
        for row in [row for row in rows if row["title"] == case.title][:PLACES_SHOWN]:
            times = [f"{row[key]:.1f} ms" for key in ("longest_ms", "cpu_ms", "most_cpu_ms")]
            table.add_row(row["title"], str(row["turns"]), *times, row["where"])
    return table


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="4 KiB at depth 1 under disturbance")
    for head in ("", "while", "a second", "p50", "p99", "p99.9", "p99 / alone", "p99.9 / alone", "held > 5 ms", "did"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row["pattern"],
            row["title"],
            f"{row['operations_per_s']:,.0f}",
            *(f"{row[key]:,.0f} µs" for key in ("p50_us", "p99_us", "p99_9_us")),
            *(f"{row[key]:.2f}" for key in ("p99_us_ratio", "p99_9_us_ratio")),
            f"{row['loop_held']:.0f}",
            f"{row['shown']:,.0f}",
        )
    return table


class Disturbed(Nbdserver):
    """This server, with a shorter checkpoint interval (`quick`), or looking for what holds its loop (`watched`)."""

    def __init__(self, directory: Path, size_bytes: int, quick: bool) -> None:
        super().__init__(directory, size_bytes)
        self.quick = quick
        self.watched = False

    def command(self, setting: Setting) -> list[str]:
        variables = [f"{WATCH_VARIABLE}=1"] if self.watched else []
        if self.quick:
            path = self.directory.parent / "path"
            path.mkdir(exist_ok=True)
            (path / "sitecustomize.py").write_text(QUICK_CHECKPOINTS)
            variables.append(f"PYTHONPATH={path}:{Path.cwd()}")
        return ["env", *variables, *super().command(setting)]

    def watch(self) -> None:
        """Start it anew, to look for what holds its loop."""
        self.stop()
        self.watched = True
        self.start(self.setting)


@application.command()
def run(
    size: Annotated[str, typer.Option(help="Working set.")] = "512M",
    volumes: Annotated[int, typer.Option(min=0, help="Other volumes on the node.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of one measurement.")] = 4.0,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure latencies at depth 1 under disturbances."""
    with run_of("disturbance", results, directory) as bench:
        size_bytes = size_bytes_of(size)
        machine.check_room(bench.place, size_bytes * 4 + (2 << 30))
        targets = {quick: Disturbed(bench.place / name, size_bytes, quick) for quick, name in SERVERS.items()}
        with stopped_at_the_end(*targets.values()):
            nodes: Nodes = {}
            for quick, target in targets.items():
                target.prepare()
                target.start(target.setting)
                prefill(target)
                nodes[quick] = Node(target)
            console.print(f"making {volumes} volumes")
            nodes[False].make_volumes(volumes)
            rows = measure_cases(nodes, rounds, seconds)
            console.print(show(rows))
            console.print("the same again, to see what holds the loop")
            for quick, target in targets.items():
                target.watch()
                nodes[quick] = Node(target)
            places = places_of(nodes, seconds)
            console.print(show_places(places))
        bench.keep({"rows": rows, "places": places})


if __name__ == "__main__":
    application()
