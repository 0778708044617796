"""Descriptors on their way from one process to the next: what they are called, and sending many of them."""

import os
import socket
from collections.abc import Iterable, Sequence

STATE, LISTENING, CLIENT, LOCK = "nbdserver-state", "nbdserver-listen", "nbdserver-client", "nbdserver-lock"
"""Names of the descriptors, as LISTEN_FDNAMES and systemd's store have them."""

_DESCRIPTORS_A_MESSAGE = 250  # the kernel takes 253 (SCM_MAX_FD)


def send_descriptors(to: socket.socket, descriptors: Sequence[int], message: bytes = b"d") -> None:
    """Send them, with the message, over a unix socket that keeps messages apart. OSError."""
    for start in range(0, len(descriptors), _DESCRIPTORS_A_MESSAGE):
        socket.send_fds(to, [message], descriptors[start : start + _DESCRIPTORS_A_MESSAGE])


def receive_descriptors(from_: socket.socket, count: int) -> list[int]:
    """Receive so many. OSError if they do not come."""
    descriptors: list[int] = []
    while len(descriptors) < count:
        data, more, _, _ = socket.recv_fds(from_, 1, _DESCRIPTORS_A_MESSAGE)
        for descriptor in more:
            os.set_inheritable(descriptor, False)  # a copy that nobody knows of would keep a connection open
        descriptors += more
        if not data or not more:
            close_all(descriptors)
            raise OSError(f"{len(descriptors)} of {count} descriptors arrived")
    return descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
