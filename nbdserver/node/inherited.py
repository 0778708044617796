"""Descriptors that this process was started with, by the protocol of systemd's sd_listen_fds(3).

Theory: LISTEN_FDS descriptors from number 3 on, with names in LISTEN_FDNAMES, for the process whose id is LISTEN_PID.
There is one way for all who start us: systemd (socket activation, and what we gave into its store before a restart),
and the program before us (`nbdserver upgrade-in-place` keeps the process id). Names tell what they are; a listening
socket with a name that is not ours is one that somebody wants served.

Rules: the variables are removed, and no descriptor is inherited further by accident. What is of no use is closed.
"""

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass, field

from nbdserver.host.listening import descriptor_cookie
from nbdserver.node.descriptors import CLIENT, LISTENING, LOCK, STATE, close_all

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@dataclass
class Inherited:
    """What there is, by its use."""

    lock: int | None = None
    state: int | None = None
    clients: list[int] = field(default_factory=list)
    listening: list[int] = field(default_factory=list)  # of the process before
    activated: list[tuple[int, str]] = field(default_factory=list)  # of socket units: (descriptor, address)
    problems: list[str] = field(default_factory=list)

    def forget(self) -> None:
        """Close what the process before left of its clients."""
        close_all([*([] if self.state is None else [self.state]), *self.listening, *self.clients])
        self.state, self.listening, self.clients = None, [], []


def announce(environment: MutableMapping[str, str], names: list[str]) -> None:
    """Set the variables for this process's successor with the same id."""
    environment["LISTEN_PID"] = str(os.getpid())
    environment["LISTEN_FDS"] = str(len(names))
    environment["LISTEN_FDNAMES"] = ":".join(names)


def take(environment: MutableMapping[str, str]) -> Inherited:
    """Take the descriptors and remove the variables."""
    process_id, count, names = (environment.pop(name, "") for name in VARIABLES)
    inherited = Inherited()
    if process_id != str(os.getpid()) or not count.isdecimal():
        return inherited
    descriptors = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count))
    labels = names.split(":") if names else []
    states: list[int] = []
    for index, descriptor in enumerate(descriptors):
        os.set_inheritable(descriptor, False)
        name = labels[index] if index < len(labels) else "unknown"
        if name == LOCK:
            inherited.lock = descriptor
        elif name == STATE:
            states.append(descriptor)
        elif name == CLIENT:
            inherited.clients.append(descriptor)
        elif name == LISTENING:
            inherited.listening.append(descriptor)
        else:
            _add_activated(inherited, name, descriptor)
    if len(states) == 1:
        inherited.state = states[0]
    elif states or inherited.clients or inherited.listening:
        # Which of several is the newest cannot be known: an old one would repeat requests.
        inherited.problems.append(f"{len(states)} states of clients were left instead of one: clients are dropped")
        close_all(states)
        inherited.forget()
    _drop_twins(inherited)
    return inherited


def _add_activated(inherited: Inherited, name: str, descriptor: int) -> None:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as one:
            is_listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            address = _address(one) if is_listening and one.type == socket.SOCK_STREAM else ""
    except OSError:
        address = ""
    if address:
        inherited.activated.append((descriptor, address))
    else:
        inherited.problems.append(f"the descriptor {name} is no stream socket that listens: it is not used")
        os.close(descriptor)


def _address(one: socket.socket) -> str:
    """Where it listens, as settings say it; "" for a kind of socket that we do not serve."""
    name = one.getsockname()
    if one.family == socket.AF_UNIX:
        return f"unix:{name}" if isinstance(name, str) and name else ""
    if one.family == socket.AF_INET6:
        return f"[{name[0]}]:{name[1]}"
    return f"{name[0]}:{name[1]}" if one.family == socket.AF_INET else ""


def _drop_twins(inherited: Inherited) -> None:
    """A socket of a socket unit comes from systemd and from the process before: one is enough."""
    activated = {descriptor_cookie(descriptor) for descriptor, _ in inherited.activated}
    twins = [descriptor for descriptor in inherited.listening if descriptor_cookie(descriptor) in activated]
    inherited.listening = [descriptor for descriptor in inherited.listening if descriptor not in twins]
    close_all(twins)
