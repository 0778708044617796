"""`python -m tests.benchmark.workers`: several volumes with a client each, `workers: N` beside one worker.

Two servers of ours have the same volumes, written alike, and run by turns. In each row one fio has a client for each
volume. The ratio is N workers over one; its interval is the bootstrap over rounds of `ratios.py`.

fio takes its time on the same cores. What is left for a gain follows from the samples: with every core busy there are
`cores / (server's + client's CPU an operation)` operations a second, at the CPU that one worker needs for them. That
over what one worker does is the column `at most`.
"""

import os
from statistics import median
from typing import Annotated

import typer
from rich.table import Table

from . import machine, measuring
from .__main__ import chosen_rows, size_bytes_of
from .load import Sample, measure, run_fio
from .outcome import RESULTS, DirectoryOption, ResultsOption, console, run_of
from .ratios import Ratio
from .rows import Row
from .targets import EXPORT, Nbdserver, Setting, stopped_at_the_end

ROWS = "randread-4k-d16,randwrite-4k-d16,randread-4k-d1,fsync-4k-j1"
FILL_S = 300

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Workers(Nbdserver):
    """A server with so many workers and volumes."""

    workers = 1
    volumes = 4

    @property
    def exports(self) -> list[str]:
        return [f"{EXPORT}{number}" for number in range(self.volumes)]

    def prepare(self) -> None:
        super().prepare()
        config = self.directory.with_suffix(".yaml")
        config.write_text(f"workers: {self.workers}\n")
        self.setting = Setting(f"workers: {self.workers}", ("--config", str(config)))

    def fio(self, arguments: list[str]) -> list[str]:
        """fio with the same job on each volume, as one group."""
        command = ["fio", "--output-format=json", "--group_reporting", "--thread", "--ioengine=nbd"]
        command += [f"--size={self.size_bytes}", *arguments]
        for name in self.exports:
            command += [f"--name={name}", f"--uri={self.uri_of(name)}"]
        return command


class One(Workers):
    name = title = "one"


class Several(Workers):
    name = title = "several"


def measure_volumes(server: Workers, row: Row, seconds: float, seed: int) -> Sample:
    timed = ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--randrepeat=0", f"--randseed={seed}"]
    return measure(server, row, seconds, seed, server.fio([*row.fio_arguments(), *timed]))


def fill(server: Workers) -> None:
    random_bytes = ["--refill_buffers", "--buffer_compress_percentage=0", "--end_fsync=1"]
    run_fio(server.fio(["--rw=write", "--bs=1m", "--iodepth=4", *random_bytes]), FILL_S)
    run_fio(server.fio(["--rw=read", "--bs=1m", "--iodepth=4"]), FILL_S)  # maps and page cache


def at_most(one: list[Sample], cores: int) -> float:
    """The ratio at which every core would be busy at the CPU an operation that one worker and its clients need."""
    return median(
        cores * 1000 / (sample.server_cpu_s_per_1000 + sample.client_cpu_s_per_1000) / sample.operations_per_s
        for sample in one
    )


def show(
    rows: list[Row], samples: dict[str, measuring.Samples], ratios: dict[str, Ratio], title: str, cores: int
) -> Table:
    table = Table(title=title)
    cpu_heading = "CPU µs an operation, server / clients"
    for heading in (
        "each client",
        "ratio",
        "95 % interval",
        "at most",
        "several",
        "one",
        f"{cpu_heading}: several",
        "one",
    ):
        table.add_column(heading)
    for row in rows:
        taken = samples[row.name]
        ratio, several, one = ratios[row.name], taken[Several.name], taken[One.name]
        rates = [f"{median(sample.operations_per_s for sample in part):,.0f}/s" for part in (several, one)]
        cpu = [f"{_cpu_us(part, 'server'):.1f} / {_cpu_us(part, 'client'):.1f}" for part in (several, one)]
        interval = f"{ratio.low:.2f} – {ratio.high:.2f}"
        table.add_row(row.title, f"{ratio.value:.2f}", interval, f"{at_most(one, cores):.2f}", *rates, *cpu)
    return table


def _cpu_us(samples: list[Sample], whose: str) -> float:
    return 1000 * median(getattr(sample, f"{whose}_cpu_s_per_1000") for sample in samples)


@application.command()
def run(
    rows: Annotated[str, typer.Option(help="Comma-separated rows, with one job for each volume.")] = ROWS,
    workers: Annotated[int, typer.Option(min=2, help="Of the server with several.")] = 2,
    volumes: Annotated[int, typer.Option(min=1, help="With a client each.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="Measurements of each server in each row.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of one measurement.")] = 1.5,
    size: Annotated[str, typer.Option(help="Of each volume.")] = "256M",
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Measure several volumes with a client each on several workers and on one."""
    with run_of("workers", results, directory) as bench:
        wanted, size_bytes = chosen_rows(rows), size_bytes_of(size)
        machine.check_room(bench.place, size_bytes * volumes * 6)
        servers = (Several(bench.place, size_bytes), One(bench.place, size_bytes))
        servers[0].workers = workers
        samples: dict[str, measuring.Samples] = {row.name: {each.name: [] for each in servers} for row in wanted}
        with stopped_at_the_end(*servers):
            for server in servers:
                server.volumes = volumes
                server.prepare()
                server.start(server.setting)
                fill(server)
            for row in wanted:
                for number in range(rounds):
                    for server in servers if number % 2 else servers[::-1]:
                        samples[row.name][server.name].append(measure_volumes(server, row, seconds, number + 1))
        cores = len(os.sched_getaffinity(0))
        title = f"{volumes} volumes, a client each: {workers} workers beside one, all on {cores} cores"
        ratios = {name: measuring.ratio_between(taken, Several.name) for name, taken in samples.items()}
        console.print(show(wanted, samples, ratios, title, cores))
        told = {
            name: {"at_most": at_most(taken[One.name], cores), **measuring.row_as_json(taken, ratios[name])}
            for name, taken in samples.items()
        }
        bench.keep({"workers": workers, "volumes": volumes, "cores": cores, "rows": told})


if __name__ == "__main__":
    application()
