"""The simulator of clusters itself, with a toy on it: what is promised to a scenario, and that wrongs are found.

The toy counts: each node keeps one number in its store, sends it to all others by datagrams, and takes over what is
higher.
"""

import random
from collections.abc import Callable

import pytest

from protocol.checksum import crc32c
from tests.simulation.cluster.cluster import Cluster, ClusterRun
from tests.simulation.cluster.faults import CATALOGUE, Mix, draw_mix
from tests.simulation.cluster.machine import Machine, Seams
from tests.simulation.cluster.reruns import printed_elsewhere
from tests.simulation.registers import ViolationError

BEAT_S = 0.25
NODES = 5


class Counter:
    """The toy: the highest number that anyone was told to count to, at every node."""

    checks_frames = True

    def __init__(self, machine: Machine, seams: Seams) -> None:
        self.seams = seams
        self.value = int.from_bytes(seams.store.get(b"value") or b"", "big")
        self.durable = self.value
        self._writing = False
        self._box = seams.network.open_datagrams(f"{machine.host}:700", self._received)
        self._peers = [f"10.0.0.{number}:700" for number in range(1, NODES + 1)]
        self._beat()

    def count_to(self, value: int) -> None:
        self.value = max(self.value, value)
        self._write()

    def close(self) -> None:
        self._box.close()

    def _beat(self) -> None:
        if self.durable:
            number = self.durable.to_bytes(8, "big")
            for peer in self._peers:
                self._box.send(peer, number + crc32c(number).to_bytes(4, "big"))
        self.seams.clock.call_later(BEAT_S, self._beat)

    def _received(self, peer: str, payload: bytes) -> None:
        number, check = payload[:8], int.from_bytes(payload[8:], "big")
        if not self.checks_frames or (len(payload) == 12 and crc32c(number) == check):
            self.count_to(int.from_bytes(number, "big"))

    def _write(self) -> None:
        if self._writing or self.durable == self.value:
            return
        self._writing = True
        value = self.value
        batch = self.seams.store.batch()
        batch.put(b"value", value.to_bytes(8, "big"))

        def done(number: int) -> None:
            self._writing = False
            self.durable = value
            self._write()

        self.seams.store.write_later(batch, done)


class Trusting(Counter):
    """A canary: it believes what it receives."""

    checks_frames = False


class Silent(Counter):
    """A canary: it never says what it knows."""

    def _beat(self) -> None:
        return


class Forgetful(Counter):
    """A canary: it says durable before it is."""

    def count_to(self, value: int) -> None:
        self.value = self.durable = max(self.value, value)


class Counting:
    """The scenario: nobody knows a number that was never counted to; in the end all have one that was durable."""

    converges_within_s = 30.0

    def __init__(self) -> None:
        self.cluster: Cluster
        self.counted = 0
        self.durable = 0

    def begin(self, cluster: Cluster) -> None:
        self.cluster = cluster
        for number in range(NODES):
            cluster.add(f"node-{number + 1}")
        for name in cluster.machines:
            cluster.start(name)

    def nodes(self) -> list[Counter]:
        nodes = [machine.node for machine in self.cluster.machines.values()]
        return [node for node in nodes if isinstance(node, Counter)]

    def act(self) -> None:
        self.counted += 1
        nodes = self.nodes()
        if nodes:
            self.cluster.random.choice(nodes).count_to(self.counted)

    def check(self) -> None:
        for node in self.nodes():
            self.durable = max(self.durable, node.durable)
            if node.value > self.counted:
                raise ViolationError(f"{node.value} was counted, and nobody was told to count beyond {self.counted}")

    def core(self, rng: random.Random) -> set[str]:
        return set(self.cluster.machines)

    def missing(self) -> str:
        lowest = min((node.value for node in self.nodes()), default=0)
        return f"a node is at {lowest} of {self.durable}" if lowest < self.durable else ""

    def end(self) -> None:
        return


def run(
    seed: int,
    toy: Callable[[Machine, Seams], Counter] = Counter,
    mix: Mix | None = None,
    story: Callable[[str], None] | None = None,
) -> ClusterRun:
    drawn = draw_mix(random.Random(seed)) if mix is None else mix
    cluster = Cluster(seed, drawn, toy, story)
    return ClusterRun(cluster, Counting(), safety_s=60.0, act_s=1.0).go()


def test_a_cluster_converges_whatever_happened_to_it() -> None:
    hits = run(0).cluster.hits
    for seed in range(1, 60):
        hits.update(run(seed).cluster.hits)
    for fault in CATALOGUE:
        needs_more = fault.name.startswith(("stream", "registry", "watch", "lease", "disk"))
        assert needs_more or hits[fault.name], f"no seed had the fault {fault.name!r}"


@pytest.mark.parametrize(
    ("canary", "mix", "says"),
    [
        (Trusting, Mix({"corruption": 0.1}), "nobody was told to count"),
        (Trusting, Mix({"garbage": 0.1}), "nobody was told to count"),
        (Silent, Mix(), "a node is at"),
        (Forgetful, Mix({"power of all": 240.0}), "a node is at"),
    ],
)
def test_a_planted_bug_is_found(canary: type[Counter], mix: Mix, says: str) -> None:
    found = []
    for seed in range(10):
        run(seed, Counter, mix)
        try:
            run(seed, canary, mix)
        except ViolationError as error:
            found.append(str(error))
    assert any(says in message for message in found), found


def test_the_same_seed_gives_the_same_run_in_every_process() -> None:
    prints = {run(7).cluster.scheduler.fingerprint for _ in range(2)}
    program = "from tests.simulation.cluster.test_engine import run; print(run(7).cluster.scheduler.fingerprint)"
    prints |= printed_elsewhere(program)
    assert len(prints) == 1
    assert run(8).cluster.scheduler.fingerprint not in prints
