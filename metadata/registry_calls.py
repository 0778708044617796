"""What is said to a registry and what it answers: the values of the Registry seam, and their bounds.

Theory: the registry may be on another machine, so an answer can be late or never come. A swap therefore has four
outcomes, and the one in the middle is not an error but a result:

    SWAPPED     every change was made, durably, at `revision`
    LOST        some key was not what was expected: nothing was changed
    UNKNOWN     it was sent and no answer came: it was made, or not, or *will yet be made*
    NOT_DONE    it was never sent, or refused for a reason that has nothing to do with others: nothing was changed

Rules
- UNKNOWN is settled by swapping again, not by reading alone: what is under way may arrive after the read. The same
  swap made again is SWAPPED, and then the first one cannot be made any more; or it is LOST, and then a read shows
  whose value is there. This holds because a value that was once replaced never comes back: values carry a number that
  only rises (an epoch), and a key that is made and removed has a name that is used once.
- A change that says what is there already is a check: nothing is written, no watcher hears of it; the other changes
  are made only if it holds. (With a lease it is a change: the key is bound to that lease.)
- All changes of one swap have one revision, and a watcher hears of them in one event.
- Revisions only rise, across all keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

MAX_KEY_BYTES = 512
MAX_CHANGES = 64
MAX_SWAP_BYTES = 1 << 20
"""Keys, expected and new values of one swap together; etcd takes 1.5 MiB with its own framing."""
MAX_RANGE_BYTES = 64 << 20
"""Keys and values of one range together."""
MAX_PENDING_CALLS = 256
MAX_WATCHES = 256
MAX_LEASES = 256
MIN_TTL_S = 2.0
"""etcd gives no shorter lease when its election timeout is the usual second."""
MAX_TTL_S = 3600.0

NO_LEASE = 0

VERSION_KEY = "registry-version"
REGISTRY_VERSION = b"2"
"""The registry's own key, made with it and checked whenever it is opened: a newer one is refused."""
LIFE_KEY = "registry-life"
"""How often the registry was made whole from what the nodes know (registry_guard.py), in decimal; absent: never."""
HOME_KEY = "registry-home"
"""The id of the etcd cluster in which the registry was made, or made whole last, in decimal: a backup of it that was
restored is in another one."""
OWN_PREFIX = "registry-"
"""Of these keys."""
HIDDEN_KEYS = frozenset((VERSION_KEY, HOME_KEY))
"""Those of etcd's own that no range and no watch shows."""
READABLE_VERSIONS = (b"1", REGISTRY_VERSION)
"""An older one is marked with the present version: what is written from then on, an older program could not read."""


class Outcome(Enum):
    """What became of a swap; see above."""

    SWAPPED = "swapped"
    LOST = "lost"
    UNKNOWN = "unknown"
    NOT_DONE = "not done"


@dataclass(frozen=True, slots=True)
class Change:
    """One key of a swap: `expected` becomes `new`; None is absence."""

    key: str
    expected: bytes | None
    new: bytes | None
    lease_id: int = NO_LEASE
    """The key goes when this lease ends; a key that is written without one is bound to none."""

    @property
    def is_check(self) -> bool:
        """True if nothing is to be written."""
        return self.new == self.expected and self.lease_id == NO_LEASE


@dataclass(frozen=True, slots=True)
class Swap:
    """The answer to a swap."""

    outcome: Outcome
    revision: int = 0
    """Of SWAPPED: the revision of these changes, or the present one if all of them were checks."""
    reason: str = ""
    """Of UNKNOWN and NOT_DONE: why, in one line."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The answer to a read: what is there, no older than when it was asked for."""

    revision: int
    items: tuple[tuple[str, bytes], ...]
    """In the order of the keys' UTF-8."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """No answer: nothing is known, nothing was changed that anyone will notice."""

    reason: str
    """One line."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a watcher hears: all that one revision changed below its prefix, or everything anew."""

    revision: int
    is_reset: bool
    """True: `changes` is the whole range as it is; forget what you knew."""
    changes: tuple[tuple[str, bytes | None], ...]
    """None: the key is gone (never in a reset)."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a registry fares, for `status`."""

    is_connected: bool
    since_s: float
    """On the Clock: when `is_connected` last changed."""
    endpoint: str
    """The one in use, or tried last; "" for a registry of this process."""
    last_error: str
    """One line, also after it has passed; "" for none so far."""
    pending_calls: int


def check_changes(changes: Sequence[Change]) -> None:
    """Raise ValueError for a swap that no registry takes."""
    if not 0 < len(changes) <= MAX_CHANGES:
        raise ValueError(f"a swap has 1 to {MAX_CHANGES} changes, not {len(changes)}")
    size_bytes = 0
    keys = set()
    for change in changes:
        check_key(change.key)
        if change.key in keys:
            raise ValueError(f"a swap changes a key once; {change.key!r} is there twice")
        if change.lease_id != NO_LEASE and change.new is None:
            raise ValueError(f"{change.key!r} is removed: there is nothing to bind to a lease")
        keys.add(change.key)
        size_bytes += len(change.key.encode()) + len(change.expected or b"") + len(change.new or b"")
    if size_bytes > MAX_SWAP_BYTES:
        raise ValueError(f"a swap has at most {MAX_SWAP_BYTES} bytes of keys and values, not {size_bytes}")


def check_key(key: str) -> None:
    """Raise ValueError for a key that no registry takes."""
    size_bytes = len(key.encode())
    if not 0 < size_bytes <= MAX_KEY_BYTES or "\0" in key:
        raise ValueError(f"a key has 1 to {MAX_KEY_BYTES} bytes and no NUL; {key[:40]!r} has {size_bytes} bytes")
    if key == VERSION_KEY:
        raise ValueError(f"{VERSION_KEY!r} is the registry's own key")


def check_prefix(prefix: str) -> None:
    """Raise ValueError for a prefix that no registry takes; "" is every key."""
    size_bytes = len(prefix.encode())
    if size_bytes > MAX_KEY_BYTES or "\0" in prefix:
        raise ValueError(f"a prefix has at most {MAX_KEY_BYTES} bytes and no NUL; {prefix[:40]!r} has {size_bytes}")


def check_ttl(ttl_s: float) -> None:
    """Raise ValueError for a lease that no registry gives."""
    if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise ValueError(f"a lease lasts {MIN_TTL_S:g} to {MAX_TTL_S:g} seconds, not {ttl_s:g}")


def end_of_prefix(prefix: bytes) -> bytes:
    """Return the first key, in UTF-8, that is above every key beginning with `prefix`."""
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else b"\xff"
