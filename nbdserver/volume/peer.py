"""Who is at the other end of a connection, as far as exports care.

Theory: a peer is known by its address, and by the name in its certificate if that was verified. A certificate has one
*name* here: its subject's common name, or, without one, its first DNS name.

Rules
- Every peer on a unix socket or a loopback address is the local host, whatever its certificate; who has come to another
  node by such an address is that node's host.
- Another peer's host is address and certificate name together: a certificate that two machines share does not make them
  one host, and two machines behind one address translation are two if their certificates differ.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address

LOCAL_HOST = "local"
CERTIFICATE_NAME_LIMIT = 255

Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class Peer:
    """One end of a connection."""

    name: str
    """Of the connection: "192.0.2.1:4711", "[2001:db8::1]:4711", "unix:..."."""
    tls: str = ""
    """Version and cipher; "" in clear text."""
    certificate: str = ""
    """The name in its certificate, which was verified; "" without one."""
    via: str = ""
    """The node that it has come to, if that is another one."""

    def over_tls(self, tls: str, certificate: str) -> "Peer":
        """The same peer with what its TLS handshake has shown; a name that cannot be written is none."""
        return replace(self, tls=tls, certificate=certificate if is_certificate_name(certificate) else "")

    @cached_property
    def address(self) -> Address | None:
        """Its IP address (an IPv4 one mapped into IPv6 is unmapped), or None on a unix socket."""
        if self.name.startswith("unix:"):
            return None
        address = ip_address(self.name.rpartition(":")[0].strip("[]").partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            return address.ipv4_mapped
        return address

    @cached_property
    def host(self) -> str:
        """What tells hosts apart."""
        if self.address is None or self.address.is_loopback:
            return f"{LOCAL_HOST} on {self.via}" if self.via else LOCAL_HOST
        return f"{self.address} ({self.certificate})" if self.certificate else str(self.address)


def is_certificate_name(text: str) -> bool:
    """Whether a certificate's name can be shown and written into a list."""
    return 0 < len(text) <= CERTIFICATE_NAME_LIMIT and text.isprintable() and "," not in text and text == text.strip()
