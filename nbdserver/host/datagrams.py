"""Datagrams of the real Network: one UDP socket, read in batches.

Theory: a datagram is a hint that may be lost, so nothing here waits, queues or retries. One wake takes what has
arrived, up to `DATAGRAMS_A_ROUND`, so that a flood delays the connections beside it by a bounded time only; the rest
stays in the kernel's buffer, and what does not fit there is lost.

Rules
- A receiver that raises loses the datagram, not the socket.
- What the system refuses to send is lost; each kind of refusal is logged once, because one that stays (a firewall)
  looks like a silent peer otherwise.
"""

import errno
import logging
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metadata.seams import DATAGRAM_LIMIT_BYTES
from nbdserver.host.addresses import address_name, numeric_address
from protocol.invariant import invariant

if TYPE_CHECKING:
    from nbdserver.host.network import SocketNetwork

DATAGRAMS_A_ROUND = 64  # some 200 µs of receiving
RECEIVE_BUFFER_BYTES = 2 << 20  # of the kernel's: a burst waits there while a batch is served
PEERS_REMEMBERED = 4096  # more than a cluster has nodes; a flood from forged addresses must not fill the memory

_SO_RCVBUFFORCE = 33  # not named in Python's socket module

_log = logging.getLogger(__name__)


class SocketDatagrams:
    """A bound UDP socket of a SocketNetwork."""

    def __init__(self, network: "SocketNetwork", address: str, received: Callable[[str, bytes], None]) -> None:
        family, bound = numeric_address(address, socket.SOCK_DGRAM)
        self._network = network
        self._received = received
        self._buffer = memoryview(bytearray(65536))
        self._names: dict[Any, str] = {}
        self._peers: dict[str, Any] = {}
        self._refusals: set[int | None] = set()
        self._closed = False
        self._family = family
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _enlarge_receive_buffer(self._socket)
            self._socket.bind(bound)
        except OSError:
            self._socket.close()
            raise
        self.address = address_name(self._socket.getsockname())
        network.register(self._socket.fileno(), select.EPOLLIN, self._ready)

    def send(self, peer: str, payload: bytes) -> None:
        """Send one datagram, or lose it. ValueError for a peer that is no numeric address of this socket's family."""
        invariant(len(payload) <= DATAGRAM_LIMIT_BYTES, "a datagram is larger than IP can carry")
        target = self._peers.get(peer)
        if target is None:
            target = self._remember(peer)
        if self._closed:
            return
        try:
            self._socket.sendto(payload, target)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in self._refusals:
                self._refusals.add(error.errno)
                _log.warning("cannot send datagrams to %s: %s (said once)", peer, error.strerror)

    def close(self) -> None:
        """Stop receiving; idempotent."""
        if not self._closed:
            self._closed = True
            self._network.unregister(self._socket.fileno())
            self._socket.close()

    def _remember(self, peer: str) -> Any:
        family, target = numeric_address(peer, socket.SOCK_DGRAM)
        if family != self._family:
            raise ValueError(f"{peer} cannot be reached from {self.address}: one is IPv4, the other IPv6")
        if len(self._peers) >= PEERS_REMEMBERED:
            self._peers.clear()
        self._peers[peer] = target
        return target

    def _name(self, address: Any) -> str:
        if len(self._names) >= PEERS_REMEMBERED:
            self._names.clear()
        name = self._names[address] = address_name(address)
        return name

    def _ready(self, _mask: int) -> None:
        buffer, names = self._buffer, self._names
        for _ in range(DATAGRAMS_A_ROUND):
            if self._closed:
                return
            try:
                size_bytes, address = self._socket.recvfrom_into(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                # What the network reports about something that was sent; the socket itself is well.
                _log.debug("a datagram could not be received: %s", errno.errorcode.get(error.errno or 0, str(error)))
                continue
            try:
                self._received(names.get(address) or self._name(address), bytes(buffer[:size_bytes]))
            except Exception:
                _log.exception("a datagram of %s could not be handled; it is dropped", address_name(address))


def _enlarge_receive_buffer(bound: socket.socket) -> None:
    """Beyond net.core.rmem_max if that is allowed; a smaller buffer loses more of a burst."""
    try:
        bound.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    except OSError:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
