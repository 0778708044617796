"""The blocks that were found damaged, by what shows them.

Rules
- A block is noted by layer and LBA: people know it by a volume or a snapshot. A layer that is gone has no reader.
- It stays noted until it is repaired, or a scrub that read everything did not find it; at most MOST_NOTED are.

Known weakness: this is memory. After a restart a damaged block is found by who reads it, or by the next scrub.
"""

from collections.abc import Callable, Mapping

from metadata.layers import Tree
from nbdserver.logdisk.repair import BadBlock
from protocol.disk import SNAPSHOT

MOST_NOTED = 1024


class Damage:
    """Of one family."""

    def __init__(self, tree: Tree, report: Callable[[str, dict[str, object]], None]) -> None:
        self._tree = tree
        self._report = report
        self._noted: dict[tuple[int, int], int] = {}  # (layer, LBA) → MBA

    def __len__(self) -> int:
        return len(self._noted)

    def found(self, layer: int, lba: int, bad: BadBlock, errno: int) -> None:
        """A block that a layer shows could not be read (`errno`), or has the wrong checksum (0)."""
        if len(self._noted) < MOST_NOTED:
            self._noted[layer, lba] = bad.mba
        place = {"lba": lba, "segment": bad.segment, "offset": bad.offset, "errno": errno}
        self._report("checksum-error", {**self._shown_as(layer), **place})

    def repaired(self, mba: int) -> None:
        """The block is right again, whatever shows it."""
        self._noted = {shown: each for shown, each in self._noted.items() if each != mba}

    def is_all(self, noted: Mapping[tuple[int, int], int]) -> None:
        """Everything was read, and no more than these ((layer, LBA): MBA) are damaged."""
        self._noted = dict(sorted(noted.items())[:MOST_NOTED])

    def listed(self) -> list[dict[str, object]]:
        """{number: the volume's, snapshot: its name or "", lba} of each that somebody can read."""
        layers = self._tree.layers
        return [{**self._shown_as(layer), "lba": lba} for layer, lba in sorted(self._noted) if layer in layers]

    def _shown_as(self, layer: int) -> dict[str, object]:
        row = self._tree.layers[layer].row
        return {"number": row.volume, "snapshot": row.name if row.kind == SNAPSHOT else ""}
