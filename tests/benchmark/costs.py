"""`python -m tests.benchmark.costs`: what an operation costs our data process, row by row, by system call and library.

perf samples the process while fio does a row. Each sample belongs to the system call that it is in, or else to the
library whose code it is in (the interpreter, the checksums, ...); the shares divide the CPU time that the row took, as
`/proc` counts it. That tells what could be saved at most by each thing that one might try.
"""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import machine, measuring
from .__main__ import chosen_rows, size_bytes_of
from .conditions import Conditions
from .load import Sample, prefill, scatter, warm
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError
from .profiler import measure_beside, serving_pid
from .report import GREATEST_COSTS
from .rows import Row
from .targets import Nbdserver, stopped_at_the_end

SAMPLES_PER_S = 4000
_ENTRY = "do_syscall_64"
_PREFIXES = ("__x64_sys_", "__sys_", "x64_sys_", "do_")
_LIBRARIES = {
    "libpython": "the interpreter",
    "python": "the interpreter",
    "array.": "the interpreter",
    "_struct": "the interpreter",
    "select.": "the interpreter",
    "_socket": "the interpreter",
    "libcrc32c": "checksums",
    "_crc32c": "checksums",
    "libc": "the C library: copies, memory",
    "libleveldb": "LevelDB",
    "_plyvel": "LevelDB",
}

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def stacks(script: str) -> Iterator[list[tuple[str, str]]]:
    """(symbol, library) of each frame of each sample in the text of `perf script`, the innermost first."""
    frames: list[tuple[str, str]] = []
    for line in script.splitlines():
        fields = line.split()
        if not fields:
            if frames:
                yield frames
            frames = []
        elif len(fields) >= 3 and fields[-1].startswith("(") and line[0].isspace():
            frames.append((fields[1].split("+")[0], fields[-1].strip("()").rsplit("/", 1)[-1]))
    if frames:
        yield frames


def cost_of(frames: list[tuple[str, str]]) -> str:
    """What a sample is counted under."""
    symbols = [symbol for symbol, _ in frames]
    if _ENTRY in symbols[1:]:
        name = symbols[symbols.index(_ENTRY) - 1]
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        return f"{name}()"
    library = frames[0][1]
    for beginning, name in _LIBRARIES.items():
        if library.startswith(beginning):
            return name
    return "the kernel, entering and leaving" if "kernel" in library else library


def costs(script: str) -> list[tuple[str, float]]:
    """(cost, share of all samples), the greatest first."""
    counted = Counter(cost_of(frames) for frames in stacks(script))
    total = sum(counted.values())
    return [(name, count / total) for name, count in counted.most_common()]


def record(server: Nbdserver, row: Row, duration_s: float, directory: Path) -> tuple[Sample, list[tuple[str, float]]]:
    """Do a row with perf beside it."""
    if row.laid_out:
        prefill(server)
    if row.scattered:
        scatter(server)
    warm(server)
    pid = serving_pid(server, row)
    data = directory / f"{row.name}.perf"
    command = ["perf", "record", "-q", "-g", "-e", "cpu-clock", "-F", str(SAMPLES_PER_S), "-p", str(pid)]
    command += ["-o", str(data), "--", "sleep", str(duration_s)]
    sample = measure_beside(command, data, server, row, duration_s, "it needs root")
    script = subprocess.run(
        ["perf", "script", "-i", str(data), "-F", "comm,ip,sym,dso"], capture_output=True, text=True, check=False
    )
    data.unlink()
    return sample, costs(script.stdout)


def show(row: Row, sample: Sample, found: list[tuple[str, float]]) -> Table:
    operation_us = sample.server_cpu_s_per_1000 * 1000
    table = Table(title=f"{row.title}: {sample.operations_per_s:,.0f}/s, {operation_us:.1f} µs of CPU an operation")
    for heading in ("µs", "share", "in"):
        table.add_column(heading)
    for name, share in found[:GREATEST_COSTS]:
        table.add_row(f"{share * operation_us:.1f}", f"{share:.0%}", name)
    return table


@application.command()
def run(
    rows: Annotated[str | None, typer.Option(help="Comma-separated rows.  [default: all]")] = None,
    seconds: Annotated[float, typer.Option(min=0.2, help="Length of a profile.")] = 3.0,
    size: Annotated[str, typer.Option(help="Working set.")] = "1G",
    memory: Annotated[str | None, typer.Option(help="Limit of the server's memory, page cache included.")] = None,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Print the five greatest costs of an operation in each row; all of them go to a JSON file."""
    with run_of("costs", results, directory) as bench:
        if shutil.which("perf") is None:
            raise BenchmarkError("perf is not installed: apt-get install linux-perf")
        wanted, size_bytes = chosen_rows(rows), size_bytes_of(size)
        told: dict[str, Any] = {}
        machine.check_room(bench.place, size_bytes * 4)
        server = Nbdserver(bench.place, size_bytes)
        conditions = Conditions(size_bytes, size_bytes_of(memory) if memory else 0)
        with conditions.put_on([server]), stopped_at_the_end(server):
            measuring.prepare([server])
            for row in wanted:
                sample, found = record(server, row, seconds, bench.place)
                console.print(show(row, sample, found))
                told[row.name] = {"sample": measuring.as_json([sample]), "costs": dict(found)}
        bench.keep({"rows": told})


if __name__ == "__main__":
    application()
