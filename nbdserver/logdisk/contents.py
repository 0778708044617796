"""What a family's volumes and snapshots hold, in a few bytes each, read offline: whether two directories hold the same.

Theory. The log behind the checkpoint is replayed into maps in memory, as recovery does, and then every export is read
MiB by MiB as its clients would see it. Its digest is the BLAKE2b (256 bits) of its size and, for each MiB that is not
all zeros, of the MiB's number and digest: numbers are 8 bytes, little-endian, and a last part is filled up with zeros.
So it tells nothing of where blocks lie, how they were written, or whether zeros are holes, and whoever reads the same
by any way comes to the same digest. What several exports share is read once.

Rules
- Nothing is changed, and no block counts whose checksum is wrong: then its export has no digest.
- Everything here waits for the disk.

Known weakness: each export costs a look into the maps for each MiB that any export has; a hundred snapshots of a
terabyte take long, though their data is read once.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from metadata.epochs import read_epochs
from metadata.family_state import Family, read_checkpoint, read_family
from metadata.layers import Row
from metadata.logical_map import ADDRESS_SHIFT, PAGE_OF_LAYER
from metadata.pages import PAGE_BLOCKS, PAGE_SHIFT, Page
from metadata.replica_state import read_splices
from metadata.resync_table import ResyncTable
from metadata.seams import Files, Store
from nbdserver.logdisk.cold_read import place_of
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.opening import load_maps
from nbdserver.logdisk.recovery import RecoveryError, Replay
from nbdserver.logdisk.segments import SegmentPool
from protocol.disk import BLOCK_BYTES, HEAD, SNAPSHOT, wrong_blocks
from protocol.invariant import InvariantError

_DIGEST_BYTES = 32
_CACHE_BYTES = 64 << 20
_PART_BYTES = PAGE_BLOCKS * BLOCK_BYTES
_ZEROS = bytes(_PART_BYTES)
_PARTS_A_PROGRESS = 64


@dataclass(frozen=True)
class Content:
    """One export: `digest` in hexadecimal digits, "" with the reason in `problem` if some of it cannot be read."""

    name: str
    size_bytes: int
    digest: str
    problem: str


@dataclass(frozen=True)
class Contents:
    """A family's exports, and of which moment that is."""

    epoch: int
    txid: int
    """With the epoch the end of the log: replicas that end at the same one hold the same."""
    regions_to_fetch: int
    """A replica that has some has older things there, whatever its log says."""
    exports: list[Content]


def read_contents(
    files: Files,
    store: Store,
    names: Mapping[int, str],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Contents:
    """Read all of a family, whose volumes have these names by their numbers. Raises RecoveryError, OSError or
    DamagedValueError if its maps or its log cannot be read.

    `progress` is called with (what is being done, MiB done, MiB in all).
    """
    family = read_family(store)
    pool = SegmentPool(files, family.segment_bytes, lambda *_: None)
    try:
        pool.open_all()
        return _Reading(files, store, pool, family).read(names, progress)
    except (InvariantError, LookupError) as error:
        raise RecoveryError(f"the maps do not hold together: {error}") from error
    finally:
        pool.close()


class _Export:
    """One layer with a name, on its way to a digest."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.problem = ""
        self.digest = blake2b(row.size_bytes.to_bytes(8, "little"), digest_size=_DIGEST_BYTES)

    def content(self, volume: str) -> Content:
        """What came out of it."""
        row = self.row
        name = f"{volume}@{row.name}" if row.kind == SNAPSHOT else volume
        return Content(name, row.size_bytes, "" if self.problem else self.digest.hexdigest(), self.problem)


class _Reading(Replay):
    """Recovery's own replay, which writes nothing and goes on to read what the maps show."""

    def __init__(self, files: Files, store: Store, pool: SegmentPool, family: Family) -> None:
        start = read_checkpoint(store)
        maps = Maps(store, _CACHE_BYTES, lambda _: None)
        load_maps(maps, store, family, start)
        history = read_epochs(store, start.epoch, start.txid)
        super().__init__(files, store, pool, maps, family.family, history, read_splices(store), lambda _: None)
        self._start = start

    def read(self, names: Mapping[int, str], progress: Callable[[str, int, int], None]) -> Contents:
        """Replay, then read every export."""
        txid = self.run(self._start).position.txid
        to_fetch = ResyncTable()
        to_fetch.load(self._store.range(*to_fetch.key_range()))
        rows = (layer.row for layer in self._maps.tree.layers.values())
        exports = [_Export(row) for row in rows if row.kind in (HEAD, SNAPSHOT)]
        exports.sort(key=lambda export: (export.row.volume, export.row.kind == SNAPSHOT, export.row.layer))
        parts = self._parts(max((export.row.size_bytes for export in exports), default=0))
        total, done, number = parts.count(1), 0, parts.find(1)
        while number >= 0:
            if not done % _PARTS_A_PROGRESS:
                progress("contents", done, total)
            self._add_part(exports, number)
            done, number = done + 1, parts.find(1, number + 1)
        named = [export.content(names.get(export.row.volume, str(export.row.volume))) for export in exports]
        return Contents(*self._history.position(txid), len(to_fetch), named)

    def _parts(self, size_bytes: int) -> bytearray:
        """By number: 1 for each part of which any layer has something."""
        parts = bytearray(-(-size_bytes // _PART_BYTES))
        logical = self._maps.logical
        stored = (logical.page_of_key(key) for key, _ in self._store.range(b"L", b"M"))
        for numbers in (stored, logical.dirty_pages(), self._maps.stale):
            for number in numbers:
                part = number & PAGE_OF_LAYER
                if part < len(parts):
                    parts[part] = 1
        return parts

    def _add_part(self, exports: list[_Export], number: int) -> None:
        """The same part of all exports; what shows the same blocks is read once."""
        read: dict[bytes, bytes | OSError] = {}
        for export in exports:
            blocks = min(PAGE_BLOCKS, export.row.size_bytes // BLOCK_BYTES - (number << PAGE_SHIFT))
            if blocks <= 0 or export.problem:
                continue
            mbas = self._logical((export.row.layer << ADDRESS_SHIFT) + (number << PAGE_SHIFT))[:blocks]
            shown = mbas.tobytes()
            if shown not in read:
                try:
                    read[shown] = _digest(self._data(mbas))
                except OSError as error:
                    read[shown] = error
            found = read[shown]
            if isinstance(found, OSError):
                export.problem = f"it cannot be read in MiB {number}: {found.strerror}"
            elif found:
                export.digest.update(number.to_bytes(8, "little") + found)

    def _data(self, mbas: Page) -> bytearray:
        """What these blocks hold, 0 being zeros. OSError if any is damaged."""
        data = bytearray(len(mbas) * BLOCK_BYTES)
        places = sorted((*place_of(mba, self._middle(mba))[1:], index) for index, mba in enumerate(mbas) if mba)
        first = 0
        while first < len(places):
            segment, offset, _, _ = places[first]
            stop = first + 1
            while stop < len(places) and places[stop][:2] == (segment, offset + (stop - first) * BLOCK_BYTES):
                stop += 1
            run = places[first:stop]
            found = self._read(segment, offset, len(run))
            if wrong_blocks(found, array("I", [checksum for _, _, checksum, _ in run])):
                raise OSError(errno.EIO, f"a block in segment {segment} from byte {offset} on has a wrong checksum")
            for at, (_, _, _, index) in enumerate(run):
                data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] = found[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]
            first = stop
        return data

    def _read(self, segment: int, offset: int, blocks: int) -> bytes:
        handles = self._pool.handles
        if not 0 < segment < len(handles) or handles[segment] < 0:
            raise OSError(errno.EIO, f"a block lies in segment {segment}, which is not there")
        return self._files.read(handles[segment], blocks * BLOCK_BYTES, offset)


def _digest(data: bytearray) -> bytes:
    """Of one part; b"" if it is all zeros."""
    whole = data.ljust(_PART_BYTES, b"\0")
    return b"" if whole == _ZEROS else blake2b(whole, digest_size=_DIGEST_BYTES).digest()
