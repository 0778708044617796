"""A family of many mapped blocks without their data: maps and segment table made through the product's own code.

Twenty million blocks are 80 GB of data that no benchmark wants to write. So the segment files are sparse: every block
in them reads as zeros, and the maps carry the checksum of a block of zeros. What is measured on top (open, lookup,
recovery) cannot tell: the maps in LevelDB, the segment table and the segments' number are those of a family of that
size, and every read is still verified.

Blocks are spread evenly over the volume, each at a place of its own within its share. MBAs are shuffled against LBAs
within each chunk, so that neighbours in the volume are not neighbours in the middle map, as after random writes.

Known weakness: the records in the segments are holes too, so `check` and the cleaner would find nothing there; the
disk is opened, read and appended to, not cleaned.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from metadata.family_state import put_checkpoint, put_open_state, read_checkpoint, read_open_state
from metadata.leveldb import LevelStore
from metadata.logical_map import ADDRESS_SHIFT
from metadata.pages import PAGE_BLOCKS, PAGE_SHIFT
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.segments import segment_path
from protocol.checksum import crc32c
from protocol.disk import BLOCK_BYTES, SEGMENT_HEADER_BYTES

CHUNK_BLOCKS = 1 << 17  # a page of the logical map for each: 300 MB in memory, a LevelDB batch of 10 MB
CACHE_BYTES = 64 << 20
EPOCH = 1
SEGMENT_BYTES = 64 << 20
ZEROS_CRC = crc32c(bytes(BLOCK_BYTES))


@dataclass(frozen=True)
class Spread:
    """Where the mapped blocks of a volume lie."""

    size_bytes: int
    blocks: int

    def lba(self, index: int) -> int:
        """LBA of mapped block `index`; Knuth's multiplicative hash gives the jitter."""
        volume_blocks = self.size_bytes // BLOCK_BYTES
        start = index * volume_blocks // self.blocks
        room = (index + 1) * volume_blocks // self.blocks - start
        return start + index * 2654435761 % room


def fill(directory: Path, store: LevelStore, spread: Spread, progress: Callable[[int], None]) -> None:
    """Map every block of `spread` in a freshly formatted family, chunk by chunk, and leave a checkpoint behind."""
    segment_blocks = (SEGMENT_BYTES - SEGMENT_HEADER_BYTES) // BLOCK_BYTES
    maps = Maps(store, CACHE_BYTES, _refuse)
    maps.tree.load(store, 0)
    maps.begin_epoch(EPOCH)
    shuffle = random.Random(1).shuffle
    segment = first = 0
    while first < spread.blocks:
        stop = _chunk_end(spread, first)
        mbas = list(range(maps.next_mba, maps.next_mba + stop - first))
        maps.take_mbas(maps.next_mba + stop - first)
        shuffle(mbas)
        for place, mba in enumerate(mbas, first):
            slot = place % segment_blocks
            if not slot:
                segment += 1
                _begin_segment(directory, maps, segment)
            lba = spread.lba(place)
            address = 1 << ADDRESS_SHIFT | lba
            if maps.logical.get(address >> PAGE_SHIFT) is None:
                maps.logical.create(address >> PAGE_SHIFT)
            maps.set_logical(address, 1, mba)
            maps.set_middle(mba, segment, SEGMENT_HEADER_BYTES + slot * BLOCK_BYTES, ZEROS_CRC)
            maps.regions.mark(lba, 1, segment)
        _checkpoint(store, maps, segment, is_last=stop == spread.blocks)
        maps.next_mba = -(-maps.next_mba // PAGE_BLOCKS) * PAGE_BLOCKS  # the page given out from may be evicted now
        progress(stop - first)
        first = stop


def _chunk_end(spread: Spread, first: int) -> int:
    """The index behind a chunk from `first` on; a chunk ends with a page of the logical map."""
    stop = min(first + CHUNK_BLOCKS, spread.blocks)
    while stop < spread.blocks and spread.lba(stop) >> PAGE_SHIFT == spread.lba(stop - 1) >> PAGE_SHIFT:
        stop += 1
    return stop


def _begin_segment(directory: Path, maps: Maps, segment: int) -> None:
    maps.segments.begin(segment, segment, bytes(8))
    maps.segments.appended(segment, SEGMENT_BYTES, segment, segment)
    with (directory / segment_path(segment)).open("wb") as file:
        file.truncate(SEGMENT_BYTES)


def _checkpoint(store: LevelStore, maps: Maps, segment: int, is_last: bool) -> None:
    """What a checkpoint writes, in the form that it writes it. The last one says where the log goes on."""
    maps.logical.freeze()
    maps.middle.freeze()
    maps.regions.freeze()
    maps.tree.freeze()
    batch = store.batch()
    rows = maps.segments.freeze(segment, segment, segment)
    for steps in (
        maps.segments.encode(batch, rows),
        maps.logical.encode(batch, {}, {}, {}),
        maps.middle.encode(batch, {}, {}, {}),
        maps.regions.encode(batch),
    ):
        for _ in steps:
            pass
    if is_last:
        position = replace(
            read_checkpoint(store),
            lsn=segment,
            txid=segment,
            epoch=EPOCH,
            segment=segment + 1,
            offset=0,
            sequence=segment + 1,
            next_mba=maps.next_mba,
            live_blocks=maps.live_blocks,
        )
        put_checkpoint(batch, position)
        put_open_state(batch, replace(read_open_state(store), epoch=EPOCH))
    store.write(batch)
    for page_map in (maps.logical, maps.middle):
        page_map.thaw()
        page_map.evict(CHUNK_BLOCKS)  # makes them all old
        page_map.evict(CHUNK_BLOCKS)


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)
