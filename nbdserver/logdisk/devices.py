"""Block devices of one family: the head of a volume, which moves from layer to layer, and views of snapshots.

Theory. A `Head` has a reader and a writer that know the layer by two numbers, where its pages begin and its first MBA.
When a snapshot is made, or the volume is rolled back, only these change: whoever has bound the head's methods keeps
them. A `View` is a reader alone; as long as it is open its layer is neither merged nor dropped.

Rules
- An operation that had to wait looks at the maps anew when it goes on, in the layer that is the head's by then. What a
  client sees does not change with a snapshot, so it cannot tell.
- A head whose volume was deleted, and a view that was closed, answer everything with EIO.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from metadata.logical_map import ADDRESS_SHIFT
from metadata.seams import Buffer, Done, Files
from nbdserver.block import BlockRoom, Extents, Later, Operation, RunRoom
from nbdserver.logdisk.reader import Reader
from nbdserver.logdisk.writer import Writer

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk

_READING = (Operation.READ, Operation.EXTENTS, Operation.CACHE)


class Device:
    """What heads and views share: reading one layer."""

    def __init__(self, disk: LogDisk, files: Files, layer: int) -> None:
        self.disk = disk
        self.layer = layer
        self.gone = False
        self.size_bytes = disk.maps.tree.layers[layer].row.size_bytes  # looked at for every batch
        self.reader = Reader(files, disk.maps, disk.pool, layer)
        if disk.failure:
            self.reader.stop()
        self.read: Callable[[int, int], Sequence[Buffer] | None] = self.reader.read
        self.read_blocks: Callable[[Sequence[int], Sequence[BlockRoom], int], Sequence[int]] = self.reader.read_blocks
        self.read_run: Callable[[int, int, RunRoom, int], bool] = self.reader.read_run
        self.extents: Callable[[int, int, int], Extents | None] = self.reader.extents

    @property
    def first_address(self) -> int:
        """Of the layer's block 0."""
        return self.layer << ADDRESS_SHIFT

    def fetch(self, ranges: Sequence[tuple[int, int]], done: Callable[[], None]) -> bool:
        """See BlockDevice."""
        return not self.gone and self.disk.fetching.fetch(self, ranges, done)

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        """See BlockDevice."""
        self.disk.slow_path.submit(self, operation, offset, length, data, done, limit)

    def acknowledged(self, done: Done) -> None:
        """See BlockDevice: no commit is in flight here."""
        self.disk.call_soon(lambda: done(0))

    def bitmaps(self) -> Mapping[str, int]:
        """See BlockDevice: all snapshots of the volume that were made before, on whatever layers they lie."""
        tree = self.disk.maps.tree
        named = tree.names.get(tree.layers[self.layer].row.volume, {}) if not self.gone else {}
        return {name: layer for name, layer in named.items() if layer < self.layer}

    def changed(self, since: int, offset: int, length: int, limit: int, done: Later) -> None:
        """See BlockDevice."""
        self.disk.changed(self, since, offset, length, limit, done)

    def stop(self) -> None:
        """Answer nothing inline any more."""
        self.reader.stop()


class Head(Device):
    """The head of a volume: a BlockDevice. See there."""

    def __init__(self, disk: LogDisk, files: Files, volume: int) -> None:
        super().__init__(disk, files, disk.maps.tree.heads[volume])
        self.volume = volume
        self.writer = Writer(disk.maps, disk.appending, self.reader, self.layer)
        self.write: Callable[[int, memoryview], bool] = self.writer.write
        self.discard: Callable[[int, int], bool] = self.writer.discard
        self.commit: Callable[[], int] = self.writer.commit
        if disk.failure:
            self.writer.stop()

    def move_to(self, layer: int) -> None:
        """The volume's head is another layer now, or has another size or first MBA."""
        self.layer = layer
        self.size_bytes = self.disk.maps.tree.layers[layer].row.size_bytes
        self.reader.move_to(layer)
        self.writer.move_to(layer)

    def flush(self, done: Done) -> None:
        """See BlockDevice."""
        self.disk.flush(done)

    def stop(self) -> None:
        super().stop()
        self.writer.stop()


class View(Device):
    """A snapshot, read-only: a BlockDevice. Close it when nobody looks at it any more."""

    def __init__(self, disk: LogDisk, files: Files, layer: int) -> None:
        super().__init__(disk, files, layer)
        disk.maps.tree.open_view(layer, 1)

    def write(self, offset: int, data: memoryview) -> bool:
        """A snapshot is not written: `later` says so."""
        return False

    def discard(self, offset: int, length: int) -> bool:
        """A snapshot is not written: `later` says so."""
        return False

    def commit(self) -> int:
        """Nothing was written."""
        return 0

    def flush(self, done: Done) -> None:
        """See BlockDevice: nothing was written here, so what was acknowledged is durable."""
        failure = bool(self.disk.failure)
        self.disk.call_soon(lambda: done(errnos.EIO if failure else 0))

    def later(
        self, operation: Operation, offset: int, length: int, data: bytes | None, done: Later, limit: int = 1
    ) -> None:
        """See BlockDevice; EPERM for what would change it."""
        if operation in _READING:
            super().later(operation, offset, length, data, done, limit)
        else:
            self.disk.call_soon(lambda: done(errnos.EPERM, None))

    def close(self) -> None:
        """Nobody looks any more; idempotent."""
        if not self.gone:
            self.gone = True
            self.stop()
            self.disk.view_closed(self)
