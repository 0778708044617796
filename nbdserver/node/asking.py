"""Asking a data process what it should answer at once.

Theory. Some requests may take as long as they take (deleting a volume); what somebody looks at has to be there in a
moment, also when the data process hangs: that is when somebody looks. So these are given up after ANSWER_S, and it is
noted since when there is no answer. While there is none only QUICK_S are spent on finding out whether there is one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from nbdserver.node.data_process import DataProcessError

ANSWER_S = 3.0
QUICK_S = 0.5

SILENT = "Silent"
"""The kind of DataProcessError that says that no answer came in time."""


class Asking:
    """Requests that are answered soon or not at all."""

    def __init__(self, call: Callable[..., Awaitable[Any]], now_s: Callable[[], float]) -> None:
        self._call = call
        self._now_s = now_s
        self._silent_since_s: float | None = None

    @property
    def silent_s(self) -> float:
        """For how long there has been no answer; 0.0 while it answers."""
        return 0.0 if self._silent_since_s is None else self._now_s() - self._silent_since_s

    async def ask(self, name: str, **arguments: Any) -> Any:
        """What `Channel.call` returns. Raises DataProcessError, of the kind SILENT if no answer came in time."""
        asked_s = self._now_s()
        try:
            async with asyncio.timeout(ANSWER_S if self._silent_since_s is None else QUICK_S):
                answer = await self._call(name, **arguments)
        except TimeoutError:
            if self._silent_since_s is None:
                self._silent_since_s = asked_s
            raise DataProcessError(f"the data process has not answered for {self.silent_s:.0f} s", SILENT) from None
        except DataProcessError:
            self._silent_since_s = None  # it refuses, or is gone: it does not hang
            raise
        self._silent_since_s = None
        return answer
