"""Sealed frames over one connection: what every stream of the directory is made of.

Rules
- Bodies that are sent before both sides have said hello wait, at most WAITING_LIMIT_BYTES of them.
- A refused frame or a body that does not parse closes the stream; whoever uses it is told once, by `lost`.
- A peer that has not said hello within HELLO_S is closed.
- A frame whose end has not come within FRAME_S of its beginning closes the stream too, when more comes: how long it is
  counts only when all of it has been checked, and a damaged length would hold up all that follows.
- A peer that takes nothing while more than UNSENT_LIMIT_BYTES wait for it is closed: it comes back and asks again.
"""

from collections.abc import Callable
from typing import Any

from metadata.seams import Clock, Connection, Timer
from protocol.directory import MalformedError
from protocol.directory_control import decode_body
from protocol.sealed_frames import FrameRefusedError, SealedStream

HELLO_S = 5.0
FRAME_S = 20.0
BUFFER_BYTES = 64 << 10
UNSENT_LIMIT_BYTES = 4 << 20
WAITING_LIMIT_BYTES = 1 << 20


class FrameStream:
    """One end of a stream; the Receiver of its connection.

    `heard(stream, body)` gets each body, `lost(stream, reason)` the end, `opened(stream)` the other side's hello,
    `drained(stream)` room for more.
    """

    def __init__(
        self,
        clock: Clock,
        connection: Connection,
        sealed: SealedStream,
        heard: Callable[["FrameStream", Any], None],
        lost: Callable[["FrameStream", str], None],
        opened: Callable[["FrameStream"], None] | None = None,
    ) -> None:
        self.connection = connection
        self._clock = clock
        self._part_since_s: float | None = None
        self.on_drained: Callable[[], None] | None = None
        self._sealed = sealed
        self._heard = heard
        self._lost = lost
        self._opened = opened
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._waiting: list[tuple[int, bytes]] = []
        self._waiting_bytes = 0
        self._is_closed = False
        self._hello_timer: Timer | None = clock.call_later(HELLO_S, self._hello_missing)
        connection.send([sealed.hello()])

    @property
    def peer(self) -> int:
        """Id of the other node, 0 before its hello."""
        return self._sealed.peer

    @property
    def unsent_bytes(self) -> int:
        return self.connection.unsent_bytes + self._waiting_bytes

    def send(self, body: Any) -> None:
        """Send a body of the directory; nothing happens on a closed stream."""
        self.send_encoded(body.kind, body.encode())

    def send_encoded(self, kind: int, body: bytes) -> None:
        if self._is_closed:
            return
        if not self._sealed.is_open:
            self._waiting.append((kind, body))
            self._waiting_bytes += len(body)
            if self._waiting_bytes > WAITING_LIMIT_BYTES:
                self._end("too much waits for its hello")
            return
        self.connection.send([self._sealed.seal(kind, body)])
        if self.connection.unsent_bytes > UNSENT_LIMIT_BYTES:
            self._end("it takes nothing")

    def close(self) -> None:
        """Send what is queued, then close; nobody is told."""
        if not self._is_closed:
            self._stop()
            self.connection.close()

    # --- the Receiver ---

    def buffer(self) -> memoryview:
        return self._buffer

    def received(self, size_bytes: int) -> None:
        was_open = self._sealed.is_open
        try:
            frames = self._sealed.receive(self._buffer[:size_bytes])
        except FrameRefusedError as error:
            self._end(f"refused: {error.reason}")
            return
        if not was_open and self._sealed.is_open:
            self._start()
        if self._is_endless(bool(frames)):
            self._end("refused: a frame does not come to its end")
            return
        for frame in frames:
            if self._is_closed:
                return
            try:
                body = decode_body(frame.kind, bytes(frame.body))
            except MalformedError as error:
                self._end(f"refused: a frame of kind {frame.kind}: {error}")
                return
            self._heard(self, body)

    def _is_endless(self, has_frames: bool) -> bool:
        """Whether the frame that is being received has begun too long ago; `has_frames`: others were complete."""
        if not self._sealed.has_part:
            self._part_since_s = None
        elif has_frames or self._part_since_s is None:
            self._part_since_s = self._clock.now()
        else:
            return self._clock.now() - self._part_since_s > FRAME_S
        return False

    def drained(self) -> None:
        if self.on_drained is not None and not self._is_closed:
            self.on_drained()

    def lost(self, reason: str) -> None:
        if not self._is_closed:
            self._stop()
            self._lost(self, reason)

    def _start(self) -> None:
        if self._hello_timer is not None:
            self._hello_timer.cancel()
            self._hello_timer = None
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if self._opened is not None:
            self._opened(self)
        for kind, body in waiting:
            self.send_encoded(kind, body)

    def _hello_missing(self) -> None:
        self._hello_timer = None
        self._end("no hello came")

    def _end(self, reason: str) -> None:
        if not self._is_closed:
            self._stop()
            self.connection.abort()
            self._lost(self, reason)

    def _stop(self) -> None:
        self._is_closed = True
        self.on_drained = None
        if self._hello_timer is not None:
            self._hello_timer.cancel()
            self._hello_timer = None
