"""What a callback brings, as something that a coroutine waits for.

Theory: seams, the log disk and replication answer by callbacks, for they neither have a loop nor need one. Whoever has
coroutines waits here.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


async def answer_of(ask: Callable[[Callable[[Answer], None]], object]) -> Answer:
    """What `ask(done)` hands to `done`, which it calls once. Whoever waits no longer, when it does, is not told."""
    answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def done(given: Answer) -> None:
        if not answer.done():
            answer.set_result(given)

    ask(done)
    return await answer
