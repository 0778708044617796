"""Members whose disks do not keep up: what everybody else has made durable they have not.

Theory. A client's flush waits for all members. So a device that stands still, or is far slower than the others', holds
up every flush of the volume. It is known by comparison: what a flush waits for, and the owner and all other members had
durable SLOW_S ago, one member has not yet. That one is removed like one that is silent. It follows the stream all the
same, so that it lacks nothing when its disk has kept up with the owner's for CALM_S, and becomes a member again.

Rules
- One that is as slow as any other is not slow; nor is one that is behind with what nobody waits for.
- Of who is only coming back nothing is said: it has much to write. What it lacked when it went is forgotten.

Known weakness: an owner whose own disk is the slow one is not known by this, nor are two slow members of three: then
flushes wait.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # people are told SLOW by the control process, which has no links
    from nbdserver.replication.link import Link

SLOW_S = 1.5
LATE_S = 0.5
"""So much behind is not calm."""
CALM_S = 5.0
SLOW = f"its disk is slow: it has not synced what all others had {SLOW_S:g} s before"


class SlowDisks:
    """Of one owner's set."""

    def __init__(self) -> None:
        self._behind: dict[str, tuple[int, float]] = {}  # by node: (txid that it has not durable, since when)
        self._slow: dict[str, float] = {}  # by node that was removed: when it was behind last

    def is_slow(self, node: str) -> bool:
        """Whether its disk has not kept up, and not been calm since."""
        return node in self._slow

    def look(self, now_s: float, own_txid: int, members: "Sequence[Link]", links: "Mapping[str, Link]") -> str:
        """Time has gone by: the node of a member to be removed, or "". `own_txid`: up to there flushes wait for it, and
        it is durable here."""
        for node in list(self._slow):
            link = links.get(node)
            if link is None:
                del self._slow[node]
            elif self._lag_s(now_s, link, own_txid) >= LATE_S or not link.is_following:
                self._slow[node] = now_s
            elif now_s - self._slow[node] >= CALM_S:
                del self._slow[node]
        for node in self._behind.keys() - self._slow.keys() - {link.node for link in members}:
            del self._behind[node]
        slow = ""
        for link in members:
            others = (other.durable_txid for other in members if other is not link)
            if self._lag_s(now_s, link, min((own_txid, *others))) >= SLOW_S:
                slow = link.node
        if slow:
            self._slow[slow] = now_s
        return slow

    def _lag_s(self, now_s: float, link: "Link", txid: int) -> float:
        """For how long it has not had durable what was so elsewhere; 0.0 if it is not known to lack anything."""
        behind = self._behind.get(link.node)
        if behind is not None and link.durable_txid < behind[0]:
            return now_s - behind[1]
        if link.durable_txid < txid:
            self._behind[link.node] = txid, now_s
        else:
            self._behind.pop(link.node, None)
        return 0.0
