"""Clients on their way between the data processes of a node, in the middle of their handshake.

Theory: every process has an inbox, a local socket that keeps messages apart, and can write to those of the others. A
message is a client's state (`HandshakingClient`), with its socket. If its TLS lives here, the socket is one end of a
local pair, and its bytes are forwarded.

Rules
- The inbox is read once the process serves (`open`); until then clients wait in it. The kernel bounds what is in it:
  who finds it full is refused.
- What arrives and cannot be used costs that client its connection, and nobody else.
- The control process keeps every inbox open, so that it outlives the process that reads it.
"""

import logging
import os
import select
import socket
from collections.abc import Sequence

from metadata.seams import Connection
from nbdserver.frontend.forwarding import Forwarding
from nbdserver.frontend.server import ForwardingOver, Server
from nbdserver.host.network import SocketNetwork
from nbdserver.node.descriptors import close_all
from protocol.handover import HandoverError, HandshakingClient, decode_handshaking, encode_handshaking

MESSAGE_BYTES = 256 << 10  # an option has at most 64 KiB, and there may be as much behind it
ARRIVALS_A_ROUND = 16
INBOX_BYTES = 4 << 20  # of the kernel's, where that is allowed

_log = logging.getLogger(__name__)


def make_inboxes(workers: int) -> list[tuple[socket.socket, socket.socket]]:
    """(read end, write end) for each process of a node; none for one alone."""
    inboxes = []
    for _ in range(workers if workers > 1 else 0):
        reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for one in (reading, writing):
            one.setblocking(False)
        writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, INBOX_BYTES)
        inboxes.append((reading, writing))
    return inboxes


class Passing:
    """Sends clients to the other processes, and takes in those that they send."""

    def __init__(
        self, network: SocketNetwork, server: Server, inbox: socket.socket, outboxes: Sequence[socket.socket]
    ) -> None:
        """`outboxes`: the write end of each process's inbox, by its number."""
        self._network = network
        self._server = server
        self._inbox = inbox
        self._outboxes = outboxes
        self._is_open = False
        server.pass_on = self.pass_on

    def open(self) -> None:
        """Take in who comes, from now on."""
        if not self._is_open:
            self._is_open = True
            self._network.register(self._inbox.fileno(), select.EPOLLIN, self._ready)

    def close(self) -> None:
        """Take in nobody any more."""
        if self._is_open:
            self._is_open = False
            self._network.unregister(self._inbox.fileno())

    def pass_on(
        self, connection: Connection, client: HandshakingClient, worker: int, over: ForwardingOver
    ) -> Forwarding | None:
        """As PassOn of the server says."""
        detached = connection.detach()
        if detached is not None:
            self._send(worker, client, detached[0])
            return None
        ours, theirs = socket.socketpair()
        try:
            self._send(worker, client, theirs.detach())
        except OSError:
            ours.close()
            raise
        local = self._network.adopt(ours.detach())
        forwarding = Forwarding(connection, local, over)
        local.start(forwarding.server_end)
        connection.redirect(forwarding.client_end)
        connection.resume_reading()
        return forwarding

    def _send(self, worker: int, client: HandshakingClient, descriptor: int) -> None:
        """Send, and close the descriptor here in any case. OSError."""
        try:
            socket.send_fds(self._outboxes[worker], [encode_handshaking(client)], [descriptor])
        finally:
            os.close(descriptor)

    def _ready(self, _mask: int) -> None:
        for _ in range(ARRIVALS_A_ROUND):
            try:
                message, descriptors, _, _ = socket.recv_fds(self._inbox, MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            except OSError as error:
                _log.warning("a client of another process cannot be taken in: %s", error)
                return
            if len(descriptors) == 1:
                self._take_in(message, descriptors[0])
            else:
                close_all(descriptors)  # no descriptor was left for it

    def _take_in(self, message: bytes, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        try:
            client = decode_handshaking(message)
        except HandoverError as error:
            _log.error("a client of another process is not taken in: %s", error)
            os.close(descriptor)
            return
        try:
            connection = self._network.adopt(descriptor)
        except OSError:
            return  # the client has gone meanwhile
        session = self._server.arrive(connection, client)
        if session is None:
            connection.abort()
            return
        connection.start(session)
        try:
            session.go_on()
        except Exception:
            _log.exception("the session of %s failed; its connection is closed", client.peer_name)
            session.disconnect("an internal error of the server")
