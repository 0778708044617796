"""sd_notify: tell systemd, if it started us, how far we are. One datagram to the socket that NOTIFY_SOCKET names."""

import os
import socket


def notify(state: str) -> None:
    """Send `state` (`READY=1`, `STOPPING=1`); does nothing when nobody asked for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass  # a supervisor that went away is no reason to stop serving
