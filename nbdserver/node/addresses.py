"""Addresses to listen on: `HOST:PORT`, `[V6]:PORT`; what a URI for them looks like, and who holds a taken port."""

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import quote

from nbdserver.node.errors import WrongInputError

MAX_SOCKET_PATH_BYTES = 107
"""sun_path is 108 bytes with its closing zero."""

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def check_address(text: str) -> str:
    """Return `text` if it is `HOST:PORT` or `[V6]:PORT`. Raises WrongInputError with what would be right."""
    host, port = split_address(text)
    return join_address(host, port)


def split_address(text: str) -> tuple[str, int]:
    """Return (host, port) of a listening address. Raises WrongInputError."""
    host, colon, port_text = text.rpartition(":")
    if not colon or not port_text.isascii() or not port_text.isdigit():
        raise WrongInputError(f"{text!r} is not HOST:PORT; write for example 127.0.0.1:10809 or [::1]:10809")
    port = int(port_text)
    if not 1 <= port <= 65535:
        raise WrongInputError(f"{text!r} has port {port}; a port is 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_ip(host, 6):
            raise WrongInputError(f"{text!r} has no IPv6 address in its brackets; write for example [::1]:{port}")
    elif ":" in host:
        raise WrongInputError(f"{text!r} needs brackets around its IPv6 address: [{host}]:{port}")
    elif host in ("", "*"):
        raise WrongInputError(f"{text!r} names no host; write 0.0.0.0:{port} or [::]:{port} for every address")
    elif not _HOST_NAME.fullmatch(host) or (host.replace(".", "").isdigit() and not _is_ip(host, 4)):
        raise WrongInputError(f"{text!r} has no host that could be meant; write for example 127.0.0.1:{port}")
    return host, port


def join_address(host: str, port: int) -> str:
    """What `split_address` has taken apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_socket_path(path: Path) -> Path:
    """Return the absolute path of a unix socket. Raises WrongInputError when the kernel could not take it."""
    absolute = Path(os.path.abspath(path))
    length = len(os.fsencode(absolute))
    if length > MAX_SOCKET_PATH_BYTES:
        raise WrongInputError(
            f"the socket path {absolute} has {length} bytes; Linux takes at most {MAX_SOCKET_PATH_BYTES}, "
            "choose a shorter one with --socket"
        )
    return absolute


def is_loopback(host: str) -> bool:
    """True for 127.0.0.0/8 and ::1, also when written as an IPv4-mapped IPv6 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def uri(address: str, export: str = "", tls: bool = False) -> str:
    """Return the NBD URI of an export (or of the server) behind `HOST:PORT`, over TLS or not, or `unix:PATH`."""
    if address.startswith("unix:"):
        return f"nbd+unix:///{export}?socket={quote(address.removeprefix('unix:'))}"
    return f"{'nbds' if tls else 'nbd'}://{address}/{export}"


def port_holder(port: int) -> str:
    """Return `program (pid N)` of who listens on TCP `port`, or "another program" when /proc does not show it."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening_inodes(table, port)}
    if inodes:
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _holds_socket(process, inodes):
                try:
                    program = (process / "comm").read_text().strip()
                except OSError:
                    program = "a program"
                return f"{program} (pid {process.name})"
    return "another program (its owner is not visible to this user)"


def _listening_inodes(table: str, port: int) -> list[str]:
    try:
        lines = Path("/proc/net", table).read_text().splitlines()[1:]
    except OSError:
        return []
    rows = [line.split() for line in lines]
    listening = "0A"  # TCP_LISTEN in include/net/tcp_states.h
    return [row[9] for row in rows if row[3] == listening and int(row[1].rpartition(":")[2], 16) == port]


def _holds_socket(process: Path, inodes: set[str]) -> bool:
    try:
        for descriptor in (process / "fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:[") and target[8:-1] in inodes:
                return True
    except OSError:
        return False  # ended meanwhile, or another user's
    return False


def _is_ip(host: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).version == version
    except ValueError:
        return False
