"""Who may see and enter an export: by network, by the name in a certificate, in clear text or over TLS.

Rules
- Networks and certificate names are asked each for itself: where an export lists both, a client needs an address in one
  of the networks *and* one of the names. So adding a name never lets anybody in who was not allowed before.
- Peers on a unix socket are admitted in clear text and without a name: the socket's file mode is their access control.
- To a peer from another network an export does not exist; only those who could use it hear that it needs TLS.
"""

from collections.abc import Iterable
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network

from nbdserver.volume.peer import Address, Peer, is_certificate_name

CERTIFICATE_PREFIX = "cert:"

IPNetwork = IPv4Network | IPv6Network


class TlsMode(Enum):
    """Whether an export is used over TLS; INHERIT: as the node says."""

    INHERIT = "inherit"
    OFF = "off"
    ALLOWED = "allowed"
    REQUIRED = "required"


class Admission(Enum):
    """Whether a peer may see and enter an export."""

    YES = "yes"
    NO = "no"
    NEEDS_TLS = "not without TLS"
    NOT_OVER_TLS = "not over TLS"


def is_name_of_certificate(text: str) -> bool:
    """Whether an entry of allowed clients is one; else it is a network."""
    return text.startswith(CERTIFICATE_PREFIX)


class Allowed:
    """Networks ("192.0.2.0/24") and certificate names ("cert:web1"); none of a kind: all."""

    def __init__(self, texts: Iterable[str]) -> None:
        """ValueError for what is neither."""
        self.texts = tuple(texts)
        names = [text.removeprefix(CERTIFICATE_PREFIX) for text in self.texts if is_name_of_certificate(text)]
        for name in names:
            if not is_certificate_name(name):
                raise ValueError(f"{name!r} cannot be the name in a certificate")
        self.names = frozenset(names)
        self.networks = tuple(_network(text) for text in self.texts if not is_name_of_certificate(text))

    def has_address(self, address: Address) -> bool:
        return not self.networks or any(address in network for network in self.networks)

    def has_name(self, name: str) -> bool:
        return not self.names or name in self.names


def admission(peer: Peer, allowed: Allowed, tls: TlsMode) -> Admission:
    """Whether `peer` may use an export with these settings."""
    if peer.address is not None and not allowed.has_address(peer.address):
        return Admission.NO
    if peer.tls and tls is TlsMode.OFF:
        return Admission.NOT_OVER_TLS
    if peer.address is None:
        return Admission.YES
    if not peer.tls and tls is TlsMode.REQUIRED:
        return Admission.NEEDS_TLS
    return Admission.YES if allowed.has_name(peer.certificate) else Admission.NO


def _network(text: str) -> IPNetwork:
    try:
        return ip_network(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no address or network such as 192.0.2.7 or 2001:db8::/64, nor a certificate's name"
            f" such as cert:web1 ({error})"
        ) from None
