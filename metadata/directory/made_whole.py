"""`directory/state` of a registry that is made whole, decided from what the nodes know.

Theory: pure. The registry has gone back (metadata/registry_guard.py), so what it holds may be older than what the nodes
have seen. The new state is later than any that is known, and nobody's: no process has incarnation 0. So whoever leads
or is being elected gives up when it hears of it, and a master is elected among the voters.

Rules
- A majority of the voters has to answer: one of them has promised the highest epoch that ever had a master.
- Voters that are given up vote no more: there may be no majority without them.
- Where nobody has seen an epoch there was no directory: it begins as the first one does, whatever nodes there are.

Known weakness: nodes know the state since their start only. When all were restarted the voters are those of the backup,
and what a majority of later ones alone had confirmed may be missing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from metadata.directory.node import DirectoryNode
from metadata.directory.registry_keys import MasterState, Member
from protocol.directory import NodeKind


class MissingVotersError(Exception):
    """Too few of the voters answer."""

    def __init__(self, silent: Sequence[str]) -> None:
        super().__init__(f"{', '.join(silent)} of the directory's voters do not answer")
        self.silent = silent


@dataclass(frozen=True)
class Known:
    """What one node knows of the directory."""

    node: int
    name: str
    is_first: bool
    epoch: int
    """The highest that it has followed or promised."""
    state: MasterState | None
    """As it heard it last; None: not since its start."""


def known_to(directory: DirectoryNode) -> Known:
    """What this node knows."""
    me = directory.me
    epoch = max(directory.epoch, directory.replica.store.promised)
    return Known(me.node, me.name, me.kind is NodeKind.FIRST, epoch, directory.election.state)


def state_from(
    me: Member, known: Sequence[Known], present: MasterState | None, without: Collection[str] = ()
) -> MasterState | None:
    """From what nodes know, and what the registry still holds; nodes `without` are given up. `me`: one that knows, for
    where nothing says who was master. None: there was no master yet. MissingVotersError."""
    states = [each.state for each in known if each.state is not None]
    states += [present] if present is not None else []
    newest = max(states, key=lambda state: state.number, default=None)
    if newest is None:
        if not any(each.epoch for each in known):
            return None
        found = {each.node: each.name for each in known if each.is_first}
        newest = MasterState(0, 0, me.node, 0, me.name, me.datagrams, me.streams, found)
    answering = {each.node for each in known}
    voters = {node: name for node, name in newest.voters.items() if node in answering or name not in without}
    silent = sorted(name for node, name in voters.items() if node not in answering)
    if 2 * len(silent) >= len(voters):
        raise MissingVotersError(silent)
    epoch = max(newest.epoch, *(each.epoch for each in known)) + 1
    return newest.changed(epoch=epoch, incarnation=0, voters=voters)
