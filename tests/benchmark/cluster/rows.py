"""The rows: what fio does in each, and what we set ourselves, as multiples and fractions of Ceph in the same run.

The goals are ahead of Vitastor 3.0.8, the fastest open system of this kind, which is in no distribution: it was
measured once beside Ceph, and its multiples of Ceph were 6.6, 8.5, 3.4, 1.9 and 1.3 in the first five rows. Its
fractions of Ceph's CPU are our goals for that. With a flush after each write it did 3.1 times what Ceph does, after
each sixteenth 7.7.
"""

from dataclasses import dataclass

from ..rows import Row


@dataclass(frozen=True)
class ClusterRow(Row):
    """`cpu_goal`: seconds of all daemons an operation, as a fraction of Ceph's; 0: none is set."""

    cpu_goal: float = 0.0


ROWS = (
    ClusterRow("randwrite-4k-d1", "4k random write, depth 1", "randwrite", 4096, 1, 1, 0, 8.0, cpu_goal=0.13),
    ClusterRow("randwrite-4k-d16", "4k random write, depth 16", "randwrite", 4096, 16, 1, 0, 12.0, cpu_goal=0.10),
    ClusterRow("randread-4k-d16", "4k random read, depth 16", "randread", 4096, 16, 1, 0, 8.0, cpu_goal=0.21),
    ClusterRow("write-128k-d8", "128k sequential write, depth 8", "write", 131072, 8, 1, 0, 3.0, cpu_goal=0.43),
    ClusterRow("read-128k-d8", "128k sequential read, depth 8", "read", 131072, 8, 1, 0, 3.0, cpu_goal=0.53),
    ClusterRow("flush-4k-d1", "4k random write, depth 1, flush after each", "randwrite", 4096, 1, 1, 1, 3.1),
    ClusterRow("flush-4k-d16", "4k random write, depth 16, flush after 16", "randwrite", 4096, 16, 1, 16, 7.7),
    ClusterRow("flush-128k-d8", "128k sequential write, depth 8, flush after 16", "write", 131072, 8, 1, 16, 3.0),
)
ROWS_BY_NAME = {row.name: row for row in ROWS}
