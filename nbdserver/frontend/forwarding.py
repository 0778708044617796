"""Forwarding a client's bytes: for a connection that cannot be handed over, because its TLS lives in this process.

Theory: the session of such a client is in another process, at the other end of a socket, where it finds requests in
clear text. Here two connections stand back to back, and each is the other's receiver: what arrives on one is sent
on the other.

Rules
- Bounds: what one end does not take stops the other from being read at UNSENT_LIMIT_BYTES, until all of it has left.
- When one end is gone, what it had sent is still delivered, and then the other is closed.
"""

from collections.abc import Callable

from metadata.seams import Connection

BUFFER_BYTES = 256 << 10
UNSENT_LIMIT_BYTES = 4 << 20  # a request or a reply of the largest size is 32 MiB, and goes through in pieces

_ROOM = memoryview(bytearray(BUFFER_BYTES))  # of all: nothing stays in it


class Forwarding:
    """Two connections back to back. Both have to be told where their bytes go: `client_end`, `server_end`."""

    def __init__(self, client: Connection, server: Connection, over: Callable[["Forwarding"], None]) -> None:
        """`over(self)` is called once, when both are closed or about to be."""
        self._over: Callable[[Forwarding], None] | None = over
        self._connections = (client, server)
        self.client_end = _End(client, server, self._end)
        self.server_end = _End(server, client, self._end)

    def close(self) -> None:
        """Drop both now."""
        for connection in self._connections:
            connection.abort()
        self._end()

    def _end(self) -> None:
        over, self._over = self._over, None
        if over is not None:
            for end in (self.client_end, self.server_end):
                end.ended = None  # no cycle stays
            over(self)


class _End:
    """The receiver of one connection, which sends to the other."""

    def __init__(self, source: Connection, target: Connection, ended: Callable[[], None]) -> None:
        self.ended: Callable[[], None] | None = ended
        self._source = source
        self._target = target

    def buffer(self) -> memoryview:
        return _ROOM

    def received(self, size_bytes: int) -> None:
        self._target.send([_ROOM[:size_bytes]])
        if self._target.unsent_bytes > UNSENT_LIMIT_BYTES:
            self._source.pause_reading()

    def drained(self) -> None:
        """The source has taken all that it was sent: more may come from the target."""
        self._target.resume_reading()

    def lost(self, _reason: str) -> None:
        self._target.close()
        if self.ended is not None:
            self.ended()
