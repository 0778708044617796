"""Tables from a result: `python -m tests.benchmark.cluster.report RESULT.json` prints Markdown for the documents."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from ..report import figure, lines_of, rate_text
from .ceph import Ceph

PEER = Ceph.name


def cpu_fraction(row: dict[str, Any], subject: str) -> float | None:
    """CPU of all daemons for an operation, ours over Ceph's."""
    if PEER not in row["samples"] or subject == PEER:
        return None
    return figure(row, subject, "server_cpu_s_per_1000") / figure(row, PEER, "server_cpu_s_per_1000")


def table_of(result: dict[str, Any]) -> Table:
    """Rates, their ratio, and the fraction of CPU, with the goals."""
    names: list[str] = result["systems_in_order"]
    table = Table(title="Operations a second: median of the rounds (below: CPU ms of all daemons an operation)")
    for head in ("row", "times the others\n95 % interval", "goal", "CPU of\nCeph's", "goal"):
        table.add_column(head, justify="left" if head == "row" else "right")
    for name in names:
        table.add_column(result["systems"][name]["title"], justify="right")
    for row in result["rows"]:
        table.add_row(*cells_of(row, result), end_section=True)
    return table


def cells_of(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    ratio, fraction = row["ratio"], cpu_fraction(row, result["subject"])
    return [
        row["title"],
        f"{ratio['value']:.2f}\n{ratio['low']:.2f} – {ratio['high']:.2f}" if ratio else "–",
        f"{row['goal']:.1f}",
        f"{fraction:.3f}" if fraction is not None else "–",
        f"{row['cpu_goal']:.2f}" if row["cpu_goal"] else "–",
        *(
            f"{rate_text(row, figure(row, name, 'operations_per_s'))}\n{figure(row, name, 'server_cpu_s_per_1000'):.3f}"
            for name in result["systems_in_order"]
        ),
    ]


def markdown(result: dict[str, Any]) -> str:
    """The same table, and what it was measured on."""
    machine, options = result["machine"], result["options"]
    versions = "; ".join(result["systems"][name]["version"] for name in result["systems_in_order"])
    conditions = (
        f"Measured {result['date']} on {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"{machine['file_system']}, load {machine['load_before']} when it began. Working set "
        f"{options['size_bytes'] >> 20} MiB, {options['rounds']} rounds of {options['seconds']:g} s. {versions}; "
        f"{result['fio_version']}."
    )
    titles = [f"{result['systems'][name]['title']}; CPU ms" for name in result["systems_in_order"]]
    head = ["row", "times Ceph, 95 % interval", "goal", "CPU of Ceph's", "goal", *titles]
    rows = [[cell.replace("\n", "; ") for cell in cells_of(row, result)] for row in result["rows"]]
    return f"{conditions}\n\n{lines_of(head, rows)}\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.benchmark.cluster.report RESULT.json > table.md")
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
