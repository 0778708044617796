"""Exports: what NBD clients name, their live settings, and who uses them.

Theory: an `Export` joins a block device with a name and settings. `Exports` is the node's directory of them. A
session enters an export at the end of its handshake and leaves it when its connection is gone; in between the export
knows it, so that a changed setting acts at once.

Rules
- *One host writes.* A session that entered an export that is not read-only counts as a writer. A second host is
  refused as long as sessions of the first are connected, unless the export is `shared`. Hosts are told apart by
  address; every peer on a unix socket or a loopback address is the local host.
- A client outside `allowed` neither sees nor enters an export. Peers on a unix socket are always allowed: the
  socket's file mode is their access control.
- Settings change live: an export made read-only refuses its writers' next write; clients that are no longer allowed
  are disconnected.

Known weakness: hosts behind one address translation look like one host.
"""

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol

from metadata.seams import Clock
from nbdserver.block import BlockDevice
from nbdserver.volume.counters import Counters
from nbdserver.volume.limits import Limits, Throttle

LOCAL_HOST = "local"
NAME_LIMIT_BYTES = 4096  # the protocol's bound on strings

Address = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


class ExportError(Exception):
    """A request about exports that cannot be fulfilled; the message says why."""


class ExportSession(Protocol):
    """What an export knows of a client that uses it."""

    @property
    def peer_name(self) -> str:
        """Of its connection."""

    @property
    def peer_host(self) -> str:
        """As `peer_host` gives it."""

    @property
    def counters(self) -> Counters:
        """What it has done so far."""

    def disconnect(self, reason: str) -> None:
        """Close the connection now."""


def peer_host(peer_name: str) -> str:
    """The host of a `Connection.peer_name` ("192.0.2.1:4711", "[2001:db8::1]:4711", "unix:..."), or LOCAL_HOST."""
    address = peer_address(peer_name)
    return LOCAL_HOST if address is None or address.is_loopback else str(address)


def peer_address(peer_name: str) -> Address | None:
    """The peer's IP address (an IPv4 one mapped into IPv6 is unmapped), or None for a peer on a unix socket."""
    if peer_name.startswith("unix:"):
        return None
    address = ip_address(peer_name.rpartition(":")[0].strip("[]").partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


class Export:
    """A named block device with settings. The attributes are read freely; settings change through `change`."""

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        *,
        description: str = "",
        read_only: bool = False,
        shared: bool = False,
        allowed: Iterable[str] = (),
    ) -> None:
        """`allowed`: addresses or networks ("192.0.2.0/24"), none meaning everyone. ExportError for bad ones."""
        _check_text("an export's name", name)
        _check_text("a description", description)
        if not name:
            raise ExportError("an export needs a name")
        self.name = name
        self.device = device
        self.description = description
        self.read_only = read_only
        self.shared = shared
        self.allowed = _networks(allowed)
        self.throttle: Throttle | None = None  # of a volume with limits
        self.sessions: set[ExportSession] = set()
        self._past = Counters()  # of sessions that have left

    @property
    def counters(self) -> Counters:
        """The sum over all sessions since the export was added."""
        total = Counters()
        total.include(self._past)
        for session in self.sessions:
            total.include(session.counters)
        return total

    def limit(self, limits: Limits, clock: Clock) -> None:
        """Set how fast clients may use it, at once; those who wait for old limits go on under the new ones."""
        old = self.throttle
        if limits != (old.limits if old is not None else Limits()):
            self.throttle = Throttle(limits, clock) if limits.any else None
            if old is not None:
                old.end()

    def allows(self, peer_name: str) -> bool:
        """Whether a peer of this name may see and enter the export."""
        address = peer_address(peer_name)
        return not self.allowed or address is None or any(address in network for network in self.allowed)

    def enter(self, session: ExportSession) -> None:
        """Add a session. ExportError when another host writes and the export is not shared."""
        if not self.read_only and not self.shared:
            others = self.hosts() - {session.peer_host}
            if others:
                raise ExportError(
                    f"{self.name} is in use by {', '.join(sorted(others))};"
                    f" disconnect it, or set {self.name} to shared=true"
                )
        self.sessions.add(session)

    def leave(self, session: ExportSession) -> None:
        """Remove a session; nothing happens if it is not there."""
        if session in self.sessions:
            self.sessions.discard(session)
            self._past.include(session.counters)

    def hosts(self) -> set[str]:
        """The hosts whose sessions use the export."""
        return {session.peer_host for session in self.sessions}

    def change(
        self,
        *,
        description: str | None = None,
        read_only: bool | None = None,
        shared: bool | None = None,
        allowed: Sequence[str] | None = None,
    ) -> None:
        """Change settings at once, all or (ExportError) none; None leaves one as it is."""
        new_shared = self.shared if shared is None else shared
        new_read_only = self.read_only if read_only is None else read_only
        networks = self.allowed if allowed is None else _networks(allowed)
        if description is not None:
            _check_text("a description", description)
        if not new_shared and not new_read_only and len(self.hosts()) > 1:
            raise ExportError(
                f"{self.name} is in use by {', '.join(sorted(self.hosts()))};"
                " disconnect all but one of these hosts first"
            )
        self.shared, self.read_only, self.allowed = new_shared, new_read_only, networks
        if description is not None:
            self.description = description
        for session in list(self.sessions):
            if not self.allows(session.peer_name):
                session.disconnect("the export's allowed clients changed")


class Exports:
    """The node's exports by name."""

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._exports.values()))

    def __len__(self) -> int:
        return len(self._exports)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._exports)

    def lookup(self, name: str) -> Export | None:
        """The export of this name, or None."""
        return self._exports.get(name)

    def default(self, peer_name: str) -> Export | None:
        """What the empty name means to a peer: the only volume that it may see; snapshots do not count."""
        visible = [export for export in self.visible(peer_name) if "@" not in export.name]
        return visible[0] if len(visible) == 1 else None

    def visible(self, peer_name: str) -> list[Export]:
        """The exports that a peer may see, by name."""
        return [self._exports[name] for name in self.names() if self._exports[name].allows(peer_name)]

    def add(self, export: Export) -> None:
        """ExportError if the name is taken."""
        if export.name in self._exports:
            raise ExportError(f"there is already an export {export.name}")
        self._exports[export.name] = export

    def rename(self, export: Export, name: str) -> None:
        """Give one of the exports another name; its sessions go on. ExportError if the name is taken."""
        if name in self._exports:
            raise ExportError(f"there is already an export {name}")
        del self._exports[export.name]
        export.name = name
        self._exports[name] = export

    def remove(self, name: str) -> Export:
        """Take an export out and disconnect its sessions; the caller closes the device. ExportError without one."""
        export = self._exports.pop(name, None)
        if export is None:
            raise ExportError(f"there is no export {name}")
        for session in list(export.sessions):
            session.disconnect("the export was removed")
        return export


def _networks(texts: Iterable[str]) -> tuple[IPNetwork, ...]:
    networks = []
    for text in texts:
        try:
            networks.append(ip_network(text))
        except ValueError as error:
            raise ExportError(
                f"{text!r} is no address or network such as 192.0.2.7 or 2001:db8::/64 ({error})"
            ) from error
    return tuple(networks)


def _check_text(what: str, text: str) -> None:
    if len(text.encode()) > NAME_LIMIT_BYTES or "\0" in text:
        raise ExportError(f"{what} is limited to {NAME_LIMIT_BYTES} bytes without a zero byte")
