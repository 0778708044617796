"""`python -m tests.benchmark.restart`: how long a start takes after kill -9, by how much was written before.

One volume is filled from end to end, to one size after the other. At each size it is written at random, 4 KiB at a
time, and the server is killed in the middle of that, some rounds long. What is measured is the time from the start of
the program until a client has read the block that it wrote last; the server's own event says how much it replayed. The
page cache is warm, as it is after the end of a process.

Known weakness: how much is replayed depends on the moment; the load runs longer than the 30 s that may pass between
checkpoints only if --load-s says so.
"""

import json
import os
import signal
import subprocess
import time
from contextlib import closing
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from protocol.nbd import Command
from tests.nbd_client import Client

from . import machine
from .__main__ import size_bytes_of
from .load import fio_job, run_fio
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError
from .targets import EXPORT, Nbdserver, stopped_at_the_end

BLOCK_BYTES = 4096

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def fill(target: Nbdserver, start: int, stop: int) -> None:
    """Write the volume from `start` to `stop`, incompressibly."""
    arguments = ["--rw=write", "--bs=1m", f"--offset={start}", f"--size={stop - start}", "--iodepth=4"]
    run_fio(fio_job(target, "fill", *arguments, "--refill_buffers"), timeout_s=900)


def load_and_kill(target: Nbdserver, filled_bytes: int, load_s: float, seed: int) -> None:
    """Kill the server under random writes."""
    assert target.server is not None
    arguments = ["--rw=randwrite", "--bs=4k", f"--offset={BLOCK_BYTES}", f"--size={filled_bytes - BLOCK_BYTES}"]
    arguments += ["--iodepth=16", "--time_based", "--runtime=3600", f"--randseed={seed}"]
    command = fio_job(target, "load", *arguments)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as fio:
        try:
            time.sleep(load_s)
            if fio.poll() is not None:
                raise BenchmarkError("fio ended before the server was killed")
            with closing(Client(str(target.socket_path), EXPORT)) as client:
                client.request(Command.WRITE, 0, data=seed.to_bytes(8, "big") * (BLOCK_BYTES // 8))
            os.kill(target.server.pid, signal.SIGKILL)  # the data process dies with it
            target.stop()
        finally:
            fio.kill()


def start(target: Nbdserver, seed: int) -> dict[str, Any]:
    """Start the server; seconds until the block that was written last was read, and what was replayed."""
    started = time.monotonic()
    target.start(target.setting)
    with closing(Client(str(target.socket_path), EXPORT, timeout_s=60)) as client:
        reply = client.request(Command.READ, 0, BLOCK_BYTES)
    seconds = time.monotonic() - started
    if reply.data != seed.to_bytes(8, "big") * (BLOCK_BYTES // 8):
        raise BenchmarkError("a write that was acknowledged before kill -9 is not there")
    events = (json.loads(line) for line in (target.directory / "events.jsonl").read_text().split("\n") if line)
    replayed = [event for event in events if event["kind"] == "recovered"][-1]
    return {"seconds": seconds, "records": replayed["records"], "blocks": replayed["blocks"]}


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Start after kill -9")
    for head in ("written before", "median", "longest", "replayed, median of the rounds"):
        table.add_column(head, justify="right")
    for row in rows:
        seconds = [each["seconds"] for each in row["rounds"]]
        table.add_row(
            f"{row['written_bytes'] / 2**30:g} GiB",
            f"{median(seconds):.2f} s",
            f"{max(seconds):.2f} s",
            f"{median(each['blocks'] for each in row['rounds']):,.0f} blocks",
        )
    return table


@application.command()
def run(
    sizes: Annotated[str, typer.Option(help="What is written before, comma-separated, rising.")] = "1G,5G,20G",
    rounds: Annotated[int, typer.Option(min=1, help="Kills at each size.")] = 3,
    load_s: Annotated[float, typer.Option(min=0.5, help="Seconds of random writes before each kill.")] = 10.0,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure how long the server takes to start after kill -9."""
    with run_of("restart", results, directory) as bench:
        steps = [size_bytes_of(size) for size in sizes.split(",")]
        rows = []
        machine.check_room(bench.place, steps[-1] * 3 // 2 + (4 << 30))
        target = Nbdserver(bench.place, steps[-1])
        target.prepare()
        target.start(target.setting)
        with stopped_at_the_end(target):
            filled = seed = 0
            for step in steps:
                fill(target, filled, step)
                filled = step
                taken = []
                for _ in range(rounds):
                    seed += 1
                    load_and_kill(target, filled, load_s, seed)
                    taken.append(start(target, seed))
                rows.append({"written_bytes": filled, "rounds": taken})
        console.print(show(rows))
        bench.keep({"rows": rows})


if __name__ == "__main__":
    application()
