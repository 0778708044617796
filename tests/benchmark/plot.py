"""The picture of a result: the ratio of every row with its interval and goal, and the rates beneath it."""

from pathlib import Path
from textwrap import fill
from typing import Any

from .drawing import pyplot, save
from .report import figure, rate_text

COLOURS = {
    "nbdserver": "#c8442d",
    "nbdkit": "#2f6f9f",
    "qemu-nbd-raw": "#4f9d8f",
    "qemu-nbd-qcow2": "#9ccabf",
    "nbd-server": "#9a8fb8",
}
OTHER_COLOUR = "#888888"
COLUMNS = 4


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG."""
    rows = result["rows"]
    names = result["targets_in_order"]
    bands = -(-len(rows) // COLUMNS)
    with_ratios = any(row["ratio"] for row in rows)
    heights = ([0.5 * len(rows) + 1.0] if with_ratios else []) + [2.3] * bands
    canvas = pyplot.figure(figsize=(13, sum(heights) + 0.8), layout="constrained")
    grid = canvas.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    if with_ratios:
        _draw_ratios(canvas.add_subplot(grid[0, :]), rows)
    for index, row in enumerate(rows):
        band = index // COLUMNS + (1 if with_ratios else 0)
        _draw_rates(canvas.add_subplot(grid[band, index % COLUMNS]), row, names, result)
    machine, options = result["machine"], result["options"]
    limit_gib = options.get("memory_bytes", 0) / 2**30
    memory = f" in {limit_gib:g} GiB of memory" if limit_gib else ""
    canvas.suptitle(
        f"{result['date']}   {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"{machine['file_system']}   {options['size_bytes'] / 2**30:g} GiB working set{memory}, "
        f"median of {options['rounds']} rounds of {options['seconds']:g} s",
        fontsize=9,
        color="#555555",
    )
    save(canvas, path)


def _draw_ratios(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.axvline(1.0, color="#444444", linewidth=1)
    for position, row in enumerate(rows):
        ratio = row["ratio"]
        if not ratio:
            continue
        reached = ratio["value"] >= row["goal"]
        colour = "#2e8b57" if reached else "#d9902f" if ratio["value"] >= 1 else "#c8442d"
        axes.barh(position, ratio["value"], color=colour, height=0.6, alpha=0.9)
        axes.plot([ratio["low"], ratio["high"]], [position, position], color="#222222", linewidth=1.5)
        axes.plot([row["goal"]] * 2, [position - 0.4, position + 0.4], color="#222222", linewidth=2.5)
        end = max(ratio["value"], ratio["high"], row["goal"])
        axes.text(end + 0.03, position, f"{ratio['value']:.2f}", va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), [fill(row["title"], 34) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title("nbdserver / best peer of the row   (line: 95 % interval, bar: goal)", loc="left", fontweight="bold")


def _draw_rates(axes: Any, row: dict[str, Any], names: list[str], result: dict[str, Any]) -> None:
    values = [figure(row, name, "operations_per_s") for name in names]
    axes.barh(range(len(names)), values, color=[COLOURS.get(name, OTHER_COLOUR) for name in names], height=0.7)
    for position, name in enumerate(names):
        rates = row["samples"][name]["operations_per_s"]
        axes.plot([min(rates), max(rates)], [position, position], color="#222222", linewidth=1)
        axes.text(max(rates), position, f"  {rate_text(row, values[position])}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [result["targets"][name]["title"] for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(max(row["samples"][name]["operations_per_s"]) for name in names) * 1.45)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(fill(row["title"], 40), loc="left", fontsize=9)
