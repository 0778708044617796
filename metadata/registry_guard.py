"""Whether a registry is the one that this node has seen, and not an earlier state of it, or another one.

Theory. What is in the registry must never go back: an old value of a replica set names members that lack what was
acknowledged since. etcd goes back when it is restored from a backup, and is empty when it was lost. So each node
remembers how far the registry was when it saw it last, and takes nothing from one that is not as far. It goes on as
while etcd cannot be reached, until somebody has made the registry whole again (nbdserver/node/recovery.py), which gives
it another *life*, with a higher number.

Rules
- Revisions are compared within one life of one etcd cluster.
- A higher life is taken as it is: who has begun it has asked the nodes for what they know.

Known weakness: an etcd cluster that is put back without another token and under the same addresses has the same id. A
node that had seen nothing of what was lost, because it was away, does not notice; the others do.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RegistryPast:
    """How far a registry is."""

    life: int
    """How often it was made whole from what the nodes know."""
    cluster_id: int
    """Of etcd."""
    revision: int

    def encode(self) -> bytes:
        """As a node keeps it."""
        return f"{self.life} {self.cluster_id} {self.revision}".encode()

    @staticmethod
    def decode(value: bytes) -> "RegistryPast":
        """ValueError if it is none."""
        life, cluster_id, revision = map(int, value.split())
        return RegistryPast(life, cluster_id, revision)


class RegistryGuard:
    """What one node has seen of its cluster's registry."""

    def __init__(self, past: RegistryPast | None) -> None:
        """None: nothing yet."""
        self.past = past
        self.refused = ""
        """Why what was found last is not taken; "" if it is."""

    def admit(self, there: RegistryPast) -> str:
        """Why this is not the registry that was seen; "" if it is, which is remembered."""
        self.refused = "" if self.past is None else _why_not(self.past, there)
        if not self.refused:
            self.past = there
        return self.refused

    def saw(self, revision: int) -> None:
        """The one that was admitted is so far now."""
        if self.past is not None and revision > self.past.revision:
            self.past = replace(self.past, revision=revision)


def _why_not(past: RegistryPast, there: RegistryPast) -> str:
    if there.life > past.life:
        return ""
    if there.life < past.life:
        what = "it is empty, or from before it was recovered last"
    elif there.cluster_id != past.cluster_id:
        what = "it is another etcd cluster than before"
    elif there.revision < past.revision:
        what = f"it is at revision {there.revision}, and this node has seen {past.revision}"
    else:
        return ""
    return f"etcd was put back to an earlier state, or lost what it had ({what}); see nbdserver cluster recover --help"
