"""One fio run against one target: the load, and what it cost the server."""

import json
import os
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .processes import TICKS_PER_S, BenchmarkError, last_line
from .rows import Row
from .targets import Target

START_UP_S = 0.45  # what a fio run takes beyond its time, for the estimate of the time left
GROUP_DELAY_MS = 30  # the second half of many jobs starts this much later


@dataclass(frozen=True)
class Sample:
    """One measurement. `operations` counts reads or writes, not flushes."""

    operations_per_s: float
    bytes_per_s: float
    p50_us: float
    p99_us: float
    operations: int
    server_cpu_s_per_1000: float
    client_cpu_s_per_1000: float
    other_cores: float  # how many cores everything else on the machine kept busy meanwhile: noise


class Accounted(Protocol):
    """Processes whose CPU is counted together."""

    def cpu_s(self) -> float: ...


class Served(Protocol):
    """What fio works on."""

    @property
    def name(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def server(self) -> Accounted | None:
        """None while it does not run."""

    def fio_arguments(self) -> list[str]:
        """Engine and target."""


def fio_version() -> str:
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def fio_command(row: Row, target: list[str], size_bytes: int, duration_s: float, seed: int) -> list[str]:
    """`target` are the arguments for engine and target. The seed fixes the addresses, so that in one round every target
    is asked for the same ones."""
    job = [*target, "--thread", f"--size={size_bytes}", *row.fio_arguments()]
    job += ["--time_based", f"--runtime={round(duration_s * 1000)}ms", "--randrepeat=0", f"--randseed={seed}"]
    command = ["fio", "--output-format=json"]
    for number, jobs in enumerate(row.job_groups()):
        command += [f"--name=group{number}", *job]
        if row.jobs > 1:
            command += [f"--numjobs={jobs}", "--group_reporting", f"--startdelay={number * GROUP_DELAY_MS}ms"]
    return command


def fio_job(target: Served, name: str, *arguments: str) -> list[str]:
    """fio with one job on a target."""
    return ["fio", "--output-format=json", f"--name={name}", *target.fio_arguments(), "--thread", *arguments]


def run_fio(command: list[str], timeout_s: float) -> dict[str, Any]:
    """fio's JSON for its only job; BenchmarkError with fio's own words if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"fio hangs for {timeout_s:.0f} s: {' '.join(command)}") from error
    start = done.stdout.find("{")
    report = json.loads(done.stdout[start:]) if done.returncode == 0 and start >= 0 else None
    if report is None or report["jobs"][0]["error"]:
        words = last_line(done.stderr + done.stdout[: max(start, 0)])
        raise BenchmarkError(f"fio failed: {words}; command: {' '.join(command)}")
    job: dict[str, Any] = report["jobs"][0]
    return job


def scatter(target: Target) -> None:
    """Write every block once, in random order."""
    arguments = [f"--size={target.size_bytes}", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--refill_buffers"]
    run_fio(fio_job(target, "scatter", *arguments, "--end_fsync=1"), timeout_s=600)


def prefill(target: Served) -> None:
    """Write all of it once, sequentially, with random bytes drawn anew for each megabyte (nothing compresses)."""
    arguments = [f"--size={target.size_bytes}", "--rw=write", "--bs=1m", "--iodepth=4", "--refill_buffers"]
    arguments += ["--buffer_compress_percentage=0", "--end_fsync=1"]
    run_fio(fio_job(target, "prefill", *arguments), timeout_s=600)


def warm(target: Target) -> None:
    """Bring the disk into the page cache: a setting that bypasses it (cache=none) drops what it writes over.

    With limited memory the server has to do that itself, as far as there is room: what others read is charged to them.
    """
    if target.memory:
        arguments = [f"--size={target.size_bytes}", "--rw=read", "--bs=1m", "--iodepth=4"]
        run_fio(fio_job(target, "warm", *arguments), timeout_s=600)
        return
    piece = memoryview(bytearray(1 << 20))
    for path in target.directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(piece):
                    pass


def measure(target: Served, row: Row, duration_s: float, seed: int, command: list[str] | None = None) -> Sample:
    """Run the row once against a started target, or instead of it another `command` of fio with one group of jobs.

    Dirty pages are written back after each run that wrote, so that no target pays for its predecessor's.
    """
    server = target.server
    if server is None:
        raise BenchmarkError(f"{target.name} is not running")
    command = command or fio_command(row, target.fio_arguments(), target.size_bytes, duration_s, seed)
    server_before, client_before, machine_before = server.cpu_s(), _children_cpu_s(), busy_s()
    started_s = time.monotonic()
    job = run_fio(command, timeout_s=duration_s * 4 + 60)
    client_s = _children_cpu_s() - client_before
    time.sleep(0.03)  # nbd-server's child of this connection ends and is waited for
    server_s = server.cpu_s() - server_before
    other_s = busy_s() - machine_before - client_s - server_s
    elapsed_s = time.monotonic() - started_s
    if row.writes:
        os.sync()
    side = job["write" if row.writes else "read"]
    operations = side["total_ios"]
    if not operations:
        raise BenchmarkError(f"{target.name} did nothing in {duration_s} s of {row.name}; give it more --seconds")
    percentiles = side["clat_ns"].get("percentile", {})
    return Sample(
        operations_per_s=side["iops"],
        bytes_per_s=side["bw_bytes"],
        p50_us=percentiles.get("50.000000", 0) / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
        operations=operations,
        server_cpu_s_per_1000=server_s / operations * 1000,
        client_cpu_s_per_1000=client_s / operations * 1000,
        other_cores=max(0.0, other_s / elapsed_s),
    )


def busy_s() -> float:
    """CPU seconds that all cores together have spent on anything but idling and waiting for disks, since boot."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / TICKS_PER_S


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
