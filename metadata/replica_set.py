"""Who owns a replicated family and who is in sync: one value in the registry, and how it is changed.

Theory. Everything that must not be decided twice is in this value, and it is only ever swapped against its old bytes.
A swap may end without an answer; then it was made, or not, or will yet be made. `Change` makes it again until that is
known. This ends because each value has a number that rises: bytes that were replaced never come back, and whose value
it is can be told from its number, epoch and owner.

Rules
- One change of one writer at a time.
- A value of a newer version is refused, not guessed at.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from metadata.registry_calls import Change as KeyChange
from metadata.registry_calls import Event, Outcome, Reading, Swap, Unavailable
from metadata.seams import Clock, Timer, Watch

_VERSION = 1
_AGAIN_S = 0.2  # after an answer that did not settle anything


class ReplicaSetError(Exception):
    """The value cannot be used; one line."""


class ReplicaSets(Protocol):
    """What is needed of the Registry seam for these values."""

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None: ...

    def swap_later(self, changes: Sequence[KeyChange], done: Callable[[Swap], None]) -> None: ...

    def watch(self, prefix: str, changed: Callable[[Event], None]) -> Watch: ...


@dataclass(frozen=True)
class Member:
    """A replica as it was when it was found to be in sync."""

    node: str
    incarnation: int


@dataclass(frozen=True)
class ReplicaSet:
    """The value of one family."""

    epoch: int
    owner: str
    in_sync: tuple[Member, ...]
    placement: tuple[str, ...]
    """Nodes that have a replica, or are to have one."""
    generation: int = 1
    """Raised when acknowledged writes may be gone."""
    number: int = 1
    """Of this value."""
    leaving: tuple[str, ...] = ()
    """Of the placement: members that are to go when all the others are in sync."""

    def member(self, node: str) -> Member | None:
        """The member on that node."""
        return next((member for member in self.in_sync if member.node == node), None)

    def changed(self, **values: Any) -> "ReplicaSet":
        """The value that is to follow this one."""
        return replace(self, number=self.number + 1, **values)

    def without(self, *nodes: str) -> "ReplicaSet":
        """The next value, without the members on these nodes; those that are leaving are gone."""
        gone = [node for node in nodes if node in self.leaving]
        return self.changed(
            in_sync=tuple(member for member in self.in_sync if member.node not in nodes),
            placement=tuple(node for node in self.placement if node not in gone),
            leaving=tuple(node for node in self.leaving if node not in gone),
        )

    def with_member(self, added: Member) -> "ReplicaSet":
        """The next value, with this member in place of any other on its node."""
        others = tuple(member for member in self.in_sync if member.node != added.node)
        return self.changed(in_sync=(*others, added))

    def adds_to(self, before: "ReplicaSet") -> bool:
        """Whether there is a member on a node that had none."""
        return any(before.member(member.node) is None for member in self.in_sync)

    @property
    def staying(self) -> tuple[str, ...]:
        """Nodes that have a replica, or are to have one, and are not leaving."""
        return tuple(node for node in self.placement if node not in self.leaving)

    def placed(self, nodes: Sequence[str]) -> "ReplicaSet":
        """The next value, with replicas on these nodes; members elsewhere are leaving."""
        leaving = tuple(member.node for member in self.in_sync if member.node not in nodes)
        return self.changed(placement=(*nodes, *leaving), leaving=leaving)

    @property
    def can_let_go(self) -> bool:
        """Whether somebody is leaving who is not needed any more. An owner stays as long as it is that."""
        is_whole = all(self.member(node) is not None for node in self.staying)
        return is_whole and any(node != self.owner for node in self.leaving)

    def without_leaving(self) -> "ReplicaSet":
        """The next value, when it can let go."""
        return self.without(*(node for node in self.leaving if node != self.owner))

    def encode(self) -> bytes:
        """As it is in the registry."""
        return json.dumps({"version": _VERSION, **asdict(self)}, separators=(",", ":"), sort_keys=True).encode()

    @staticmethod
    def decode(value: bytes) -> "ReplicaSet":
        """ReplicaSetError."""
        try:
            content = json.loads(value)
            version = content.pop("version")
            if version != _VERSION:
                raise ReplicaSetError(f"it has version {version}, this program knows version {_VERSION}")
            members = tuple(Member(**member) for member in content.pop("in_sync"))
            placement, leaving = tuple(content.pop("placement")), tuple(content.pop("leaving", ()))
            return ReplicaSet(in_sync=members, placement=placement, leaving=leaving, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReplicaSetError(f"it is damaged: {error}") from error


REPLICA_SETS = "replicas/"
"""What the keys of all of them begin with."""


def replica_set_key(family: bytes) -> str:
    """Its key in the registry."""
    return REPLICA_SETS + family.hex()


Settled = Callable[[bool, ReplicaSet | None], None]
"""(whether it was made, the value that is there now; None if there is none or it cannot be read)."""


class Change:
    """One change of the value, made again until it is known what became of it."""

    def __init__(
        self, clock: Clock, registry: ReplicaSets, key: str, old: ReplicaSet, new: ReplicaSet, done: Settled
    ) -> None:
        """`done` is called once, unless it is cancelled."""
        self._new = new
        self._clock = clock
        self._registry = registry
        self._key = key
        self._swap = KeyChange(key, old.encode(), new.encode())
        self._done: Settled | None = done
        self._timer: Timer | None = None
        self._try()

    def cancel(self) -> None:
        """Nobody waits any more; it may yet be made."""
        self._done = None
        if self._timer is not None:
            self._timer.cancel()

    def _try(self) -> None:
        self._timer = None
        self._registry.swap_later([self._swap], self._swapped)

    def _again(self) -> None:
        if self._done is not None:
            self._timer = self._clock.call_later(_AGAIN_S, self._try)

    def _swapped(self, swap: Swap) -> None:
        if swap.outcome is Outcome.SWAPPED:
            self._settle(True, self._new)
        elif swap.outcome is Outcome.LOST:
            self._registry.get_later(self._key, self._read)
        else:
            self._again()

    def _read(self, answer: Reading | Unavailable) -> None:
        if isinstance(answer, Unavailable):
            self._again()
            return
        value = answer.items[0][1] if answer.items else None
        if value == self._swap.new:
            self._settle(True, self._new)  # an earlier try was made
            return
        try:
            self._settle(False, None if value is None else ReplicaSet.decode(value))
        except ReplicaSetError:
            self._settle(False, None)

    def _settle(self, made: bool, there: ReplicaSet | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(made, there)
