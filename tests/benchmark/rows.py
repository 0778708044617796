"""The rows of the table: what fio does in each, and the ratio to the best peer that we set ourselves."""

from dataclasses import dataclass

JOBS_AT_ONCE = 8


@dataclass(frozen=True)
class Row:
    """One fio job over the whole working set.

    `goal` is the ratio of operations a second, ours over the best peer's, that the project wants to reach. Where a log
    has put the blocks depends on who wrote them in which order, so a row may ask to be measured on disks that were
    just written from end to end (`laid_out`), or just overwritten block by block in random order (`scattered`); all
    others take them as the rows before left them.
    """

    name: str
    title: str
    pattern: str
    block_bytes: int
    depth: int
    jobs: int
    fsync_every: int
    goal: float
    laid_out: bool = False
    scattered: bool = False

    @property
    def writes(self) -> bool:
        return "write" in self.pattern

    def fio_arguments(self) -> list[str]:
        """What makes this row, without target, size, time and seed. Each job has a connection of its own."""
        arguments = [f"--rw={self.pattern}", f"--bs={self.block_bytes}", f"--iodepth={self.depth}"]
        if self.fsync_every:
            arguments.append(f"--fsync={self.fsync_every}")
        return arguments

    def job_groups(self) -> list[int]:
        """Jobs that may connect at the same moment; nbd-server's listening queue holds ten."""
        return [min(self.jobs - first, JOBS_AT_ONCE) for first in range(0, self.jobs, JOBS_AT_ONCE)]


ROWS = (
    Row("randread-4k-d16", "4k random read, depth 16", "randread", 4096, 16, 1, 0, 1.5),
    Row("randwrite-4k-d16", "4k random write, depth 16", "randwrite", 4096, 16, 1, 0, 1.5),
    Row("randread-4k-d1", "4k random read, depth 1", "randread", 4096, 1, 1, 0, 1.2),
    Row("randwrite-4k-d1", "4k random write, depth 1", "randwrite", 4096, 1, 1, 0, 1.0),
    Row("read-128k-d8", "128k sequential read, depth 8", "read", 131072, 8, 1, 0, 1.0, laid_out=True),
    Row("write-128k-d8", "128k sequential write, depth 8", "write", 131072, 8, 1, 0, 1.0),
    Row("randread-4k-j16", "4k random read, 16 jobs on 16 connections", "randread", 4096, 1, 16, 0, 1.5),
    Row("fsync-4k-j1", "4k random write, fsync each, 1 job", "randwrite", 4096, 1, 1, 1, 1.3),
    Row("fsync-4k-j16", "4k random write, fsync each, 16 jobs on 16 connections", "randwrite", 4096, 1, 16, 1, 3.0),
    Row(
        "read-128k-scattered",
        "128k sequential read, depth 8, of what was overwritten at random",
        "read",
        131072,
        8,
        1,
        0,
        1.0,
        scattered=True,
    ),
)
ROWS_BY_NAME = {row.name: row for row in ROWS}
