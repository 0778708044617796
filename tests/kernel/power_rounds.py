"""What is done to the power of three replicas, at random, and what must be so afterwards.

Theory: a *round* is some *cuts*, one after the other, each in the middle of writes with flushes. While the node that
the judge is attached to has power, the judge notices no more than a pause. When it has not, the judge comes by one that
has, and finds everything acknowledged, if that one's replica is in sync. Then all get their power back, in any order;
without anybody's help all replicas are in sync again, and show the same. Beside the judge fio writes, through any node
(sliced_fio.py).
"""

import random
import time
from collections.abc import Callable, Sequence

from tests.kernel.powered_replicas import NODES, PoweredReplicas, Writing
from tests.kernel.sliced_fio import SlicedFio
from tests.nbd_client import Client

SHORTEST_S, LONGEST_S = 0.5, 3.0
REQUESTS = 100
"""At least so many are answered between two cuts."""

Cuts = Sequence[Sequence[str]]
"""Whose power is cut together, and whose after that."""
Kind = Callable[[str], Cuts]
"""Draws the cuts, for a judge that is attached to a node of that name."""


class PowerRounds:
    """Rounds of one cluster; what was done is counted."""

    def __init__(self, cluster: PoweredReplicas, generator: random.Random) -> None:
        self._cluster = cluster
        self._random = generator
        self._kinds: list[Kind] = [
            self.the_one_that_is_written_to_then_all,
            self.all_at_once,
            self.one_of_the_others,
            self.two_then_the_third,
            self.the_one_that_is_written_to,
            self.one_of_the_others_then_all,
        ]
        self._cuts_of_all = self._cuts_of_some = self._slices = 0
        self._longest_return_s = 0.0

    def run(self, rounds: int) -> None:
        """Each kind once, then any; AssertionError, LostError or GuestError for what must not be."""
        for number in range(rounds):
            kind = self._kinds[number] if number < len(self._kinds) else self._random.choice(self._kinds)
            self.round(f"round {number + 1} of {rounds}", kind)

    def round(self, title: str, kind: Kind) -> None:
        """One round, with what it tells."""
        began_s = time.monotonic()
        cluster, judge = self._cluster, self._cluster.judge
        flushes, generation = judge.flushes, cluster.value().generation
        client, attached = self._attach()
        cuts, fio_by = kind(attached), self._one_in_sync()
        fio = cluster.start_fio(client, fio_by)
        is_kept = self._write_through(cuts, client, attached, fio)
        fio.end(is_answered=is_kept and fio_by in cluster.powered)
        assert judge.flushes > flushes, "a round without a flush shows nothing"
        off = [each for each in NODES if each not in cluster.powered]
        self._cuts_of_all += len(off) == len(NODES)
        self._cuts_of_some += len(off) < len(NODES)
        cluster.power_on(self._random.sample(off, len(off)))
        return_s = cluster.wait_in_sync()
        self._longest_return_s = max(self._longest_return_s, return_s)
        cluster.check(acknowledged_too=is_kept)
        self._slices += len(fio.flushed)
        cluster.verify(fio)
        assert len(off) < len(NODES) or cluster.value().generation > generation, "what is gone is not told"
        cluster.say(
            f"{title}: {kind.__name__} {cuts}: {judge.writes} writes, {judge.flushes} flushes so far; "
            f"fio by {fio_by}; in sync {return_s:.1f} s after the start; {time.monotonic() - began_s:.0f} s"
        )

    def result(self) -> str:
        judge = self._cluster.judge
        return (
            f"all lost their power {self._cuts_of_all} times, one or two of them {self._cuts_of_some} times, under "
            f"{judge.writes} writes and {judge.flushes} flushes, and {self._slices} slices of fio: nothing was "
            f"lost, all replicas are alike. A request took {judge.longest_s:.1f} s at most; in sync "
            f"{self._longest_return_s:.1f} s after a start"
        )

    def _write_through(self, cuts: Cuts, client: Client, attached: str, fio: SlicedFio) -> bool:
        """Write, and cut; whether what was acknowledged must be there though it was not flushed."""
        cluster = self._cluster
        for each in cuts:
            if attached not in cluster.powered:
                client.close()
                if not cluster.in_sync() & set(cluster.powered):
                    return False  # those that had everything have lost their power
                client, attached = self._attach()
                cluster.look(client, acknowledged_too=True)
            with cluster.writing(client) as writing:
                self._go_on(writing)
                if each is cuts[0]:
                    fio.wait_until_flushed()
                cluster.cut(each)
                if attached in cluster.powered:
                    self._go_on(writing)
                    assert not writing.is_cut, f"the client of {attached} was dropped when {each} lost their power"
                else:
                    writing.wait_until_cut()
        client.close()
        return bool(cluster.in_sync() & set(cluster.powered))

    def _attach(self) -> tuple[Client, str]:
        """By one that has power, through which the volume is served."""
        name = self._one_in_sync()
        return self._cluster.attach(name), name

    def _one_in_sync(self) -> str:
        """With power."""
        return self._random.choice(sorted(self._cluster.in_sync() & set(self._cluster.powered)))

    def _go_on(self, writing: Writing) -> None:
        writing.go_on(self._random.uniform(SHORTEST_S, LONGEST_S), REQUESTS)

    # --- kinds ---

    def all_at_once(self, _attached: str) -> Cuts:
        return [NODES]

    def one_of_the_others(self, attached: str) -> Cuts:
        return [[self._random.choice([name for name in NODES if name != attached])]]

    def the_one_that_is_written_to(self, attached: str) -> Cuts:
        return [[attached]]

    def the_one_that_is_written_to_then_all(self, attached: str) -> Cuts:
        return [[attached], [name for name in NODES if name != attached]]

    def two_then_the_third(self, _attached: str) -> Cuts:
        mixed = self._random.sample(NODES, len(NODES))
        return [mixed[:2], mixed[2:]]

    def one_of_the_others_then_all(self, attached: str) -> Cuts:
        (first,) = self.one_of_the_others(attached)
        return [first, [name for name in NODES if name not in first]]
