"""The offline check of one family: everything that can be known without opening it for writing.

Theory. A checkpoint is the state at one instant, so all of it can be held against itself and against the segment files,
which it never outruns: the maps name each other's entries one to one, the segment usage table counts what the middle
map points to, each segment's chain of records reaches its `end`, and each live block is where a record of that chain
put it, with the checksum that both give. What was logged behind the checkpoint is walked as recovery would walk it.

The logical maps of the layers are check_layers.py's, the segment files check_segments.py's.

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
from itertools import groupby

from metadata.epochs import EpochHistory
from metadata.family_state import Checkpoint, read_checkpoint, read_family, read_open_state, read_pending_holes
from metadata.layers import CUT_KEYS, ROW_KEYS, STATE_KEY
from metadata.logical_map import LBA_OF_ADDRESS
from metadata.pages import PAGE_BLOCKS, PAGE_MASK, PAGE_SHIFT, Page, PageMap
from metadata.replica_state import REPLICA_KEY, read_splices
from metadata.seams import Files, Store
from nbdserver.logdisk.check_layers import LayerCheck
from nbdserver.logdisk.check_segments import Placed, SegmentCheck
from nbdserver.logdisk.contents import Contents
from nbdserver.logdisk.maps import CHECKSUM, OFFSET, Maps
from nbdserver.logdisk.records import Record
from nbdserver.logdisk.recovery import RecoveryError, Replay
from nbdserver.logdisk.segments import SegmentPool
from protocol.disk import (
    BLOCK_BYTES,
    SEGMENT_HEADER_BYTES,
    DamagedValueError,
    unpack_value,
)
from protocol.invariant import InvariantError

MOST_FINDINGS = 1000
GATHERED_BLOCKS = 4 << 20  # addresses held at a time: some 500 MiB
_PAGES_A_PROGRESS = 64

Items = Iterator[tuple[bytes, bytes]]
Progress = Callable[[str, int, int], None]
"""Called with (what is being looked at, units done, units in all)."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: `kind` for programs, the sentence for people."""

    kind: str
    """registry, store, value, family, layers, segment-table, logical-map, middle-map, chain, data, log or contents"""
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
    contents: Contents | None = None  # if they were asked for and can be read


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
            self._check_segments()
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
                if key[:1] not in b"FOCHRSTYGEPJBI" or len(key) not in (1, 5, 9):
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

    def _gather(self, group: list[int]) -> dict[int, list[Placed]]:
        """(offset, MBA, checksum) of the live blocks in each segment of the group."""
        found: dict[int, list[Placed]] = {segment: [] for segment in group}
        for number, page in self._pages(Maps(self._store, 0, lambda _: None).middle, quiet=True):
            base = number << PAGE_SHIFT
            for index in range(PAGE_BLOCKS):
                blocks = found.get(page[index])
                if blocks is not None:
                    blocks.append((page[OFFSET + index], base | index, page[CHECKSUM + index]))
        return found

    def _check_segments(self) -> None:
        check = SegmentCheck(self._files, self._table, self._family, self._quick, self.result, self._find)
        looked = 0
        for group in self._groups():
            found = self._gather(group)
            for segment in group:
                if check.check(segment, sorted(found.pop(segment))):
                    looked += 1
                    self._progress("segments", looked, self.result.segments)
        check.check_links(self._checkpoint)

    # -- behind the checkpoint

    def _check_tail(self) -> None:
        pool = SegmentPool(self._files, self._segment_bytes, lambda *_: None)
        try:
            pool.open_all()
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
