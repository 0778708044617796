"""One end of a stream between peers: bytes in, frames out.

Rules
- What is no good frame ends the stream; whoever opened it opens another one.
- `lost` is said once, and never after `close`.
- The blocks of an APPEND lie where they were received, until `received_frame` returns: who keeps them copies them.
- Behind a FORWARD and its answer there are no frames: `give_away` ends the stream and leaves the connection.
"""

from collections.abc import Callable, Sequence

from metadata.seams import Buffer, Connection
from protocol.peer import Frame, PeerFrameError
from protocol.peer_decoding import FrameBuffer
from protocol.peer_frames import encode

Received = Callable[["PeerStream", Frame], None]
Lost = Callable[["PeerStream", str], None]


class PeerStream:
    """The Receiver of a connection."""

    def __init__(self, connection: Connection, received: Received, lost: Lost) -> None:
        connection.spins = False
        self._connection = connection
        self.received_frame = received  # replaced when the stream was opened
        self.lost_stream = lost
        self.batch_ended: Callable[[], None] | None = None
        """Called when everything was given out that has arrived together."""
        self.is_receiving = False
        self.is_open = True
        self._frames = FrameBuffer()

    def send(self, frame: Frame) -> None:
        """Send or queue it; nothing happens once the stream is over."""
        self.send_packed(encode(frame))

    def send_packed(self, buffers: Sequence[Buffer]) -> None:
        """The same with a frame that was packed before."""
        if self.is_open:
            self._connection.send(buffers)

    def close(self, last: Frame | None = None) -> None:
        """End it, after `last`; idempotent."""
        if self.is_open:
            self.is_open = False
            if last is None:
                self._connection.abort()
            else:
                self._connection.send(encode(last))
                self._connection.close()

    def give_away(self) -> tuple[Connection, bytes]:
        """(the connection, what it has brought behind the last frame), for somebody else to go on with."""
        self.is_open = False
        return self._connection, self._frames.leftover()

    # --- Receiver ---

    def buffer(self) -> memoryview:
        return self._frames.writable()

    def received(self, size_bytes: int) -> None:
        self.is_receiving = True
        try:
            for frame in self._frames.received(size_bytes):
                self.received_frame(self, frame)
                if not self.is_open:
                    return
        except PeerFrameError as error:
            if self.is_open:
                self.close()
                self.lost_stream(self, str(error))
        finally:
            self.is_receiving = False
            if self.batch_ended is not None:
                self.batch_ended()

    def drained(self) -> None:
        """Nobody waits for it: what a stream may have under way is bounded by its frames."""

    def lost(self, reason: str) -> None:
        if self.is_open:
            self.is_open = False
            self.lost_stream(self, reason)
