"""Tables from a result of the benchmark or of `costs`, in Markdown for docs/performance.md:
`python -m tests.benchmark.report RESULT.json`."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from .rows import ROWS_BY_NAME

GREATEST_COSTS = 5

Result = dict[str, Any]


def rate_text(row: Result, rate_per_s: float) -> str:
    """Operations a second, or megabytes for blocks large enough that nobody counts them."""
    if row["block_bytes"] >= 65536:
        return f"{rate_per_s * row['block_bytes'] / 1e6:,.0f} MB/s"
    return f"{rate_per_s:,.0f}/s"


def figure(row: Result, target: str, column: str) -> float:
    """The median over the rounds."""
    return float(median(row["samples"][target][column]))


def spread_percent(row: Result, target: str) -> float:
    """(highest - lowest) / median of the rate over the rounds."""
    rates = row["samples"][target]["operations_per_s"]
    return float((max(rates) - min(rates)) / median(rates) * 100)


def rich_table(result: Result) -> Table:
    """The table that a run ends with."""
    names: list[str] = result["targets_in_order"]
    table = Table(title="Operations a second: median of the rounds (below: server CPU seconds per 1,000 operations)")
    table.add_column("row")
    if result["subject"] in names:
        table.add_column("ratio to best peer\n95 % interval", justify="center")
        table.add_column("goal", justify="right")
    for name in names:
        table.add_column(result["targets"][name]["title"], justify="right")
    for row in result["rows"]:
        cells = [row["title"]]
        ratio = row["ratio"]
        if result["subject"] in names:
            if ratio:
                colour = "green" if ratio["value"] >= row["goal"] else "yellow" if ratio["value"] >= 1 else "red"
                cells.append(f"[{colour}]{ratio['value']:.2f}[/]\n{ratio['low']:.2f} – {ratio['high']:.2f}")
            else:
                cells.append("–")
            cells.append(f"{row['goal']:.1f}")
        for name in names:
            mark = "[bold]" if ratio and name == ratio["best_peer"] else "[not bold]"
            rate = rate_text(row, figure(row, name, "operations_per_s"))
            cells.append(
                f"{mark}{rate}[/] ±{spread_percent(row, name) / 2:.0f} %\n"
                f"{figure(row, name, 'server_cpu_s_per_1000'):.4f}"
            )
        table.add_row(*cells, end_section=True)
    return table


def markdown(result: Result) -> str:
    """The same table, latencies, settings, versions and commands, for the documents."""
    return (
        "\n\n".join([_conditions(result), _rates(result), _costs(result), _settings(result), _commands(result)]) + "\n"
    )


def noise_cores(result: Result) -> float:
    """Cores that other processes kept busy, in the median measurement."""
    return float(
        median(value for row in result["rows"] for taken in row["samples"].values() for value in taken["other_cores"])
    )


def _conditions(result: Result) -> str:
    machine, options = result["machine"], result["options"]
    versions = "; ".join(result["targets"][name]["version"] for name in result["targets_in_order"])
    limit_bytes = options.get("memory_bytes", 0)
    memory = f", {limit_bytes >> 20} MiB of memory for each server and its page cache" if limit_bytes else ""
    return (
        f"Measured {result['date']} on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, Linux {machine['kernel']}, {machine['file_system']}; "
        f"{noise_cores(result):.2f} cores were busy with other things. "
        f"Working set {options['size_bytes'] >> 20} MiB{memory}, "
        f"{options['rounds']} rounds of {options['seconds']:g} s. {versions}; {result['fio_version']}."
    )


def lines_of(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _rates(result: Result) -> str:
    names = result["targets_in_order"]
    head = [
        "row",
        "ratio",
        "95 % interval",
        "best round",
        "goal",
        *(result["targets"][name]["title"] for name in names),
    ]
    rows = []
    for row in result["rows"]:
        ratio = row["ratio"]
        figures = ["–"] * 3
        if ratio:
            figures = [f"**{ratio['value']:.2f}**", f"{ratio['low']:.2f} – {ratio['high']:.2f}"]
            figures.append(f"{ratio['best_round']:.2f}")
        rates = [rate_text(row, figure(row, name, "operations_per_s")) for name in names]
        rows.append([row["title"], *figures, f"{row['goal']:.1f}", *rates])
    return lines_of(head, rows)


def _costs(result: Result) -> str:
    names = result["targets_in_order"]
    head = ["CPU s per 1,000 operations; p50 / p99 µs", *(result["targets"][name]["title"] for name in names)]
    rows = []
    for row in result["rows"]:
        cells = [
            f"{figure(row, name, 'server_cpu_s_per_1000'):.4f}; "
            f"{figure(row, name, 'p50_us'):.0f} / {figure(row, name, 'p99_us'):.0f}"
            for name in names
        ]
        rows.append([row["title"], *cells])
    return lines_of(head, rows)


def _settings(result: Result) -> str:
    names = [name for name in result["targets_in_order"] if name != result["subject"]]
    head = ["best setting found", *(result["targets"][name]["title"] for name in names)]
    rows = [[row["title"], *(row["settings"][name] for name in names)] for row in result["rows"]]
    return lines_of(head, rows)


def _commands(result: Result) -> str:
    lines = ["```"]
    for name in result["targets_in_order"]:
        lines += result["targets"][name]["commands"].values()
    lines.append("")
    lines += [row["fio_command"] for row in result["rows"]]
    return "\n".join([*lines, "```"])


def costs_markdown(result: Result) -> str:
    """Of a result of `costs`: what an operation takes, and what of it are the greatest costs."""
    head = ["row", "µs of CPU", "of them", "", "", "", ""]
    lines = []
    for name, told in result["rows"].items():
        operation_us = told["sample"]["server_cpu_s_per_1000"][0] * 1000
        greatest = [
            f"{cost} {share * operation_us:.1f}" for cost, share in list(told["costs"].items())[:GREATEST_COSTS]
        ]
        lines.append([ROWS_BY_NAME[name].title, f"{operation_us:.1f}", *greatest])
    return lines_of(head, lines) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.benchmark.report RESULT.json > table.md")
    result = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(markdown(result) if "targets_in_order" in result else costs_markdown(result))


if __name__ == "__main__":
    main()
