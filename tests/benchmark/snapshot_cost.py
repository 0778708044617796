"""`python -m tests.benchmark.snapshot_cost`: what ten snapshots cost a volume, in every row of the benchmark.

Two servers of ours hold one disk each, written alike. One of them takes ten snapshots, with random writes before
each, so that its layers share blocks with the head in every mixture; the other takes the same writes and no snapshot.
Then every row is measured on both, in turn, round by round. The ratio is with over without; its interval is the
bootstrap over rounds of `ratios.py`.
"""

import subprocess
import sys
from statistics import median
from typing import Annotated

import typer
from rich.table import Table

from . import machine, measuring
from .__main__ import chosen_rows, size_bytes_of
from .load import measure
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError
from .ratios import Ratio
from .rows import ROWS_BY_NAME, Row
from .targets import EXPORT, Nbdserver, Setting, stopped_at_the_end

BETWEEN = ROWS_BY_NAME["randwrite-4k-d16"]
BETWEEN_S = 0.5  # some tens of thousands of blocks before each snapshot
LEAST = 0.9  # no row may have its whole interval below

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Without(Nbdserver):
    """The disk that has no snapshots."""

    name = title = "without"

    def take_snapshot(self, name: str) -> None:
        """Nothing is taken here."""


class With(Nbdserver):
    """The disk that has them."""

    name = title = "with"

    def take_snapshot(self, name: str) -> None:
        command = [sys.executable, "-m", "nbdserver", "--data", str(self.directory)]
        done = subprocess.run(
            [*command, "snapshot", "create", f"{EXPORT}@{name}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"the snapshot was not taken: {done.stderr.strip()}")


def make_layers(servers: tuple[With, Without], snapshots: int) -> None:
    """Write to both alike; take snapshots of one."""
    for number in range(snapshots):
        for server in servers:
            measure(server, BETWEEN, BETWEEN_S, seed=1000 + number)
            server.take_snapshot(f"s{number}")


def show(rows: list[Row], samples: dict[str, measuring.Samples], ratios: dict[str, Ratio], snapshots: int) -> Table:
    table = Table(title=f"a volume with {snapshots} snapshots beside one without")
    for heading in ("", "ratio", "95 % interval", "with", "without", "CPU µs an operation, with / without"):
        table.add_column(heading)
    for row in rows:
        ratio, taken = ratios[row.name], samples[row.name]
        rates = [f"{median(sample.operations_per_s for sample in taken[name]):,.0f}/s" for name in ("with", "without")]
        cpu = [f"{median(sample.server_cpu_s_per_1000 for sample in taken[name]) * 1000:.1f}" for name in taken]
        verdict = " (too slow)" if ratio.high < LEAST else ""
        interval = f"{ratio.low:.2f} – {ratio.high:.2f}{verdict}"
        table.add_row(row.title, f"{ratio.value:.2f}", interval, *rates, " / ".join(cpu))
    return table


@application.command()
def run(
    rows: Annotated[str | None, typer.Option(help="Comma-separated rows.  [default: all]")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each disk in each row.")] = 15,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of one measurement.")] = 1.0,
    snapshots: Annotated[int, typer.Option(min=1, help="Snapshots of the one disk.")] = 10,
    size: Annotated[str, typer.Option(help="Working set.")] = "1G",
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure every row on a volume with snapshots and on one without; ends with 1 if one is too slow."""
    with run_of("snapshot-cost", results, directory) as bench:
        wanted, size_bytes = chosen_rows(rows), size_bytes_of(size)
        machine.check_room(bench.place, size_bytes * 12)
        servers = (With(bench.place, size_bytes), Without(bench.place, size_bytes))
        with stopped_at_the_end(*servers):
            measuring.prepare(list(servers))
            make_layers(servers, snapshots)
            samples = measuring.measure_rows(
                wanted, list(servers), rounds, seconds, lambda target, row: Setting("default"), _progress
            )
        ratios = {name: measuring.ratio_between(taken, With.name) for name, taken in samples.items()}
        console.print(show(wanted, samples, ratios, snapshots))
        bench.keep({"rows": {name: measuring.row_as_json(samples[name], ratio) for name, ratio in ratios.items()}})
        if any(ratio.high < LEAST for ratio in ratios.values()):
            raise SystemExit(1)


def _progress(worked_off_s: float, what: str) -> None:
    if what and not worked_off_s:
        print(what, file=sys.stderr)


if __name__ == "__main__":
    application()
