"""One attempt to connect, for the real Network.

Theory: a connect that does not block is a socket that becomes writable, or fails, or does neither until its time is
up. Exactly one of `connected` and `failed` is called, once, from the loop and never from inside `Network.connect`.

Rules
- A TCP socket that has connected to itself is a refusal: to an unused port of this host the kernel can give the same
  port as the source, and the two ends of such a "connection" are one.
"""

import asyncio
import errno
import logging
import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metadata.seams import Connection, Receiver
from nbdserver.host.addresses import numeric_address
from nbdserver.host.connection import SocketConnection

if TYPE_CHECKING:
    from nbdserver.host.network import SocketNetwork

_log = logging.getLogger(__name__)


class Connecting:
    """A connect that is under way."""

    def __init__(
        self,
        network: "SocketNetwork",
        address: str,
        connected: Callable[[Connection], Receiver | None],
        failed: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        self._network = network
        self._connected = connected
        self._failed = failed
        self._ended = False
        self._registered = False
        family: socket.AddressFamily = socket.AF_UNIX
        target: Any = address.removeprefix("unix:")
        if target == address:
            family, target = numeric_address(address, socket.SOCK_STREAM)
        self._target = target
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            number = self._socket.connect_ex(target)
        except OSError as error:  # a path that is too long has no errno
            self._socket.close()
            raise ValueError(f"{address!r} is no address to connect to: {error}") from None
        self._timer: asyncio.Handle = network.loop.call_later(timeout_s, self._fail, f"no answer in {timeout_s:g} s")
        if number == errno.EINPROGRESS:
            network.register(self._socket.fileno(), select.EPOLLOUT, self._ready)
            self._registered = True
        else:
            network.loop.call_soon(self._finish, number)

    def give_up(self) -> None:
        """Nothing is called any more, unless `connected` was; idempotent."""
        if not self._ended:
            self._end()
            self._socket.close()

    def _end(self) -> None:
        self._ended = True
        self._timer.cancel()
        if self._registered:
            self._network.unregister(self._socket.fileno())

    def _ready(self, _mask: int) -> None:
        self._finish(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _finish(self, number: int) -> None:
        if self._ended:
            return
        if not number and self._socket.family != socket.AF_UNIX and self._is_connected_to_itself():
            number = errno.ECONNREFUSED
        if number:
            self._fail(os.strerror(number))
            return
        self._end()
        connection = SocketConnection(self._network, self._socket, self._target)
        try:
            receiver = self._connected(connection)
        except Exception:
            _log.exception("the connection to %s could not be used; it is closed", connection.peer_name)
            receiver = None
        if receiver is None:
            connection.abort()
        else:
            connection.start(receiver)

    def _is_connected_to_itself(self) -> bool:
        try:
            return bool(self._socket.getpeername() == self._socket.getsockname())
        except OSError:
            return False  # it is gone already; reading it will say so

    def _fail(self, reason: str) -> None:
        if not self._ended:
            self.give_up()
            self._failed(reason)
