"""Everything that can happen to an etcd of three, at random, for a while: ETCD_SOAK_S=600 for longer than CI has time.

Three count, each in a key of its own; two contend for a key bound to a lease, and each believes that it holds it only
while its lease is valid. A failure prints the seed that drew the faults (their timing is the machine's own).
"""

import os
import random
import resource
import time
from collections.abc import Callable

from metadata.registry_calls import Change, Outcome, Swap, Unavailable
from metadata.seams import Lease
from tests.etcd_cluster import EtcdCluster
from tests.etcd_rig import Counter, EtcdRig, MakeCluster, MakeRig, quick

DURATION_S = float(os.environ.get("ETCD_SOAK_S", "12"))
KEY = "held"
TTL_S = 2.0


class Contender:
    """Wants one key, bound to its lease; gives it up and takes it again and again."""

    def __init__(self, rig: EtcdRig, name: str, believed: Callable[[], int]) -> None:
        self._rig = rig
        self._value = name.encode()
        self._believed = believed
        self._lease: Lease | None = None
        self._has_key = False
        self.is_stopping = False
        self.times_held = 0
        self._ask()

    @property
    def believes(self) -> bool:
        """True while it would act as the holder."""
        return self._has_key and self._lease is not None and self._rig.clock.now() < self._lease.valid_until_s

    def _ask(self) -> None:
        if not self.is_stopping:
            self._rig.registry.grant_later(TTL_S, self._lost, self._granted)

    def _again(self, delay_s: float = 0.1) -> None:
        self._rig.clock.call_later(delay_s, self._try if self._lease else self._ask)

    def _granted(self, answer: Lease | Unavailable) -> None:
        if not isinstance(answer, Unavailable):
            self._lease = answer
        self._again(0.0)

    def _lost(self) -> None:
        self._lease = None
        self._has_key = False
        self._again()

    def _try(self) -> None:
        if self._lease and not self._has_key and not self.is_stopping:
            lease = self._lease
            change = Change(KEY, None, self._value, lease.id)
            self._rig.registry.swap_later([change], lambda answer: self._swapped(lease, answer))

    def _swapped(self, lease: Lease, answer: Swap) -> None:
        if lease is not self._lease:
            return
        if answer.outcome is Outcome.UNKNOWN:
            # Whose it is shows when the lease has ended: the key goes with it.
            lease.release()
            self._lease = None
        elif answer.outcome is Outcome.SWAPPED:
            self._has_key = True
            self.times_held += 1
            assert not self.believes or self._believed() == 1, "both believe"
            self._rig.clock.call_later(0.7, lambda: self._give_up(lease))
            return
        self._again()

    def _give_up(self, lease: Lease) -> None:
        if lease is self._lease:
            self._has_key = False
            self._lease = None
            lease.release()
            self._again(0.3)


def disturb(etcd: EtcdCluster, rig: EtcdRig, rng: random.Random) -> None:
    """Do one bad thing, leave it for a while, make it good."""
    members = rng.sample(etcd.members, rng.choice([1, 1, 1, 2]))
    fault = rng.choice(["kill", "pause", "compact", "stand still", "nothing"])
    if fault == "kill":
        for member in members:
            member.kill()
        rig.run_for(rng.uniform(0, 1.5))
        for member in members:
            member.start()
    elif fault == "pause":
        for member in members:
            member.pause()
        rig.run_for(rng.uniform(0, 2.5))
        for member in members:
            member.resume()
    elif fault == "compact":
        rig.registry.get_later("0", lambda answer: None)
        fields = etcd.control("get", "x", "--write-out=fields", check=False).split('"Revision" : ')
        if len(fields) > 1:
            etcd.control("compact", fields[1].split()[0], check=False)
    elif fault == "stand still":
        rig.stand_still(rng.uniform(0, 3))
    rig.run_for(rng.uniform(0, 1.5))


def test_whatever_happens_to_etcd_nothing_is_lost_or_believed_by_two(make_etcd: MakeCluster, make_rig: MakeRig) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    etcd = make_etcd(3)
    rigs = [make_rig(quick(etcd)) for _ in range(3)]
    counters = [Counter(rig, str(number)) for number, rig in enumerate(rigs)]
    contenders: list[Contender] = []

    def believed() -> int:
        return sum(contender.believes for contender in contenders)

    for number, rig in enumerate(rigs[:2]):
        contenders.append(Contender(rig, f"contender {number}", believed))
    for counter in counters:
        counter.start()
    until_s = time.monotonic() + DURATION_S
    memory_kib = 0
    while time.monotonic() < until_s:
        disturb(etcd, rng.choice(rigs), rng)
        assert believed() <= 1
        memory_kib = memory_kib or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reached = [counter.count for counter in counters]
    for rig in rigs:
        rig.run_until(lambda: all(a.count > b for a, b in zip(counters, reached, strict=True)), timeout_s=30)
    for contender in contenders:
        contender.is_stopping = True
    for counter in counters:
        counter.stop()
    assert all(contender.times_held for contender in contenders) or DURATION_S < 60
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kib
    assert grown_kib < 100 << 10
    print(f"counted {reached}, held {[contender.times_held for contender in contenders]}, grew by {grown_kib} KiB")
