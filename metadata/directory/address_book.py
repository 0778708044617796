"""Who the members are and where each node is reached.

Rules
- Members are what the map says under `member/`; what is there and is no member's record is nobody.
- A node that asks to join is reached where it says, until it is a member; JOINING_LIMIT are remembered, then they have
  to ask again.
- A master that is not in the map is reached where the registry says.
- Datagrams go between first-kind nodes only.
"""

from bisect import bisect_left, insort
from collections.abc import Callable

from metadata.directory.map import DirectoryMap
from metadata.directory.registry_keys import MEMBER_PREFIX, MasterState, Member
from protocol.directory import NodeKind

JOINING_LIMIT = 1024


class AddressBook:
    """As one node knows it."""

    def __init__(self, directory: DirectoryMap, kind: NodeKind, state: Callable[[], MasterState | None]) -> None:
        """`kind` is this node's, `state()` the registry's state if it is known."""
        self.members: dict[int, Member] = {}
        """By id."""
        self.relays: list[int] = []
        """The ids of the first-kind members, rising."""
        self._of_key: dict[str, int] = {}
        self._kind = kind
        self._state = state
        self._joining: dict[int, Member] = {}
        for key, value in directory.range(MEMBER_PREFIX):
            self.changed(key, value)

    def changed(self, key: str, value: bytes | None) -> None:
        """The map has this under `member/` now."""
        before = self._of_key.get(key)
        if before is not None:
            self._drop(before)
        member = Member.decode(key, value) if value is not None else None
        if member is None:
            return
        if member.node in self.members:  # under another name: the newer record counts
            self._drop(member.node)
        self.members[member.node] = member
        self._of_key[key] = member.node
        if member.kind is NodeKind.FIRST:
            insort(self.relays, member.node)

    def _drop(self, node: int) -> None:
        member = self.members.pop(node)
        del self._of_key[member.key]
        if member.kind is NodeKind.FIRST:
            del self.relays[bisect_left(self.relays, node)]

    def joins(self, member: Member) -> None:
        """A node asks to join and says where it is."""
        if len(self._joining) >= JOINING_LIMIT:
            self._joining.clear()
        self._joining[member.node] = member

    def forget_joining(self) -> None:
        self._joining.clear()

    def addresses(self, node: int) -> tuple[str, str]:
        """Where it takes datagrams from this node, and streams; "" if not at all, or not known."""
        member = self.members.get(node) or self._joining.get(node)
        state = self._state()
        if member is not None:
            datagrams = member.datagrams if self._kind is member.kind is NodeKind.FIRST else ""
            return (datagrams, member.streams)
        if state is not None and state.master == node:
            return (state.datagrams if self._kind is NodeKind.FIRST else "", state.streams)
        return ("", "")

    def streams(self, node: int) -> str:
        """Where it takes streams."""
        return self.addresses(node)[1]
