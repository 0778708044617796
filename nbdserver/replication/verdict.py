"""Replicas that hold different things of one region: which of them are right.

Rules
- The higher txid is right: whoever has a lower one lacks a modification.
- At equal txids what more than half of at least three hold is right. Otherwise nobody can say, and nothing is repaired.
"""

from collections import Counter
from collections.abc import Mapping

from protocol.peer import RegionState

MOST_NEEDED = 3
"""So many have to be asked before most of them can be right."""


def right_nodes(states: Mapping[str, RegionState]) -> frozenset[str]:
    """Nodes whose copies of the region are right; empty if that cannot be said."""
    newest_txid = max(state.region_txid for state in states.values())
    newest = {node: state for node, state in states.items() if state.region_txid == newest_txid}
    ((state, count),) = Counter(newest.values()).most_common(1)
    if count < len(newest) and (len(newest) < MOST_NEEDED or 2 * count <= len(newest)):
        return frozenset()
    return frozenset(node for node, each in newest.items() if each == state)
