"""`python -m tests.benchmark.scale`: what maps, opening and recovery cost as volumes grow from 1 GiB to 16 TiB.

Each size is built once (scale_family.py; `build --directory DIR` does that before, at some other time, and leaves it
there), then measured in processes of their own, so that no cache is left over:

* open: `LogDisk.open` of a cleanly checkpointed family, and the memory after it.
* lookup: a 4 KiB read of a mapped block whose map pages are not in memory (LevelDB is asked twice), and the same read
  again when they are. Data comes from the page cache (the segments are sparse), and so do LevelDB's files, as on a
  server that runs: what is measured is computing, not the disk.
* recovery: a process overwrites random mapped blocks and ends without closing; then open is measured again. It makes
  no checkpoint for the time that passes, only for what fills the cache: so this is about as much as there can be.
"""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nbdserver.block import BLOCK_BYTES, Operation
from nbdserver.logdisk.disk import DiskSettings, LogDisk

from . import machine
from .__main__ import size_bytes_of
from .local_family import close_disk, host, open_disk
from .outcome import RESULTS, ResultsOption, console, run_of, told_in_one_line
from .processes import BenchmarkError, last_line, resident_bytes
from .scale_family import SEGMENT_BYTES, Spread, fill

FAMILY = bytes(range(16))
DEFAULT_SIZES = "1G,128G,1T,16T"
DEFAULT_BLOCKS = 20_000_000
LOOKUPS = 5_000
OVERWRITES = 50_000
BATCH = 16
SETTINGS = DiskSettings(checkpoint_interval_s=3600.0)

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# -- what runs in a process of its own


def memory_bytes() -> int:
    return resident_bytes(os.getpid())["RssAnon"]


async def build_family(directory: Path, spread: Spread) -> dict[str, float]:
    started = time.perf_counter()
    (directory / "maps").mkdir(parents=True)
    with host(directory, asyncio.get_running_loop()) as parts:
        LogDisk.format(parts.files, parts.store, FAMILY, spread.size_bytes, SEGMENT_BYTES, random.Random(1))
        fill(directory, parts.store, spread, lambda blocks: print(json.dumps({"blocks": blocks}), flush=True))
    return {"build_s": time.perf_counter() - started}


async def measure_open(directory: Path) -> dict[str, Any]:
    """Open, and close properly."""
    replayed: dict[str, object] = {}

    def report(kind: str, fields: dict[str, object]) -> None:
        if kind == "recovered":
            replayed.update(fields)

    stored = sum(file.stat().st_size for file in (directory / "maps").iterdir())
    with host(directory, asyncio.get_running_loop()) as parts:
        before = memory_bytes()
        started, started_cpu = time.perf_counter(), time.process_time()
        disk = open_disk(parts, SETTINGS, report)
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
        memory = memory_bytes() - before
        await close_disk(disk)
    return {
        "open_s": seconds,
        "open_cpu_s": cpu_s,
        "open_memory_bytes": memory,
        "leveldb_bytes": stored,
        "replayed_blocks": replayed.get("blocks", 0),
    }


async def measure_lookup(directory: Path, spread: Spread) -> dict[str, float]:
    """LOOKUPS reads of random mapped blocks with the maps cold, each followed by a warm one."""
    draw = random.Random(2)
    indexes = [draw.randrange(spread.blocks) for _ in range(LOOKUPS)]
    cold: list[float] = []
    warm: list[float] = []
    with host(directory, asyncio.get_running_loop()) as parts:
        disk = open_disk(parts, SETTINGS)
        for index in indexes:
            offset = spread.lba(index) * BLOCK_BYTES
            started = time.perf_counter()
            data = disk.head(1).read(offset, BLOCK_BYTES)
            if data is None:
                await read_later(disk, offset)
                cold.append(time.perf_counter() - started)
                started = time.perf_counter()
                data = disk.head(1).read(offset, BLOCK_BYTES)
            warm.append(time.perf_counter() - started)
            if data is None or b"".join(bytes(part) for part in data) != bytes(BLOCK_BYTES):
                raise BenchmarkError(f"the block at {offset} was not read back")
        memory = memory_bytes()
        await close_disk(disk)
    return {
        "lookup_cold_p50_us": median(cold) * 1e6,
        "lookup_cold_p99_us": quantiles(cold, n=100)[98] * 1e6,
        "lookup_warm_p50_us": median(warm) * 1e6,
        "lookups_cold": len(cold),
        "lookup_memory_bytes": memory,
    }


async def read_later(disk: LogDisk, offset: int) -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    disk.head(1).later(Operation.READ, offset, BLOCK_BYTES, None, lambda errno, _: future.set_result(errno))
    errno = await future
    if errno:
        raise BenchmarkError(f"reading at {offset} failed: {os.strerror(errno)}")


async def overwrite_and_die(directory: Path, spread: Spread, overwrites: int) -> None:
    """Overwrite random mapped blocks in batches of BATCH, then end as kill -9 ends it."""
    draw = random.Random()
    data = draw.randbytes(BLOCK_BYTES)
    with host(directory, asyncio.get_running_loop()) as parts:
        disk = open_disk(parts, SETTINGS)
        for _ in range(overwrites // BATCH):
            offsets = [spread.lba(draw.randrange(spread.blocks)) * BLOCK_BYTES for _ in range(BATCH)]
            missing = [offset for offset in offsets if not disk.head(1).write(offset, memoryview(data))]
            if disk.head(1).commit():
                raise BenchmarkError("a batch was refused")
            for offset in missing:
                await write_later(disk, offset, data)
            await asyncio.sleep(0)
        print(json.dumps({"counters": disk.counters()}, default=str), flush=True)
        os._exit(0)


async def write_later(disk: LogDisk, offset: int, data: bytes) -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    disk.head(1).later(Operation.WRITE, offset, len(data), data, lambda errno, _: future.set_result(errno))
    errno = await future
    if errno:
        raise BenchmarkError(f"writing at {offset} failed: {os.strerror(errno)}")


@application.command(hidden=True)
def phase(name: str, directory: Path, size_bytes: int, blocks: int, overwrites: int) -> None:
    """One measurement in a process of its own; its figures are the last line it prints, as JSON."""
    spread = Spread(size_bytes, blocks)
    phases: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "build": lambda: build_family(directory, spread),
        "open": lambda: measure_open(directory),
        "lookup": lambda: measure_lookup(directory, spread),
        "die": lambda: overwrite_and_die(directory, spread, overwrites),
    }
    print(json.dumps(asyncio.run(phases[name]())), flush=True)


# -- what runs them


def run_phase(
    name: str,
    directory: Path,
    spread: Spread,
    overwrites: int = 0,
    advance: Callable[[int], None] = lambda blocks: None,
) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmark.scale", "phase", name, str(directory)]
    command += [str(spread.size_bytes), str(spread.blocks), str(overwrites)]
    last: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            last = json.loads(line)
            advance(last.get("blocks", 0))
        said = process.stderr.read()
    if process.returncode:
        raise BenchmarkError(f"{name} at {spread.size_bytes >> 30} GiB failed: {last_line(said)}")
    return last


def build_families(place: Path, spreads: list[Spread]) -> None:
    """Make those that `place` does not have. One that was cut off is made anew."""
    machine.check_room(place, 8 << 30)
    missing = [spread for spread in spreads if not family_in(place, spread).exists()]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(spread.blocks for spread in missing))
        for spread in missing:
            progress.update(task, description=f"building {spread.size_bytes >> 30} GiB")
            unfinished = place / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            run_phase("build", unfinished, spread, advance=lambda blocks: progress.advance(task, blocks))
            unfinished.rename(family_in(place, spread))


def family_in(place: Path, spread: Spread) -> Path:
    return place / f"scale-{spread.size_bytes >> 30}GiB-{spread.blocks}"


def measure_size(directory: Path, spread: Spread, overwrites: int) -> dict[str, Any]:
    """All figures of one size."""
    row: dict[str, Any] = {"size_bytes": spread.size_bytes, "mapped_blocks": spread.blocks}
    row |= run_phase("open", directory, spread)
    row |= run_phase("lookup", directory, spread)
    row["overwriter"] = run_phase("die", directory, spread, overwrites).get("counters", {})
    after = run_phase("open", directory, spread)
    return row | {
        "recovery_s": after["open_s"],
        "recovery_cpu_s": after["open_cpu_s"],
        "recovery_memory_bytes": after["open_memory_bytes"],
        "replayed_blocks": after["replayed_blocks"],
    }


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Maps, open and recovery")
    for head in (
        "volume",
        "mapped blocks",
        "LevelDB",
        "open",
        "memory",
        "lookup cold p50 / p99",
        "warm",
        "replayed",
        "recovery",
    ):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            f"{row['size_bytes'] / 2**30:,.0f} GiB",
            f"{row['mapped_blocks']:,}",
            f"{row['leveldb_bytes'] / 1e6:,.0f} MB",
            f"{row['open_s'] * 1000:,.0f} ms",
            f"{row['open_memory_bytes'] / 1e6:,.0f} MB",
            f"{row['lookup_cold_p50_us']:,.0f} / {row['lookup_cold_p99_us']:,.0f} µs",
            f"{row['lookup_warm_p50_us']:,.1f} µs",
            f"{row['replayed_blocks']:,} blocks",
            f"{row['recovery_s'] * 1000:,.0f} ms",
        )
    return table


def draw_plot(result: dict[str, Any], path: Path) -> None:
    """Four small plots over the volume's size."""
    from .drawing import pyplot, save

    rows = result["rows"]
    sizes = [row["size_bytes"] / 2**30 for row in rows]
    # title, (label, column, unit); unit 0 divides by the mapped blocks
    panels: list[tuple[str, list[tuple[str, str, float]]]] = [
        ("open and recovery, s", [("open", "open_s", 1), ("after kill -9", "recovery_s", 1)]),
        (
            "lookup, µs",
            [
                ("cold p50", "lookup_cold_p50_us", 1),
                ("p99", "lookup_cold_p99_us", 1),
                ("warm", "lookup_warm_p50_us", 1),
            ],
        ),
        ("memory, MB", [("after open", "open_memory_bytes", 1e6), ("after recovery", "recovery_memory_bytes", 1e6)]),
        ("bytes of LevelDB a mapped block", [("LevelDB", "leveldb_bytes", 0)]),
    ]
    canvas, grid = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axes, (title, lines) in zip(grid.flat, panels, strict=True):
        for label, key, unit in lines:
            values = [row[key] / (unit or row["mapped_blocks"]) for row in rows]
            axes.plot(sizes, values, marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size / 1024:g} TiB" if size >= 1024 else f"{size:g} GiB" for size in sizes])
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e0e0e0")
        axes.set_title(title, loc="left", fontweight="bold")
        if len(lines) > 1:
            axes.legend(frameon=False)
    most = max(row["mapped_blocks"] for row in rows)
    canvas.suptitle(f"{result['date']}   up to {most:,} mapped blocks, {result['machine']['cpu']}", color="#555555")
    save(canvas, path)


SizesOption = Annotated[str, typer.Option(help="Comma-separated volume sizes.")]
BlocksOption = Annotated[int, typer.Option(min=1000, help="Mapped blocks (fewer where the volume has fewer).")]


def spreads_of(sizes: str, blocks: int) -> list[Spread]:
    return [Spread(size, min(blocks, size // BLOCK_BYTES)) for size in map(size_bytes_of, sizes.split(","))]


@application.command()
def build(
    directory: Annotated[Path, typer.Option(help="Where families are built, and stay.")],
    sizes: SizesOption = DEFAULT_SIZES,
    blocks: BlocksOption = DEFAULT_BLOCKS,
) -> None:
    """Build the families that `run --directory DIR` then measures: some minutes each."""
    with told_in_one_line():
        directory.mkdir(parents=True, exist_ok=True)
        build_families(directory, spreads_of(sizes, blocks))


@application.command()
def run(
    sizes: SizesOption = DEFAULT_SIZES,
    blocks: BlocksOption = DEFAULT_BLOCKS,
    overwrites: Annotated[
        int, typer.Option(min=BATCH, help="Random writes before the end of the process.")
    ] = OVERWRITES,
    directory: Annotated[
        Path | None, typer.Option(help="Where `build` left families.  [default: they are built now, and removed]")
    ] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure map lookups, opening and recovery over volumes of growing size."""
    with run_of("scale", results, directory, stays=True) as bench:
        spreads = spreads_of(sizes, blocks)
        build_families(bench.place, spreads)
        rows = [measure_size(family_in(bench.place, spread), spread, overwrites) for spread in spreads]
        result = bench.keep({"overwrites_before_recovery": overwrites, "rows": rows})
        draw_plot(result, bench.picture)
        console.print(show(rows))


if __name__ == "__main__":
    # `run` is what one calls; `phase` is what it calls.
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.argv.insert(1, "run")
    application()
