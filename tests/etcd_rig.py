"""Users of a real etcd on one event loop, as the sentences of tests/registry_conformance.py want them."""

import asyncio
import random
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from metadata.etcd_registry import EtcdRegistry
from metadata.etcd_settings import EtcdSettings
from metadata.registry_calls import Change, Outcome, Reading, Swap, Unavailable
from nbdserver.host.clock import HostClock
from tests.etcd_cluster import EtcdCluster
from tests.registry_conformance import Watcher, must_swap

RUN_TIMEOUT_S = 20.0


MakeCluster = Callable[..., EtcdCluster]
MakeRig = Callable[..., "EtcdRig"]

FAILURES: list[dict[str, Any]] = []
"""What callbacks raised; the loop has no other place for it."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all rigs: grpc's events of one that is closed would be in the way of the next one's."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: FAILURES.append(context))
    return loop


def quick(etcd: EtcdCluster, **changes: object) -> EtcdSettings:
    """Settings under which a minute is a second."""
    values = {
        "endpoints": etcd.endpoints,
        "namespace": "test/",
        "call_timeout_s": 1.0,
        "connect_timeout_s": 1.0,
        "probe_interval_s": 0.2,
        "probe_timeout_s": 0.8,
        "backoff_min_s": 0.02,
        "backoff_max_s": 0.2,
        **changes,
    }
    return EtcdSettings(**values)  # type: ignore[arg-type]


class EtcdRig:
    """Two users of an etcd, on one loop."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.loop = _loop()
        self.clock = HostClock(self.loop)
        self.registry = self.open(settings)
        self.other = self.open(settings)

    def open(self, settings: EtcdSettings) -> EtcdRegistry:
        """Open one more."""
        return EtcdRegistry(settings, self.clock, random.Random(0), self.loop)

    def run_until(self, holds: Callable[[], bool], timeout_s: float = RUN_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s

        async def poll() -> None:
            while not holds():
                assert time.monotonic() < deadline, f"{self.registry.health()}"
                assert not FAILURES, "a callback has failed"
                await asyncio.sleep(0.002)

        self.loop.run_until_complete(poll())

    def run_for(self, duration_s: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(duration_s))

    def stand_still(self, duration_s: float) -> None:
        time.sleep(duration_s)

    def end(self) -> None:
        for registry in (self.registry, self.other):
            registry.close()
            self.loop.run_until_complete(registry.wait_closed())
        failures, FAILURES[:] = FAILURES[:], []
        assert not failures


class Counter:
    """Counts up in one key, whatever happens, and watches itself: every answer is held against what it may mean."""

    def __init__(self, rig: EtcdRig, key: str = "counter") -> None:
        self._rig = rig
        self._key = key
        self._is_running = False
        self._is_idle = True
        self._may_be_made = False
        self.count = 0
        self.outcomes: list[Outcome] = []
        self.reasons: list[str] = []
        must_swap(rig, (key, None, b"0"))
        self.watcher = Watcher(rig, key)
        rig.run_until(lambda: bool(self.watcher.events))

    def start(self) -> None:
        self._is_running, self._is_idle = True, False
        self._count()

    def stop(self) -> None:
        """Stop, and check that the watcher heard of every number, in order, each once."""
        self._is_running = False
        self._rig.run_until(lambda: self._is_idle)
        self._rig.run_until(lambda: self.watcher.state == {self._key: str(self.count).encode()})
        numbers = [int(value or b"") for event in self.watcher.events for _, value in event.changes]
        resets = sum(event.is_reset for event in self.watcher.events) - 1
        assert numbers == sorted(set(numbers))
        assert resets or numbers == list(range(self.count + 1))

    def run(self, more: int = 20) -> None:
        """Count `more` numbers, waiting as long as it takes."""
        goal = self.count + more
        self.start()
        self._rig.run_until(lambda: self.count >= goal)
        self.stop()

    def _count(self) -> None:
        if not self._is_running and not self._may_be_made:
            self._is_idle = True
            return
        change = Change(self._key, str(self.count).encode(), str(self.count + 1).encode())
        self._rig.registry.swap_later([change], self._swapped)

    def _swapped(self, answer: Swap) -> None:
        self.outcomes.append(answer.outcome)
        self.reasons.append(answer.reason)
        if answer.outcome is Outcome.SWAPPED:
            self._counted()
        elif answer.outcome is Outcome.LOST:
            assert self._may_be_made, "nobody else counts"
            self._rig.registry.get_later(self._key, self._read)
        else:
            self._may_be_made |= answer.outcome is Outcome.UNKNOWN
            self._rig.clock.call_later(0.02, self._count)

    def _read(self, answer: Reading | Unavailable) -> None:
        if isinstance(answer, Unavailable):
            self._rig.registry.get_later(self._key, self._read)
        else:
            assert answer.items == ((self._key, str(self.count + 1).encode()),), "the unknown swap was made"
            self._counted()

    def _counted(self) -> None:
        self.count += 1
        self._may_be_made = False
        self._count()
