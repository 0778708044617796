"""`python -m tests.benchmark.sustained`: random overwrites of a store that is nearly full, for as long as it takes.

The store is what `max-data` leaves the volume; nine tenths of it are live. Once a second the server's counters are
read: clients' rate, and the write amplification, which is what the log took over what clients wrote. Both go into a
plot, the second beside what theory says for uniformly random writes: a cleaner that takes the segment that was written
longest ago finds a share u of it live where (u - 1) / ln u is the live share of the store (Desnoyers, "Analytic Models
of SSD Write Performance", 2014), and writes 1 / (1 - u) blocks for one of a client's. Cost-benefit among equals is
close to that.

Known weakness: the reserve of free segments and the open one are part of the store, so that what garbage can lie in is
less than a tenth; with small segments that is little.
"""

import math
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from . import machine
from .__main__ import size_bytes_of
from .disturbance import Node
from .load import fio_job, prefill
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError
from .targets import EXPORT, Nbdserver, Setting, stopped_at_the_end

LIVE_SHARE = 0.9
SEGMENTS = 256  # of the store
BLOCK_BYTES = 4096

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def theoretical_amplification(live_share: float) -> float:
    """Blocks written for each block of a client's, in the steady state of uniformly random overwrites."""
    low, high = 1e-9, live_share
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if (middle - 1) / math.log(middle) < live_share else (low, middle)
    return 1 / (1 - low)


def watch(node: Node, load: "subprocess.Popen[bytes]", seconds: float) -> list[dict[str, float]]:
    """Figures of each second until the load ends."""
    names = {"written": "write_bytes_total", "appended": "disk_log_bytes_appended_total"}
    samples: list[dict[str, float]] = []
    started = time.monotonic()
    while load.poll() is None and time.monotonic() - started < seconds + 60:
        time.sleep(1)
        at_s = time.monotonic() - started
        samples.append({"at_s": at_s} | {name: node.figure(metric) for name, metric in names.items()})
    return samples


def steps(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    """Between each two samples that clients wrote between: rate and amplification."""
    found = []
    for before, after in pairwise(samples):
        written = after["written"] - before["written"]
        if written > 0:
            rate = written / BLOCK_BYTES / (after["at_s"] - before["at_s"])
            found.append(
                {"at_s": after["at_s"], "writes_per_s": rate,
                 "amplification": (after["appended"] - before["appended"]) / written}
            )  # fmt: skip
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    from .drawing import pyplot, save

    at_min = [step["at_s"] / 60 for step in result["steps"]]
    canvas, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    above.plot(at_min, [step["writes_per_s"] for step in result["steps"]])
    above.set_title("4 KiB random overwrites a second", loc="left", fontweight="bold")
    below.plot(at_min, [step["amplification"] for step in result["steps"]])
    below.axhline(result["theory"], color="#888888", linestyle="--", label=f"theory: {result['theory']:.1f}")
    below.set_title("write amplification", loc="left", fontweight="bold")
    below.set_xlabel("minutes")
    below.legend(frameon=False)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e0e0e0")
    canvas.suptitle(
        f"{result['date']}   {result['live_bytes'] >> 20} MiB live in {result['store_bytes'] >> 20} MiB",
        color="#555555",
    )
    save(canvas, path)


def measure(place: Path, store_bytes: int, seconds: float) -> dict[str, Any]:
    """Fill, then overwrite."""
    segment_bytes = max(1 << 20, 1 << (store_bytes // SEGMENTS).bit_length() - 1)
    live_bytes = int(store_bytes * LIVE_SHARE) // BLOCK_BYTES * BLOCK_BYTES
    (place / "node.yaml").write_text(f"segment: {segment_bytes}\n")
    target = Nbdserver(place, live_bytes)
    target.prepare()
    target.start(Setting("small segments", ("--config", str(place / "node.yaml"))))
    with stopped_at_the_end(target):
        node = Node(target)
        node.limit_data(EXPORT, store_bytes)
        prefill(target)
        arguments = ["--rw=randwrite", "--bs=4k", f"--size={live_bytes}", "--iodepth=16", "--norandommap"]
        command = fio_job(target, "sustained", *arguments, "--time_based", f"--runtime={round(seconds)}")
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
            samples = watch(node, load, seconds)
            if load.poll():
                raise BenchmarkError("fio failed: a write was refused, or the server is gone")
    taken = steps(samples)
    last = taken[len(taken) * 2 // 3 :]
    return {
        "store_bytes": store_bytes,
        "live_bytes": live_bytes,
        "segment_bytes": segment_bytes,
        "theory": theoretical_amplification(LIVE_SHARE),
        "writes_per_s": median(step["writes_per_s"] for step in last),
        "slowest_writes_per_s": min(step["writes_per_s"] for step in last),
        "amplification": median(step["amplification"] for step in last),
        "overwritten_times": (samples[-1]["written"] - samples[0]["written"]) / live_bytes,
        "steps": taken,
    }


@application.command()
def run(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    size: Annotated[str, typer.Option(help="The store.")] = "4G",
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Overwrite a nearly full store at random."""
    with run_of("sustained", results, directory) as bench:
        store_bytes = size_bytes_of(size)
        machine.check_room(bench.place, store_bytes * 5 // 4 + (1 << 30))
        result = bench.keep(measure(bench.place, store_bytes, minutes * 60))
        draw(result, bench.picture)
        console.print(
            f"overwritten {result['overwritten_times']:.1f} times; then {result['writes_per_s']:,.0f} writes a "
            f"second (slowest second {result['slowest_writes_per_s']:,.0f}), write amplification "
            f"{result['amplification']:.2f}; theory {result['theory']:.2f}",
            highlight=False,
        )


if __name__ == "__main__":
    application()
