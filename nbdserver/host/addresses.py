"""Socket addresses as text: `HOST:PORT` and `[V6]:PORT`, numeric ones only.

Theory: who sends to a peer must not wait for a name server, so an address on the wire of the loop is numeric; whoever
reads names from a configuration looks them up there. A link-local IPv6 address carries its interface (`fe80::1%eth0`).
"""

import socket
from typing import Any


def address_name(address: Any) -> str:
    """The text of a socket address of IPv4 or IPv6, as the kernel reports it."""
    host, port = address[:2]
    if ":" not in host:
        return f"{host}:{port}"
    scope = f"%{address[3]}" if len(address) > 3 and address[3] and "%" not in host else ""
    return f"[{host}{scope}]:{port}"


def numeric_address(text: str, kind: socket.SocketKind) -> tuple[socket.AddressFamily, Any]:
    """(family, socket address) of a text; ValueError for an address of another form."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if colon and bare and port.isdecimal() and int(port) <= 65535 and (":" in bare) == (bare != host):
        try:
            found = socket.getaddrinfo(bare, int(port), type=kind, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = []
        if found:
            return found[0][0], found[0][4]
    raise ValueError(f"{text!r} is no numeric address: give HOST:PORT or [V6]:PORT")
