"""`python -m tests.benchmark.cluster`: operations a second and their CPU, our three replicas beside three of Ceph's.

Both systems run all the time; what is compared was measured within seconds, the first one changing from round to
round (`../measuring.py` says why). CPU is that of all daemons, whatever they do: of Ceph the monitor and the manager
too, of ours etcd and the control processes.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import machine
from ..__main__ import refuse_a_slow_checksum, size_bytes_of
from ..load import fio_command, fio_version, measure, prefill
from ..measuring import Samples, ratio_of, row_as_json
from ..outcome import RESULTS, DirectoryOption, JsonOption, ResultsOption, chosen, run_of, show
from ..processes import BenchmarkError
from .ceph import Ceph
from .data_processes import DataProcesses, Forwarded
from .nodes import Nodes, NodesWithTls
from .report import table_of
from .rows import ROWS, ROWS_BY_NAME, ClusterRow
from .systems import System

SYSTEMS: dict[str, type[System]] = {
    system.name: system for system in (Nodes, Ceph, NodesWithTls, DataProcesses, Forwarded)
}
USUAL = f"{Nodes.name},{Ceph.name}"
ROOM_FACTOR = 5  # three replicas of each system, and what a log and its cleaner need besides
QUICK_SIZE_BYTES = 64 << 20

application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def chosen_rows(names: str | None) -> list[ClusterRow]:
    return list(ROWS) if names is None else chosen(names, "row", ROWS_BY_NAME)


def chosen_systems(names: str, directory: Path, size_bytes: int) -> list[System]:
    """Not started yet."""
    wanted = chosen(names, "system", SYSTEMS)
    absent = [program for system in wanted for program in system.missing()]
    if absent:
        raise BenchmarkError(f"not installed: {', '.join(absent)}. Run tests/benchmark/cluster/provision.sh as root")
    return [system(directory, size_bytes) for system in wanted]


def measure_rows(rows: list[ClusterRow], systems: list[System], rounds: int, seconds: float) -> dict[str, Samples]:
    """By the rows' names."""
    samples: dict[str, Samples] = {}
    say = Console(stderr=True)
    for row in rows:
        of_row: Samples = {system.name: [] for system in systems}
        for number in range(rounds):
            first = number % len(systems)
            for system in systems[first:] + systems[:first]:
                of_row[system.name].append(measure(system, row, seconds, seed=number + 1))
        samples[row.name] = of_row
        rates = ", ".join(
            f"{name} {median(each.operations_per_s for each in taken):,.0f}" for name, taken in of_row.items()
        )
        say.print(f"{row.name}: {rates}", highlight=False, soft_wrap=True)
    return samples


def assemble(
    systems: list[System], rows: list[ClusterRow], samples: dict[str, Samples], options: dict[str, Any]
) -> dict[str, Any]:
    """What is kept: all that the table and the documents are made from."""
    rows_json = []
    for row in rows:
        subject = systems[0].name
        ratio = ratio_of(samples[row.name], subject)
        rows_json.append(
            {
                "name": row.name,
                "title": row.title,
                "block_bytes": row.block_bytes,
                "goal": row.goal,
                "cpu_goal": row.cpu_goal,
                "fio_commands": {
                    system.name: " ".join(
                        fio_command(row, system.fio_arguments(), system.size_bytes, options["seconds"], seed=1)
                    )
                    for system in systems
                },
                **row_as_json(samples[row.name], ratio),
            }
        )
    return {
        "fio_version": fio_version(),
        "options": options,
        "subject": systems[0].name,
        "systems_in_order": [system.name for system in systems],
        "systems": {system.name: {"title": system.title, "version": system.version()} for system in systems},
        "rows": rows_json,
    }


@application.command()
def benchmark(
    rows: Annotated[str | None, typer.Option(help="Comma-separated rows.  [default: all]")] = None,
    systems: Annotated[str, typer.Option(help="Comma-separated systems; the first is the subject.")] = USUAL,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each system in each row.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of one measurement.")] = 5.0,
    size: Annotated[str, typer.Option(help="Working set.")] = "1G",
    quick: Annotated[bool, typer.Option(help="A smoke run: 64M, 2 rounds of half a second.")] = False,
    directory: DirectoryOption = None,
    results: ResultsOption = RESULTS,
    as_json: JsonOption = False,
) -> None:
    """Measure replicated volumes beside Ceph RBD by fio, in turn, all daemons on this machine."""
    with run_of("bench-cluster", results, directory) as bench, ExitStack() as stack:
        refuse_a_slow_checksum()
        wanted = chosen_rows(rows)
        size_bytes = QUICK_SIZE_BYTES if quick else size_bytes_of(size)
        if quick:
            rounds, seconds = 2, 0.5
        there = chosen_systems(systems, bench.place, size_bytes)
        machine.check_room(bench.place, size_bytes * ROOM_FACTOR * len(there))
        for system in there:
            stack.callback(system.stop)
            system.start()
            prefill(system)
        samples = measure_rows(wanted, there, rounds, seconds)
        options = {"size_bytes": size_bytes, "rounds": rounds, "seconds": seconds}
        result = bench.keep(assemble(there, wanted, samples, options), told=not as_json)
        show(result, as_json, table_of(result))
    os.sync()


if __name__ == "__main__":
    application()
