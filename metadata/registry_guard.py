"""Whether a registry is the one that this node has seen, and not an earlier state of it, or another one.

Theory. What is in the registry must never go back: an old value of a replica set names members that lack what was
acknowledged since. etcd goes back when it is restored from a backup, and is empty when it was lost. So each node
remembers how far the registry was when it saw it last, and takes nothing from one that is not as far. It goes on as
while etcd cannot be reached, until somebody has made the registry whole again (nbdserver/node/recovery.py), which gives
it another *life*, with a higher number, and notes in which etcd cluster it is at *home* from then on.

Rules
- What is not at home was restored from a backup: it is refused by everybody, also by who has seen nothing before.
- Revisions are compared within one life of one etcd cluster.
- A higher life is taken as it is: who has begun it has asked the nodes for what they know.

Known weakness: an etcd cluster that is put back without another token and under the same addresses has the same id. A
node that had seen nothing of what was lost, because it was away, does not notice; the others do. An empty one is taken
by who has seen none before.
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

    def is_another_than(self, before: "RegistryPast | None") -> bool:
        """Whether it is more than some changes further."""
        return before is None or (self.life, self.cluster_id) != (before.life, before.cluster_id)

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

    def __init__(self, past: RegistryPast | None, is_recovering: bool = False) -> None:
        """`past` None: nothing yet. `is_recovering`: for who makes whole what is there, whatever it is."""
        self.past = past
        self._is_recovering = is_recovering
        self.refused = ""
        """Why what was found last is not taken; "" if it is."""

    def admit(self, there: RegistryPast, home: int) -> str:
        """Why this is not the registry that was seen; "" if it is, which is remembered. `home`: the id of the etcd
        cluster that it belongs to, as it says itself."""
        self.refused = "" if self._is_recovering else _why_not(self.past, there, home)
        if not self.refused:
            self.past = there
        return self.refused

    def saw(self, revision: int) -> None:
        """The one that was admitted is so far now."""
        if self.past is not None and revision > self.past.revision:
            self.past = replace(self.past, revision=revision)


def _why_not(past: RegistryPast | None, there: RegistryPast, home: int) -> str:
    if home != there.cluster_id:
        what = "it was restored from a backup"
    elif past is None or there.life > past.life:
        return ""
    elif there.life < past.life:
        what = "it is empty, or from before it was recovered last"
    elif there.cluster_id != past.cluster_id:
        what = "it is another etcd cluster than before"
    elif there.revision < past.revision:
        what = f"it is at revision {there.revision}, and this node has seen {past.revision}"
    else:
        return ""
    return f"etcd was put back to an earlier state, or lost what it had ({what}); see nbdserver cluster recover --help"
