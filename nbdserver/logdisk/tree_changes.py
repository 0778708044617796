"""Snapshots, clones, rollback, resizing and deletion: one record in the log each.

Theory. The maps stay where they are; what changes is which layer is whose. A snapshot names the head's layer and puts
an empty one on it; a clone is an empty layer on a snapshot's; rollback is the same for the volume itself, and its old
head becomes nameless. Each is a TREE record with the rows that were made or changed, so its cost depends neither on
the volume's size nor on how many snapshots there are. What becomes superfluous goes in the background
(tree_work.py).

Rules
- `done(0)` comes when the record is durable (Rule.TREE_SYNCED_BEFORE_REPORT), and with it everything that was
  acknowledged before.
- A refusal changes nothing: ENOENT for what is not there, EEXIST for a name or number that is taken, EINVAL for a name,
  size or snapshot that does not fit, EMLINK at MOST_LAYERS or MOST_VOLUMES, EBUSY for a volume that has snapshots,
  ENOSPC, EIO when the family has failed.
- A snapshot shows what was acknowledged before it was asked for and nothing later, so a change waits for no segment: if
  none is at hand it is made on the loop. Only before the first write there is nothing to be late for.
- Shrinking discards what it cuts off before the size changes: a crash in between leaves the old size, and zeros there.

Known weakness: a snapshot waits for an fdatasync, as a flush does.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from metadata.layers import MOST_LAYERS, MOST_VOLUMES, Row, check_name
from metadata.seams import Done
from nbdserver.block import Operation
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.segments import CLIENTS_KEEP, DELETIONS_KEEP
from protocol.disk import HEAD, LAYER_ROW, NAMELESS, SNAPSHOT

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk
    from nbdserver.logdisk.maps import Maps

MOST_BYTES = 1 << 52  # of a volume: 2^40 blocks


class TreeChanges:
    """Changes the tree of layers of one family."""

    def __init__(self, disk: LogDisk) -> None:
        self.count = 0
        self._waiting: list[Callable[[], None]] = []  # for the family's first segment
        self._disk = disk
        self._tree = disk.maps.tree

    def snapshot(self, volume: int, name: str, created_s: int, done: Done) -> None:
        """Name what the volume holds now."""
        layer = self._tree.heads.get(volume)
        if layer is None:
            self._refuse(errnos.ENOENT, done)
        elif check_name(name):
            self._refuse(errnos.EINVAL, done)
        elif name in self._tree.names.get(volume, {}):
            self._refuse(errnos.EEXIST, done)
        elif len(self._tree.layers) >= MOST_LAYERS:
            self._refuse(errnos.EMLINK, done)
        else:
            row = self._tree.layers[layer].row
            named = row._replace(kind=SNAPSHOT, name=name, created_s=created_s)
            again = partial(self.snapshot, volume, name, created_s, done)
            self._change([named, self._new_head(layer, volume, row.size_bytes)], CLIENTS_KEEP, again, done)

    def clone(self, layer: int, volume: int, done: Done) -> None:
        """Make a volume of that number which holds what the snapshot holds."""
        row = self._snapshot_row(layer)
        if row is None:
            self._refuse(errnos.ENOENT, done)
        elif volume in self._tree.heads or volume in self._tree.names:
            self._refuse(errnos.EEXIST, done)
        elif not 0 < volume < 1 << 32:
            self._refuse(errnos.EINVAL, done)
        elif len(self._tree.layers) >= MOST_LAYERS or len(self._tree.heads) >= MOST_VOLUMES:
            self._refuse(errnos.EMLINK, done)
        else:
            again = partial(self.clone, layer, volume, done)
            self._change([self._new_head(layer, volume, row.size_bytes)], CLIENTS_KEEP, again, done)

    def rollback(self, volume: int, layer: int, done: Done) -> None:
        """Make the volume hold what one of its snapshots holds; nobody may have it open."""
        row, head = self._snapshot_row(layer), self._tree.heads.get(volume)
        if row is None or head is None:
            self._refuse(errnos.ENOENT, done)
        elif row.volume != volume:
            self._refuse(errnos.EINVAL, done)
        elif len(self._tree.layers) >= MOST_LAYERS:
            self._refuse(errnos.EMLINK, done)
        else:
            old = self._tree.layers[head].row._replace(kind=NAMELESS)
            again = partial(self.rollback, volume, layer, done)
            self._change([old, self._new_head(layer, volume, row.size_bytes)], DELETIONS_KEEP, again, done)

    def delete_snapshot(self, layer: int, done: Done) -> None:
        """Take a snapshot's name away; its blocks that nothing else shows are freed in the background."""
        row = self._snapshot_row(layer)
        if row is None:
            self._refuse(errnos.ENOENT, done)
        else:
            nameless = row._replace(kind=NAMELESS, name="", created_s=0)
            self._change([nameless], DELETIONS_KEEP, partial(self.delete_snapshot, layer, done), done)

    def delete_volume(self, volume: int, done: Done) -> None:
        """Take the volume's head away; its blocks that nothing else shows are freed in the background."""
        layer = self._tree.heads.get(volume)
        if layer is None:
            self._refuse(errnos.ENOENT, done)
        elif self._tree.names.get(volume):
            self._refuse(errnos.EBUSY, done)
        else:
            nameless = self._tree.layers[layer].row._replace(kind=NAMELESS)
            self._change([nameless], DELETIONS_KEEP, partial(self.delete_volume, volume, done), done)

    def resize(self, volume: int, size_bytes: int, done: Done) -> None:
        """Give the volume another size. What grows reads as zeros; what is cut off is gone."""
        layer = self._tree.heads.get(volume)
        if layer is None:
            self._refuse(errnos.ENOENT, done)
        elif not 0 < size_bytes <= MOST_BYTES:
            self._refuse(errnos.EINVAL, done)
        elif size_bytes >= self._tree.layers[layer].row.size_bytes:
            self._set_size(volume, size_bytes, CLIENTS_KEEP, done)
        else:
            old_bytes = self._tree.layers[layer].row.size_bytes
            keep = self._disk.pool.keep_of_discard(old_bytes - size_bytes)
            # To the end of the last block, so that nothing of it is seen when the volume grows again.
            self._disk.head(volume).later(
                Operation.DISCARD,
                size_bytes,
                (old_bytes + 4095 & ~4095) - size_bytes,
                None,
                lambda errno, _: done(errno) if errno else self._set_size(volume, size_bytes, keep, done),
            )

    def _set_size(self, volume: int, size_bytes: int, keep: int, done: Done) -> None:
        layer = self._tree.heads.get(volume)
        if layer is None:
            self._refuse(errnos.ENOENT, done)
        else:
            again = partial(self._set_size, volume, size_bytes, keep, done)
            self._change([self._tree.layers[layer].row._replace(size_bytes=size_bytes)], keep, again, done)

    def _snapshot_row(self, layer: int) -> Row | None:
        found = self._tree.layers.get(layer)
        return found.row if found is not None and found.row.kind == SNAPSHOT else None

    def _new_head(self, parent: int, volume: int, size_bytes: int) -> Row:
        return Row(self._tree.next_layer, parent, self._disk.maps.next_mba, size_bytes, volume, HEAD)

    def _refuse(self, errno: int, done: Done) -> None:
        self._disk.call_soon(lambda: done(errno))

    def _change(self, rows: Sequence[Row], keep: int, again: Callable[[], None], done: Done) -> None:
        """Append the record, then do what it says. What waits for the family's first segment is asked for again: by
        then it may be another change."""
        disk = self._disk
        if disk.failure:
            self._refuse(errnos.EIO, done)
            return
        if not disk.log.offset and disk.appending.has_to_wait(len(rows) * LAYER_ROW.size, keep):
            self._waiting.append(again)
            return
        try:
            if not disk.appending.make_room_for_rows(len(rows), keep):
                self._refuse(errnos.ENOSPC, done)
                return
            crash_point("tree-before-append")
            disk.log.append_tree([row.pack() for row in rows])
            self.apply(rows)
        except OSError as error:
            errno = disk.append_failed(error)
            self._refuse(errno, done)
            return
        except Exception as error:
            disk.parted(error)
            raise
        self.count += 1
        disk.appending.appended(None)
        crash_point("tree-after-append")
        if holds(Rule.TREE_SYNCED_BEFORE_REPORT):
            disk.log.sync(done)
        else:
            self._refuse(0, done)

    def go_on(self) -> None:
        """Ask again for what waits, before anything that was not asked for by now is done."""
        waiting, self._waiting = self._waiting, []
        for again in waiting:
            again()

    def apply(self, rows: Sequence[Row]) -> None:
        """Do what a TREE record says that was just appended."""
        disk, tree = self._disk, self._tree
        volumes = {row.volume for row in rows}
        apply_rows(disk.maps, rows)
        for volume in volumes:
            layer = tree.heads.get(volume)
            if layer is None:
                disk.volume_deleted(volume)
            else:
                disk.head_moved(volume, layer)
        disk.appending.check_background()


def apply_rows(maps: Maps, rows: Sequence[Row]) -> None:
    """Do what a TREE record says, when it happens and at replay."""
    tree = maps.tree
    for row in rows:
        is_new = row.layer not in tree.layers
        tree.apply(row)
        layer = tree.layers[row.layer]
        layer.dirty_since = tree.next_checkpoint  # it holds all that the layer has by now
        if is_new:
            layer.stored = set()
        maps.next_mba = max(maps.next_mba, row.first_mba)  # rises where another node made them
