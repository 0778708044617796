"""The directory's values in the registry: who is master, who votes, what is kept there.

    directory/state          MasterState, JSON; swapped against its old content only
    directory/lease          the master's name, bound to its lease
    directory-kept           the number of the last change of what is kept
    directory-kept/KEY       number of its change (12 bytes: epoch, count), then the encoded update

Rule: no value ever comes back once it was replaced (metadata/registry_calls.py says why that matters): the state has a
number that rises with each swap, and so has every kept value.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache

from protocol.directory import NodeKind

STATE_KEY = "directory/state"
LEASE_KEY = "directory/lease"
WATCHED = "directory/"
KEPT = "directory-kept"
KEPT_PREFIX = "directory-kept/"
LEASE_TTL_S = 5.0
"""How long a cluster waits for a master that died: long enough that a busy node or a short outage loses no lease."""
STATE_VERSION = 1


class StateError(Exception):
    """A value of the registry that this program cannot read."""


@dataclass(frozen=True)
class MasterState:
    """`directory/state`."""

    number: int
    """Of this value: rises with each swap."""
    epoch: int
    master: int
    """The master's id."""
    incarnation: int
    name: str
    datagrams: str
    streams: str
    """Its addresses."""
    voters: dict[int, str] = field(default_factory=dict)
    """Name of each, by id."""

    def encode(self) -> bytes:
        content = {**asdict(self), "master": f"{self.master:016x}"}
        content["voters"] = {f"{node:016x}": name for node, name in sorted(self.voters.items())}
        return json.dumps({"version": STATE_VERSION, **content}, separators=(",", ":")).encode()

    @staticmethod
    @lru_cache(maxsize=4)
    def decode(value: bytes) -> "MasterState":
        """Raises StateError. The same value gives the same object: nobody changes its voters."""
        try:
            content = json.loads(value)
            version = content.pop("version")
            if version != STATE_VERSION:
                raise StateError(f"{STATE_KEY} has version {version}; this program knows version {STATE_VERSION}")
            content["master"] = int(content["master"], 16)
            content["voters"] = {int(node, 16): name for node, name in content["voters"].items()}
            return MasterState(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{STATE_KEY} cannot be read: {error}") from error

    def changed(self, **values: object) -> "MasterState":
        """The next value."""
        return replace(self, number=self.number + 1, **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Member:
    """The directory's value of `member/NAME`: how a node is reached."""

    node: int
    kind: NodeKind
    name: str
    datagrams: str
    streams: str

    @property
    def key(self) -> str:
        return MEMBER_PREFIX + self.name

    def encode(self) -> bytes:
        content = {
            "id": f"{self.node:016x}",
            "kind": self.kind.name.lower(),
            "datagrams": self.datagrams,
            "streams": self.streams,
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @staticmethod
    def decode(key: str, value: bytes) -> "Member | None":
        """None for what is no member's value: somebody else's key under the prefix disturbs nothing."""
        try:
            content = json.loads(value)
            return Member(
                int(content["id"], 16),
                NodeKind[content["kind"].upper()],
                key.removeprefix(MEMBER_PREFIX),
                str(content["datagrams"]),
                str(content["streams"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


MEMBER_PREFIX = "member/"
MASTER_KEY = "master"
STATE_PREFIX = "state/"
EVERYBODYS = (MEMBER_PREFIX, MASTER_KEY, STATE_PREFIX)
"""What every node subscribes to."""
