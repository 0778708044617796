"""What can happen to a cluster of real nodes, at random, for a while: `make soak MINUTES=10`.

    python -m tests.interop.soak [--minutes 10] [--seed N] [--of nodes|directory|replicas]

Rounds of `whole_nodes`, of `directory_cluster`, which has more of them and counts what is confirmed, or of
`replica_site` and `fio_rounds`, whose replicas are compared on disk when all is over (as root), one after the other, a
line for each. In the end a line of JSON says what was done, how long fio waited for an answer at most, by what had
happened, and how much memory the processes have: in no life may one grow by more than GROWTH_MIB after the first
SETTLED_S. A round that fails ends it all. Each is done once before any is done again; the seed draws their order, and
their timing is the machine's own.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import PORTS, Processes, program_path
from tests.interop.directory_cluster import DirectoryCluster
from tests.interop.fio_rounds import FioRounds
from tests.interop.replica_site import ReplicaSite, node_disks
from tests.interop.site import Site
from tests.interop.whole_nodes import WholeNodes
from tests.serving import resident_bytes

LOSSES_PER_CENT = (0, 1, 10, 30)
SETTLED_S = 30.0
GROWTH_MIB = 16.0
JOINERS = 2


class Memory:
    """How much each life of a node has, and had when it was settled."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self.growth_mib = 0.0
        self._began_s: dict[int, float] = {}
        self._settled_mib: dict[int, float] = {}

    def look(self, lives: Iterable[tuple[str, int]]) -> None:
        """Sample these processes, (of which node, pid). AssertionError when a life has grown by too much."""
        now_s = time.monotonic()
        for name, pid in lives:
            has_mib = resident_bytes(pid) / (1 << 20)
            self.peak_mib = max(self.peak_mib, has_mib)
            if now_s - self._began_s.setdefault(pid, now_s) < SETTLED_S:
                continue
            growth_mib = has_mib - self._settled_mib.setdefault(pid, has_mib)
            self.growth_mib = max(self.growth_mib, growth_mib)
            assert growth_mib < GROWTH_MIB, f"a process of {name} has grown by {growth_mib:.1f} to {has_mib:.1f} MiB"


@dataclass(frozen=True)
class Soaked:
    """What rounds happen to."""

    site: Site
    rounds: dict[str, Callable[[], None]]
    lives: Callable[[], list[tuple[str, int]]]
    """(of which node, pid) of the processes whose memory is watched."""
    end: Callable[[], None] = lambda: None
    """Looks at what is left of it."""
    longest_s: Mapping[str, float] = field(default_factory=dict)
    """How long a request of a client took, by what had happened."""


def of_directory(path: Path, processes: Processes, rng: random.Random, undo: ExitStack) -> Soaked:
    """Nodes that are a directory alone."""
    cluster = DirectoryCluster(processes, path, _ports(rng), LOSSES_PER_CENT[0], rng)
    joiners = [f"joiner-{number}" for number in range(JOINERS)]
    rounds = {
        "master and registry member killed": lambda: cluster.kill_master_and_registry_member(
            joiners.pop() if joiners else ""
        ),
        "master stopped": cluster.stop_master,
        "master cut off": cluster.cut_master_off,
        "master and another cut apart": cluster.bridge,
        "master deaf": cluster.deafen_master,
        "master silent": cluster.silence_master,
        "registry killed": cluster.kill_registry,
        "a node killed": cluster.kill_some_node,
    }
    return Soaked(cluster.site, rounds, lambda: [(node.name, node.process.pid) for node in cluster.nodes])


def of_nodes(path: Path, processes: Processes, rng: random.Random, undo: ExitStack) -> Soaked:
    """Whole nodes."""
    nodes = WholeNodes(Site(processes), processes, path, _ports(rng), rng)
    joiners = [f"joiner-{number}" for number in range(JOINERS)]
    rounds = {
        "master and registry member killed": lambda: nodes.kill_master_and_registry_member(
            joiners.pop() if joiners and nodes.can_let_in else ""
        ),
        "master stopped": nodes.stop_master,
        "master cut off": nodes.cut_master_off,
        "registry killed": nodes.kill_registry,
        "a node killed": nodes.kill_some_node,
    }
    return Soaked(nodes.site, rounds, lambda: list(nodes.lives()))


def of_replicas(path: Path, processes: Processes, rng: random.Random, undo: ExitStack) -> Soaked:
    """Whole nodes with a replicated volume, each on a file system of its own. Their memory is that of their caches."""
    disks = node_disks(processes, path, program_path, undo)
    nodes = ReplicaSite(Site(processes), processes, path, _ports(rng), rng, disks)
    fio = FioRounds(nodes, processes, path / "fio", program_path("fio", "fio"))
    rounds = {
        "a replica cut off": nodes.cut_a_replica_off,
        "owner and replica cut one way": nodes.cut_one_way,
        "the owner cut off": nodes.cut_the_owner_off,
        "the master cut off": nodes.cut_the_master_off,
        "the registry cut off": nodes.cut_the_registry_off,
        "a disk stands still": nodes.a_disk_stands_still,
        "a disk is slow": nodes.a_disk_is_slow,
        "a disk is full": nodes.a_disk_is_full,
        "a disk is taken whole": nodes.a_disk_is_taken_whole,
        "fio: a replica is killed": fio.a_replica_is_killed,
        "fio: a replica is stopped": fio.a_replica_is_stopped,
        "fio: a replica is cut off": fio.a_replica_is_cut_off,
        "fio: a disk stands still": fio.a_disk_stands_still,
        "fio: a disk is slow": fio.a_disk_is_slow,
        "fio: a disk is full": fio.a_disk_is_full,
        "fio: the owner is killed": fio.the_owner_is_killed,
        "fio: the owner is stopped": fio.the_owner_is_stopped,
        "fio: the owner's disk stands still": fio.the_owner_s_disk_stands_still,
    }
    return Soaked(nodes.site, rounds, list, nodes.stop_and_compare, fio.longest_s)


SOAKED = {"nodes": of_nodes, "directory": of_directory, "replicas": of_replicas}


def _ports(rng: random.Random) -> Callable[[], int]:
    ports = iter(rng.sample(PORTS, 100))
    return lambda: next(ports)


def soak(of: str, duration_s: float, seed: int, path: Path, processes: Processes, undo: ExitStack) -> dict[str, object]:
    """Run rounds for so long; the figures. AssertionError if something is wrong. `undo` is done when the processes have
    ended."""
    rng = random.Random(seed)
    soaked = SOAKED[of](path, processes, rng, undo)
    rounds = soaked.rounds
    begun_s, memory, done = time.monotonic(), Memory(), Counter[str]()
    longest_s, turns = 0.0, list[str]()
    while (now_s := time.monotonic()) < begun_s + duration_s:
        turns = turns or rng.sample(list(rounds), len(rounds))
        name, loss = turns.pop(), rng.choice(LOSSES_PER_CENT)
        soaked.site.lose(loss)
        rounds[name]()
        took_s = time.monotonic() - now_s
        longest_s = max(longest_s, took_s)
        done[name] += 1
        memory.look(soaked.lives())
        print(f"{now_s - begun_s:5.0f} s  {name}, {loss} % lost: {took_s:.1f} s", flush=True)
    soaked.site.lose(0)
    soaked.end()
    return {
        "of": of,
        "seed": seed,
        "minutes": round((time.monotonic() - begun_s) / 60, 1),
        "rounds": dict(done),
        "longest_round_s": round(longest_s, 1),
        "longest_request_s": {what: round(took_s, 2) for what, took_s in soaked.longest_s.items()},
        "peak_mib": round(memory.peak_mib, 1),
        "growth_mib": round(memory.growth_mib, 1),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="a cluster of real nodes under random faults")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--of", choices=SOAKED, default="nodes", help="whole nodes, their directories alone, or replicas"
    )
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as path, ExitStack() as undo, Processes() as processes:
        print(json.dumps(soak(arguments.of, arguments.minutes * 60, arguments.seed, Path(path), processes, undo)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
