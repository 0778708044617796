"""Handing the clients of a data process to the next one, and taking over those of the one before.

Theory: the next process may be another version of the program, and nothing of this one's memory comes along. So the
clients stand still, the families are closed as at a clean stop, and what is left of a client is a descriptor and its
state (`protocol/handover.py`). The states of all of them lie in one file in memory, whose descriptor travels first;
then come the clients. The control process, or systemd, holds them all until the next data
process is there. Several data processes each have a file and sockets; the control process makes one handover of them
(succession.py), and from that one for each data process of the next program, which need not be as many.

Rules
- A family is closed before a client of it is given away: when the next process opens it, under a higher epoch, nothing
  of this one can write to it any more.
- A client of a family that has failed is dropped, so that it hears of it: the next process knows nothing of the
  failure.
- Bounds: `CLIENT_LIMIT` clients, `STATE_LIMIT_BYTES` of requests and replies under way in a process; the rest is
  dropped.
- What was dropped is counted and told. A client in the handshake, or over TLS, is always dropped.

Known weakness: all clients stand still until the last family is closed, and until the next process has opened all.
"""

import os
from collections.abc import Callable, Sequence

from nbdserver.frontend.server import Server
from nbdserver.host.listening import descriptor_cookie
from nbdserver.host.network import SocketNetwork
from nbdserver.node.descriptors import STATE, close_all
from nbdserver.volume.export import Export
from protocol.handover import ClientState, Handover, decode, encode

CLIENT_LIMIT = 4096
STATE_LIMIT_BYTES = 1 << 30

FREEZE_TIMEOUT_S = 10.0
"""How long a client may have requests that wait for the device before it is dropped."""


def give(
    server: Server, fit: Callable[[Export], bool], handover: str, frozen_s: float, clients_before: int
) -> tuple[list[int], int, int]:
    """Give away a frozen server's clients: (descriptors of state and clients, how many clients, how many of the
    `clients_before` are dropped)."""
    given: list[tuple[int, ClientState]] = []
    left_bytes = STATE_LIMIT_BYTES
    for descriptor, state in server.hand_over(CLIENT_LIMIT, fit):
        left_bytes -= len(state.received) + len(state.unsent)
        if left_bytes < 0:
            os.close(descriptor)
        else:
            given.append((descriptor, state))
    dropped = clients_before - len(given)
    file = write_state(Handover(handover, frozen_s, dropped, [], [state for _, state in given]))
    return [file, *(descriptor for descriptor, _ in given)], len(given), dropped


def write_state(handover: Handover) -> int:
    """The descriptor of a new file in memory."""
    file = os.memfd_create(STATE, os.MFD_CLOEXEC)
    with open(file, "wb", closefd=False) as writer:
        for piece in encode(handover):
            writer.write(piece)
    return file


def read_state(descriptor: int) -> Handover:
    """Read and close the file in memory. HandoverError."""
    with open(descriptor, "rb") as reader:
        reader.seek(0)
        return decode(reader.read())


def take(server: Server, network: SocketNetwork, clients: Sequence[ClientState], descriptors: Sequence[int]) -> int:
    """Go on with the clients whose sockets are here; returns how many there are."""
    by_cookie = {descriptor_cookie(descriptor): descriptor for descriptor in descriptors}
    taken = 0
    for state in clients:
        descriptor = by_cookie.pop(state.cookie, None)
        if descriptor is None:
            continue
        try:
            connection = network.adopt(descriptor)
        except OSError:
            continue  # the client has gone meanwhile
        session = server.resume(connection, state)
        if session is None:
            connection.abort()
            continue
        taken += 1
        connection.start(session)
        session.resume(state)
    close_all(by_cookie.values())
    return taken
