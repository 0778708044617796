"""Exports: what NBD clients name, their live settings, and who uses them.

Theory: an `Export` joins a block device with a name and settings. `Exports` is the node's directory of them. A
session enters an export at the end of its handshake and leaves it when its connection is gone; in between the export
knows it, so that a changed setting acts at once. A node may have several data processes, each with an `Exports`: it has
its own exports, and knows from the others' what a client is told before it enters one (`Listing`), so that everybody
sees all exports wherever he connects. What happens to its own it says to `changed`. Volumes of the cluster are known on
all of its nodes, wherever they are served at the moment, and so are their snapshots, as far as has been heard.

Rules
- *One host writes.* A session that entered an export that is not read-only counts as a writer. A second host is
  refused as long as sessions of the first are connected, unless the export is `shared`. `peer.py` says what a host is.
- Before a host's connection enters, those of its connections that it has closed are dropped, with what waits
  in them: that is not done after what it asks for now.
- Who comes back from a server that was lost, and goes on where it was (`continues`), does not enter if another host
  has, or if the content was changed otherwise, since this process serves the export.
- A client that `admission.py` does not admit neither sees nor enters an export. Whether it is used over TLS is what the
  export says of itself, or else what the node says; an export that lists certificate names requires TLS.
- What is served here is listed as it is here, whatever was heard of it.
- Settings change live: an export made read-only refuses its writers' next write; clients that are no longer allowed
  are disconnected.

Known weakness: hosts behind one address translation look like one host, unless they have certificates of their own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from metadata.seams import Clock
from nbdserver.block import BlockDevice
from nbdserver.volume.admission import Admission, Allowed, TlsMode, admission
from nbdserver.volume.counters import Counters
from nbdserver.volume.limits import Limits, Throttle
from nbdserver.volume.open_batch import OpenBatch
from nbdserver.volume.peer import Peer

NAME_LIMIT_BYTES = 4096  # the protocol's bound on strings


class ExportError(Exception):
    """A request about exports that cannot be fulfilled; the message says why."""


class ExportSession(Protocol):
    """What an export knows of a client that uses it."""

    @property
    def peer(self) -> Peer:
        """Who it is."""

    @property
    def continues(self) -> bool:
        """Whether it goes on where it was, at a server that was lost."""

    @property
    def counters(self) -> Counters:
        """What it has done so far."""

    def has_hung_up(self) -> bool:
        """Whether it has closed its connection, and what it has asked for before that still waits."""

    def disconnect(self, reason: str) -> None:
        """Close the connection now."""

    def moved(self, reason: str) -> None:
        """The export is served by another node from now on: go on there, or close the connection."""


class Listing:
    """What is told of an export to those who may see it, and who that is. The attributes are read freely."""

    def __init__(self, name: str, description: str, allowed: Iterable[str], tls: TlsMode) -> None:
        """`allowed`: networks ("192.0.2.0/24") and certificate names ("cert:web1"), none meaning everyone. ExportError
        for bad ones."""
        _check_text("an export's name", name)
        _check_text("a description", description)
        if not name:
            raise ExportError("an export needs a name")
        self.name = name
        self.description = description
        self.allowed = _allowed(allowed)
        self.tls = tls
        self._node_tls = TlsMode.OFF

    @property
    def tls_in_force(self) -> TlsMode:
        """Its own setting, or else the node's; certificate names require TLS."""
        if self.allowed.names:
            return TlsMode.REQUIRED
        return self._node_tls if self.tls is TlsMode.INHERIT else self.tls

    def admits(self, peer: Peer) -> Admission:
        """Whether a peer may see and enter the export."""
        return admission(peer, self.allowed, self.tls_in_force)

    def inherit_tls(self, mode: TlsMode) -> None:
        """What the node says, at once."""
        self._node_tls = mode


class Elsewhere(Listing):
    """An export of another data process of this node, `worker`; None: of the cluster."""

    def __init__(self, worker: int | None, name: str, description: str, allowed: Iterable[str], tls: TlsMode) -> None:
        super().__init__(name, description, allowed, tls)
        self.worker = worker


class Export(Listing):
    """A named block device with settings, which change through `change`."""

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        *,
        description: str = "",
        read_only: bool = False,
        shared: bool = False,
        allowed: Iterable[str] = (),
        tls: TlsMode = TlsMode.INHERIT,
        lineage: int = 0,
        created_s: int | None = None,
    ) -> None:
        """As a Listing; `lineage` as Forwarded has it (peer_clients.py); `created_s`: when a snapshot was made."""
        super().__init__(name, description, allowed, tls)
        self.device = device
        self.lineage = lineage
        self.created_s = created_s
        self.open_batch = OpenBatch(device)
        self.read_only = read_only
        self.shared = shared
        self.changed: Callable[[], None] | None = None  # its listing
        self.throttle: Throttle | None = None  # of a volume with limits
        self.sessions: dict[ExportSession, None] = {}
        """In the order in which they have come."""
        self._past = Counters()  # of sessions that have left
        self._changed_by = ""  # the host that has entered last, or what has changed the content since

    @property
    def counters(self) -> Counters:
        """The sum over all sessions since the export was added."""
        total = Counters()
        total.include(self._past)
        for session in self.sessions:
            total.include(session.counters)
        return total

    @property
    def traffic(self) -> dict[str, int]:
        """The few of the counters that tell how much is done, without the cost of adding up histograms."""
        every = [self._past, *(session.counters for session in self.sessions)]
        return {
            "requests": sum(counters.requests for counters in every),
            "read_bytes": sum(counters.read_bytes for counters in every),
            "write_bytes": sum(counters.write_bytes for counters in every),
            "answers": sum(counters.latency_us.count for counters in every),
            "latency_us": sum(counters.latency_us.total for counters in every),
        }

    def limit(self, limits: Limits, clock: Clock) -> None:
        """Set how fast clients may use it, at once; those who wait for old limits go on under the new ones."""
        old = self.throttle
        if limits != (old.limits if old is not None else Limits()):
            self.throttle = Throttle(limits, clock) if limits.any else None
            if old is not None:
                old.end()

    def inherit_tls(self, mode: TlsMode) -> None:
        """What the node says, at once: clients that it excludes are disconnected."""
        super().inherit_tls(mode)
        self._disconnect_excluded()

    def enter(self, session: ExportSession) -> None:
        """Add a session. ExportError when another host writes and the export is not shared."""
        for other in list(self.sessions):
            if other.peer.host == session.peer.host and other.has_hung_up():
                other.disconnect("it has hung up, and its host has come again")
        if not self.read_only and not self.shared:
            others = self.hosts() - {session.peer.host}
            if others:
                raise ExportError(
                    f"{self.name} is in use by {', '.join(sorted(others))};"
                    f" disconnect it, or set {self.name} to shared=true"
                )
            if session.continues and self._changed_by not in ("", session.peer.host):
                raise ExportError(f"{self.name} was used by {self._changed_by} meanwhile")
            self._changed_by = session.peer.host
        self.sessions[session] = None

    def note_change(self, by: str) -> None:
        """The content is not what clients that were here know."""
        self._changed_by = by

    def leave(self, session: ExportSession) -> None:
        """Remove a session; nothing happens if it is not there."""
        if session in self.sessions:
            del self.sessions[session]
            self._past.include(session.counters)

    def hosts(self) -> set[str]:
        """The hosts whose sessions use the export."""
        return {session.peer.host for session in self.sessions}

    def change(
        self,
        *,
        description: str | None = None,
        read_only: bool | None = None,
        shared: bool | None = None,
        allowed: Sequence[str] | None = None,
        tls: TlsMode | None = None,
    ) -> None:
        """Change settings at once, all or (ExportError) none; None leaves one as it is."""
        new_shared = self.shared if shared is None else shared
        new_read_only = self.read_only if read_only is None else read_only
        new_allowed = self.allowed if allowed is None else _allowed(allowed)
        if description is not None:
            _check_text("a description", description)
        if not new_shared and not new_read_only and len(self.hosts()) > 1:
            raise ExportError(
                f"{self.name} is in use by {', '.join(sorted(self.hosts()))};"
                " disconnect all but one of these hosts first"
            )
        if self.shared and not new_shared:
            self._changed_by = next(iter(self.hosts()), "")
        self.shared, self.read_only, self.allowed = new_shared, new_read_only, new_allowed
        if description is not None:
            self.description = description
        if tls is not None:
            self.tls = tls
        if self.changed is not None:
            self.changed()
        self._disconnect_excluded()

    def _disconnect_excluded(self) -> None:
        for session in list(self.sessions):
            if self.admits(session.peer) is not Admission.YES:
                session.disconnect("who may use the export, or how, was changed")


class Exports:
    """The node's exports by name. Iterating and `lookup` give those of this process."""

    def __init__(self) -> None:
        self.have_tls = False
        """Whether there are certificates."""
        self.changed: Callable[[str, Export | None], None] | None = None
        """Told of each listing of our own that has changed, by its name; None: it has gone."""
        self._exports: dict[str, Export] = {}
        self._elsewhere: dict[str, Elsewhere] = {}
        self._in_cluster: dict[str, Elsewhere] = {}
        self._tls = TlsMode.OFF

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

    def find(self, name: str) -> Export | Elsewhere | None:
        """The export of this name in whichever process or node. A snapshot of a volume of the cluster is where the
        volume is."""
        here = self._exports.get(name) or self._elsewhere.get(name)
        return here or self._in_cluster.get(volume_of(name))

    def default(self, peer: Peer) -> Export | Elsewhere | None:
        """What the empty name means to a peer: the only volume that it may see; snapshots do not count."""
        visible = [export for export in self.visible(peer) if "@" not in export.name]
        return visible[0] if len(visible) == 1 else None

    def visible(self, peer: Peer) -> list[Export | Elsewhere]:
        """The exports that a peer may see, by name."""
        known = self._known()
        return [known[name] for name in sorted(known) if known[name].admits(peer) is Admission.YES]

    def note_elsewhere(self, export: Elsewhere) -> None:
        """Another process has this export."""
        export.inherit_tls(self._tls)
        self._elsewhere[export.name] = export

    def forget_elsewhere(self, worker: int, name: str) -> None:
        """That process does not have an export of this name any more; if another one has it, that stays known."""
        if name in self._elsewhere and self._elsewhere[name].worker == worker:
            del self._elsewhere[name]

    def note_in_cluster(self, export: Elsewhere) -> None:
        """The cluster has this volume, or snapshot of one."""
        export.inherit_tls(self._tls)
        self._in_cluster[export.name] = export

    def forget_in_cluster(self, name: str) -> None:
        """The cluster has nothing of this name any more."""
        self._in_cluster.pop(name, None)

    def _known(self) -> dict[str, Export | Elsewhere]:
        known: dict[str, Export | Elsewhere] = {**self._elsewhere, **self._exports}
        return {name: export for name, export in self._in_cluster.items() if volume_of(name) not in known} | known

    def inherit_tls(self, mode: TlsMode) -> None:
        """What the node says about TLS, for the exports that say nothing themselves; at once."""
        self._tls = mode
        for export in (*self._in_cluster.values(), *self._elsewhere.values(), *self._exports.values()):
            export.inherit_tls(mode)

    def tls(self, peer: Peer) -> TlsMode:
        """What a peer is told before it has named an export: required if nothing is to be had without TLS, off if
        nothing is to be had over it."""
        modes = {self._tls} | {export.tls_in_force for export in self._known().values()}
        if modes == {TlsMode.REQUIRED} and peer.address is not None:
            return TlsMode.REQUIRED
        return TlsMode.OFF if modes == {TlsMode.OFF} else TlsMode.ALLOWED

    def add(self, export: Export) -> None:
        """ExportError if the name is taken."""
        if export.name in self._exports:
            raise ExportError(f"there is already an export {export.name}")
        self._exports[export.name] = export
        export.inherit_tls(self._tls)
        export.changed = lambda: self._say(export.name)
        self._say(export.name)

    def rename(self, export: Export, name: str) -> None:
        """Give one of the exports another name; its sessions go on. ExportError if the name is taken."""
        if name in self._exports:
            raise ExportError(f"there is already an export {name}")
        old = export.name
        del self._exports[old]
        export.name = name
        self._exports[name] = export
        self._say(old)
        self._say(name)

    def remove(self, name: str, reason: str = "the export was removed", has_moved: bool = False) -> Export:
        """Take an export out and disconnect its sessions, or, if it `has_moved` to another node, let them go on there;
        the caller closes the device. ExportError without one."""
        export = self._exports.pop(name, None)
        if export is None:
            raise ExportError(f"there is no export {name}")
        export.changed = None  # which refers to it
        self._say(name)
        for session in list(export.sessions):
            (session.moved if has_moved else session.disconnect)(reason)
        return export

    def _say(self, name: str) -> None:
        if self.changed is not None:
            self.changed(name, self._exports.get(name))


def volume_of(name: str) -> str:
    """The volume of an export, which is that or one of its snapshots, `VOLUME@SNAPSHOT`."""
    return name.partition("@")[0]


def snapshot_description(volume: str) -> str:
    """What clients are told of a volume's snapshots."""
    return f"snapshot of {volume}"


def _allowed(texts: Iterable[str]) -> Allowed:
    try:
        return Allowed(texts)
    except ValueError as error:
        raise ExportError(str(error)) from None


def _check_text(what: str, text: str) -> None:
    if len(text.encode()) > NAME_LIMIT_BYTES or "\0" in text:
        raise ExportError(f"{what} is limited to {NAME_LIMIT_BYTES} bytes without a zero byte")
