"""`python -m tests.benchmark.copying`: a whole image into a server and out of it again, by nbdcopy.

Each target holds one disk; in each round every target is copied to and from once, the first one changing. The image is
random data in a file in the page cache, the other way goes to `null:`, so that what is measured is the server. Copying
in ends with a flush. Peers run with the setting that is best for 128k sequential writes, if a search found one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import machine
from .__main__ import chosen_targets, size_bytes_of
from .measuring import PeerSettings
from .processes import BenchmarkError, end_in_order_when_told
from .ratios import ratio_to_best_peer
from .rows import ROWS_BY_NAME
from .targets import SUBJECT, Target

LIKE = ROWS_BY_NAME["write-128k-d8"]
PIECE_BYTES = 16 << 20
WAYS = ("in", "out")

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 140)


def make_image(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(size_bytes // PIECE_BYTES):
            file.write(os.urandom(PIECE_BYTES))


def copy(target: Target, image: Path, way: str) -> dict[str, float]:
    """Copy once; bytes a second and what it cost the server."""
    assert target.server is not None
    route = ["--flush", str(image), target.uri] if way == "in" else [target.uri, "null:"]
    cpu_s, started = target.server.cpu_s(), time.monotonic()
    done = subprocess.run(["nbdcopy", *route], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise BenchmarkError(f"nbdcopy {way} of {target.name} failed: {done.stderr.strip()}")
    moved = image.stat().st_size
    return {"bytes_per_s": moved / seconds, "cpu_s_per_gib": (target.server.cpu_s() - cpu_s) / moved * 2**30}


def measure(servers: list[Target], image: Path, rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Way → target → one sample for each round."""
    samples: dict[str, dict[str, list[dict[str, float]]]] = {
        way: {server.name: [] for server in servers} for way in WAYS
    }
    for number in range(rounds):
        first = number % len(servers)
        for server in servers[first:] + servers[:first]:
            for way in WAYS:
                samples[way][server.name].append(copy(server, image, way))
                os.sync()
    return samples


def show(servers: list[Target], samples: dict[str, dict[str, list[dict[str, float]]]]) -> Table:
    table = Table(title="nbdcopy: MB/s, median of the rounds (below: server CPU seconds a GiB)")
    table.add_column("")
    table.add_column("ratio to best peer\n95 % interval")
    for server in servers:
        table.add_column(server.title, justify="right")
    for way, of_way in samples.items():
        rates = {name: [sample["bytes_per_s"] for sample in taken] for name, taken in of_way.items()}
        ratio = ratio_to_best_peer(rates, SUBJECT)
        cells = [
            f"{median(rates[server.name]) / 1e6:,.0f}\n"
            f"{median(sample['cpu_s_per_gib'] for sample in of_way[server.name]):.2f}"
            for server in servers
        ]
        told = f"{ratio.value:.2f}\n{ratio.low:.2f} – {ratio.high:.2f}" if ratio else "–"
        table.add_row(f"image {way}", told, *cells, end_section=True)
    return table


@application.command()
def run(
    size: Annotated[str, typer.Option(help="Size of the image.")] = "4G",
    targets: Annotated[str | None, typer.Option(help="Comma-separated targets.  [default: all]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Copies of each target, each way.")] = 3,
    directory: Annotated[Path | None, typer.Option(help="Where the disks lie.  [default: in --results]")] = None,
    results: Annotated[Path, typer.Option(help="Where results go.")] = Path("bench-results"),
) -> None:
    """Copy an image into this server and its peers, and out of them."""
    end_in_order_when_told()
    try:
        results.mkdir(parents=True, exist_ok=True)
        size_bytes = size_bytes_of(size)
        with tempfile.TemporaryDirectory(prefix="copy-", dir=directory or results) as scratch:
            place = Path(scratch).resolve()
            servers = chosen_targets(targets, place, size_bytes)
            machine.check_room(place, size_bytes * (2 * len(servers) + 2))
            kept = PeerSettings(results / "peer-settings.json", servers, size_bytes)
            image = place / "image"
            make_image(image, size_bytes)
            try:
                for server in servers:
                    server.prepare()
                    server.start(kept.best(server, LIKE))
                samples = measure(servers, image, rounds)
            finally:
                for server in servers:
                    server.stop()
            where: dict[str, Any] = machine.describe(place)
    except BenchmarkError as error:
        Console(stderr=True).print(f"benchmark: {error}", style="red", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "commit": machine.commit(),
        "machine": where,
        "command": " ".join(["python -m tests.benchmark.copying", *sys.argv[1:]]),
        "versions": {server.name: server.version() for server in servers},
        "samples": samples,
    }
    path = results / time.strftime("copying-%Y%m%d-%H%M%S.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(show(servers, samples))
    console.print(path, highlight=False)


if __name__ == "__main__":
    application()
