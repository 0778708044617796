"""A second-kind node's stream to the master: all that it says and hears.

Rules
- There is one stream, to the master that the registry names. When it breaks it is opened again, after RETRY_S, doubled
  up to RETRY_LIMIT_S, and some chance.
- It is opened again at once when there is another master, and when nothing has come over it for SILENT_S.
"""

from collections.abc import Callable
from random import Random
from typing import Any

from metadata.directory.routes import Routes
from metadata.directory.streams import FrameStream
from metadata.seams import Clock, Timer
from protocol.directory_control import Subscribe

RETRY_S = 0.2
RETRY_LIMIT_S = 5.0
ASK_S = 1.0
SILENT_S = 5.0  # a master beats four times a second, and answers joins at once


class FarLink:
    """Keeps the stream open; `heard(master, body)` gets what comes, `opened()` is called when it is there."""

    def __init__(
        self,
        clock: Clock,
        random: Random,
        routes: Routes,
        heard: Callable[[int, Any], None],
        opened: Callable[[], None],
    ) -> None:
        self.master = 0
        self.is_open = False
        self._clock = clock
        self._random = random
        self._routes = routes
        self._heard = heard
        self._opened = opened
        self._address = ""
        self._ask_at_s = 0.0
        self._heard_at_s = 0.0
        self._tries = 0
        self._give_up: Callable[[], None] | None = None
        self._timer: Timer | None = None

    def aim(self, master: int, address: str) -> None:
        """This is the master now, and where it takes streams."""
        if (master, address) != (self.master, self._address):
            self.close()
            self.master, self._address, self._tries = master, address, 0
            self._connect()

    def _connect(self) -> None:
        self._timer = None
        self._give_up = self._routes.open_stream(self._address, None, self._hears, self._failed, self._connected)

    def _hears(self, body: Any) -> None:
        self._heard_at_s = self._clock.now()
        self._heard(self.master, body)

    def is_silent(self, now_s: float) -> bool:
        """True if the stream is open and nothing has come over it for too long: whatever is asked is answered."""
        return self.is_open and now_s > self._heard_at_s + SILENT_S

    def _connected(self, stream: FrameStream) -> None:
        if stream.peer != self.master:
            self.again()
            return
        self._tries = 0
        self._ask_at_s = 0.0
        self._heard_at_s = self._clock.now()
        self.is_open = True
        self._routes.streams[self.master] = stream
        self._opened()

    def _failed(self, reason: str) -> None:
        self._give_up = None
        self.again()

    def again(self) -> None:
        """Close the stream and open it anew, after a pause."""
        self.close()
        pause_s = min(RETRY_S * (1 << self._tries), RETRY_LIMIT_S) * (0.5 + self._random.random())
        self._tries = min(self._tries + 1, 10)
        self._timer = self._clock.call_later(pause_s, self._connect)

    def ask(self, subscribe: Subscribe, now_s: float) -> None:
        """Ask the master for what follows, if the stream is open and it was not asked just now."""
        if self.is_open and now_s >= self._ask_at_s:
            self._ask_at_s = now_s + ASK_S
            self._routes.send(self.master, subscribe)

    def close(self) -> None:
        self.is_open = False
        self._routes.streams.pop(self.master, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._give_up is not None:
            self._give_up()
            self._give_up = None
