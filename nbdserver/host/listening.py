"""Listening sockets: made for an address, closed with the file of a unix one, and told from all others.

Rules: an address is `HOST:PORT`, `[V6]:PORT` or `unix:PATH`; a host name stands for all its addresses. A socket file at
which nobody listens any more is replaced, one in use is not, and a file that is no socket is left alone.
"""

import contextlib
import errno
import os
import socket
import stat
import sys

LISTEN_BACKLOG = 128
UNIX_PATH_LIMIT_BYTES = 107
_SO_COOKIE = 57  # not named in Python's socket module


def socket_cookie(one: socket.socket) -> int:
    """The kernel's number of a socket: the same in every process that has it, never given twice until it boots."""
    return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def descriptor_cookie(descriptor: int) -> int:
    """The same of a socket's descriptor. OSError if it is none."""
    with socket.socket(fileno=os.dup(descriptor)) as one:
        return socket_cookie(one)


def close_listening(listening: socket.socket, owned: bool) -> None:
    """Close it; the file of a unix socket that is `owned` goes."""
    path = listening.getsockname() if owned and listening.family == socket.AF_UNIX else None
    listening.close()
    if path:
        with contextlib.suppress(OSError):
            os.unlink(path)


def listening_sockets(address: str) -> list[socket.socket]:
    """The sockets of an address: one of a unix path, one of each address that a host name stands for."""
    if address.startswith("unix:"):
        return [_listen_at_path(address.removeprefix("unix:"))]
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        raise ValueError(f"{address!r} is no address to listen at: give HOST:PORT, [V6]:PORT or unix:PATH")
    found = socket.getaddrinfo(
        host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
    )
    listening: list[socket.socket] = []
    try:
        for family, kind, protocol, _, target in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            listening.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setblocking(False)
            one.bind(target)
            one.listen(LISTEN_BACKLOG)
    except OSError:
        for one in listening:
            one.close()
        raise
    return listening


def _listen_at_path(path: str) -> socket.socket:
    """Listen at a unix path; a socket file at which nobody listens any more is replaced."""
    if len(os.fsencode(path)) > UNIX_PATH_LIMIT_BYTES:
        raise ValueError(
            f"the socket path {path} has {len(os.fsencode(path))} bytes; the system's limit is"
            f" {UNIX_PATH_LIMIT_BYTES}: choose a shorter one"
        )
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        try:
            listening.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_abandoned(path):
                raise
            os.unlink(path)
            listening.bind(path)
        listening.listen(LISTEN_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _is_abandoned(path: str) -> bool:
    """Whether the file is a socket at which nobody listens (connecting to any other file is refused too)."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
