"""Who a node of the directory is, and what it may publish."""

from dataclasses import dataclass

from metadata.directory.registry_keys import EVERYBODYS
from protocol.directory import (
    KEY_LIMIT_BYTES,
    PREFIXES_LIMIT,
    VALUE_LIMIT_BYTES,
    Action,
    NodeKind,
    Update,
)
from protocol.directory_control import NAME_LIMIT_BYTES
from protocol.sealed_frames import ClusterKeys

EXPIRES_LIMIT_S = 4_000_000.0  # in milliseconds it fits into four bytes
OWN_PREFIXES_LIMIT = PREFIXES_LIMIT - len(EVERYBODYS)


@dataclass(frozen=True)
class DirectorySettings:
    """Who a node is. ValueError for what cannot be."""

    name: str
    kind: NodeKind
    datagrams: str
    """Address to receive datagrams at; second-kind nodes use it for nothing."""
    streams: str
    """Address to accept streams at."""
    keys: ClusterKeys
    prefixes: tuple[str, ...] = ()
    """What a second-kind node subscribes to, besides members and master."""
    least_incarnation: int = 0
    """Of this life, whatever the store says: higher than any that began earlier, also if the store is older than they
    are. The others take nothing from a life that is over."""

    def __post_init__(self) -> None:
        if len(self.prefixes) > OWN_PREFIXES_LIMIT:
            raise ValueError(f"a node subscribes to at most {OWN_PREFIXES_LIMIT} prefixes, not {len(self.prefixes)}")
        for prefix in self.prefixes:
            if len(prefix.encode()) > KEY_LIMIT_BYTES:
                raise ValueError(f"a prefix has at most {KEY_LIMIT_BYTES} bytes; {prefix[:40]!r} has more")
        for text in (self.name, self.datagrams, self.streams):
            if not 0 < len(text.encode()) <= NAME_LIMIT_BYTES:
                raise ValueError(f"names and addresses have 1 to {NAME_LIMIT_BYTES} bytes; {text[:40]!r} has not")

    @property
    def subscription(self) -> tuple[str, ...]:
        """The prefixes of what this node gets; () for everything."""
        return () if self.kind is NodeKind.FIRST else tuple(sorted({*EVERYBODYS, *self.prefixes}))


def publication(key: str, value: bytes | None, expires_s: float) -> Update:
    """The update that puts (or deletes: None) a key. ValueError for what no directory takes."""
    size_bytes = len(key.encode())
    if not 0 < size_bytes <= KEY_LIMIT_BYTES or "\0" in key:
        raise ValueError(f"a key has 1 to {KEY_LIMIT_BYTES} bytes and no NUL; {key[:40]!r} has {size_bytes} bytes")
    if value is not None and len(value) > VALUE_LIMIT_BYTES:
        raise ValueError(f"a value has at most {VALUE_LIMIT_BYTES} bytes, not {len(value)}")
    if not 0 <= expires_s <= EXPIRES_LIMIT_S:
        raise ValueError(f"a value expires within {EXPIRES_LIMIT_S:.0f} seconds, not {expires_s:g}")
    action = Action.DELETE if value is None else Action.PUT
    return Update(action, key, value or b"", expires_ms=round(1000 * expires_s))
