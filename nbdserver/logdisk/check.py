"""The offline check of one family: everything that can be known without opening it for writing.

Theory. A checkpoint is the state at one instant, so all of it can be held against itself and against the segment files,
which it never outruns: the maps name each other's entries one to one, the segment usage table counts what the middle
map points to, each segment's chain of records reaches its `end`, and each live block is where a record of that chain
put it, with the checksum that both give. What was logged behind the checkpoint is walked as recovery would walk it.

The logical maps of the layers are check_layers.py's.

Rules
- Nothing is changed: files are read, the store is read, no page or row is written back.
- Every value is looked at by itself; one that is damaged is a finding, and the comparisons that need it are left out,
  because what it should have held is not known.
- Blocks under a pending hole still have entries in both maps and are counted: a hole takes them out of both at once.
- At most MOST_FINDINGS findings are kept; the rest is counted.

Known weakness: memory grows by some 200 bytes for each 256 mapped blocks, and the middle map is read once more for
every GATHERED_BLOCKS live blocks. Dead blocks are not read: nothing will ever ask for them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise

from metadata.epochs import EpochHistory
from metadata.family_state import Checkpoint, read_checkpoint, read_family, read_open_state, read_pending_holes
from metadata.layers import CUT_KEYS, ROW_KEYS, STATE_KEY
from metadata.logical_map import LBA_OF_ADDRESS
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page, PageMap
from metadata.replica_state import REPLICA_KEY, read_splices
from metadata.seams import Files, Store
from nbdserver.logdisk.check_layers import LayerCheck
from nbdserver.logdisk.maps import CHECKSUM, OFFSET, Maps
from nbdserver.logdisk.read_ahead import ReadAhead, read_record
from nbdserver.logdisk.records import Record, parse_segment_header
from nbdserver.logdisk.recovery import RecoveryError, Replay
from nbdserver.logdisk.segments import DIRECTORY, SegmentPool, segment_path
from protocol.checksum import crc32c
from protocol.disk import (
    BLOCK_BYTES,
    SEAL,
    SEGMENT_HEADER_BYTES,
    DamagedValueError,
    chain_key,
    unpack_value,
)
from protocol.invariant import InvariantError

MOST_FINDINGS = 1000
GATHERED_BLOCKS = 4 << 20  # addresses held at a time: some 500 MiB
_READ_BLOCKS = 256  # of neighbouring live blocks in one read
_PAGES_A_PROGRESS = 64

Items = Iterator[tuple[bytes, bytes]]
Progress = Callable[[str, int, int], None]
"""Called with (what is being looked at, units done, units in all)."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: `kind` for programs, the sentence for people."""

    kind: str  # registry, store, value, family, layers, segment-table, logical-map, middle-map, chain, data, log
    sentence: str
    where: str


@dataclass
class CheckResult:
    """What a check found and what it looked at."""

    findings: list[Finding] = field(default_factory=list)
    findings_left_off: int = 0
    live_blocks: int = 0
    blocks_verified: int = 0  # whose data was read and had the right checksum
    records_verified: int = 0
    records_to_replay: int = 0
    blocks_to_replay: int = 0
    pending_holes: int = 0
    segments: int = 0
    is_complete: bool = True  # False: damage made some comparisons impossible


@dataclass
class _Chain:
    """How the chain of one segment begins and ends."""

    previous_crc: int  # in the segment's header
    crc: int
    last: Record | None


def check_family(files: Files, store: Store, quick: bool, progress: Progress = lambda *_: None) -> CheckResult:
    """Check one family; `quick` leaves out reading the data. Never raises for damage: that is what it reports."""
    return _FamilyCheck(files, store, quick, progress).run()


class _FamilyCheck:
    def __init__(self, files: Files, store: Store, quick: bool, progress: Progress) -> None:
        self.result = CheckResult()
        self._files = files
        self._store = store
        self._quick = quick
        self._progress = progress
        self._maps = Maps(store, 0, lambda _: None)
        self._table = self._maps.segments
        self._segment_bytes = 0
        self._family = b""
        self._masks: dict[int, int] = {}  # middle page → bit set of the entries that no LBA claimed yet
        self._checkpoint: Checkpoint
        self._is_clean = False

    def run(self) -> CheckResult:
        self._check_small_values()
        if self._read_state():
            self._check_middle()
            self._check_logical()
            chains = self._check_segments()
            self._check_links(chains)
            self._check_tail()
        return self.result

    def _find(self, kind: str, where: str, sentence: str) -> None:
        if len(self.result.findings) < MOST_FINDINGS:
            self.result.findings.append(Finding(kind, sentence, where))
        else:
            self.result.findings_left_off += 1

    # -- values

    def _items(self, start: bytes, stop: bytes, quiet: bool = False) -> Items:
        """The undamaged items of a range; the others become findings."""
        try:
            for key, value in self._store.range(start, stop):
                try:
                    unpack_value(key, value)
                except DamagedValueError as error:
                    self._incomplete("value", f"key {key.hex()}", str(error), quiet)
                    continue
                yield key, value
        except OSError as error:
            self._incomplete("store", f"keys {start.hex()} to {stop.hex()}", f"LevelDB: {error}", quiet)

    def _incomplete(self, kind: str, where: str, sentence: str, quiet: bool = False) -> None:
        self.result.is_complete = False
        if not quiet:
            self._find(kind, where, sentence)

    def _check_small_values(self) -> None:
        for start, stop in ((b"\x01", b"L"), (b"N", b"\xff" * 9)):
            for key, _ in self._items(start, stop):
                if key[:1] not in b"FOCHRSTYGEPJB" or len(key) not in (1, 5, 9):
                    self._find("value", f"key {key.hex()}", f"key {key.hex()} is none that this version writes")

    def _read_state(self) -> bool:
        store = self._store
        try:
            family = read_family(store)
            self._is_clean = read_open_state(store).clean
            self._checkpoint = read_checkpoint(store)
            tree = self._maps.tree
            tree.load_items(
                store.get(STATE_KEY),
                self._items(*ROW_KEYS, quiet=True),
                self._items(*CUT_KEYS, quiet=True),
                family.size_bytes,
            )
            self._maps.take_holes(read_pending_holes(store))
            self._table.load(self._items(*self._table.key_range(), quiet=True))
            self._maps.regions.load(self._items(*self._maps.regions.key_range(), quiet=True))
        except (DamagedValueError, OSError, ValueError, KeyError, InvariantError) as error:
            self._incomplete(
                "family", "fixed keys", f"the family's state cannot be read, so its maps mean nothing: {error}"
            )
            return False
        self._family = family.family
        self._segment_bytes = family.segment_bytes
        self.result.pending_holes = len(self._maps.holes)
        self.result.segments = len(self._table.in_use)
        for hole in self._maps.holes:
            if (
                hole.first_lba & LBA_OF_ADDRESS
            ) + hole.count > LBA_OF_ADDRESS or hole.hole >= self._checkpoint.next_hole:
                self._find(
                    "family", f"hole {hole.hole}", f"pending hole {hole.hole} does not lie in the volume's history"
                )
        return True

    def _pages(self, page_map: PageMap, quiet: bool = False) -> Iterator[tuple[int, Page]]:
        """Every page of a map, in order. The map is empty before and keeps a few pages."""
        start = page_map.prefix[:1]
        kind_at = page_map.kind_at
        entry_key_bytes = {0: kind_at + 1, 1: kind_at + 2, 2: kind_at + 1}

        def ours() -> Items:
            for key, value in self._items(start, bytes((start[0] + 1,)), quiet):
                kind = key[kind_at] if len(key) > kind_at else -1
                if key.startswith(page_map.prefix) and entry_key_bytes.get(kind) == len(key):
                    yield key, value
                elif not quiet:
                    self._find("value", f"key {key.hex()}", f"key {key.hex()} is none that this version writes")

        for number, items in groupby(ours(), lambda item: page_map.page_of_key(item[0])):
            try:
                yield number, page_map.install(number, list(items))
            except (ValueError, InvariantError) as error:
                self._incomplete(
                    "value", f"page {number}", f"a value of map page {number} has no page in it: {error}", quiet
                )

    # -- maps

    def _check_middle(self) -> None:
        table, next_mba = self._table, self._checkpoint.next_mba
        counts: dict[int, int] = {}
        for looked, (number, page) in enumerate(self._pages(Maps(self._store, 0, lambda _: None).middle)):
            mask = 0
            for index in range(PAGE_BLOCKS):
                segment = page[index]
                if not segment:
                    continue
                mask |= 1 << index
                counts[segment] = counts.get(segment, 0) + 1
                offset = page[OFFSET + index]
                where = f"MBA {number << PAGE_SHIFT | index:#x}"
                if segment not in table.in_use:
                    self._find("middle-map", where, f"{where} lies in segment {segment}, which is not in use")
                elif not SEGMENT_HEADER_BYTES < offset <= table.end[segment] - BLOCK_BYTES:
                    self._find(
                        "middle-map",
                        where,
                        f"{where} lies at byte {offset} of segment {segment}, outside what was written",
                    )
            if mask:
                self._masks[number] = mask
                if number << PAGE_SHIFT | mask.bit_length() - 1 >= next_mba:
                    self._find(
                        "middle-map", f"page {number}", f"an MBA of page {number} was never given out by the checkpoint"
                    )
            if not looked % _PAGES_A_PROGRESS:
                self._progress("middle map", sum(counts.values()), self._checkpoint.live_blocks)
        self.result.live_blocks = sum(counts.values())
        if self.result.is_complete:
            self._compare_counts(counts)

    def _compare_counts(self, counts: dict[int, int]) -> None:
        table = self._table
        for segment in sorted(table.in_use):
            if table.live[segment] != counts.get(segment, 0):
                self._find(
                    "segment-table", f"segment {segment}",
                    f"the usage table counts {table.live[segment]} live blocks in segment {segment}, "
                    f"the middle map {counts.get(segment, 0)}",
                )  # fmt: skip
        if self.result.live_blocks != self._checkpoint.live_blocks:
            self._find(
                "middle-map", "checkpoint",
                f"the checkpoint counts {self._checkpoint.live_blocks} live blocks, "
                f"the middle map {self.result.live_blocks}",
            )  # fmt: skip

    def _check_logical(self) -> None:
        pages = self._pages(Maps(self._store, 0, lambda _: None).logical)
        claimed = 0
        check = LayerCheck(self._maps, self._masks, self._find, self._why_not, partial(self._items, quiet=True))
        check.check_tree(self._checkpoint.next_mba)
        for looked, (number, page) in enumerate(pages):
            claimed += check.check_page(number, page, self.result.is_complete)
            if not looked % _PAGES_A_PROGRESS:
                self._progress("logical map", claimed, self.result.live_blocks)
        left = sum(mask.bit_count() for mask in self._masks.values())
        if left and self.result.is_complete:
            number = min(number for number, mask in self._masks.items() if mask)
            first = number << PAGE_SHIFT | (self._masks[number] & -self._masks[number]).bit_length() - 1
            self._find(
                "middle-map",
                f"MBA {first:#x}",
                f"no LBA points to {left} blocks that take room, from MBA {first:#x} on",
            )
        self._masks = {}

    def _why_not(self, mba: int) -> str:
        middle = Maps(self._store, 0, lambda _: None).middle
        number = mba >> PAGE_SHIFT
        page = middle.install(number, list(self._items(*middle.key_range(number), quiet=True)))
        return "as another LBA does" if page[mba & PAGE_MASK] else "which lies nowhere"

    # -- segments

    def _groups(self) -> Iterator[list[int]]:
        """Segments in use, as many at a time as have GATHERED_BLOCKS live blocks."""
        group: list[int] = []
        blocks = 0
        for segment in sorted(self._table.in_use):
            if group and blocks + self._table.live[segment] > GATHERED_BLOCKS:
                yield group
                group, blocks = [], 0
            group.append(segment)
            blocks += self._table.live[segment]
        if group:
            yield group

    def _gather(self, group: list[int]) -> dict[int, list[tuple[int, int, int]]]:
        """(offset, MBA, checksum) of the live blocks in each segment of the group."""
        found: dict[int, list[tuple[int, int, int]]] = {segment: [] for segment in group}
        for number, page in self._pages(Maps(self._store, 0, lambda _: None).middle, quiet=True):
            base = number << PAGE_SHIFT
            for index in range(PAGE_BLOCKS):
                blocks = found.get(page[index])
                if blocks is not None:
                    blocks.append((page[OFFSET + index], base | index, page[CHECKSUM + index]))
        return found

    def _check_segments(self) -> dict[int, _Chain]:
        """Returns the chains of the segments whose chain is whole."""
        chains: dict[int, _Chain] = {}
        looked = 0
        for group in self._groups():
            found = self._gather(group)
            for segment in group:
                blocks = sorted(found.pop(segment))
                try:
                    handle = self._files.open(segment_path(segment))
                except OSError as error:
                    self._find(
                        "chain", f"segment {segment}", f"the file of segment {segment} cannot be opened: {error}"
                    )
                    continue
                try:
                    chain = self._check_segment(segment, handle, blocks)
                    if chain is not None:
                        chains[segment] = chain
                    if not self._quick:
                        self._check_data(segment, handle, blocks)
                finally:
                    self._files.close(handle)
                looked += 1
                self._progress("segments", looked, self.result.segments)
        return chains

    def _check_segment(self, segment: int, handle: int, blocks: list[tuple[int, int, int]]) -> _Chain | None:
        for (offset, mba, _), (following, other, _) in pairwise(blocks):
            if following < offset + BLOCK_BYTES:
                self._find(
                    "middle-map", f"segment {segment} byte {following}",
                    f"MBA {mba:#x} and MBA {other:#x} lie in the same place of segment {segment}",
                )  # fmt: skip
        wanted = {offset: (mba, checksum) for offset, mba, checksum in blocks}
        try:
            chain = self._walk(segment, handle, wanted)
        except OSError as error:
            self._find("chain", f"segment {segment}", f"segment {segment} cannot be read: {error}")
            return None
        if chain is not None:
            for offset, (mba, _) in wanted.items():
                self._find(
                    "middle-map", f"segment {segment} byte {offset}",
                    f"MBA {mba:#x} lies at byte {offset} of segment {segment}, where no record put a block",
                )  # fmt: skip
        return chain

    def _walk(self, segment: int, handle: int, wanted: dict[int, tuple[int, int]]) -> _Chain | None:
        """Follow the chain up to `end`, taking what it names out of `wanted`; None if it breaks."""
        table = self._table
        where = f"segment {segment}"
        start = parse_segment_header(self._files.read(handle, SEGMENT_HEADER_BYTES, 0))
        sequence, salt, end = table.sequence[segment], table.salt[segment], table.end[segment]
        life = (self._family, segment, sequence, salt)
        if start is None or (start.family, start.segment, start.sequence, start.salt) != life:
            # A header that nothing follows yet may be lost with the power: recovery goes on without it.
            if end > SEGMENT_HEADER_BYTES:
                self._find("chain", where, f"the header of segment {segment} is not that of its present life")
            return None
        key, offset, crc = chain_key(sequence, salt), SEGMENT_HEADER_BYTES, start.previous_crc
        last: Record | None = None
        ahead = ReadAhead(self._files, handle)
        while offset < end:
            record = read_record(ahead, key, offset)
            if record is None or record.previous_crc != crc or (last is not None and record.lsn != last.lsn + 1):
                follows = f"and {end - offset} bytes should follow"
                sentence = f"segment {segment} has no valid record at byte {offset}, {follows}"
                self._find("chain", f"{where} byte {offset}", sentence)
                return None
            self._match(segment, record, wanted)
            self.result.records_verified += 1
            offset, crc, last = record.end, record.crc, record
        if offset != end or (last is not None and (last.lsn, last.txid) != (table.lsn[segment], table.txid[segment])):
            self._find(
                "segment-table",
                where,
                f"the records of segment {segment} end at byte {offset}, the usage table says {end}",
            )
            return None
        return _Chain(start.previous_crc, crc, last)

    def _match(self, segment: int, record: Record, wanted: dict[int, tuple[int, int]]) -> None:
        offset = record.data_offset
        for mba, checksum in zip(record.mbas, record.checksums, strict=True):
            found = wanted.pop(offset, None)
            if found is not None and found != (mba, checksum):
                self._find(
                    "middle-map", f"segment {segment} byte {offset}",
                    f"the middle map has MBA {found[0]:#x} with checksum {found[1]:08x} at byte {offset} of segment "
                    f"{segment}; the record there has MBA {mba:#x} with {checksum:08x}",
                )  # fmt: skip
            offset += BLOCK_BYTES

    def _check_data(self, segment: int, handle: int, blocks: list[tuple[int, int, int]]) -> None:
        for first, count in _runs(blocks):
            begin = blocks[first][0]
            try:
                data = self._files.read(handle, count * BLOCK_BYTES, begin)
            except OSError:
                data = b""
            for index, (offset, mba, checksum) in enumerate(blocks[first : first + count]):
                block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                if not block and count > 1:
                    block = self._read_block(handle, offset)
                if len(block) == BLOCK_BYTES and crc32c(block) == checksum:
                    self.result.blocks_verified += 1
                    continue
                what = "has the wrong checksum" if len(block) == BLOCK_BYTES else "cannot be read"
                self._find(
                    "data", f"segment {segment} byte {offset}",
                    f"the block of MBA {mba:#x} at byte {offset} of segment {segment} {what}",
                )  # fmt: skip

    def _read_block(self, handle: int, offset: int) -> bytes:
        try:
            return self._files.read(handle, BLOCK_BYTES, offset)
        except OSError:
            return b""

    def _check_links(self, chains: dict[int, _Chain]) -> None:
        """The chain goes on from segment to segment, and the checkpoint stands at its end."""
        table = self._table
        by_sequence = {table.sequence[segment]: segment for segment in table.in_use}
        for segment, chain in chains.items():
            follower = by_sequence.get(table.sequence[segment] + 1, 0)
            if follower not in chains:
                continue
            seal = chain.last if chain.last is not None and chain.last.kind == SEAL else None
            is_named = seal is None or (seal.successor, seal.successor_salt) == (follower, table.salt[follower])
            if chains[follower].previous_crc != chain.crc or not is_named:
                sentence = f"segment {follower} does not go on where segment {segment} ends"
                self._find("chain", f"segment {follower}", sentence)
        position = self._checkpoint
        opened = chains.get(position.segment)
        end = (table.end[position.segment], opened.crc) if opened is not None else None
        if position.offset and end is not None and end != (position.offset, position.previous_crc):
            sentence = f"the checkpoint does not stand at the end of segment {position.segment}"
            self._find("log", f"segment {position.segment}", sentence)

    # -- behind the checkpoint

    def _check_tail(self) -> None:
        pool = SegmentPool(self._files, self._segment_bytes, lambda *_: None)
        try:
            for name in self._files.list(DIRECTORY):
                stem, _, suffix = name.partition(".")
                if suffix == "seg" and stem.isdigit():
                    pool.open_if_present(int(stem))
            self._walk_tail(pool)
        except (RecoveryError, OSError, InvariantError) as error:
            self._find("log", "behind the checkpoint", str(error))
        finally:
            pool.close()

    def _walk_tail(self, pool: SegmentPool) -> None:
        position = self._checkpoint
        if position.offset and (position.segment >= len(pool.handles) or pool.handles[position.segment] < 0):
            return  # its file is missing, and reported
        try:
            splices = read_splices(self._store)
        except DamagedValueError:
            return  # reported: where the log goes on is not known
        walk = _TailWalk(
            self._files, self._store, pool, self._maps, self._family, EpochHistory(), splices, lambda _: None
        )
        recovered = walk.run(position)
        self.result.records_to_replay, self.result.blocks_to_replay = recovered.records, recovered.blocks
        if self._is_clean and recovered.records and self._store.get(REPLICA_KEY) is None:
            self._find(
                "log", "behind the checkpoint", f"the log was closed cleanly, yet {recovered.records} records follow"
            )


class _TailWalk(Replay):
    """Recovery's own walk along the chain, which does nothing again: it needs no page and no history for that."""

    def _bring(self, group: list[Record]) -> None:
        pass

    def _apply(self, record: Record, segment: int) -> None:
        pass


def _runs(blocks: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """(first, count) of the blocks that lie one after the other, at most _READ_BLOCKS in a run."""
    first = 0
    while first < len(blocks):
        count = 1
        while (
            count < _READ_BLOCKS
            and first + count < len(blocks)
            and blocks[first + count][0] == blocks[first][0] + count * BLOCK_BYTES
        ):
            count += 1
        yield first, count
        first += count
