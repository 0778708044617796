"""`python -m tests.benchmark.layers`: what snapshots, clones, rollbacks, resizes and deletions cost.

A real server is asked over its API, as the command line does, and the time of each request is taken, from asking to the
answer: the change is durable then. Three series, one varied in each:

* the size of the volume, each with the same written blocks, evenly spread;
* how many snapshots the volume has;
* how many clones there are of one snapshot.

A round at each step is: write some blocks, snapshot, write, clone, rollback, shrink, grow, delete the clone, delete the
snapshot. So layers are not empty, and the background has work. What a deletion gives back is not timed: it comes in the
background.

Known weakness: fsyncs of the log and of the registry stand in what is measured, and the device decides about them.
"""

import time
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from protocol.nbd import Command
from tests.conftest import Processes
from tests.nbd_client import Client
from tests.serving import Server

from . import machine
from .__main__ import size_bytes_of
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError, free_ports

SIZES = "1G,64G,1T,16T"
COUNTS = "0,10,100,300,1000"
BLOCK_BYTES = 4096
OPERATIONS = (
    "snapshot create",
    "clone create",
    "snapshot rollback",
    "volume resize, smaller",
    "volume resize, larger",
    "volume delete (a clone)",
    "snapshot delete",
)
COUNTED_SIZE_BYTES = 64 << 30  # of the volume whose snapshots and clones are counted
PIECE_BYTES = 64 << 10

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Served:
    """A running server, its API and its clients."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._server = Server(processes, folder / "data", free_ports(1), {})
        self._api = self._server.api(timeout_s=120)

    def ask(self, method: str, path: str, **content: Any) -> float:
        """Seconds until the answer. BenchmarkError for a refusal."""
        query = {"force": "true"} if method == "DELETE" else {}
        started = time.perf_counter()
        answer = self._api.request(method, f"/v1{path}", json=content if method == "POST" else None, params=query)
        taken = time.perf_counter() - started
        if answer.status_code >= 300:
            raise BenchmarkError(f"{method} {path}: {answer.text}")
        return taken

    def make(self, name: str, size_bytes: int, written_bytes: int) -> None:
        """A volume with pieces written, evenly spread."""
        self.ask("POST", "/volumes", name=name, size_bytes=size_bytes)
        pieces = max(1, written_bytes // PIECE_BYTES)
        self.write(name, [index * (size_bytes // pieces) // BLOCK_BYTES * BLOCK_BYTES for index in range(pieces)])

    def write(self, name: str, offsets: list[int], piece_bytes: int = PIECE_BYTES) -> None:
        client = Client(("127.0.0.1", self._server.port), name, 60.0)
        for offset in offsets:
            if client.request(Command.WRITE, offset, data=bytes([offset >> 20 & 0xFF]) * piece_bytes).error:
                raise BenchmarkError(f"writing {name} failed")
        client.request(Command.FLUSH)
        client.close()
        while any(found["volume"] == name for found in self._api.get("/v1/clients").json()):
            time.sleep(0.001)


def measure(served: Served, volume: str, size_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each operation, by its name."""
    taken: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    for number in range(rounds):
        name = f"round-{number}"
        snapshot, resize = f"/snapshots/{volume}/{name}", f"/volumes/{volume}/resize"
        offsets = [(number * 97 + index * 1009) * BLOCK_BYTES for index in range(16)]
        served.write(volume, offsets, BLOCK_BYTES)
        requests: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/snapshots", {"volume": volume, "name": name}),
            ("POST", "/clones", {"volume": volume, "snapshot": name, "name": name}),
            ("POST", f"{snapshot}/rollback", {}),
            ("POST", resize, {"size_bytes": size_bytes // 2, "force": True}),
            ("POST", resize, {"size_bytes": size_bytes}),
            ("DELETE", f"/volumes/{name}", {}),
            ("DELETE", snapshot, {}),
        ]
        for operation, (method, path, content) in zip(OPERATIONS, requests, strict=True):
            if operation == "snapshot rollback":
                served.write(volume, offsets, BLOCK_BYTES)
            taken[operation].append(served.ask(method, path, **content))
    return taken


def steps_of(
    served: Served, sizes: list[int], counts: list[int], written_bytes: int, rounds: int, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Every step of the three series."""
    series: dict[str, list[dict[str, Any]]] = {"size_bytes": [], "snapshots": [], "clones": []}
    task = progress.add_task("layers", total=len(sizes) + 2 * counts[-1] + 2 * len(counts))
    for size_bytes in sizes:
        name = f"size-{size_bytes >> 30}"
        served.make(name, size_bytes, written_bytes)
        series["size_bytes"].append({"at": size_bytes, "seconds": measure(served, name, size_bytes, rounds)})
        progress.advance(task)
    for what in ("snapshots", "clones"):
        name = f"many-{what}"
        served.make(name, COUNTED_SIZE_BYTES, written_bytes)
        served.ask("POST", "/snapshots", volume=name, name="base")
        for before, count in zip([0, *counts], counts, strict=False):
            for number in range(before, count):
                if what == "snapshots":
                    served.ask("POST", "/snapshots", volume=name, name=f"s{number}")
                else:
                    served.ask("POST", "/clones", volume=name, snapshot="base", name=f"clone-{number}")
                progress.advance(task)
            seconds = measure(served, name, COUNTED_SIZE_BYTES, rounds)
            series[what].append({"at": count, "seconds": seconds})
            progress.advance(task)
    return series


def label_of(what: str, at: int) -> str:
    if what != "size_bytes":
        return f"{at:,}"
    return f"{at / 2**40:g} TiB" if at >= 1 << 40 else f"{at / 2**30:g} GiB"


def show(series: dict[str, list[dict[str, Any]]]) -> list[Table]:
    tables = []
    for what, title in (("size_bytes", "size of the volume"), ("snapshots", "snapshots"), ("clones", "clones")):
        table = Table(title=f"median ms, by {title}")
        table.add_column("")
        for step in series[what]:
            table.add_column(label_of(what, step["at"]), justify="right")
        for name in OPERATIONS:
            table.add_row(name, *(f"{median(step['seconds'][name]) * 1e3:.1f}" for step in series[what]))
        tables.append(table)
    return tables


def draw_plot(result: dict[str, Any], path: Path) -> None:
    """A plot for each series: a line for each operation, with its quartiles."""
    from .drawing import pyplot, save

    canvas, grid = pyplot.subplots(1, 3, figsize=(14, 5), layout="constrained", sharey=True)
    titles = {"size_bytes": "size of the volume", "snapshots": "snapshots of it", "clones": "clones of one snapshot"}
    for axes, (what, title) in zip(grid, titles.items(), strict=True):
        steps = result["series"][what]
        for name in OPERATIONS:
            samples = [[second * 1e3 for second in step["seconds"][name]] for step in steps]
            middle = [median(each) for each in samples]
            spread = [quantiles(each, n=4) if len(each) > 1 else [each[0]] * 3 for each in samples]
            errors = [
                [mid - low for mid, (low, _, _) in zip(middle, spread, strict=True)],
                [high - mid for mid, (_, _, high) in zip(middle, spread, strict=True)],
            ]
            axes.errorbar(range(len(steps)), middle, yerr=errors, marker="o", markersize=3, capsize=2, label=name)
        axes.set_xticks(range(len(steps)), [label_of(what, step["at"]) for step in steps])
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e0e0e0")
        axes.set_title(title, loc="left", fontweight="bold")
    grid[0].set_ylabel("ms until it is durable: median, quartiles")
    grid[0].legend(frameon=False, fontsize=8)
    canvas.suptitle(f"{result['date']}   {result['machine']['cpu']}, {result['rounds']} rounds", color="#555555")
    save(canvas, path)


@application.command()
def run(
    sizes: Annotated[str, typer.Option(help="Comma-separated volume sizes.")] = SIZES,
    counts: Annotated[str, typer.Option(help="How many snapshots, and clones; comma-separated, rising.")] = COUNTS,
    rounds: Annotated[int, typer.Option(min=1, help="Of every operation at each step.")] = 15,
    written: Annotated[str, typer.Option(help="Written to each volume before.")] = "64M",
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure changes of layers over sizes of volumes and numbers of snapshots and clones."""
    with run_of("layers", results, directory) as bench:
        wanted = [size_bytes_of(size) for size in sizes.split(",")]
        machine.check_room(bench.place, 4 << 30)
        with Processes() as processes, Progress(console=Console(stderr=True)) as progress:
            series = steps_of(
                Served(processes, bench.place),
                wanted,
                [int(count) for count in counts.split(",")],
                size_bytes_of(written),
                rounds,
                progress,
            )
        draw_plot(bench.keep({"rounds": rounds, "series": series}), bench.picture)
        for table in show(series):
            console.print(table)


if __name__ == "__main__":
    application()
