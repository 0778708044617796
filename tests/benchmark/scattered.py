"""`python -m tests.benchmark.scattered`: what random 4 KiB writes all over a terabyte cost in memory and in metadata.

* `memory` drives a real server by fio and looks at its data process once a second: RssAnon + RssShmem is to stay within
  the map cache's limit plus 200 MiB, and flat. RssFile (LevelDB's tables, mapped) is the kernel's to take back.
* `full-cache` has both halves of the map cache full from its first minutes on: a part of the terabyte is filled in
  order, then overwritten at random, over more map pages than the cache holds. It drives the log disk itself.
* `metadata` needs more writes than most disks have room for. So it drives the log disk itself, over a Files that takes
  appends without keeping them; LevelDB and everything else are real. Whatever the process still gives to the disk
  (write_bytes of /proc/self/io, compactions included) is metadata; the headers of the log's records are added. With a
  --directory it goes on where it was, so that fifty million writes can be made in pieces; SIGTERM ends one in order.

Known weakness: the last two read nothing back, and `metadata` stops making sense where the cleaner would find a victim,
after some 55 million writes.
"""

import asyncio
import errno
import gc
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from metadata.pages import PAGE_BLOCKS
from metadata.seams import Buffer
from nbdserver.block import BLOCK_BYTES, Operation
from nbdserver.host.files import HostFiles
from nbdserver.logdisk.devices import Head
from nbdserver.logdisk.disk import DiskSettings, LogDisk

from . import machine
from .__main__ import size_bytes_of
from .load import fio_job
from .local_family import close_disk, host, open_disk
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .processes import BenchmarkError, descendants, resident_bytes
from .targets import Nbdserver, stopped_at_the_end

VOLUME_BYTES = 1 << 40
SEGMENT_BYTES = 64 << 20
DEPTH = 16
WINDOW = 1024  # writes whose map pages are read together
CACHE_BYTES = DiskSettings().cache_bytes
MARGIN_BYTES = 200 << 20
ROOM_FACTOR = 1.1  # of what is written: headers, and files written ahead
MOST_BYTES_A_WRITE = 512
OVERWRITES_A_SAMPLE = 10_000

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# -- memory


def own_bytes(found: Mapping[str, float]) -> int:
    """What only the process itself can give back."""
    return int(found.get("RssAnon", 0) + found.get("RssShmem", 0))


def over_time(samples: list[dict[str, float]]) -> tuple[str, dict[str, Any]]:
    """(in words, what is kept): at most, and whether it grows in the second half."""
    own = [own_bytes(sample) for sample in samples]
    second_half = own[len(own) // 2 :]
    limit_bytes = CACHE_BYTES + MARGIN_BYTES
    words = (
        f"RssAnon + RssShmem at most {max(own) >> 20} MiB of {limit_bytes >> 20}, "
        f"in the second half {min(second_half) >> 20} to {max(second_half) >> 20} MiB"
    )
    kept = {
        "limit_bytes": limit_bytes,
        "peak_bytes": max(own),
        "second_half_bytes": [min(second_half), max(second_half)],
        "samples": samples,
    }
    return words, kept


@application.command()
def memory(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    rate: Annotated[int, typer.Option(min=1, help="Writes a second.")] = 2000,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Watch the memory of a server under random writes."""
    with run_of("scattered-memory", results, directory, stays=True) as bench:
        machine.check_room(bench.place, int(rate * minutes * 60 * BLOCK_BYTES * ROOM_FACTOR) + (2 << 30))
        target = Nbdserver(bench.place, VOLUME_BYTES)
        target.prepare()
        target.start(target.setting)
        arguments = ["--rw=randwrite", "--bs=4k", f"--size={VOLUME_BYTES}", f"--iodepth={DEPTH}", "--norandommap"]
        arguments += ["--time_based", f"--runtime={round(minutes * 60)}", f"--rate_iops={rate}"]
        with stopped_at_the_end(target):
            writes, samples = watch(target, fio_job(target, "scattered", *arguments))
        file_peak_bytes = int(max(sample.get("RssFile", 0) for sample in samples))
        told, kept = over_time(samples)
        console.print(
            f"{writes:,} writes in {minutes:g} minutes: {told}; RssFile at most {file_peak_bytes >> 20} MiB",
            highlight=False,
        )
        bench.keep({"writes": writes, "file_peak_bytes": file_peak_bytes, **kept})


def watch(target: Nbdserver, command: list[str]) -> tuple[int, list[dict[str, float]]]:
    """Run fio; how many writes it made, and the memory of the data process in each second."""
    assert target.server is not None
    samples: list[dict[str, float]] = []
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as fio:
        while fio.poll() is None:
            time.sleep(1)
            found = [resident_bytes(pid) for pid in descendants(target.server.pid)]
            data_process = max(found, key=own_bytes)  # the other one has no maps
            samples.append({"at_s": time.monotonic() - started, **data_process})
        assert fio.stdout is not None
        told = fio.stdout.read()
    if fio.returncode:
        raise BenchmarkError("fio failed: a write was refused, or the server is gone")
    return json.loads(told[told.index("{") :])["jobs"][0]["write"]["total_ios"], samples


# -- a log disk that is driven here


class HollowFiles(HostFiles):
    """Segment files that are holes: what is appended is counted, not kept."""

    appended_bytes = 0

    def create(self, path: str, size_bytes: int) -> int:
        handle = super().create(path, 0)
        os.ftruncate(handle, size_bytes)
        return handle

    def append(self, handle: int, buffers: Sequence[Buffer], offset: int) -> None:
        self.appended_bytes += sum(map(len, buffers))

    def _create(self, path: str, size_bytes: int) -> tuple[int, int]:
        try:
            return (0, self.create(path, size_bytes))
        except OSError as error:
            return (error.errno or errno.EIO, -1)

    _prepare = _create


def stop_when_told(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """Set by SIGTERM or Ctrl-C, which end nothing by themselves then."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def answer(waiting: asyncio.Future[int], failed: int, _: object) -> None:
    waiting.set_result(failed)


async def bring_in(disk: LogDisk, head: Head, lbas: Sequence[int]) -> None:
    """Have the map pages of these blocks read, all in one go as far as that goes."""
    loop = asyncio.get_running_loop()
    for _ in ("logical", "middle"):  # the second page is known when the first one is there
        need = list({page for lba in lbas for page in disk.maps.needed(head.first_address + lba, 1)})
        if need:
            there = loop.create_future()
            disk.maps.load(need, partial(there.set_result, None))
            await there


async def write_at_random(
    disk: LogDisk, draw: random.Random, writes: int, depth: int, stop: asyncio.Event, volume_bytes: int = VOLUME_BYTES
) -> int:
    """Write, `depth` blocks a record, until it is enough; how many were written.

    The map pages of the next WINDOW writes are read while these are made: a client would wait for each by itself.
    """
    loop = asyncio.get_running_loop()
    head = disk.head(1)
    data = draw.randbytes(BLOCK_BYTES)
    view = memoryview(data)
    made = 0
    following: list[int] = []
    while made < writes and not stop.is_set():
        lbas = following
        count = min(WINDOW, writes - made - len(lbas))
        following = [draw.randrange(volume_bytes // BLOCK_BYTES) for _ in range(count)]
        bringing = asyncio.create_task(bring_in(disk, head, following))
        waiting: list[asyncio.Future[int]] = []
        for number, lba in enumerate(lbas):
            if not head.write(lba * BLOCK_BYTES, view):
                waiting.append(loop.create_future())
                head.later(Operation.WRITE, lba * BLOCK_BYTES, BLOCK_BYTES, data, partial(answer, waiting[-1]))
            if number % depth == depth - 1 or number == len(lbas) - 1:
                if head.commit():
                    raise BenchmarkError("a batch was refused")
                await asyncio.sleep(0)
        await bringing
        if any(await asyncio.gather(*waiting)):
            raise BenchmarkError("a write was refused")
        made += len(lbas)
    return made


# -- full cache


async def fill(disk: LogDisk, size_bytes: int, progress: Progress) -> None:
    """Write it from the beginning, a page of the maps a record."""
    loop = asyncio.get_running_loop()
    head = disk.head(1)
    data = random.Random(1).randbytes(PAGE_BLOCKS * BLOCK_BYTES)
    for offset in progress.track(range(0, size_bytes, len(data)), description="filling"):
        if not head.write(offset, memoryview(data)):
            waiting = loop.create_future()
            head.later(Operation.WRITE, offset, len(data), data, partial(answer, waiting))
            if await waiting:
                raise BenchmarkError("a write was refused")
        if head.commit():
            raise BenchmarkError("a batch was refused")
        await asyncio.sleep(0)


async def overwrite(place: Path, size_bytes: int, minutes: float) -> list[dict[str, float]]:
    """Fill, then overwrite at random; the memory of this process now and then."""
    loop = asyncio.get_running_loop()
    stop = stop_when_told(loop)
    (place / "maps").mkdir()
    samples: list[dict[str, float]] = []
    with host(place, loop, HollowFiles) as parts:
        LogDisk.format(parts.files, parts.store, bytes(16), VOLUME_BYTES, SEGMENT_BYTES, random.Random(1))
        disk = open_disk(parts, DiskSettings())
        with Progress(console=Console(stderr=True)) as progress:
            await fill(disk, size_bytes, progress)
            task = progress.add_task("overwriting", total=minutes * 60)
            draw, started, made = random.Random(2), time.monotonic(), 0
            while (at_s := time.monotonic() - started) < minutes * 60 and not stop.is_set():
                made += await write_at_random(disk, draw, OVERWRITES_A_SAMPLE, DEPTH, stop, size_bytes)
                samples.append({"at_s": at_s, "writes": made, **resident_bytes(os.getpid())})
                progress.update(task, completed=at_s)
        await close_disk(disk)
    return samples


@application.command()
def full_cache(
    minutes: Annotated[float, typer.Option(min=0.01, help="How long, after the filling.")] = 30.0,
    size: Annotated[str, typer.Option(help="How much is filled and overwritten.")] = "150G",
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Watch the memory of a log disk whose map cache is full."""
    with run_of("scattered-full-cache", results, directory) as bench:
        gc.disable()  # as in a data process
        samples = asyncio.run(overwrite(bench.place, size_bytes_of(size), minutes))
        told, kept = over_time(samples)
        console.print(f"{samples[-1]['writes']:,} overwrites: {told}", highlight=False)
        bench.keep(kept)


# -- metadata


def given_to_the_disk_bytes() -> int:
    """write_bytes of this process, threads included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("write_bytes"):
            return int(line.split()[1])
    return 0


@dataclass
class Tally:
    """What was counted so far, in all runs in this directory, and how it grew."""

    writes: int = 0
    to_disk_bytes: int = 0
    batches_bytes: int = 0
    headers_bytes: int = 0
    checkpoints: int = 0
    steps: list[dict[str, int]] = field(default_factory=list)

    def bytes_a_write(self, *names: str) -> float:
        return sum(getattr(self, name) for name in names) / max(1, self.writes)

    def __str__(self) -> str:
        together = self.bytes_a_write("to_disk_bytes", "headers_bytes")
        return (
            f"{self.writes:,} writes: {together:.0f} bytes of metadata each "
            f"(of at most {MOST_BYTES_A_WRITE}): {self.bytes_a_write('headers_bytes'):.0f} in headers of records, "
            f"{self.bytes_a_write('to_disk_bytes'):.0f} by LevelDB, compactions included, for "
            f"{self.bytes_a_write('batches_bytes'):.0f} given to it"
        )


async def scatter(place: Path, tally: Tally, writes: int, depth: int, every: int, rest_s: float) -> None:
    """Make the writes, rest, close; what that cost goes into the tally. SIGTERM ends it early and in order."""
    loop = asyncio.get_running_loop()
    stop = stop_when_told(loop)
    is_new = not (place / "maps").exists()
    (place / "maps").mkdir(exist_ok=True)
    with host(place, loop, HollowFiles) as parts:
        files, store = parts.files, parts.store
        assert isinstance(files, HollowFiles)
        before = replace(tally)
        on_disk_before = given_to_the_disk_bytes()
        if is_new:
            LogDisk.format(files, store, bytes(16), VOLUME_BYTES, SEGMENT_BYTES, random.Random(1))
        disk = open_disk(parts, DiskSettings())

        def count(made: int) -> None:
            tally.writes = before.writes + made
            tally.to_disk_bytes = before.to_disk_bytes + given_to_the_disk_bytes() - on_disk_before
            tally.batches_bytes = before.batches_bytes + store.bytes_written
            tally.headers_bytes = before.headers_bytes + files.appended_bytes - made * BLOCK_BYTES
            tally.checkpoints = before.checkpoints + disk.checkpointer.count

        draw = random.Random()
        made = 0
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("writing", total=writes)
            while made < writes and not stop.is_set():
                made += await write_at_random(disk, draw, min(every, writes - made), depth, stop)
                count(made)
                tally.steps.append({name: value for name, value in asdict(tally).items() if name != "steps"})
                progress.update(task, completed=made)
                progress.console.print(str(tally), highlight=False, soft_wrap=True)
        await asyncio.sleep(rest_s)
        await close_disk(disk)
        count(made)


@application.command()
def metadata(
    writes: Annotated[int, typer.Option(min=1, help="Random writes to make now.")] = 50_000_000,
    depth: Annotated[int, typer.Option(min=1, help="Writes that share a record.")] = DEPTH,
    every: Annotated[int, typer.Option(min=1, help="Writes between two intermediate figures.")] = 1_000_000,
    rest_s: Annotated[float, typer.Option(min=0, help="Rest after them.")] = 60.0,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Count the bytes of metadata that random writes cost."""
    with run_of("scattered-metadata", results, directory, stays=True) as bench:
        machine.check_room(bench.place, 8 << 30)
        kept = bench.place / "tally.json"
        gc.disable()  # as in a data process
        tally = Tally(**json.loads(kept.read_text())) if kept.exists() else Tally()
        asyncio.run(scatter(bench.place, tally, writes, depth, every, rest_s))
        kept.write_text(json.dumps(asdict(tally)) + "\n")
        stored = sum(file.stat().st_size for file in (bench.place / "maps").iterdir())
        console.print(f"{tally}; it holds {stored >> 20} MiB", highlight=False)
        bench.keep({**asdict(tally), "stored_bytes": stored})


if __name__ == "__main__":
    application()
