"""sd_notify: tell systemd, if it started us, how far we are, and let it keep descriptors over a restart.

Theory: one datagram to the socket that NOTIFY_SOCKET names. With FDSTORE=1 it carries descriptors, which systemd keeps
under a name until the unit has stopped for good, and gives to the next process it starts for the unit. FDSTORE in the
environment says how many it keeps (systemd 254 sets it; the unit does for those before).

Rules: a datagram is processed some time after it was sent. `barrier` waits for that; before it has returned True,
nothing may be done that relies on it.
"""

import os
import select
import socket
from collections.abc import Sequence

from nbdserver.node.descriptors import send_descriptors

BARRIER_TIMEOUT_S = 5.0


def notify(state: str) -> None:
    """Send `state` (`READY=1`, `STOPPING=1`); does nothing when nobody asked for it."""
    with _connected() as sock:
        try:
            sock.send(state.encode())
        except OSError:
            pass  # a supervisor that went away is no reason to stop serving


def store_size() -> int:
    """How many descriptors systemd keeps for us; 0 when it did not start us."""
    size = os.environ.get("FDSTORE", "")
    return int(size) if os.environ.get("NOTIFY_SOCKET") and size.isdecimal() else 0


def store(name: str, descriptors: Sequence[int]) -> None:
    """Let systemd keep them. OSError."""
    with _connected() as sock:
        send_descriptors(sock, descriptors, f"FDSTORE=1\nFDNAME={name}".encode())


def remove(name: str) -> None:
    """Let systemd close all that it keeps under this name."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def barrier() -> bool:
    """Wait until systemd has done all that it was told; False if it does not say so in time."""
    done, kept_by_systemd = os.pipe()
    try:
        with _connected() as sock:
            socket.send_fds(sock, [b"BARRIER=1"], [kept_by_systemd])
    except OSError:
        os.close(done)
        return False
    finally:
        os.close(kept_by_systemd)
    poll = select.poll()
    poll.register(done, 0)
    hung_up = bool(poll.poll(BARRIER_TIMEOUT_S * 1000))
    os.close(done)
    return hung_up


def _connected() -> socket.socket:
    """A socket to systemd; one that leads nowhere when there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    if address.startswith(("/", "@")):
        try:
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass  # sending will say so
    return sock
