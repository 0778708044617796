"""Disks with little room in the world `replicas`: some nodes have a file system of a few segments.

Theory. Room is asked for before ordering (docs/replication.md, rule 18), so a full member costs nobody anything but
ENOSPC: writes, snapshots and clones may be refused, everything else goes on. A member that is removed because it
cannot append was given what it had no room for.

Rules
- Which runs have small disks is drawn apart: the others are what they would be without any.
- Who has come back is not judged: what was ordered before it counted was not held against its room.

Known weakness: room is added before all must come to be in sync.
"""

import errno as errnos
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.simulation.cluster.machine import DRIVE_BYTES
from tests.simulation.registers import ViolationError
from tests.simulation.simulated_files import HELD_BACK_BYTES

if TYPE_CHECKING:
    from tests.simulation.replication.on_log_disks import LogScenario

REFUSED_FOR_ROOM = "no room"  # in the reason of a removal
FLOOD = 200
SMALL = (14, 14, 20, 32)
SHARE = 0.2  # of the runs that have small disks


def drawn_room_segments(seed: int) -> int:
    """How many segments have room on the small disks of a seed's run; 0: there are none."""
    rng = random.Random(f"{seed} small disks")
    return rng.choice(SMALL) if rng.random() < SHARE else 0


class SmallDisks:
    """Of one run; none, mostly."""

    def __init__(self, scenario: "LogScenario", rng: random.Random, segments: int) -> None:
        """`segments`: so many have room on each of the small ones, 0: there are none."""
        self._scenario = scenario
        self._segments = segments
        self._share = rng.choice([0.3, 1.0]) if segments else 0.0  # of the nodes
        self._random = rng
        self._names: list[str] = []
        self._returned: set[str] = set()
        self.flood = FLOOD if segments else 0
        """Large writes at the beginning."""
        self.flooded_blocks = rng.choice([1, 150, 600]) if segments else 1
        """Of each region, where large writes begin."""

    def begin(self, names: Sequence[str], segment_bytes: int) -> None:
        """Before they start: make some of their disks small."""
        if self._segments:
            self._names = [name for name in names if self._random.random() < self._share] or [names[0]]
            self._set_room(self._segments * segment_bytes + HELD_BACK_BYTES)

    def _set_room(self, size_bytes: int) -> None:
        for name in self._names:
            self._scenario.cluster.machines[name].drive.capacity_bytes = size_bytes
            self._scenario.cluster.tell(f"the disk of {name} has room for {size_bytes - HELD_BACK_BYTES} bytes")

    def may_refuse(self, errno: int) -> bool:
        """Whether lack of room can be the cause."""
        return errno == errnos.ENOSPC and bool(self._names)

    def judge(self, kind: str, fields: dict[str, object]) -> None:
        """What a node reports."""
        if kind == "replica-added":
            self._returned.add(str(fields["node"]))
        if fields.get("node") in self._returned:
            return
        if kind == "replica-removed" and REFUSED_FOR_ROOM in str(fields["reason"]):
            raise ViolationError(f"{fields['node']} was sent what it has no room for")

    def heal(self) -> None:
        """Somebody adds room."""
        self._set_room(DRIVE_BYTES)
