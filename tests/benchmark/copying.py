"""`python -m tests.benchmark.copying`: a whole image into a server and out of it again, by nbdcopy.

Each target holds one disk; in each round every target is copied to and from once, the first one changing. The image is
random data in a file in the page cache, the other way goes to `null:`, so that what is measured is the server. Copying
in ends with a flush. Peers run with the settings that are best for 128k sequential writes, or reads, if a search of the
benchmark found them. With --tls both sides show certificates.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.table import Table

from . import machine
from .__main__ import chosen_targets, size_bytes_of
from .conditions import Conditions
from .measuring import PeerSettings
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError
from .ratios import ratio_to_best_peer
from .rows import ROWS_BY_NAME
from .targets import CLIENT, SUBJECT, Target, stopped_at_the_end

SEARCHED = Conditions(1 << 30)  # by the benchmark: settings are what is best in memory
PIECE_BYTES = 16 << 20
WAYS = {"in": ROWS_BY_NAME["write-128k-d8"], "out": ROWS_BY_NAME["read-128k-d8"]}
"""Each way, and the row whose settings it uses."""

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def make_certificates(directory: Path) -> Path:
    """A CA, one for the server, one for the client, by the command that users have."""
    for words in (["ca"], ["node", "localhost"], ["client", CLIENT]):
        command = [sys.executable, "-m", "nbdserver", "cert", *words, "--dir", str(directory)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise BenchmarkError(f"no certificates: {made.stderr.strip()}")
    return directory


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


def measure(
    servers: list[Target], kept: PeerSettings, image: Path, rounds: int
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Way → target → one sample for each round."""
    samples: dict[str, dict[str, list[dict[str, float]]]] = {
        way: {server.name: [] for server in servers} for way in WAYS
    }
    for number in range(rounds):
        first = number % len(servers)
        for server in servers[first:] + servers[:first]:
            for way, like in WAYS.items():
                server.start(kept.best(server, like))
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
    targets: Annotated[
        str | None, typer.Option(help="Comma-separated targets.  [default: all but nbdkit-simple]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Copies of each target, each way.")] = 3,
    tls: Annotated[bool, typer.Option(help="Over TLS, with certificates of both sides.")] = False,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Copy an image into this server and its peers, and out of them."""
    with run_of("copying", results, directory) as bench:
        size_bytes = size_bytes_of(size)
        servers = chosen_targets(targets, bench.place, size_bytes)
        machine.check_room(bench.place, size_bytes * (len(servers) + 3))
        kept = PeerSettings(results / SEARCHED.settings_file, servers, SEARCHED)
        certificates = make_certificates(bench.place / "tls") if tls else None
        image = bench.place / "image"
        make_image(image, size_bytes)
        with stopped_at_the_end(*servers):
            for server in servers:
                server.certificates = certificates
                server.prepare()
            samples = measure(servers, kept, image, rounds)
        console.print(show(servers, samples))
        bench.keep(
            {
                "versions": {server.name: server.version() for server in servers},
                "settings": {
                    way: {server.name: kept.best(server, like).name for server in servers} for way, like in WAYS.items()
                },
                "samples": samples,
            }
        )


if __name__ == "__main__":
    application()
