"""Recovery: from the last checkpoint along the chain to the end of the log.

Theory. LevelDB holds the maps as of one lsn and the place in the log behind it. Replay takes each record that is the
next link of the chain (its CRC covers salt, sequence number and the previous header's CRC) and whose data has the
CRCs that the header names, and does again what it did. The chain may end only where a crash could have torn it: in
what was never known durable. If any valid header of this log behind the break knows a later lsn durable, the break is
damage, not an end, and recovery refuses to go on.

Records are applied in groups. The map pages that a group needs are read before it, in the order of their keys: at
random each costs LevelDB a search of its own, and there are as many as blocks. Two kinds need not be read. A block
that was written under an MBA that the middle map has already was an overwrite: the logical map says where it said it
before. And of pages of MBAs that the checkpoint had not given out LevelDB has nothing.

Rules
- Data is verified too (Rule.REPLAY_VERIFIES_DATA): a header can reach the disk without its data.
- A move takes effect only if the MBA still has the old PBA (Rule.MOVE_ONLY_IF_UNCHANGED).
- The tail that was replayed is written again in place and synced before anything is served from it
  (Rule.TAIL_SYNCED_BEFORE_SERVING): after a failed fsync the page cache may hold as clean what the disk never got.
- Appending goes on in another segment, and a checkpoint at the recovered lsn is synced first, so what lies behind the
  last good record can never be reached again. On a full disk, where a segment for each crash would use up the reserve,
  it goes on behind the last good record: what lies there was no link of the chain, and its epoch is an older one.
- A replica may not make that checkpoint before every replica has the tail. It notes in LevelDB where the log goes on
  (a *splice*, metadata/replica_state.py). That is also how a log is cut: replay stops behind the last modification
  that is to stay, and what followed it cannot be reached any more (Rule.CUT_IS_DURABLE_FIRST).
- Everything here waits for the disk: it runs before the family serves anyone, in any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from metadata.epochs import EpochHistory
from metadata.family_state import Checkpoint
from metadata.layers import unpack_rows
from metadata.logical_map import ADDRESS_SHIFT
from metadata.pages import PAGE_MASK, PAGE_SHIFT, Page
from metadata.replica_state import Splice
from metadata.seams import Files, Store
from nbdserver.logdisk.committed import WITHOUT_LIMIT
from nbdserver.logdisk.log import Log
from nbdserver.logdisk.lookup import Lookup
from nbdserver.logdisk.maps import OFFSET, SMALL_HOLE_BLOCKS, Maps
from nbdserver.logdisk.ordering import Rule, crash_point, holds
from nbdserver.logdisk.read_ahead import ReadAhead, read_record
from nbdserver.logdisk.records import Record, SegmentStart, body_length, extents_of, parse_segment_header
from nbdserver.logdisk.region_copies import show, unpack_views
from nbdserver.logdisk.segments import CLIENTS_KEEP, DELETIONS_KEEP, SegmentPool
from nbdserver.logdisk.tree_changes import apply_rows
from protocol.disk import (
    BLOCK_BYTES,
    EXTENT_HOLE,
    MOVE,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    REGION,
    REGION_HEAD,
    SEAL,
    SEGMENT_HEADER_BYTES,
    TREE,
    WRITE,
    chain_key,
    wrong_blocks,
)
from protocol.peer import Position

_COPY_BYTES = 1 << 20
_GROUP_BLOCKS = 1 << 14  # at most; a quarter of what the cache holds
_DURABLE_LSN = 10  # place of the field in a record header


class RecoveryError(Exception):
    """The log is damaged where it was known durable: serving it would lose acknowledged data silently."""


def highest_sequence(files: Files, handles: Sequence[int], family: bytes) -> int:
    """Of any life whose header is in a segment file, 0 if there is none; the handles are by number, -1 for none."""
    return max((start.sequence for start in _lives(files, handles, family)), default=0)


def _lives(files: Files, handles: Sequence[int], family: bytes) -> Iterator[SegmentStart]:
    """The headers in the segment files, present lives or former ones."""
    for number, handle in enumerate(handles):
        start = parse_segment_header(files.read(handle, SEGMENT_HEADER_BYTES, 0)) if handle >= 0 else None
        if start is not None and (start.family, start.segment) == (family, number):
            yield start


@dataclass
class Recovered:
    """What replay found."""

    position: Checkpoint  # of the next record
    records: int
    blocks: int
    tail: list[tuple[int, int, int]]  # (segment, start, end) of what was replayed
    is_cut: bool  # more follows, and does not count


class Replay:
    """Replays one family's log into `maps`. `progress(bytes done)` is called now and then."""

    def __init__(
        self,
        files: Files,
        store: Store,
        pool: SegmentPool,
        maps: Maps,
        family: bytes,
        history: EpochHistory,
        splices: Mapping[int, Splice],
        progress: Callable[[int], None],
    ) -> None:
        self._files = files
        self._store = store
        self._pool = pool
        self._maps = maps
        self._family = family
        self._history = history
        self._splices = splices
        self._progress = progress
        self._last_txid = WITHOUT_LIMIT  # of what is replayed
        self._is_cut = False
        self._first_new_mba = 0
        self._group_blocks = min(_GROUP_BLOCKS, maps.logical.limit_pages // 4, maps.middle.limit_pages // 4)

    def run(self, start: Checkpoint, cut_at: Position | None = None) -> Recovered:
        """Replay from `start`, not beyond `cut_at`; raises RecoveryError, DamagedValueError or OSError."""
        maps = self._maps
        if cut_at is not None:
            self._last_txid = cut_at.txid
            if cut_at.txid < start.txid:
                raise RecoveryError(f"the log cannot be cut at {cut_at}: its checkpoint is at txid {start.txid}")
        self._first_new_mba = start.next_mba
        segment, offset, sequence, salt = start.segment, start.offset, start.sequence, start.salt
        previous_crc, lsn, txid = start.previous_crc, start.lsn, start.txid
        tail: list[tuple[int, int, int]] = []
        records = blocks = 0
        spliced = -1
        while True:
            splice = self._splices.get(lsn) if lsn != spliced else None
            if splice is not None:
                spliced = lsn
                segment, offset, sequence, salt = splice.segment, 0, splice.sequence, splice.salt
            if not self._begin(segment, offset, sequence, salt, previous_crc, lsn, txid):
                self._refuse_if_durable(lsn, sequence, segment, 0)
                break
            offset = offset or SEGMENT_HEADER_BYTES
            first = offset
            record: Record | None = None
            for group in self._groups(self._chain(segment, offset, chain_key(sequence, salt), previous_crc, lsn)):
                self._bring(group)
                for each in group:
                    self._apply(each, segment)
                    if each.kind in (WRITE, TREE):
                        txid = each.txid
                    maps.segments.appended(segment, each.end, each.txid, each.lsn)
                    blocks += each.blocks
                record = group[-1]
                offset, previous_crc, lsn = record.end, record.crc, record.lsn
                records += len(group)
                self._progress(offset - first)
            tail.append((segment, 0 if first == SEGMENT_HEADER_BYTES else first, offset))
            if lsn in self._splices and lsn != spliced:
                continue
            if record is None or record.kind != SEAL:
                if not self._is_cut:
                    self._refuse_if_durable(lsn, sequence, segment, offset)
                break
            segment, offset, sequence, salt = record.successor, 0, sequence + 1, record.successor_salt
        position = Checkpoint(
            lsn, txid, start.epoch, segment, offset, previous_crc, sequence, salt, maps.next_mba, maps.next_hole,
            maps.live_blocks,
        )  # fmt: skip
        if cut_at is not None and self._history.position(min(txid, cut_at.txid)).epoch != cut_at.epoch:
            raise RecoveryError(f"the log cannot be cut at {cut_at}: it has {self._history.position(cut_at.txid)}")
        return Recovered(position, records, blocks, tail, self._is_cut)

    def rewrite_tail(self, tail: list[tuple[int, int, int]]) -> list[int]:
        """Write what was replayed again, byte for byte in place; returns the handles to sync, oldest first."""
        crash_point("replay-before-tail")
        handles: list[int] = []
        for segment, start, end in tail:
            handle = self._pool.handles[segment]
            for offset in range(start, end, _COPY_BYTES):
                data = self._files.read(handle, min(_COPY_BYTES, end - offset), offset)
                self._files.append(handle, (data,), offset)
            handles.append(handle)
        return handles

    def begin_fresh_segment(self, log: Log, splice: bool) -> bool:
        """Let the log go on in another segment than the one that it ended in, if that was ever written. With `splice`
        by all means, and as nothing that was left behind can be: it may hold valid records. Whether it does."""
        if not log.lsn and not splice and not self._pool.open_if_present(log.segment):
            return False  # a family's first segment, not begun yet
        segment = self._pool.take(CLIENTS_KEEP)
        if not segment and (splice or not log.offset):
            segment = self._pool.take(DELETIONS_KEEP)
        if segment:
            highest = highest_sequence(self._files, self._pool.handles, self._family) if splice else 0
            log.go_on_in(segment, max(log.sequence, highest) + 1)
        elif self._is_cut or not log.begin_if_needed():
            raise RecoveryError("there is no room for the log to go on: free some space on the file system")
        return bool(segment)

    # -- the chain

    def _begin(
        self, segment: int, offset: int, sequence: int, salt: bytes, previous_crc: int, lsn: int, txid: int
    ) -> bool:
        """Stand at the start of a segment's life, if it began; `offset` > 0: inside one that the checkpoint knows."""
        if offset:
            return True
        if not self._pool.open_if_present(segment):
            return False
        data = self._files.read(self._pool.handles[segment], SEGMENT_HEADER_BYTES, 0)
        start = parse_segment_header(data)
        if (
            start is None
            or (start.family, start.segment, start.sequence, start.salt) != (self._family, segment, sequence, salt)
            or start.previous_crc != previous_crc
        ):
            return False
        if segment in self._maps.segments.in_use:
            raise RecoveryError(f"the metadata is damaged: the log goes on in segment {segment}, which is in use")
        self._pool.keep(segment)
        self._maps.segments.begin(segment, sequence, salt)
        self._maps.segments.appended(segment, SEGMENT_HEADER_BYTES, txid, lsn)
        return True

    def _chain(self, segment: int, offset: int, key: bytes, previous_crc: int, lsn: int) -> Iterator[Record]:
        """The records from `offset` on that are next links with good data."""
        ahead = ReadAhead(self._files, self._pool.handles[segment])
        while True:
            record = read_record(ahead, key, offset)
            if record is None or record.previous_crc != previous_crc or record.lsn != lsn + 1:
                return
            if record.txid > self._last_txid:
                self._is_cut = True
                return
            if record.blocks and holds(Rule.REPLAY_VERIFIES_DATA):
                data = ahead.read(record.data_offset, record.blocks * BLOCK_BYTES)
                if wrong_blocks(data, record.checksums):
                    return
            yield record
            if record.kind == SEAL or record.lsn in self._splices:
                return
            offset, previous_crc, lsn = record.end, record.crc, record.lsn

    def _groups(self, records: Iterator[Record]) -> Iterator[list[Record]]:
        """The records, some at a time: what they need fits into the cache, and a change of the tree is alone."""
        group: list[Record] = []
        blocks = 0
        for record in records:
            touched = _touched_blocks(record)
            alone = record.kind in (TREE, REGION)
            if group and (blocks + touched > self._group_blocks or alone):
                yield group
                group, blocks = [], 0
            group.append(record)
            blocks += touched
            if alone:
                yield group
                group, blocks = [], 0
        if group:
            yield group

    def _refuse_if_durable(self, lsn: int, sequence: int, segment: int, offset: int) -> None:
        """Raise RecoveryError if a header behind the break says that more than `lsn` was durable."""
        if not holds(Rule.LOG_ENDS_ONLY_ABOVE_DURABLE):
            return
        handles = self._pool.handles
        for start in _lives(self._files, handles, self._family):
            if start.sequence < sequence:
                continue
            begin = offset if start.segment == segment else SEGMENT_HEADER_BYTES
            durable = self._durable_in(handles[start.segment], chain_key(start.sequence, start.salt), begin)
            if durable > lsn:
                raise RecoveryError(
                    f"the log is damaged: record {lsn + 1} cannot be read (expected in segment {segment} at byte "
                    f"{offset}), but segment {start.segment} knows records up to {durable} durable"
                )

    def _durable_in(self, handle: int, key: bytes, offset: int) -> int:
        """The highest `durable_lsn` of any header of this life of a segment from `offset` on, wherever it stands."""
        magic = RECORD_MAGIC.to_bytes(4, "little")
        data = self._files.read(handle, self._pool.segment_bytes - offset, offset)
        durable = 0
        found = data.find(magic)
        while found >= 0:
            header = data[found : found + RECORD_HEADER_BYTES]
            if body_length(key, header) is not None:
                durable = max(durable, RECORD_HEADER.unpack(header)[_DURABLE_LSN])
            found = data.find(magic, found + 1)
        return durable

    # -- the pages that are needed

    def _bring(self, group: list[Record]) -> None:
        """Have the map pages in memory that the records need, as far as that can be told before they are applied."""
        maps = self._maps
        self._bring_middle({mba >> PAGE_SHIFT for record in group for mba in record.mbas})
        writes = [record for record in group if record.kind == WRITE and record.layer in maps.tree.layers]
        logical = {number for record in writes for number in self._logical_pages(record)}
        self._bring_logical(number for number in logical if maps.page(number) is None and number not in maps.stale)
        self._bring_middle({number for record in writes for number in self._middle_pages_under_holes(record)})

    def _logical_pages(self, record: Record) -> Iterator[int]:
        first_address = record.layer << ADDRESS_SHIFT
        block = 0
        for lba, count, kind in extents_of(record):
            address = first_address + lba
            if kind != EXTENT_HOLE:
                block += count
                if all(map(self._has, record.mbas[block - count : block])):
                    continue
            elif count > SMALL_HOLE_BLOCKS:
                continue
            yield from range(address >> PAGE_SHIFT, ((address + count - 1) >> PAGE_SHIFT) + 1)

    def _middle_pages_under_holes(self, record: Record) -> Iterator[int]:
        first_mba = self._maps.tree.first_mba(record.layer)
        for lba, count, kind in extents_of(record):
            if kind == EXTENT_HOLE and count <= SMALL_HOLE_BLOCKS:
                address = (record.layer << ADDRESS_SHIFT) + lba
                for page_map, number in self._maps.needed(address, count, count, first_mba):
                    if page_map is self._maps.middle:
                        yield number

    def _bring_logical(self, numbers: Iterable[int]) -> None:
        lookups = [Lookup(self._maps, number) for number in sorted(numbers)]
        reading = lookups
        while reading:
            ranges = [lookup.ranges() for lookup in reading]
            items = iter(self._store.ranges([each for of_lookup in ranges for each in of_lookup]))
            reading = [
                lookup
                for lookup, asked in zip(reading, ranges, strict=True)
                if lookup.take([next(items) for _ in asked])
            ]
        for lookup in lookups:
            self._maps.admit(lookup)

    def _has(self, mba: int) -> bool:
        """Whether the middle map knows where the block is; its page is in memory."""
        page = self._maps.middle.get(mba >> PAGE_SHIFT)
        return page is not None and page[mba & PAGE_MASK] != 0

    def _bring_middle(self, numbers: Iterable[int]) -> None:
        middle = self._maps.middle
        stored: list[int] = []
        for number in sorted(number for number in numbers if middle.get(number) is None):
            if number << PAGE_SHIFT < self._first_new_mba:
                stored.append(number)
            else:
                middle.create(number)
        if stored:
            found = self._store.ranges([middle.key_range(number) for number in stored])
            for number, items in zip(stored, found, strict=True):
                middle.install(number, items)

    # -- doing it again

    def _apply(self, record: Record, segment: int) -> None:
        if record.kind in (WRITE, TREE):
            self._history.note(record.epoch, record.txid)
        if record.kind == WRITE:
            self._apply_write(record, segment)
        elif record.kind == MOVE:
            self._apply_move(record, segment)
        elif record.kind == REGION:
            self._apply_region(record, segment)
        elif record.kind == TREE:
            apply_rows(self._maps, unpack_rows(record.rows))

    def _apply_region(self, record: Record, segment: int) -> None:
        maps = self._maps
        first_lba, count, _, region_txid = REGION_HEAD.unpack_from(record.rows)
        for block, mba in enumerate(record.mbas):
            self._middle(mba)
            maps.set_middle(mba, segment, record.data_offset + block * BLOCK_BYTES, record.checksums[block])
            maps.next_mba = max(maps.next_mba, mba + 1)
        try:
            views = unpack_views(record.rows[REGION_HEAD.size :], count)
        except ValueError as error:
            raise RecoveryError(f"the log is damaged: record {record.lsn} does not hold together ({error})") from error
        show(maps, first_lba, views, self._logical, self._middle)
        maps.regions.raise_to(first_lba, region_txid)

    def _apply_write(self, record: Record, segment: int) -> None:
        maps = self._maps
        if record.layer not in maps.tree.layers:
            raise RecoveryError(f"the log is damaged: record {record.lsn} is of layer {record.layer}, which is none")
        first_address = record.layer << ADDRESS_SHIFT
        first_mba = maps.tree.first_mba(record.layer)
        block = 0
        for lba, count, kind in extents_of(record):
            maps.regions.mark(lba, count, record.txid)
            if kind == EXTENT_HOLE:
                self._apply_hole(first_address + lba, count)
                continue
            for current in range(first_address + lba, first_address + lba + count):
                mba = record.mbas[block]
                # A block that has a place is an overwrite: the logical map knows its MBA.
                if not self._middle(mba)[mba & PAGE_MASK]:
                    old = self._logical(current)[current & PAGE_MASK]
                    if old != mba:
                        maps.set_logical(current, 1, mba)
                        if old >= first_mba:  # of a replica: replica_append.py
                            self._middle(old)
                            maps.free(old)
                    self._middle(mba)
                maps.set_middle(mba, segment, record.data_offset + block * BLOCK_BYTES, record.checksums[block])
                maps.next_mba = max(maps.next_mba, mba + 1)
                block += 1

    def _apply_move(self, record: Record, segment: int) -> None:
        for block, mba in enumerate(record.mbas):
            index = mba & PAGE_MASK
            page = self._middle(mba)
            old = (record.old[2 * block], record.old[2 * block + 1])
            if (page[index], page[OFFSET + index]) == old or not holds(Rule.MOVE_ONLY_IF_UNCHANGED):
                self._maps.set_middle(mba, segment, record.data_offset + block * BLOCK_BYTES, record.checksums[block])

    def _apply_hole(self, address: int, count: int) -> None:
        maps = self._maps
        if count > SMALL_HOLE_BLOCKS:
            maps.add_hole(address, count)
            return
        first_mba = maps.tree.first_mba(address >> ADDRESS_SHIFT)
        for current in range(address, address + count):
            page = self._logical(current)
            mba = page[current & PAGE_MASK]
            if mba:
                if mba >= first_mba:
                    self._middle(mba)
                maps.clear(current, 1)

    def _logical(self, address: int) -> Page:
        number = address >> PAGE_SHIFT
        maps = self._maps
        while True:
            page = maps.page(number)
            if page is not None:
                return page
            if number not in maps.stale:
                self._bring_logical((number,))
            while number in maps.stale:
                self._bring_middle(needed for _, needed in maps.settle(number))

    def _middle(self, mba: int) -> Page:
        number = mba >> PAGE_SHIFT
        page = self._maps.middle.get(number)
        if page is None:
            self._bring_middle((number,))
            page = self._maps.middle.get(number)
        assert page is not None
        return page


def _touched_blocks(record: Record) -> int:
    """How many map pages of a kind applying it may need, at most."""
    if record.kind != WRITE:
        return record.blocks
    return sum(count for _, count, kind in extents_of(record) if kind != EXTENT_HOLE or count <= SMALL_HOLE_BLOCKS)
