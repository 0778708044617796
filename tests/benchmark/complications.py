"""`python -m tests.benchmark.complications`: what each complication of the hot path brings.

Two servers of ours hold one disk each, written alike. One is the program as it is, the other the same without one
complication (`taking_out.py`). Each is measured in the rows that it is for, in turn, round by round. The ratio is with
over without, so that 1.00 brings nothing; its interval is the bootstrap over rounds of `ratios.py`.
"""

import os
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from . import machine, measuring
from .__main__ import size_bytes_of
from .outcome import RESULTS, DirectoryOption, JsonOption, ResultsOption, chosen, run_of, show
from .ratios import Ratio
from .taking_out import COMPLICATIONS, VARIABLE, Complication
from .targets import Nbdserver, Setting, Target, stopped_at_the_end

ROOT = Path(__file__).resolve().parents[2]
PATCHING = Path(__file__).resolve().parent / "without"
"""Where Python finds what it runs at the start of each process."""

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Whole(Nbdserver):
    """The program as it is."""

    name = title = "with"


class Without(Nbdserver):
    """The same without the complication that its setting names."""

    name = title = "without"

    def command(self, setting: Setting) -> list[str]:
        plain = super().command(Setting("default"))
        if setting.name not in COMPLICATIONS:
            return plain
        search_path = os.pathsep.join(map(str, filter(None, [PATCHING, ROOT, os.environ.get("PYTHONPATH")])))
        return ["env", f"PYTHONPATH={search_path}", f"{VARIABLE}={setting.name}", *plain]


def measure(
    complication: Complication, servers: list[Target], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Row → samples of both, and the ratio."""

    def setting_of(server: Target, _row: object) -> Setting:
        return Setting(complication.name if isinstance(server, Without) else "default")

    samples = measuring.measure_rows(
        list(complication.rows), servers, rounds, seconds, setting_of, lambda _worked_off_s, _what: None, False
    )
    return {
        name: measuring.row_as_json(taken, measuring.ratio_between(taken, Whole.name))
        for name, taken in samples.items()
    }


def told(figures: dict[str, Any]) -> list[str]:
    """Ratio, interval, rates and CPU µs an operation of one row."""
    ratio = Ratio(**figures["ratio"])
    taken = [figures["samples"][name] for name in (Whole.name, Without.name)]
    return [
        f"{ratio.value:.2f}",
        f"{ratio.low:.2f} – {ratio.high:.2f}",
        " / ".join(f"{median(columns['operations_per_s']):,.0f}" for columns in taken),
        " / ".join(f"{median(columns['server_cpu_s_per_1000']) * 1000:.1f}" for columns in taken),
    ]


def table_of(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table(title="With a complication over without it")
    for heading in ("", "row", "ratio", "95 % interval", "operations a second", "CPU µs an operation"):
        table.add_column(heading)
    for name, rows in found.items():
        for row, figures in rows.items():
            table.add_row(name, row, *told(figures))
    return table


@application.command()
def run(
    names: Annotated[str | None, typer.Option("--only", help="Comma-separated complications.  [default: all]")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each server in each row.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of one measurement.")] = 1.0,
    size: Annotated[str, typer.Option(help="Working set.")] = "512M",
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
) -> None:
    """Measure the program with and without each complication of its hot path."""
    with run_of("complications", results, directory) as bench:
        wanted = chosen(names or ",".join(COMPLICATIONS), "complication", COMPLICATIONS)
        size_bytes = size_bytes_of(size)
        machine.check_room(bench.place, size_bytes * 8)
        servers: list[Target] = [Whole(bench.place, size_bytes), Without(bench.place, size_bytes)]
        found: dict[str, dict[str, dict[str, Any]]] = {}
        with stopped_at_the_end(*servers):
            measuring.prepare(servers)
            for complication in wanted:
                print(f"without {complication.name}", file=sys.stderr)
                found[complication.name] = measure(complication, servers, rounds, seconds)
        result = bench.keep({"complications": found}, told=not as_json)
        show(result, as_json, table_of(found))


if __name__ == "__main__":
    application()
