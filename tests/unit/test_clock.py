"""HostClock: CLOCK_BOOTTIME, and timers that can be taken back."""

import asyncio
import time

from metadata.seams import Clock
from nbdserver.host.clock import HostClock


def test_now_is_boot_time() -> None:
    loop = asyncio.new_event_loop()
    clock: Clock = HostClock(loop)
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= clock.now() <= time.clock_gettime(time.CLOCK_BOOTTIME)
    loop.close()


def test_timers_fire_in_order_and_a_cancelled_one_never() -> None:
    loop = asyncio.new_event_loop()
    clock: Clock = HostClock(loop)
    fired: list[str] = []
    clock.call_later(0.02, lambda: fired.append("late"))
    clock.call_later(0.01, lambda: fired.append("cancelled")).cancel()
    clock.call_later(0.0, lambda: fired.append("early"))
    clock.call_soon(lambda: fired.append("soon"))
    clock.call_later(0.03, loop.stop)
    assert fired == []
    loop.run_forever()
    assert fired == ["soon", "early", "late"]
    loop.close()
