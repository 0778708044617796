"""How the benchmarks draw: without a display, in small type, without a box. To be imported late: it takes a second."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot
from matplotlib.figure import Figure

__all__ = ["pyplot", "save"]

pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def save(canvas: Figure, path: Path) -> None:
    """Write a PNG, and forget the canvas."""
    canvas.savefig(path, dpi=140)
    pyplot.close(canvas)
