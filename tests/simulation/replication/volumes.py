"""What a replicated family's volumes, snapshots and clones may be and hold: the judge of the world `replicas`.

Theory. Each volume has a register a block. A snapshot shows for ever what its volume may have held when it was asked
for; a clone begins with what its snapshot may show. What was answered is there, and durable; what is in doubt, because
its node died or was deposed, is there or not. It is settled by the next owner that may answer: what that shows is so
from then on.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from nbdserver.logdisk.disk import LogDisk
from tests.simulation.registers import BLOCK_BYTES, ZEROS, Registers, ViolationError

Content = Mapping[int, frozenset[bytes]]
"""What each block may hold; blocks that are not named are zeros."""


@dataclass
class Snapshot:
    """What one of them may show."""

    content: Content
    size_bytes: int
    is_sure: bool  # it is there; else perhaps


class Volume:
    """What one of them may be."""

    def __init__(self, content: Content, size_bytes: int) -> None:
        self.registers = Registers()
        self.sizes_bytes = {size_bytes}  # one of these
        self.snapshots: dict[str, Snapshot] = {}
        for lba, contents in content.items():
            register = self.registers.block(lba)
            register.settle(set(contents), 0)
            register.ever |= contents

    def content(self) -> Content:
        """What each block may hold now."""
        return {lba: frozenset(register.now()) for lba, register in self.registers.blocks.items()}

    def sure(self) -> list[str]:
        """The snapshots that are there."""
        return sorted(name for name, snapshot in self.snapshots.items() if snapshot.is_sure)

    def look(self, number: int, size_bytes: int, names: set[str]) -> None:
        """The owner shows that it has this size and these snapshots."""
        if size_bytes not in self.sizes_bytes:
            raise ViolationError(f"volume {number} has {size_bytes} bytes, and not one of {sorted(self.sizes_bytes)}")
        self.sizes_bytes = {size_bytes}
        if lost := set(self.sure()) - names:
            raise ViolationError(f"snapshots {sorted(lost)} of volume {number} are gone")
        if strangers := names - set(self.snapshots):
            raise ViolationError(f"snapshots {sorted(strangers)} of volume {number} were never asked for, or are back")
        self.snapshots = {name: snapshot for name, snapshot in self.snapshots.items() if name in names}
        for snapshot in self.snapshots.values():
            snapshot.is_sure = True


class Volumes:
    """All of one family, by number."""

    def __init__(self, size_bytes: int) -> None:
        self.sure = {1: Volume({}, size_bytes)}
        self.doubtful: dict[int, Volume] = {}

    def all(self) -> Iterator[Volume]:
        """Those that are there, and those that may be."""
        yield from self.sure.values()
        yield from self.doubtful.values()

    def ask_flush(self) -> Callable[[], None]:
        """A flush is asked for; returns what to call when it is answered."""
        asked = [(volume.registers, volume.registers.tick()) for volume in self.all()]

        def flushed() -> None:
            for registers, moment in asked:
                registers.flushed(moment)

        return flushed

    def went_back(self) -> None:
        """What was acknowledged and not flushed may be gone."""
        for volume in self.all():
            volume.registers.went_back()

    def look(self, disk: LogDisk) -> None:
        """What an owner that may answer shows, when no change of the tree is under way."""
        shown = {row.volume: row.size_bytes for row in disk.volumes()}
        if lost := set(self.sure) - set(shown):
            raise ViolationError(f"volumes {sorted(lost)} are gone")
        if strangers := set(shown) - set(self.sure) - set(self.doubtful):
            raise ViolationError(f"volumes {sorted(strangers)} were never asked for, or are back")
        self.sure |= {number: volume for number, volume in self.doubtful.items() if number in shown}
        self.doubtful.clear()
        for number, volume in self.sure.items():
            volume.look(number, shown[number], {row.name for row in disk.snapshots_of(number)})


def judge_snapshot(what: str, content: Content, lba: int, data: bytes) -> None:
    """Of a snapshot's block, ViolationError if it never was that."""
    allowed = content.get(lba, {ZEROS})
    if data not in {each[: len(data)] for each in allowed}:
        raise ViolationError(f"{what} shows what block {lba} did not hold: {data[:16].hex()}")


def lbas_of(volume: Volume, size_bytes: int) -> list[int]:
    """The blocks that anybody has asked about, as far as they are whole in it."""
    return [lba for lba in sorted(volume.registers.blocks) if (lba + 1) * BLOCK_BYTES <= size_bytes]
