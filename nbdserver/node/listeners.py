"""The sockets at which NBD clients connect, in the control process, which gives all data processes the same ones.

Theory: whichever data process is free first accepts a client; where its export lives shows in its handshake. A socket
of which every process has a copy outlives each of them: who connects while one is started again waits and is served.

Rules
- A change is made whole or not at all. The file of a unix socket goes with it, unless a socket unit has made it.
- The socket of the program's own commands is nobody else's: it is not handed over, the next program makes its own.
"""

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from nbdserver.host.listening import close_listening, listening_sockets, socket_cookie
from nbdserver.node.addresses import port_holder, split_address
from nbdserver.node.errors import WrongInputError
from protocol.handover import Listening


class Listeners:
    """The listening sockets of a node."""

    def __init__(self, own: Path, activated: Sequence[tuple[int, str]]) -> None:
        """`own`: of the program's own commands. `activated`: (descriptor, address) of socket units."""
        self._own = f"unix:{own}"
        self._own_path = own
        self._activated = {address for _, address in activated}
        self._sockets: dict[str, list[socket.socket]] = {}
        self._inherited: dict[str, list[socket.socket]] = {}
        for descriptor, address in activated:
            self.inherit(address, os.dup(descriptor))

    def inherit(self, address: str, descriptor: int) -> None:
        """The next `listen` at this address uses this socket, with others that were given for it."""
        inherited = socket.socket(fileno=descriptor)
        inherited.setblocking(False)
        self._inherited.setdefault(address, []).append(inherited)

    def listen(self, addresses: Sequence[str]) -> None:
        """Listen at exactly these addresses. If one is not to be had: WrongInputError, and all stays as it was."""
        wanted = [*addresses, self._own]
        added: dict[str, list[socket.socket]] = {}
        for address in wanted:
            if address in self._sockets or address in added:
                continue
            try:
                added[address] = self._inherited.pop(address, []) or listening_sockets(address)
            except (OSError, ValueError) as error:
                for one, sockets in added.items():
                    self._close(one, sockets)
                raise WrongInputError(_taken(address, error)) from None
        if self._own in added:
            self._own_path.chmod(0o600)
        for gone in set(self._sockets) - set(wanted):
            self._close(gone, self._sockets.pop(gone))
        self._sockets |= added
        for address, sockets in self._inherited.items():
            self._close(address, sockets)
        self._inherited.clear()

    def sockets(self) -> list[tuple[str, int]]:
        """(address, descriptor) of each."""
        return [(address, one.fileno()) for address, sockets in self._sockets.items() for one in sockets]

    def close_own(self) -> None:
        """Serve the program's own commands no more."""
        self._close(self._own, self._sockets.pop(self._own, []))

    def to_hand_over(self) -> tuple[list[Listening], list[int]]:
        """What the next program is told of them, and their descriptors, which stay ours."""
        kept = [(address, one) for address, sockets in self._sockets.items() for one in sockets if address != self._own]
        return [Listening(socket_cookie(one), address) for address, one in kept], [one.fileno() for _, one in kept]

    def close(self) -> None:
        """Close all."""
        for address, sockets in [*self._sockets.items(), *self._inherited.items()]:
            self._close(address, sockets)
        self._sockets.clear()
        self._inherited.clear()

    def _close(self, address: str, sockets: Sequence[socket.socket]) -> None:
        for one in sockets:
            close_listening(one, address not in self._activated)


def _taken(address: str, error: OSError | ValueError) -> str:
    is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    if address.startswith("unix:") or not is_taken:
        problem = getattr(error, "strerror", None) or str(error)
        if is_taken:
            problem = "another program listens there, or it is no socket"
        option = "--socket" if address.startswith("unix:") else "--listen"
        return f"cannot listen on {address}: {problem}; choose another with {option}"
    host, port = split_address(address)
    free = f"[{host}]" if ":" in host else host
    another = f"--listen {free}:{port % 65535 + 1}"
    return f"port {port} is taken by {port_holder(port)}; choose another, for example {another}"
